"""What the clients have in common: addresses, keys, and what a status means for the caller. No HTTP library."""

import asyncio
import json
import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from trigger_opt.errors import UserError
from trigger_opt.transfer.client import (
    BudgetError,
    RefusedError,
    RetryLaterError,
    TransferError,
    UnclearError,
    UnknownBatchError,
)

_LINE = 300
_NOT_TAKEN = (408, 425, 429, 503)
_NO_BUDGET = (402, 428)
_UNKNOWN = (404, 410)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A server's refusal: HTTP status, its words in one line, seconds of its Retry-After, its own code.

    Attributes:
        deliberate: it carries Retry-After or a JSON body, so it is the server's own no, not a proxy's word for a
            connection that broke.
    """

    status: int
    words: str
    retry_after: float | None = None
    code: str = ""
    deliberate: bool = False

    @property
    def out_of_budget(self) -> bool:
        """Whether it says that nothing is left to spend."""
        return self.status in _NO_BUDGET or self.code == "insufficient_quota"

    def __str__(self) -> str:
        return f"{self.status}: {self.words}" if self.words else str(self.status)


def repeatable_error(failure: Failure, *, key_variable: str, about: str) -> Exception:
    """The error of a call that may be made again (upload, status, download, cancel); `about`: "batch b1"."""
    if failure.out_of_budget:
        return BudgetError(f"the server has no tokens left for this key ({failure}); resume when it grants more")
    if failure.status in (401, 403):
        return RefusedError(f"the server refuses the key ({failure}); check the environment variable {key_variable}")
    if failure.status == 404:
        return RefusedError(f"the server does not know {about} ({failure}); check transfer.base_url and the key")
    if failure.status == 413:
        return RefusedError(f"the server finds {about} too large ({failure}); choose a smaller transfer.batch_size")
    if 400 <= failure.status < 500 and failure.status not in _NOT_TAKEN:
        return RefusedError(f"the server refuses {about} ({failure}); change what is asked as it says")
    return RetryLaterError(f"the server cannot do it now ({failure})", failure.retry_after)


def batch_error(failure: Failure, *, key_variable: str, batch_id: str) -> Exception:
    """The error of a call about one batch, which may be made again (status, cancel)."""
    about = f"batch {batch_id}"
    if failure.status in _UNKNOWN and not failure.out_of_budget:
        return UnknownBatchError(f"the server knows no {about} ({failure}); check transfer.base_url and the key")
    return repeatable_error(failure, key_variable=key_variable, about=about)


def submit_error(failure: Failure, *, key_variable: str, about: str) -> Exception:
    """The error of a call that costs: only the statuses that say so are taken to mean that nothing was done."""
    # A proxy says 503 also when the server behind it broke with the request in its hands.
    refused = 400 <= failure.status < 500 or (failure.status == 503 and failure.deliberate)
    if refused or failure.out_of_budget:
        return repeatable_error(failure, key_variable=key_variable, about=about)
    return UnclearError(f"the server failed while it took {about} ({failure})")


def retry_after(value: str | None, date: str | None = None) -> float | None:
    """Seconds that a Retry-After header asks for (seconds or a date, never negative); None when it says nothing.

    Args:
        date: the answer's own Date header. A moment of the server's clock is measured against that clock: ours may be
            days away.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = _moment(value) - (_moment(date) if date else datetime.now(UTC).timestamp())
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _moment(date: str) -> float:
    try:
        then = parsedate_to_datetime(date)
    except (ValueError, TypeError):
        return math.nan
    return then.replace(tzinfo=then.tzinfo or UTC).timestamp()


def one_line(text: str, *, secret: str) -> str:
    """`text` as one line of at most 300 characters, with `secret` (a key; empty for none) blotted out."""
    line = " ".join((text.replace(secret, "***") if secret else text).split())
    return line if len(line) <= _LINE else line[: _LINE - 1] + "…"


def words_of(body: object) -> str:
    """What the body of an error says: its messages where it is JSON of a usual shape, else the body itself."""
    if isinstance(body, str):
        try:
            body = json.loads(body)
        except (ValueError, RecursionError):
            return str(body)
    if not isinstance(body, dict):
        return body if isinstance(body, str) else json.dumps(body)
    said = [words_of(body[name]) for name in ("error", "message", "details", "detail") if body.get(name)]
    return ": ".join(said) or json.dumps(body)


def is_json(text: str) -> bool:
    """Whether a body is a JSON object, as servers word their refusals."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def checked_base_url(text: str) -> str:
    """`text` without a trailing slash.

    Raises:
        UserError: it is no http(s) URL with a host, or holds more than a path: a password would be written down. One
            with "@" is not shown.
    """
    # Wherever it stands: a password with a slash in it ends up in what is read as the path.
    if "@" in text:
        raise UserError("transfer.base_url holds a user name or password; give https://HOST/PATH alone")
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or any(c.isspace() for c in text):
        raise UserError(f"transfer.base_url={text!r} is no URL; give http://HOST:PORT or https://HOST")
    if parts.query or parts.fragment:
        raise UserError("transfer.base_url holds a query or a fragment; give https://HOST/PATH alone")
    return text.rstrip("/")


def checked_key(key: str, *, variable: str) -> str:
    """`key` without spaces around it.

    Raises:
        UserError: it cannot travel in a header; the key is not shown.
    """
    key = key.strip()
    if not all("!" <= c <= "~" for c in key):
        raise UserError(f"the key holds spaces or characters outside ASCII; check the environment variable {variable}")
    return key


def missing_extra(error: ImportError, *, client: str) -> UserError:
    """What to tell the user when a package that `client` needs is not installed."""
    package = (error.name or "").partition(".")[0]
    return UserError(f"the client {client} needs the package {package}: pip install 'trigger_opt[transfer]'")


@asynccontextmanager
async def whole_file(into: Path) -> AsyncIterator[BinaryIO]:
    """A file that becomes `into` when the block ends well, and is gone when it does not.

    Raises:
        TransferError: it cannot be written. So the block must turn the network's OSErrors into others itself.
    """
    part = into.with_name(f"{into.name}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
        os.replace(part, into)
    except OSError as error:
        raise TransferError(
            f"the results cannot be written to {into} ({error.strerror}); make room there and resume"
        ) from None
    finally:
        part.unlink(missing_ok=True)
