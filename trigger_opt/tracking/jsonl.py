"""`metrics.jsonl`, the record of a run's numbers, which the backends are filled from.

The tracker counts one global step by itself, restored from the file when the folder is opened again, so it never goes
backwards over stages, restarts and resumed runs. A stage's own x axis is a metric ("search/evaluations").

Lines, told apart by their keys; every line also has "time", Unix seconds:

    {"step": 3, "search/score": 1.5, ...}                            log
    {"step": 4, "table": name, "columns": [...], "rows": [...]}      table
    {"artifact": name, "kind": kind, "files": [names]}               artifact
    {"summary": {...}}                                               summary
    {"exit_code": 0}                                                 finish
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trigger_opt.errors import UserError
from trigger_opt.tracking.base import Backend, Moment

METRICS_FILE = "metrics.jsonl"

_RESERVED = frozenset({"step", "time", "table", "columns", "rows", "artifact", "summary", "exit_code"})
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonlTracker:
    """Appends to `metrics.jsonl` in `run_dir`, then hands on to the backends; every line is on its way to disk when
    the call returns.

    Non-finite numbers are written as the strings "NaN", "Infinity" and "-Infinity", so each line is strict JSON.

    Attributes:
        next_step: the global step the next row gets; 0 in a new folder.

    Raises:
        UserError: `metrics.jsonl` exists and is damaged before its last line.
        TypeError: (all methods) a value is no JSON value.
        ValueError: (log) a metric's name is a key the file uses itself; (table) a row has not one cell a column.
        FileNotFoundError: (artifact) a file does not exist.
    """

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._path = run_dir / METRICS_FILE
        self._backends: list[Backend] = []
        _drop_torn_line(self._path)
        self.next_step = max((line["step"] for line in self._lines() if "step" in line), default=-1) + 1

    def attach(self, backend: Backend) -> None:
        """Give `backend` everything the file holds, and from now on what is added."""
        lines = self._lines()
        # The files of an earlier artifact of the same name were overwritten by the later one's.
        newest = {line["artifact"]: number for number, line in enumerate(lines) if "artifact" in line}
        for number, line in enumerate(lines):
            if "artifact" not in line or newest[line["artifact"]] == number:
                self._give_again(line, backend)
        self._backends.append(backend)

    def log(self, metrics: Mapping[str, float | int | str]) -> None:
        """See Tracker."""
        if taken := _RESERVED & metrics.keys():
            raise ValueError(f"a metric must not be called {sorted(taken)[0]!r}; name it stage/metric")
        at = self._append_step(metrics)
        for backend in self._backends:
            backend.log(at, metrics)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """See Tracker."""
        if odd := [row for row in rows if len(row) != len(columns)]:
            raise ValueError(f"table {name!r} has {len(columns)} columns, but a row of {len(odd[0])} cells")
        at = self._append_step({"table": name, "columns": columns, "rows": rows})
        for backend in self._backends:
            backend.table(at, name, columns, [[_strict(cell) for cell in row] for row in rows])

    def artifact(self, name: str, kind: str, files: Sequence[Path]) -> None:
        """See Tracker. The files stay where they are; only their names are noted."""
        if missing := [str(file) for file in files if not file.is_file()]:
            raise FileNotFoundError(f"artifact {name!r} lacks {', '.join(missing)}")
        self._append({"artifact": name, "kind": kind, "files": [self._noted(file) for file in files]})
        for backend in self._backends:
            backend.artifact(name, kind, files)

    def summary(self, values: Mapping[str, object]) -> None:
        """See Tracker."""
        self._append({"summary": values})
        for backend in self._backends:
            backend.summary({key: _strict(value) for key, value in values.items()})

    def finish(self, exit_code: int) -> None:
        """See Tracker."""
        self._append({"exit_code": exit_code})
        for backend in self._backends:
            backend.finish(exit_code)

    def sync_hint(self) -> str | None:
        """The first hint any backend has."""
        return next((hint for backend in self._backends if (hint := backend.sync_hint())), None)

    def _lines(self) -> list[dict[str, Any]]:
        return read_metrics(self._path) if self._path.exists() else []

    def _noted(self, file: Path) -> str:
        # In the run folder with its folders, to be found again; from elsewhere by name alone: records hold no paths of
        # the machine.
        path, run_dir = file.resolve(), self._run_dir.resolve()
        return path.relative_to(run_dir).as_posix() if path.is_relative_to(run_dir) else path.name

    def _give_again(self, line: Mapping[str, Any], backend: Backend) -> None:
        match line:
            case {"table": name, "columns": columns, "rows": rows}:
                backend.table(Moment(step=line["step"], time=line["time"]), name, columns, rows)
            case {"artifact": name, "kind": kind, "files": names}:
                files = [self._run_dir / file for file in names]
                # A file may have been put aside since: its stage was to run again, and gives the artifact then.
                if all(file.is_file() for file in files):
                    backend.artifact(name, kind, files)
            case {"summary": values}:
                backend.summary(values)
            case {"step": step, "time": when, **metrics}:
                # Numbers again, for a chart; in tables and the outcome they stay words, which a model may have said.
                numbers = {key: _NON_FINITE.get(value, value) for key, value in metrics.items()}
                backend.log(Moment(step=step, time=when), numbers)

    def _append_step(self, values: Mapping[str, object]) -> Moment:
        step = self.next_step
        when = self._append({"step": step, **values})
        self.next_step += 1
        return Moment(step=step, time=when)

    def _append(self, values: Mapping[str, object]) -> float:
        when = round(time.time(), 3)
        # ASCII: model text may hold lone surrogates, which UTF-8 refuses, and U+2028, where str.splitlines splits.
        text = json.dumps(_strict({"time": when, **values}), allow_nan=False)
        with self._path.open("a", encoding="ascii") as file:
            file.write(text + "\n")
        return when


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a `metrics.jsonl`, in order; a last line torn by a crash is left out.

    Raises:
        UserError: the file is missing or a line before the last is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: give the folder of a run that was started")
    out: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            out.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            remedy = "delete that line, or use a new run folder"
            raise UserError(f"{path}, line {number}, is damaged ({error}); {remedy}") from None
    return out


def _drop_torn_line(path: Path) -> None:
    """Cut a half-written last line off, so that the next one does not grow onto it."""
    if not path.exists():
        return
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def _strict(value: object) -> object:
    """`value` with non-finite numbers as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value
