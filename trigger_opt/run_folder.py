"""One run's folder: who holds it, which records lie in it, and how it came about (run.json)."""

import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from importlib import metadata
from pathlib import Path

from trigger_opt.errors import UserError
from trigger_opt.locks import held
from trigger_opt.records import RunInfo, StageRun, read_record, write_record

# What each stage writes. A stage that is run again keeps its old files beside the new ones.
STAGE_FILES = {
    "diff": ("diff.jsonl",),
    "hypotheses": ("hypotheses.jsonl",),
    "search": ("candidates.jsonl", "history.jsonl", "cost.json"),
    "verify": ("verified.jsonl", "completions.jsonl", "verdict.json"),
    "transfer": ("transfer.jsonl", "transfer_answers.jsonl"),
    "report": ("report.html", "report.md"),
}
_LOCK = ".lock"


def loads_models(stages: Sequence[str]) -> bool:
    """Whether any of these stages needs the pair; the others live on records."""
    return not set(stages) <= {"transfer", "report"}


class RunFolder:
    """A held run folder."""

    def __init__(self, path: Path, info: RunInfo) -> None:
        self.path = path
        self.info = info

    def file(self, name: str) -> Path:
        """Path of a record file."""
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether a record file is there."""
        return self.file(name).is_file()

    def add_stage(self, stage: StageRun) -> None:
        """Write down that a stage was run."""
        self.info = replace(self.info, stages=[*self.info.stages, stage])
        write_record(self.file("run.json"), self.info)

    def set_plan(self, lines: Sequence[str]) -> None:
        """Write down what was planned."""
        self.info = replace(self.info, plan=list(lines))
        write_record(self.file("run.json"), self.info)

    def put_aside(self, stage: str) -> None:
        """Rename what earlier runs of `stage` and of the stages after it left, so that nothing is lost and nothing
        stale is taken for this run's: NAME.old-1, NAME.old-2, … one number for all that belong together."""
        later = list(STAGE_FILES)[list(STAGE_FILES).index(stage) :]
        names = [n for s in later for n in STAGE_FILES[s]]
        number = 1
        while any(self.has(f"{n}.old-{number}") for n in names):
            number += 1
        for name in names:
            if self.has(name):
                self.file(name).rename(self.file(f"{name}.old-{number}"))


@contextmanager
def hold_run_folder(path: Path, info: RunInfo, *, stages: Sequence[str]) -> Iterator[RunFolder]:
    """Open or make the folder, hold it against other processes, and keep the earlier run's record in it.

    Raises:
        UserError: another process holds it; it cannot be written; all stages were asked for in a folder that
            already holds a run; or a later stage alone in a folder without any.
    """
    with held(path / _LOCK, what=f"the run folder {path}", remedy="give another run_dir"):
        yield RunFolder(path, _joined(path, info, stages))


def _joined(path: Path, info: RunInfo, stages: Sequence[str]) -> RunInfo:
    earlier = path / "run.json"
    if not earlier.is_file():
        return info
    old = read_record(earlier, RunInfo)
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
    return replace(info, command=f"{old.command}\n{info.command}", stages=old.stages)


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
