"""Opening a ledger: made when missing, checked, and written by one process at a time."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trigger_opt.errors import UserError
from trigger_opt.locks import held
from trigger_opt.transfer.ledger import Ledger, disk_problem
from trigger_opt.transfer.schema import SCHEMA, VERSION


@contextmanager
def open_ledger(path: Path) -> Iterator[Ledger]:
    """The ledger at `path`, made when there is none, held against other writers until the context ends.

    Raises:
        UserError: another process holds it; it cannot be written; it is no ledger, or one of another version.
    """
    path = path.expanduser().absolute()
    lock_file = path.with_name(f"{path.name}.lock")
    with (
        held(lock_file, what=f"the ledger {path}", remedy="give another transfer.ledger"),
        _connected(path, read_only=False) as connection,
    ):
        ledger = Ledger(path, connection)
        ledger.files.mkdir(exist_ok=True)
        yield ledger


@contextmanager
def read_ledger(path: Path) -> Iterator[Ledger]:
    """The ledger at `path`, to read while another process may write.

    Raises:
        UserError: there is none, or it is no ledger.
    """
    path = path.expanduser().absolute()
    if not path.is_file():
        raise UserError(f"there is no ledger {path}; name one with --ledger, or send something first")
    with _connected(path, read_only=True) as connection:
        yield Ledger(path, connection)


@contextmanager
def _connected(path: Path, *, read_only: bool) -> Iterator[sqlite3.Connection]:
    try:
        connection = sqlite3.connect(path, isolation_level=None, timeout=30.0)
    except sqlite3.OperationalError as error:
        raise UserError(disk_problem(path, error)) from None
    try:
        _prepare(path, connection, read_only=read_only)
        yield connection
    finally:
        connection.close()


def _prepare(path: Path, connection: sqlite3.Connection, *, read_only: bool) -> None:
    try:
        if read_only:
            connection.execute("PRAGMA query_only = ON")
        else:
            connection.execute("PRAGMA journal_mode = WAL")
            # What is written down before it is sent must survive the machine, not the process alone.
            connection.execute("PRAGMA synchronous = FULL")
            if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
                connection.executescript(f"BEGIN; {SCHEMA} INSERT INTO meta VALUES ({VERSION}); COMMIT;")
        version = connection.execute("SELECT version FROM meta").fetchone()
    except sqlite3.OperationalError as error:
        raise UserError(disk_problem(path, error)) from None
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} is no ledger of trigger_opt ({error}); give another transfer.ledger") from None
    if version is None or version[0] != VERSION:
        found = "none" if version is None else version[0]
        raise UserError(
            f"the ledger {path} is of version {found}, this program writes version {VERSION}; "
            "give another transfer.ledger or use the program that made it"
        )
