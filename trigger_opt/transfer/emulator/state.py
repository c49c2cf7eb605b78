"""Everything that outlives the emulator: files, batches, answers, zips and calls in one folder.

Every file appears whole under its name or not at all, and logs grow by whole lines: whatever the moment of its death,
the next emulator on the folder goes on from here.
"""

import fcntl
import hashlib
import hmac
import json
import os
import secrets
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trigger_opt.errors import UserError
from trigger_opt.records import read_record, write_record, write_text
from trigger_opt.transfer.emulator.faults import Rule

UNFINISHED = ("validating", "in_progress")


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """An uploaded file: its `name` as uploaded, and when it was `created` (epoch seconds) and how long it lasts."""

    id: str
    name: str
    created: float
    ttl: float


@dataclass(frozen=True, kw_only=True)
class Batch:
    """An accepted batch.

    Attributes:
        name: of the input file as uploaded. model: as sent. lines: of the input file. polls: answered so far.
        valid: whether the input file was accepted; only then do its lines count. errors: as the server shows them;
            None when there are none. rules: faults that belong to this batch.
    """

    id: str
    file_id: str
    name: str
    model: str
    endpoint: str
    created: float
    lines: int
    valid: bool = True
    status: str = "validating"
    polls: int = 0
    errors: list[dict[str, Any]] | None = None
    rules: list[Rule] = field(default_factory=list)


class State:
    """A held folder.

    Attributes:
        batches: by id, oldest first. calls: answered or dropped, by "METHOD route".

    Raises:
        UserError: another emulator holds the folder, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            for name in ("files", "batches", "answers", "zips"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            self._lock = (folder / ".lock").open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"the folder {folder} is in use by another emulator; give another --state") from None
        except OSError as error:
            raise UserError(f"the folder {folder} cannot be written ({error.strerror}); give another --state") from None
        for part in folder.rglob(".*.part"):
            part.unlink()
        found = [read_record(p, Batch) for p in (folder / "batches").glob("*.json")]
        self.batches = {b.id: b for b in sorted(found, key=lambda b: b.created)}
        self._answered = {i: _whole_lines(self.answers_path(i)) for i in self.batches}
        self._secret = self._read_secret()
        self._calls_path = folder / "calls.log"
        _whole_lines(self._calls_path)
        self.calls = Counter(self._calls_path.read_text().splitlines()) if self._calls_path.exists() else Counter()

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.close()

    def count_call(self, call: str) -> None:
        """Count a call for ever."""
        self.calls[call] += 1
        with self._calls_path.open("a") as f:
            f.write(f"{call}\n")

    def part(self) -> Path:
        """A path for a file in the making, on the same disk."""
        return self._folder / "files" / f".{secrets.token_hex(8)}.part"

    def add_file(self, part: Path, *, name: str, ttl: float) -> InputFile:
        """Keep a finished upload."""
        # 21 URL-safe characters, as in public logs of the real server.
        made = InputFile(id=f"file_{secrets.token_urlsafe(16)[:21]}", name=name, created=time.time(), ttl=ttl)
        os.replace(part, self.input_path(made.id))
        write_record(self.input_path(made.id).with_suffix(".json"), made)
        return made

    def find_file(self, file_id: str) -> InputFile | None:
        """An upload that was kept and has not expired."""
        # Ids come from outside and must not lead out of the folder.
        path = self.input_path(Path(file_id).name).with_suffix(".json")
        found = read_record(path, InputFile) if path.is_file() else None
        return found if found and time.time() <= found.created + found.ttl else None

    def input_path(self, file_id: str) -> Path:
        """The uploaded file."""
        return self._folder / "files" / f"{file_id}.ndjson"

    def add_batch(self, batch: Batch) -> Batch:
        """Accept a batch, under a new id."""
        batch = replace(batch, id=str(uuid.uuid4()), created=time.time())
        self._answered[batch.id] = 0
        return self.save(batch)

    def save(self, batch: Batch, **changes: Any) -> Batch:
        """Write down a batch with `changes`."""
        changed = replace(batch, **changes)
        write_record(self._folder / "batches" / f"{batch.id}.json", changed)
        self.batches[batch.id] = changed
        return changed

    def answers_path(self, batch_id: str) -> Path:
        """The answers so far, one a line in the order of the input."""
        return self._folder / "answers" / f"{batch_id}.ndjson"

    def answered(self, batch_id: str) -> int:
        """Lines answered so far."""
        return self._answered[batch_id]

    def add_answers(self, batch_id: str, records: Sequence[dict[str, Any]]) -> None:
        """Append answers to the next lines."""
        with self.answers_path(batch_id).open("a", encoding="utf-8") as f:
            f.writelines(json.dumps(r) + "\n" for r in records)
        self._answered[batch_id] += len(records)

    def zip_path(self, batch_id: str, kind: str = "") -> Path:
        """The zip of results; `kind` names a hostile one."""
        return self._folder / "zips" / f"{batch_id}{kind and '.'}{kind}.zip"

    def sign(self, batch_id: str, expires: str) -> str:
        """What makes a link to results good until `expires` (epoch seconds)."""
        return hmac.new(self._secret.encode(), f"{batch_id} {expires}".encode(), hashlib.sha256).hexdigest()

    def submitted(self) -> list[tuple[str, Path]]:
        """(model, input file) of every batch whose lines count."""
        return [(b.model, self.input_path(b.file_id)) for b in self.batches.values() if b.valid]

    def listing(self) -> list[dict[str, Any]]:
        """The batches as their owner sees them on the provider's page, oldest first."""
        return [
            {k: v for k, v in asdict(b).items() if k != "rules"} | {"answered": self.answered(b.id)}
            for b in self.batches.values()
        ]

    def _read_secret(self) -> str:
        path = self._folder / "secret"
        if not path.is_file():
            write_text(path, secrets.token_hex(16))
        return path.read_text()


def _whole_lines(path: Path) -> int:
    """Lines of a log, after a torn last one was cut off."""
    if not path.is_file():
        return 0
    whole = lines = 0
    with path.open("rb+") as f:
        for line in f:
            if line.endswith(b"\n"):
                whole += len(line)
                lines += 1
        f.truncate(whole)
    return lines
