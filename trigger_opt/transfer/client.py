"""What the runner needs of a client, and the few ways in which a call can fail.

A call either returns, or raises one of the errors below; nothing of an HTTP library passes. `Unclear` is the one that
matters: after it nobody knows whether the server did what was asked, and only the user may say that it be asked again.
"""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from trigger_opt.errors import UserError
from trigger_opt.transfer.requests import Answer, Line


class TransferError(UserError):
    """Goes no further; one line with the remedy. What was submitted stays in the ledger."""


class RefusedError(TransferError):
    """The server said no, and will say so again: a bad key, a bad request, no such batch."""


class UnknownBatchError(RefusedError):
    """The server knows no such batch."""


class BudgetError(TransferError):
    """No tokens left: at the server (HTTP 428), or under the caps of the settings."""


class RetryLaterError(Exception):
    """Nothing was done; the same call may be made again.

    Attributes:
        reason: one line. retry_after: seconds the server asked for; None when it did not.
    """

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after


class UnclearError(Exception):
    """The request may have been carried out, its answer was lost or unreadable. `reason`: one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DamagedResultsError(Exception):
    """A file of results that cannot be read whole; downloading it again may help. `reason`: one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class BatchStatus:
    """Where a batch stands.

    Attributes:
        state: "running"; "completed", its results can be downloaded; "ended" without any (failed, cancelled, expired).
        detail: the server's own word for it and its errors, one line.
        results: where the results are (a URL, file ids), good for now; empty unless completed.
        done: lines finished; None where the server does not tell.
    """

    state: Literal["running", "completed", "ended"]
    detail: str
    results: tuple[str, ...] = ()
    done: int | None = None


@runtime_checkable
class BatchClient(Protocol):
    """A server that takes a file of requests and is asked later. All calls but `submit` may be repeated freely.

    Attributes:
        server: what names it in a request's identity (kind and base URL, no key).
        keeps_labels: whether `find` can tell what became of a submission whose answer was lost.
    """

    server: str
    keeps_labels: bool

    def encode(self, line: Line) -> str:
        """The line as the server's input file holds it, JSON without a newline."""
        ...

    async def upload(self, file: Path) -> str:
        """The server's id of an uploaded input file; raises RetryLaterError, UnclearError, RefusedError."""
        ...

    async def submit(self, file_id: str, *, model: str, endpoint: str, label: str) -> str:
        """The server's id of the new batch; `label` is kept with it where the server can.

        Raises:
            RetryLaterError: it was certainly not accepted (connection never made, 408, 425, 429, 503 with Retry-After
                or a JSON refusal).
            UnclearError: it may have been (connection lost, 500, 502, 504, any other 503, an answer that is no JSON).
            BudgetError: 428. RefusedError: any other 4xx.
        """
        ...

    async def find(self, label: str) -> str | None:
        """Id of the batch submitted under `label`, None when none is listed (yet); only where `keeps_labels`.

        Raises:
            RetryLaterError, RefusedError: the server gave no whole list.
        """
        ...

    async def status(self, batch_id: str) -> BatchStatus:
        """Where it stands.

        Raises:
            RetryLaterError: also for a batch that completed without saying where its results are.
            UnclearError. RefusedError. UnknownBatchError: 404, 410.
        """
        ...

    async def download(self, status: BatchStatus, into: Path) -> None:
        """Write the results of a completed batch to the file `into`, whole or not at all.

        Raises:
            RetryLaterError: also for results that expired: ask for the status again first.
            DamagedResultsError: fewer bytes than announced. RefusedError.
        """
        ...

    def read(self, file: Path, *, on_damaged: Callable[[str], None] | None = None) -> Iterator[Answer]:
        """The answers in a downloaded file, one at a time, in any order, those that failed with their error.

        Args:
            on_damaged: is told of each damaged part ("the member 'x.json'", "line 3"), which is then left out; None
                to raise instead.

        Raises:
            DamagedResultsError: it cannot be read to its end, or, without `on_damaged`, a part of it is damaged.
        """
        ...

    async def cancel(self, batch_id: str) -> None:
        """Ask the server to stop; raises like `status`, so UnknownBatchError where it knows no such batch."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


@runtime_checkable
class DirectClient(Protocol):
    """A server that answers while one waits.

    Attributes:
        server: see BatchClient.
        free: whether asking again costs nothing, so that a lost answer may be asked for anew without consent.
        at_once: lines it is given in one call.
    """

    server: str
    free: bool
    at_once: int

    def answers(self, lines: Sequence[Line]) -> AsyncIterator[Answer]:
        """An answer for each line as it comes, in any order; a line that failed for itself has its `error`.

        Raises:
            BudgetError, RefusedError: nothing more will be answered. RetryLaterError: the lines not answered yet were
            certainly not taken. UnclearError: they may have been.
        """
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


Client = BatchClient | DirectClient
