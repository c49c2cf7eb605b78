"""The SQLite file under a ledger: made whole or not at all, written by several processes, each call by itself.

No write-ahead log: its shared memory does not work on the file systems of clusters. No connection outlives a call, so
that a file moved away meanwhile swallows nothing.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path

from trigger_opt.candidates.schema import APPLICATION_ID, STATEMENTS, VERSION
from trigger_opt.errors import UserError

# How long a call waits while other processes write.
_BUSY_SECONDS = 60.0


def select(path: Path, query: str, *values: str) -> list[tuple[str, ...]]:
    """Rows of a query; none where there is no ledger yet, or one that a process has only begun to make.

    Raises:
        UserError: another program's file, or another version's; or it cannot be read.
    """
    with _one_line(path):
        if not path.is_file():
            return []
        with closing(_connected(path, "rw")) as db:
            # All at once: a cursor left open would keep every writer waiting.
            return db.execute(query, values).fetchall() if _has_tables(path, db) else []


@contextmanager
def transaction(path: Path) -> Iterator[sqlite3.Connection]:
    """All that is executed within, or nothing; on the disk when it ends. Makes the ledger where there is none.

    Raises:
        UserError: as `select`, or it cannot be written.
    """
    with _one_line(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(_connected(path, "rwc")) as db:
            # At once, and not at the first change: two who had both read could not both go on to write.
            db.execute("BEGIN IMMEDIATE")
            try:
                if not _has_tables(path, db):
                    for statement in STATEMENTS:
                        db.execute(statement)
                yield db
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")


def program_version() -> str:
    """Of trigger_opt; "not installed" where a checkout runs without being installed."""
    # Not trigger_opt.__version__: to import the package itself counts as importing all of it, torch too.
    try:
        return metadata.version("trigger-opt")
    except metadata.PackageNotFoundError:
        return "not installed"


def _connected(path: Path, mode: str) -> sqlite3.Connection:
    db = sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, isolation_level=None, timeout=_BUSY_SECONDS)
    db.execute("PRAGMA journal_mode = DELETE")
    db.execute("PRAGMA synchronous = FULL")
    return db


def _has_tables(path: Path, db: sqlite3.Connection) -> bool:
    """False for an empty file."""
    (application,), (version,) = (db.execute(f"PRAGMA {p}").fetchone() for p in ("application_id", "user_version"))
    if not (application or version or db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()):
        return False
    if application != APPLICATION_ID:
        raise UserError(f"{path} is no ledger of candidates; give another ledger")
    if version != VERSION:
        raise UserError(
            f"the ledger {path} is of version {version}, trigger_opt {program_version()} reads version {VERSION}; "
            "use the trigger_opt that wrote it, or give another ledger"
        )
    return True


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """What SQLite or the disk could not do, in one line with the remedy."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise UserError(_problem(path, str(error))) from None
    except sqlite3.DatabaseError as error:
        # Its subclasses are mistakes of this program.
        if type(error) is not sqlite3.DatabaseError:
            raise
        raise UserError(f"{path} is no ledger of candidates ({error}); give another ledger") from None
    except OSError as error:
        raise UserError(_problem(path, error.strerror or str(error))) from None


def _problem(path: Path, what: str) -> str:
    if "locked" in what:
        return f"the ledger {path} was held by other processes for {_BUSY_SECONDS:g} s; wait or give another ledger"
    if "full" in what:
        return f"no space left on the disk of the ledger {path}; free some: what it holds is kept"
    return f"the ledger {path} cannot be used ({what}); mend that or give another ledger"
