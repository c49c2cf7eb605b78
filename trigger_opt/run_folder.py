"""One run's folder: who holds it, which records lie in it, and how it came about (run.json)."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from trigger_opt.errors import UserError
from trigger_opt.locks import held
from trigger_opt.paths import CHECKPOINT
from trigger_opt.records import RunInfo, StageRun, read_record, write_record

# What each stage writes. A stage that is run again keeps its old files beside the new ones.
STAGE_FILES = {
    "diff": ("diff.jsonl",),
    "hypotheses": ("moved.jsonl", "hypotheses.jsonl"),
    "search": (
        "built.jsonl",
        "candidates.jsonl",
        "history.jsonl",
        "gradient.json",
        "read_off.jsonl",
        "rescored.jsonl",
        "cost.json",
    ),
    "verify": ("verified.jsonl", "completions.jsonl", "known.jsonl", "ablation.json", "probe.json", "verdict.json"),
    "null": ("null.jsonl", "null.json"),
    "transfer": ("transfer.jsonl", "transfer_answers.jsonl"),
    "report": ("report.html", "report.md"),
}
# Files of an earlier stage that a stage writes anew, and later stages that do not start from what it writes.
_REWRITTEN = {"null": ("verdict.json",)}
_APART = {"null": ("transfer",)}
# What each of these stages takes from the configuration, beside the models and contexts.
_SETTINGS = {
    "hypotheses": ("hypotheses",),
    "search": ("objective", "build", "divergence", "search", "tokens", "payload", "max_hypotheses"),
    "verify": ("verify",),
}
SEARCH_SETTINGS = ("contexts", *(part for parts in _SETTINGS.values() for part in parts), "seed")
"""Parts of the configuration that decide what a search finds in a given pair."""
# Where numbers go and what others learn of them: a run that goes on may have others.
_FREE = ("tracking", "run_dir", "checkpoint")
GROWING = ("history.jsonl", "metrics.jsonl")
"""Files of a run that grow line by line."""
# Rooms that a search's numbers do not pass through.
_NOT_SEARCHING = ("candidates", "collect", "contrast", "report", "tracking", "transfer")
_VALUE_WIDTH = 40
_LOCK = ".lock"


def run_name(path: Path) -> str:
    """What people call a run by: its folder's name, with that of the sweep where jobs are but numbered."""
    return f"{path.parent.name}/{path.name}" if path.name.isdigit() and path.parent.name else path.name


def loads_models(stages: Sequence[str]) -> bool:
    """Whether any of these stages needs the pair; the others live on records."""
    return not set(stages) <= {"transfer", "report"}


class RunFolder:
    """A held run folder.

    Attributes:
        goes_on: the stage in which this command was interrupted before; None where it begins.
    """

    def __init__(self, path: Path, info: RunInfo) -> None:
        self.path = path
        self.info = info
        self.goes_on = info.unfinished[0] if info.starts > 1 and info.unfinished else None

    def file(self, name: str) -> Path:
        """Path of a record file."""
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether a record file is there."""
        return self.file(name).is_file()

    def begin(self) -> None:
        """Write down what is to be run: a process that is killed leaves no other trace of it."""
        write_record(self.file("run.json"), self.info)

    def add_stage(self, stage: StageRun, *, ended: bool = True) -> None:
        """Write down that a stage was run, to its end or not."""
        left = [s for s in self.info.unfinished if not (ended and s == stage.stage)]
        self.info = replace(self.info, stages=[*self.info.stages, stage], unfinished=left)
        write_record(self.file("run.json"), self.info)

    def set_plan(self, lines: Sequence[str]) -> None:
        """Write down what was planned."""
        self.info = replace(self.info, plan=list(lines))
        write_record(self.file("run.json"), self.info)

    def put_aside(self, stage: str) -> None:
        """Rename what earlier runs of `stage` and of the stages after it left, so that nothing is lost and nothing
        stale is taken for this run's: NAME.old-1, NAME.old-2, … one number for all that belong together."""
        later = list(STAGE_FILES)[list(STAGE_FILES).index(stage) :]
        names = [n for s in later if s not in _APART.get(stage, ()) for n in STAGE_FILES[s]]
        rewritten = _REWRITTEN.get(stage, ())
        number = 1
        while any(self.has(f"{n}.old-{number}") for n in (*names, *rewritten)):
            number += 1
        for name in filter(self.has, names):
            self.file(name).rename(self.file(f"{name}.old-{number}"))
        for name in filter(self.has, rewritten):
            # The stage starts from it, too.
            shutil.copy2(self.file(name), self.file(f"{name}.old-{number}"))


@contextmanager
def hold_run_folder(path: Path, info: RunInfo, *, stages: Sequence[str]) -> Iterator[RunFolder]:
    """Open or make the folder, hold it against other processes, and keep the earlier run's record in it.

    The same command in the folder of a run that was interrupted goes on with it.

    Raises:
        UserError: another process holds it; it cannot be written; all stages were asked for in a folder that
            already holds a run, or one that was interrupted under other settings; or a later stage alone in a folder
            without any.
    """
    with held(path / _LOCK, what=f"the run folder {path}", remedy="give another run_dir"):
        yield RunFolder(path, _joined(path, info, stages))


def has_ended(path: Path, info: RunInfo, *, stages: Sequence[str]) -> bool:
    """Whether these stages were run in the folder to their end under the same settings, whatever was run since."""
    if not (path / "run.json").is_file():
        return False
    old = read_record(path / "run.json", RunInfo)
    parts = [part for part in old.config if part not in (*_FREE, "stages")]
    ended = {s.stage for s in old.stages if not s.broken_off} - set(old.unfinished)
    return ended >= set(stages) and not differences(old.config, info.config, parts)


def _joined(path: Path, info: RunInfo, stages: Sequence[str]) -> RunInfo:
    earlier = path / "run.json"
    info = replace(info, unfinished=list(stages), starts=1)
    if not earlier.is_file():
        return info
    old = read_record(earlier, RunInfo)
    # What is left of a command is the end of its stages.
    same = old.config.get("stages") == info.config.get("stages")
    if old.unfinished and same and old.unfinished == info.unfinished[-len(old.unfinished) :]:
        return _gone_on(path, old, info)
    if old.unfinished[:1] == ["search"] and (path / CHECKPOINT).is_file():
        raise UserError(
            f"the search of the run in {path} was interrupted and goes on with the same command: "
            f"{old.command.splitlines()[-1]}; to give up what it has done since its last strings were written, remove "
            f"{path / CHECKPOINT}"
        )
    if not old.stages:
        # It stopped before it did anything, say at a wrong base: nothing there is worth guarding.
        return info
    if "diff" in stages and "report" in stages:
        raise UserError(
            f"the folder {path} already holds a run; name the stages to run again (stages=[verify,report]) "
            "or give another run_dir"
        )
    # Stages that load no model take what the run left, whatever the configuration says of models.
    parts = ("model", "contexts") if loads_models(stages) else ()
    differs = [part for part in parts if old.config.get(part) != info.config.get(part)]
    if differs:
        first = old.command.split("\n")[0]
        raise UserError(
            f"the run in {path} was made with another {' and '.join(differs)}; repeat its settings: {first}"
        )
    config = info.config | {part: old.config[part] for part in _kept(stages) if part in old.config}
    if "null" in stages and (changed := differences(config, info.config, _kept(stages))):
        raise UserError(
            f"stage 'null' repeats the search of the run in {path}, which had {', '.join(changed)}; give the same"
        )
    return replace(info, command=f"{old.command}\n{info.command}", stages=old.stages, config=config)


def _gone_on(path: Path, old: RunInfo, info: RunInfo) -> RunInfo:
    """The record of a command that was interrupted and is given again.

    Raises:
        UserError: it had other settings.
    """
    stage = old.unfinished[0]
    parts = [part for part in old.config if part not in _FREE]
    # What stages that are not run would take is what the folder's records rest on.
    changed = differences(old.config, info.config, [p for p in parts if p not in _kept(info.unfinished)])
    # A job that was put back may get another card.
    if changed := [c for c in changed if not c.startswith("model.device=")]:
        if not old.stages and not (path / CHECKPOINT).is_file():
            return info
        raise UserError(
            f"the run in {path} was interrupted in stage {stage!r} and had {', '.join(changed)}; give the same to go "
            "on, or another run_dir to begin anew"
        )
    done = list(old.stages)
    while done and done[-1].stage == stage and done[-1].broken_off:
        done.pop()
    versions = {**old.versions, **info.versions}
    return replace(old, stages=done, starts=old.starts + 1, machine=info.machine, versions=versions)


def _kept(stages: Sequence[str]) -> list[str]:
    """Parts of the configuration that `stages` do not use: the records in the folder rest on the earlier ones."""
    kept = [part for stage, parts in _SETTINGS.items() if stage not in stages for part in parts]
    if not set(stages) & set(_SETTINGS):
        kept.append("seed")
    return kept if loads_models(stages) else ["model", "contexts", *kept]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    """Settings under `parts` that are not the same, as `search.num_steps=3` with the old value; a long one by its name
    alone. What one side does not have (it was written by an earlier version) is not compared."""
    before, after = (_flat({part: config.get(part) for part in parts}) for config in (old, new))
    names = [n for n in before if before[n] != after.get(n, before[n])]
    # A group of settings on one side, and none or something else in its place on the other.
    names += [n for n in before if n not in after and any(n.startswith(f"{a}.") for a in after)]
    names += [n for n in before if any(a.startswith(f"{n}.") for a in after)]
    values = {name: json.dumps(before[name], ensure_ascii=False) for name in names}
    return [f"{name}={values[name]}" if len(values[name]) <= _VALUE_WIDTH else f"another {name}" for name in names]


def _flat(settings: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{within}{name}.") if isinstance(value, dict) else {f"{within}{name}": value}
    return flat


def versions() -> dict[str, str]:
    """Versions of what decides a result; the commit too where the package runs from a checkout."""
    names = ("trigger-opt", "torch", "transformers", "peft", "numpy", "bitsandbytes", "accelerate")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    if commit := _commit():
        found["commit"] = commit
    return found


def code_versions() -> dict[str, str]:
    """What a search that goes on must have in common with its beginning: `versions`, and instead of the commit, which
    also changes when a word in a page does, a digest of this package's code but for `_NOT_SEARCHING`."""
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    searching = [p for p in package.rglob("*.py") if p.relative_to(package).parts[0] not in _NOT_SEARCHING]
    for path in sorted(searching):
        digest.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    return {name: v for name, v in versions().items() if name != "commit"} | {"code": digest.hexdigest()[:12]}


def machine() -> str:
    """What it ran on: processor count, memory, GPUs are in the plan; no host name or path."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"


def now() -> str:
    """Local time, to the second, with its offset."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


@contextmanager
def timed() -> Iterator[list[float]]:
    """Yields a list that holds the wall seconds afterwards."""
    seconds: list[float] = []
    start = time.monotonic()
    try:
        yield seconds
    finally:
        seconds.append(time.monotonic() - start)


def _commit() -> str:
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return ""
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "") if head.returncode == 0 else ""
