"""Results of a batch into the ledger: duplicates, failures and strangers told apart."""

import json
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from trigger_opt.transfer.plan import MESSAGE_TOKENS
from trigger_opt.transfer.requests import Answer
from trigger_opt.transfer.shifts import save_activations

# A column's limit is 64 bits; a server's count may be anything.
_MOST_TOKENS = 2**40


class ResultsWriter:
    """Answers on their way into an open transaction.

    Args:
        lines: custom_id -> (request's key, state of the line). files: folder for activations.

    Attributes:
        answered, failed: lines. repeated: answers to a line that had one. unknown: identifiers of no line.
    """

    def __init__(
        self,
        db: sqlite3.Connection,
        batch: int,
        lines: dict[str, tuple[str, str]],
        *,
        files: Path,
        count_tokens: Callable[[str], int],
    ) -> None:
        self._db, self._batch, self._lines, self._files = db, batch, lines, files
        self._count = count_tokens
        self._seen: set[str] = set()
        self.answered = self.failed = self.repeated = 0
        self.unknown: list[str] = []

    def add(self, answer: Answer) -> None:
        """Write one down; of two answers to one line the first counts, an answer beats an error."""
        if answer.custom_id not in self._lines:
            self.unknown.append(answer.custom_id)
            return
        answer = replace(answer, text=_storable(answer.text), error=answer.error and _storable(answer.error))
        key, state = self._lines[answer.custom_id]
        if state == "answered" or (answer.error is not None and answer.custom_id in self._seen):
            self.repeated += 1
            return
        where = (self._batch, answer.custom_id)
        if answer.error is not None:
            self._db.execute(
                "UPDATE lines SET state = 'failed', detail = ? WHERE batch = ? AND custom_id = ?",
                (answer.error, *where),
            )
            self.failed += 1
        else:
            self.failed -= answer.custom_id in self._seen
            self._db.execute(
                "UPDATE lines SET state = 'answered', detail = '' WHERE batch = ? AND custom_id = ?", where
            )
            self._keep(key, answer)
            self._lines[answer.custom_id] = (key, "answered")
            self.answered += 1
        self._seen.add(answer.custom_id)

    def _keep(self, key: str, answer: Answer) -> None:
        file = None
        if answer.activations:
            file = f"activations/{key[:2]}/{key}.npz"
            path = self._files / file
            path.parent.mkdir(parents=True, exist_ok=True)
            save_activations(path, answer.activations)
        by_server = answer.input_tokens is not None and answer.output_tokens is not None
        tokens_in, tokens_out = answer.input_tokens or 0, answer.output_tokens or 0
        if not by_server:
            messages = self._db.execute("SELECT messages FROM requests WHERE key = ?", (key,)).fetchone()[0]
            tokens_in = sum(self._count(m["content"]) + MESSAGE_TOKENS for m in json.loads(messages))
            tokens_out = self._count(answer.text)
        self._db.execute(
            "INSERT OR IGNORE INTO answers VALUES (?,?,?,?,?,?,?,?)",
            (key, self._batch, answer.text, file, *_plausible(tokens_in, tokens_out), int(by_server), time.time()),
        )


def _plausible(*counts: int) -> list[int]:
    return [min(max(count, 0), _MOST_TOKENS) for count in counts]


def _storable(text: str) -> str:
    """Half of a surrogate pair, as JSON may hold it, is no text SQLite could keep."""
    return text.encode("utf-8", "replace").decode("utf-8")
