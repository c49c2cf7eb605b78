"""Signals that end a run: at once, or inside a search only after its current step, which is then saved.

SIGINT is Ctrl-C; batch systems send SIGTERM, or the SIGUSR1 or SIGUSR2 they were asked to send, some time before the
end of a job.
"""

import math
import signal
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

LATER = 75
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(KeyboardInterrupt):
    """A signal ends the run.

    Attributes:
        signum: which.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """As shells count Ctrl-C; for what a batch system sends, sysexits.h's "try again later"."""
        return 130 if self.signum == signal.SIGINT else LATER


class _Asked:
    """What signals asked for: one set of handlers in a process.

    Attributes:
        waiting: the signal that ends the run at the next `check`. hurry: when it was first asked to save after every
            step, by the monotonic clock. only_hurry: signals that ask for no more, for so many seconds (`patience`).
    """

    waiting: int | None = None
    deferred: bool = False
    hurry: float | None = None
    only_hurry: Collection[int] = ()
    patience: float = math.inf


@contextmanager
def listening(*, only_hurry: Collection[int] = (), patience: float = math.inf) -> Iterator[dict[int, Any]]:
    """Handle `SIGNALS` until the context ends; yields the handlers of before, by signal.

    Args:
        only_hurry: signals on which the run goes on, and saves after every step: whoever sent it will kill it.
            One that comes again after `patience` seconds ends the run like any other.
    """
    before: dict[int, Any] = {s: signal.signal(s, _handle) for s in SIGNALS}
    _Asked.waiting, _Asked.hurry, _Asked.only_hurry, _Asked.patience = None, None, only_hurry, patience
    try:
        yield before
    finally:
        for s, handler in before.items():
            # None: it was not set from Python.
            signal.signal(s, signal.SIG_DFL if handler is None else handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Signals wait until `check`; a second Ctrl-C does not."""
    _Asked.deferred = True
    try:
        yield
    finally:
        _Asked.deferred = False
    check()


def asked() -> bool:
    """Whether a signal asks that this step be saved."""
    return _Asked.hurry is not None or _Asked.waiting is not None


def check() -> None:
    """Raise what waits.

    Raises:
        Interrupted: a signal came.
    """
    if (signum := _Asked.waiting) is not None:
        _Asked.waiting = None
        raise Interrupted(signum)


def _handle(signum: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if signum in _Asked.only_hurry and (_Asked.hurry is None or now - _Asked.hurry < _Asked.patience):
        if _Asked.hurry is None:
            _tell(f"{signal.Signals(signum).name}: goes on, and a search saves after every step from now on")
            _Asked.hurry = now
        return
    if not _Asked.deferred or (signum == signal.SIGINT and _Asked.waiting == signal.SIGINT):
        raise Interrupted(signum)
    if _Asked.waiting is None:
        again = " (again: at once)" if signum == signal.SIGINT else ""
        _tell(f"{signal.Signals(signum).name}: stops after this step{again}")
        _Asked.waiting = signum


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
