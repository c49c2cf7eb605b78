"""What was meant, sent and answered, in one SQLite file that outlives every process.

A batch is written down before it is sent, and its id before anything is awaited; so whatever happens, the next start
knows what it may send, what it must fetch, and what it has to ask the user about.
"""

import json
import secrets
import shlex
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trigger_opt.paths import user_data_dir
from trigger_opt.transfer.client import TransferError
from trigger_opt.transfer.plan import Question
from trigger_opt.transfer.requests import Answer, Line, Request
from trigger_opt.transfer.results import ResultsWriter
from trigger_opt.transfer.schema import HELD
from trigger_opt.transfer.shifts import load_activations

_DAY = 24 * 3600.0
# Under SQLite's limit on variables of one statement, in every version.
_AT_ONCE = 500
_LABEL = "trigger_opt-"
# Of each question, in exports.
EXPORTED = (
    "key", "custom_id", "server", "model", "endpoint", "kind", "string", "inserted", "context", "repeat", "messages",
    "answer", "activations", "input_tokens", "output_tokens", "answered", "batch", "batch_id", "error",
)  # fmt: skip


def default_path() -> Path:
    """The user's own ledger."""
    return user_data_dir() / "transfer.sqlite"


class ForeignResultsError(TransferError):
    """Results that answer none of a batch's questions: its id belongs to another."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A row of the ledger; states are explained in `schema`. `lines` is how many it holds."""

    id: int
    label: str
    server: str
    model: str
    endpoint: str
    state: str
    file_id: str | None
    remote_id: str | None
    detail: str
    created: float
    submitted: float | None
    ended: float | None
    lines: int


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What reading a batch's results came to: counts of lines, and identifiers nobody had asked for."""

    answered: int
    failed: int
    missing: int
    repeated: int
    unknown: list[str]


class Ledger:
    """An open ledger. Written by one process at a time; see `open_ledger`.

    Attributes:
        path: of the SQLite file. files: folder beside it, for input files, downloads and activations.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self.files = path.with_name(f"{path.name}.files")
        self._db = connection

    def command(self, verb: str) -> str:
        """The command line that does `verb` on this ledger."""
        where = (
            "" if self.path == default_path().expanduser().absolute() else f" --ledger {shlex.quote(str(self.path))}"
        )
        return f"trigger-opt transfer {verb}{where}"

    # --- plans

    def add_plan(
        self,
        questions: Sequence[Question],
        *,
        server: str,
        run_dir: str,
        settings: Mapping[str, Any],
        estimate: Callable[[Request], int],
    ) -> int:
        """Write a plan down; its number. `settings` must hold no key. `estimate`: tokens of question and answer."""
        with self._transaction() as db:
            row = (time.time(), server, run_dir, json.dumps(settings))
            plan = db.execute("INSERT INTO plans (created, server, run_dir, settings) VALUES (?,?,?,?)", row).lastrowid
            assert plan is not None
            requests = (_request_row(q.line.request, estimate(q.line.request)) for q in questions)
            db.executemany("INSERT OR IGNORE INTO requests VALUES (?,?,?,?,?,?,?,?,?)", requests)
            rows = (_planned_row(plan, n, q) for n, q in enumerate(questions))
            db.executemany("INSERT INTO planned VALUES (?,?,?,?,?,?,?,?,?)", rows)
        return plan

    def last_plan(self) -> tuple[int, str, str, dict[str, Any]] | None:
        """(number, server, run folder, settings) of the latest plan; None when there is none."""
        row = self._db.execute("SELECT id, server, run_dir, settings FROM plans ORDER BY id DESC LIMIT 1").fetchone()
        return None if row is None else (row[0], row[1], row[2], json.loads(row[3]))

    def questions(self, plan: int) -> list[Question]:
        """Those of a plan, in its order."""
        rows = self._db.execute(
            "SELECT custom_id, kind, string, inserted, context, prompt, server, model, endpoint, messages, options, "
            "module_names, repeat FROM planned JOIN requests USING (key) WHERE plan = ? ORDER BY position",
            (plan,),
        )
        return [
            Question(
                line=Line(custom_id=r[0], request=_request(r[6:])),
                kind=r[1], string=r[2], inserted=r[3], context=r[4], prompt=r[5],
            )
            for r in rows
        ]  # fmt: skip

    def unsent(self, plan: int) -> list[Line]:
        """Lines of a plan that are neither answered nor held by a batch, in its order; each may be sent.

        A line the server failed is held by its batch until `release_failed`.
        """
        held = ",".join(f"'{s}'" for s in HELD)
        rows = self._db.execute(
            "SELECT custom_id, server, model, endpoint, messages, options, module_names, repeat "
            "FROM planned JOIN requests USING (key) WHERE plan = ? "
            "AND NOT EXISTS (SELECT 1 FROM answers WHERE answers.key = planned.key) "
            "AND NOT EXISTS (SELECT 1 FROM lines JOIN batches ON batches.id = lines.batch "
            f"WHERE lines.key = planned.key AND (batches.state IN ({held}) "
            "OR (batches.state IN ('stored', 'ended') AND lines.state IN ('failed', 'missing')))) "
            "ORDER BY position",
            (plan,),
        )
        return [Line(custom_id=r[0], request=_request(r[1:])) for r in rows]

    def answered(self, keys: Iterable[str]) -> set[str]:
        """Which of these requests have an answer."""
        return {key for part in _parts(keys) for (key,) in self._select("SELECT key FROM answers WHERE key IN", part)}

    def answers(self, keys: Iterable[str], *, activations: bool = True) -> dict[str, Answer]:
        """Answers by key, and for a line that failed, its error; `activations` False leaves the arrays out."""
        found: dict[str, Answer] = {}
        for part in _parts(keys):
            for key, custom_id, detail in self._select(
                "SELECT key, custom_id, detail FROM lines WHERE state IN ('failed', 'missing') AND key IN", part
            ):
                found[key] = Answer(custom_id=custom_id, error=detail)
            for key, text, file, tokens_in, tokens_out in self._select(
                "SELECT key, text, activations, input_tokens, output_tokens FROM answers WHERE key IN", part
            ):
                arrays = load_activations(self.files / file) if file and activations else {}
                found[key] = Answer(
                    custom_id=key, text=text, activations=arrays, input_tokens=tokens_in, output_tokens=tokens_out
                )
        return found

    # --- batches

    def begin(self, lines: Sequence[Line], *, state: str = "uploading") -> Batch:
        """A new batch of lines that ask one model at one endpoint."""
        first = lines[0].request
        label = f"{_LABEL}{secrets.token_hex(4)}"
        with self._transaction() as db:
            row = (label, first.server, first.model, first.endpoint, state, time.time())
            number = db.execute(
                "INSERT INTO batches (label, server, model, endpoint, state, created) VALUES (?,?,?,?,?,?)", row
            ).lastrowid
            rows = ((number, line.request.key, line.custom_id) for line in lines)
            db.executemany("INSERT INTO lines (batch, key, custom_id, state) VALUES (?,?,?,'open')", rows)
        return self.batch(label)

    def sweep(self) -> None:
        """Remove input files and downloads that a process left when it was killed."""
        for file in self.files.glob(f"{_LABEL}*"):
            file.unlink()

    def batch(self, label: str) -> Batch:
        """By its label.

        Raises:
            TransferError: there is none.
        """
        for batch in self.batches("label = ?", label):
            return batch
        raise TransferError(f"no batch is called {label!r}; `trigger-opt transfer status` lists them")

    def batches(self, where: str = "1", *values: object) -> list[Batch]:
        """In the order they were begun."""
        rows = self._db.execute(
            "SELECT id, label, server, model, endpoint, state, file_id, remote_id, detail, created, submitted, ended, "
            f"(SELECT count(*) FROM lines WHERE batch = batches.id) FROM batches WHERE {where} ORDER BY id",
            values,
        )
        names = list(Batch.__dataclass_fields__)
        return [Batch(**dict(zip(names, row, strict=True))) for row in rows]

    def unsettled(self, server: str) -> bool:
        """Whether a batch of this server is under way, or was left half done."""
        return any(b.state in HELD for b in self.batches("server = ?", server))

    def lines(self, batch: Batch) -> list[Line]:
        """Lines of a batch that are open."""
        rows = self._db.execute(
            "SELECT custom_id, server, model, endpoint, messages, options, module_names, repeat "
            "FROM lines JOIN requests USING (key) WHERE batch = ? AND state = 'open' ORDER BY lines.rowid",
            (batch.id,),
        )
        return [Line(custom_id=r[0], request=_request(r[1:])) for r in rows]

    def submitting(self, batch: Batch, file_id: str) -> None:
        """From now on it may have been submitted."""
        self._update(batch, state="submitting", file_id=file_id)

    def not_submitted(self, batch: Batch) -> None:
        """The server did not take it this time."""
        self._update(batch, state="uploading")

    def submitted(self, batch: Batch, remote_id: str) -> None:
        """The server took it.

        Raises:
            TransferError: it could not be written down; says how to do so later.
        """
        try:
            self._update(batch, state="submitted", remote_id=remote_id, submitted=time.time(), detail="")
        except TransferError as error:
            raise TransferError(
                f"the server took batch {batch.label} as {remote_id}, which could not be written down ({error}); then "
                f"`{self.command('attach')} {batch.label} {remote_id}`"
            ) from None

    def lost(self, batch: Batch, why: str) -> None:
        """Nobody knows whether the server took it."""
        self._update(batch, state="lost", detail=why)

    def drop(self, batch: Batch, why: str) -> None:
        """It was certainly not submitted: its open lines are free."""
        self._update(batch, state="dropped", detail=why, ended=time.time())

    def release(self, batch: Batch) -> None:
        """The user lets its unanswered lines be asked again."""
        self._update(batch, state="released", ended=time.time())

    def end(self, batch: Batch, why: str) -> None:
        """The server gave it up; its open lines failed."""
        with self._transaction() as db:
            db.execute(
                "UPDATE lines SET state = 'failed', detail = ? WHERE batch = ? AND state = 'open'", (why, batch.id)
            )
            db.execute(
                "UPDATE batches SET state = 'ended', detail = ?, ended = ? WHERE id = ?", (why, time.time(), batch.id)
            )

    def release_failed(self, plan: int) -> int:
        """Free the lines of a plan that the server failed or left out; how many."""
        with self._transaction() as db:
            return db.execute(
                "UPDATE lines SET state = 'released' WHERE state IN ('failed', 'missing') "
                "AND key IN (SELECT key FROM planned WHERE plan = ?) AND key NOT IN (SELECT key FROM answers)",
                (plan,),
            ).rowcount

    def store(self, batch: Batch, answers: Iterable[Answer], *, count_tokens: Callable[[str], int]) -> Stored:
        """All results of a batch at once or none of them; lines without any are missing.

        Args:
            count_tokens: of a text, for servers that do not count.

        Raises:
            DamagedResultsError: from `answers`; ForeignResultsError. Nothing is written.
        """
        with self._transaction() as db:
            rows = db.execute("SELECT custom_id, key, state FROM lines WHERE batch = ?", (batch.id,))
            lines = {custom_id: (key, state) for custom_id, key, state in rows}
            writer = ResultsWriter(db, batch.id, lines, files=self.files, count_tokens=count_tokens)
            for answer in answers:
                writer.add(answer)
            if writer.unknown and not (writer.answered or writer.failed or writer.repeated):
                raise ForeignResultsError(
                    f"its results as {batch.remote_id} answer none of its questions, the first is for "
                    f"{writer.unknown[0]!r}; is that its id?"
                )
            missing = db.execute(
                "UPDATE lines SET state = 'missing', detail = 'the server left it out' "
                "WHERE batch = ? AND state = 'open'",
                (batch.id,),
            ).rowcount
            db.execute("UPDATE batches SET state = 'stored', ended = ? WHERE id = ?", (time.time(), batch.id))
        return Stored(
            answered=writer.answered, failed=writer.failed, missing=missing, repeated=writer.repeated,
            unknown=writer.unknown,
        )  # fmt: skip

    def store_one(self, batch: Batch, answer: Answer, *, count_tokens: Callable[[str], int]) -> None:
        """One answer of a batch whose others are still to come."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT custom_id, key, state FROM lines WHERE batch = ? AND custom_id = ?",
                (batch.id, answer.custom_id),
            )
            lines = {custom_id: (key, state) for custom_id, key, state in rows}
            ResultsWriter(db, batch.id, lines, files=self.files, count_tokens=count_tokens).add(answer)

    def close_batch(self, batch: Batch) -> None:
        """All lines of a batch that was answered line by line are in."""
        self._update(batch, state="stored", ended=time.time())

    # --- figures

    def spent(self, *, server: str, last_day: bool = False) -> int:
        """Tokens of questions and answers so far; for what is under way or lost, the estimate.

        A day is the last 24 hours, and whatever a clock set back puts into the future.
        """
        since = time.time() - _DAY if last_day else 0.0
        done = self._db.execute(
            "SELECT coalesce(sum(input_tokens + output_tokens), 0) FROM answers JOIN requests USING (key) "
            "WHERE server = ? AND answered >= ?",
            (server, since),
        ).fetchone()[0]
        # Also of what was asked again: it may have been answered, and paid for, the first time.
        held = ",".join(f"'{s}'" for s in (*HELD, "released"))
        expected = self._db.execute(
            "SELECT coalesce(sum(estimate), 0) FROM lines JOIN requests USING (key) JOIN batches "
            f"ON batches.id = lines.batch WHERE batches.server = ? AND batches.state IN ({held}) "
            "AND lines.state = 'open' AND batches.created >= ?",
            (server, since),
        ).fetchone()[0]
        return int(done + expected)

    def counts(self) -> list[tuple[str, str, str, int]]:
        """(server, model, state of the line, how many) over the whole ledger; unsent ones are no lines yet."""
        rows = self._db.execute(
            "SELECT batches.server, batches.model, "
            "CASE lines.state WHEN 'open' THEN batches.state ELSE lines.state END, count(*) "
            "FROM lines JOIN batches ON batches.id = lines.batch GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
        )
        return [tuple(row) for row in rows]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every planned request with its answer or what became of it, one dict each, for exports."""
        cursor = self._db.execute(
            "SELECT requests.key, planned.custom_id, requests.server, requests.model, requests.endpoint, planned.kind, "
            "planned.string, planned.inserted, planned.context, requests.repeat, requests.messages, answers.text, "
            "answers.activations, answers.input_tokens, answers.output_tokens, answers.answered, batches.label, "
            "batches.remote_id, (SELECT detail FROM lines WHERE lines.key = requests.key "
            "AND lines.state IN ('failed', 'missing') LIMIT 1) "
            "FROM planned JOIN requests USING (key) LEFT JOIN answers USING (key) "
            "LEFT JOIN batches ON batches.id = answers.batch "
            "WHERE planned.plan = (SELECT max(plan) FROM planned AS other WHERE other.key = planned.key) "
            "ORDER BY planned.plan, planned.position"
        )
        for row in cursor:
            record = dict(zip(EXPORTED, row, strict=True))
            record["messages"] = json.loads(record["messages"])
            yield record

    # --- below

    def _update(self, batch: Batch, **columns: object) -> None:
        names = ", ".join(f"{name} = ?" for name in columns)
        with self._transaction() as db:
            db.execute(f"UPDATE batches SET {names} WHERE id = ?", (*columns.values(), batch.id))

    def _select(self, query: str, part: Sequence[str]) -> sqlite3.Cursor:
        return self._db.execute(f"{query} ({','.join('?' * len(part))})", part)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.rollback()
                raise
            self._db.commit()
        except sqlite3.OperationalError as error:
            if self._db.in_transaction:
                self._db.rollback()
            raise TransferError(disk_problem(self.path, error)) from None


def _request_row(request: Request, estimate: int) -> tuple[Any, ...]:
    return (
        request.key, request.server, request.model, request.endpoint, json.dumps(request.messages),
        json.dumps(request.options), json.dumps(request.module_names), request.repeat, estimate,
    )  # fmt: skip


def _planned_row(plan: int, position: int, q: Question) -> tuple[Any, ...]:
    return (
        plan, position, q.line.request.key, q.line.custom_id, q.kind, q.string, q.inserted, q.context, q.prompt,
    )  # fmt: skip


def _request(row: Sequence[Any]) -> Request:
    server, model, endpoint, messages, options, module_names, repeat = row
    return Request(
        server=server, model=model, endpoint=endpoint, messages=tuple(json.loads(messages)),
        options=json.loads(options), module_names=tuple(json.loads(module_names)), repeat=repeat,
    )  # fmt: skip


def _parts(keys: Iterable[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for key in keys:
        part.append(key)
        if len(part) == _AT_ONCE:
            yield part
            part = []
    if part:
        yield part


def disk_problem(path: Path, error: sqlite3.OperationalError) -> str:
    """What SQLite could not do, in one line with the remedy."""
    if "full" in str(error):
        return f"no space left on the disk of the ledger {path}; free some and start again: nothing is lost"
    if "no such table" in str(error):
        return f"{path} is no ledger of trigger_opt; give another transfer.ledger"
    return f"the ledger {path} cannot be written ({error}); mend that and start again: nothing is lost"
