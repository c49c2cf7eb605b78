"""Where a run's numbers go: `metrics.jsonl` in the run folder always, Weights & Biases when asked.

The tracker counts one global step by itself, restored from `metrics.jsonl` when the folder is opened again, so it
never goes backwards over stages, restarts and resumed runs. A stage's own x axis is a metric ("search/evaluations").

Lines of `metrics.jsonl`, told apart by their keys; every line also has "time", Unix seconds:

    {"step": 3, "search/score": 1.5, ...}                            log
    {"step": 4, "table": name, "columns": [...], "rows": [...]}      table
    {"artifact": name, "kind": kind, "files": [names]}               artifact
    {"summary": {...}}                                               summary
    {"exit_code": 0}                                                 finish
"""

import contextlib
import json
import math
import os
import re
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from trigger_opt.errors import UserError

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_run_id.txt"
MODES = ("online", "offline", "disabled", "off")

_RESERVED = frozenset({"step", "time", "table", "columns", "rows", "artifact", "summary", "exit_code"})


@runtime_checkable
class Tracker(Protocol):
    """Takes a run's numbers. `finish` is the last call; nothing may be logged after it."""

    def log(self, metrics: Mapping[str, float | int | str]) -> None:
        """Record one row of metrics at the next global step. Names are "stage/metric", units in nats or seconds."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Record a whole table, once, at the next global step; cells are JSON values, model text goes in unchanged."""

    def artifact(self, name: str, kind: str, files: Sequence[Path]) -> None:
        """Attach finished files under `name`; `kind` groups artifacts of one sort, say "candidates"."""

    def summary(self, values: Mapping[str, object]) -> None:
        """Record the run's outcome: JSON values, no step."""

    def finish(self, exit_code: int) -> None:
        """Close the run with the process's exit code: 0 for success."""

    def sync_hint(self) -> str | None:
        """The shell line that uploads this run's offline data; None when there is nothing to upload."""


class NullTracker:
    """Drops everything: for library calls and tests."""

    def log(self, metrics: Mapping[str, float | int | str]) -> None: ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None: ...

    def artifact(self, name: str, kind: str, files: Sequence[Path]) -> None: ...

    def summary(self, values: Mapping[str, object]) -> None: ...

    def finish(self, exit_code: int) -> None: ...

    def sync_hint(self) -> str | None:
        """None: nothing was kept."""
        return None


class JsonlTracker:
    """Appends to `metrics.jsonl` in `run_dir`; every line is on its way to disk when the call returns.

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
        self._path = run_dir / METRICS_FILE
        _drop_torn_line(self._path)
        lines = read_metrics(self._path) if self._path.exists() else []
        self.next_step = max((line["step"] for line in lines if "step" in line), default=-1) + 1

    def log(self, metrics: Mapping[str, float | int | str]) -> None:
        """See Tracker."""
        if taken := _RESERVED & metrics.keys():
            raise ValueError(f"a metric must not be called {sorted(taken)[0]!r}; name it stage/metric")
        self._append_step(metrics)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """See Tracker."""
        if odd := [row for row in rows if len(row) != len(columns)]:
            raise ValueError(f"table {name!r} has {len(columns)} columns, but a row of {len(odd[0])} cells")
        self._append_step({"table": name, "columns": columns, "rows": rows})

    def artifact(self, name: str, kind: str, files: Sequence[Path]) -> None:
        """See Tracker. The files stay where they are; only their names are noted."""
        if missing := [str(file) for file in files if not file.is_file()]:
            raise FileNotFoundError(f"artifact {name!r} lacks {', '.join(missing)}")
        self._append({"artifact": name, "kind": kind, "files": [file.name for file in files]})

    def summary(self, values: Mapping[str, object]) -> None:
        """See Tracker."""
        self._append({"summary": values})

    def finish(self, exit_code: int) -> None:
        """See Tracker."""
        self._append({"exit_code": exit_code})

    def sync_hint(self) -> str | None:
        """None: the file is all there is."""
        return None

    def _append_step(self, values: Mapping[str, object]) -> None:
        self._append({"step": self.next_step, **values})
        self.next_step += 1

    def _append(self, values: Mapping[str, object]) -> None:
        line = {"time": round(time.time(), 3), **values}
        # ASCII: model text may hold lone surrogates, which UTF-8 refuses, and U+2028, where str.splitlines splits.
        text = json.dumps(_strict(line), allow_nan=False)
        with self._path.open("a", encoding="ascii") as file:
            file.write(text + "\n")


class WandbTracker:
    """One W&B run, kept in `run_dir`/wandb; a reopened folder continues the same run.

    Offline touches no network at all. Neither mode sends code, git state, host name or command line: what identifies
    a run is its `config`. Once the run is open, a failure of W&B is reported on stderr once and never raised.

    Args:
        online: upload while running; otherwise the data waits in the folder for `wandb sync`.
        name: the run's display name. config: the resolved configuration, plain values.
        first_step: the global step the first row gets.
        patience: seconds to wait for the server when opening.

    Raises:
        UserError: W&B cannot start: no key, no server, or a name it refuses.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        online: bool,
        project: str,
        group: str,
        name: str,
        tags: Sequence[str],
        config: Mapping[str, object],
        first_step: int = 0,
        patience: float = 30.0,
    ) -> None:
        self._dir = run_dir / "wandb"
        self._online = online
        self._id = _run_id(run_dir)
        self._broken = False
        about = {"project": project, "group": group, "name": name, "tags": list(tags), "config": dict(config)}
        self._run, self._failures = _start(run_dir, online, patience, {"id": self._id, **about})
        self._step: int = max(first_step, self._run.step)

    def log(self, metrics: Mapping[str, float | int | str]) -> None:
        """See Tracker."""
        row, step = dict(metrics), self._next_step()
        self._guard(lambda: self._run.log(row, step=step))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """See Tracker."""
        import wandb

        data, step = [list(row) for row in rows], self._next_step()
        # Mixed types: a cell is None where a control model is missing, a number elsewhere in its column.
        table = wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)
        self._guard(lambda: self._run.log({name: table}, step=step))

    def artifact(self, name: str, kind: str, files: Sequence[Path]) -> None:
        """See Tracker. Characters W&B refuses in a name become "-". The files are copied: a rerun may change them.

        Raises:
            ValueError: a file does not exist.
        """
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", name), kind)

        def add() -> None:
            for file in files:
                artifact.add_file(str(file), name=file.name)
            self._run.log_artifact(artifact)

        self._guard(add)

    def summary(self, values: Mapping[str, object]) -> None:
        """See Tracker."""
        self._guard(lambda: self._run.summary.update(dict(values)))

    def finish(self, exit_code: int) -> None:
        """See Tracker. The data is on disk, and online also uploaded, when this returns.

        A lost server delays it by five minutes at most where wandb can be told so (not in 0.25).
        """
        import wandb

        def close() -> None:
            self._run.finish(exit_code=exit_code)
            # run.finish returns some milliseconds before the file is whole (0.31.0); this waits for the writer.
            wandb.teardown(exit_code)

        self._guard(close)
        if self._broken:
            # Otherwise wandb prints a traceback about the dead connection when Python exits.
            with contextlib.suppress(*self._failures):
                wandb.teardown(exit_code)

    def sync_hint(self) -> str | None:
        """The `wandb sync` line for all sessions of this run that were not uploaded yet; None when online."""
        if self._online:
            return None
        sessions = sorted(self._dir.resolve().glob(f"offline-run-*-{self._id}*"))
        waiting = [shlex.quote(str(s)) for s in sessions if not list(s.glob("*.wandb.synced"))]
        return " ".join(["wandb", "sync", *waiting]) if waiting else None

    def _next_step(self) -> int:
        self._step += 1
        return self._step - 1

    def _guard(self, action: Callable[[], object]) -> None:
        # The one place that swallows an error on purpose: hours of search must not die with a logging service.
        if self._broken:
            return
        try:
            action()
        except self._failures as error:
            self._broken = True
            _tell(f"warning: W&B stopped ({_one_line(error)}); the run goes on and {METRICS_FILE} keeps every number")


class Trackers:
    """Hands everything to each of `trackers`, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def log(self, metrics: Mapping[str, float | int | str]) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.log(metrics)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.table(name, columns, rows)

    def artifact(self, name: str, kind: str, files: Sequence[Path]) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.artifact(name, kind, files)

    def summary(self, values: Mapping[str, object]) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.summary(values)

    def finish(self, exit_code: int) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.finish(exit_code)

    def sync_hint(self) -> str | None:
        """The first hint any of them has."""
        return next((hint for tracker in self._trackers if (hint := tracker.sync_hint())), None)


def open_tracker(
    run_dir: Path,
    *,
    mode: str,
    project: str,
    group: str,
    name: str,
    tags: Sequence[str],
    config: Mapping[str, object],
) -> Tracker:
    """The tracker of a run folder, new or continued: `metrics.jsonl`, and W&B for the modes "offline" and "online".

    With "disabled" or "off" wandb is not even imported.

    Raises:
        UserError: the mode is unknown, W&B cannot start, or `metrics.jsonl` is damaged.
    """
    if mode not in MODES:
        raise UserError(f"tracking.mode={mode} is unknown; choose one of {', '.join(MODES)}")
    jsonl = JsonlTracker(run_dir)
    if mode in ("disabled", "off"):
        return jsonl
    wandb_tracker = WandbTracker(
        run_dir,
        online=mode == "online",
        project=project,
        group=group,
        name=name,
        tags=tags,
        config=config,
        first_step=jsonl.next_step,
    )
    return Trackers([jsonl, wandb_tracker])


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
    """`value` with non-finite numbers as strings, as W&B writes them too."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def _run_id(run_dir: Path) -> str:
    """The W&B id kept in the run folder; made and kept on first use."""
    path = run_dir / WANDB_ID_FILE
    known = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not known:
        known = uuid.uuid4().hex[:12]
        path.write_text(known + "\n", encoding="utf-8")
    return known


def _start(
    run_dir: Path, online: bool, patience: float, about: dict[str, Any]
) -> tuple[Any, tuple[type[Exception], ...]]:
    """The open run, and the exceptions that mean W&B failed rather than its caller."""
    # Before the import: wandb's error reporting looks up its own server even offline (seen with strace, 0.31.0).
    if not online:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    failures = (wandb.errors.Error, OSError, HandleAbandonedError, MailboxClosedError)
    try:
        # Process-wide, because with show_info wandb asks for a key on a terminal and waits for ever.
        wandb.setup(settings=wandb.Settings(show_info=False))
        settings = wandb.Settings(**_settings(online, patience, known=wandb.Settings.model_fields))
        # reinit: the default would hand job 2 of a multirun the run of job 1.
        run = wandb.init(dir=str(run_dir), resume="allow", reinit="finish_previous", settings=settings, **about)
    except (*failures, ValueError) as error:
        remedy = "tracking.mode=offline needs no server; for online set WANDB_API_KEY or run `wandb login`"
        mode = "online" if online else "offline"
        raise UserError(f"W&B cannot start in tracking.mode={mode}: {_one_line(error)}; {remedy}") from error
    if online:
        _tell(f"W&B: {run.url}")
    return run, failures


def _settings(online: bool, patience: float, known: Mapping[str, object]) -> dict[str, Any]:
    """Settings for `wandb.init`; `known` are those this wandb has."""
    wanted: dict[str, Any] = {
        "mode": "online" if online else "offline",
        "console": "off",
        "quiet": True,
        "show_info": False,
        "init_timeout": patience,
        "finish_timeout": 300.0,
        "disable_code": True,
        "disable_git": True,
        "save_code": False,
        "host": "",
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        # Offline: probing the machine asks a cloud metadata address.
        "x_disable_stats": not online,
    }
    # wandb 0.25, our lower bound, has no finish_timeout yet.
    return {name: value for name, value in wanted.items() if name in known}


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _tell(line: str) -> None:
    # sys.stderr looked up now: a live progress bar replaces it to keep the screen in order.
    print(line, file=sys.stderr, flush=True)
