"""Calls to a server that fails: the same again after a pause, until it works or says a clear no."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from trigger_opt.transfer.client import DamagedResultsError, RetryLaterError, TransferError, UnclearError

T = TypeVar("T")


class GaveUpError(TransferError):
    """A call failed too often in a row; what it asked for was certainly not done, or may be asked again freely."""


@dataclass
class Backoff:
    """How long to wait, and how often to try.

    Attributes:
        first, longest: seconds, of the first pause and of the longest that is not the server's wish.
        max_errors: failures in a row of one call before giving up for this time.
        say: is told of each pause longer than `quiet` seconds.
    """

    first: float
    longest: float
    max_errors: int
    say: Callable[[str], None]
    quiet: float = 5.0
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    jitter: random.Random = field(default_factory=random.Random)

    def seconds(self, errors: int, retry_after: float | None) -> float:
        """Pause after so many errors in a row: doubled each time, a little random so that clients do not march in
        step, and never shorter than the server asked for."""
        pause = min(self.longest, self.first * 2.0 ** min(errors - 1, 30)) * self.jitter.uniform(0.8, 1.2)
        return pause if retry_after is None else max(pause, retry_after * self.jitter.uniform(1.0, 1.1))

    async def repeat(self, what: str, call: Callable[[], Awaitable[T]], *, unclear: bool = True) -> T:
        """The call's result, after as many tries as it takes.

        Args:
            what: for messages, say "upload of batch x". unclear: whether the call may be repeated when nobody knows
                if it was carried out.

        Raises:
            GaveUpError: `max_errors` failures in a row; the ledger knows where to go on.
            TransferError: what the call itself refused.
            UnclearError: unless `unclear`.
        """
        errors = 0
        while True:
            try:
                return await call()
            except RetryLaterError as error:
                reason, retry_after = error.reason, error.retry_after
            except UnclearError as error:
                if not unclear:
                    raise
                reason, retry_after = error.reason, None
            except DamagedResultsError as error:
                reason, retry_after = error.reason, None
            errors += 1
            if errors >= self.max_errors:
                raise GaveUpError(
                    f"{what}: {errors} failures in a row, the last: {reason}; nothing is lost, start again later"
                )
            pause = self.seconds(errors, retry_after)
            if pause >= self.quiet:
                self.say(f"{what}: {reason}; next try in {pause:.0f} s")
            await self.sleep(pause)
