"""One writer at a time: a lock file that says who holds it, and falls free when its process ends."""

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from trigger_opt.errors import UserError

_TRIES, _PAUSE = 5, 0.05


@contextmanager
def held(lock_file: Path, *, what: str, remedy: str) -> Iterator[None]:
    """Hold `lock_file`, made with its folder when missing, until the context ends.

    Args:
        what: is held, as the user knows it, say "the ledger /x". remedy: say "give another run_dir".

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file.open("a+")
    except OSError as error:
        raise UserError(f"{what} cannot be written ({error.strerror}); {remedy}") from None
    with lock:
        try:
            _take(lock)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise UserError(f"{what} is in use by {holder}; wait for it or {remedy}") from None
        except OSError as error:
            raise UserError(
                f"{what} cannot be held against other processes: its file system takes no locks ({error.strerror}); "
                f"{remedy} elsewhere"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        yield


def holder(lock_file: Path) -> str | None:
    """Who holds `lock_file`, as "process 12 on NODE"; None when nobody does, it was never made, or it cannot be asked
    (another user's, or a file system without locks)."""
    try:
        with lock_file.open("r") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read().strip() or "another process"
    except OSError:
        return None
    return None


def _take(lock: TextIO) -> None:
    # Whoever asks `holder` has it for a moment.
    for _ in range(_TRIES - 1):
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(_PAUSE)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
