"""What became of each job of a sweep, told from the files in its folder alone; nothing is ever unpickled."""

import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trigger_opt.collect.judged import Judged, own_judgement, short
from trigger_opt.collect.overrides import MULTIRUN_FILE, PlannedJob, SweepPlan, job_command, overrides_of
from trigger_opt.errors import UserError
from trigger_opt.interrupts import LATER
from trigger_opt.locks import holder
from trigger_opt.records import STOPPED as STAGE_STOPPED
from trigger_opt.records import RunInfo, read_record
from trigger_opt.report.jobs import CRASHED, DAMAGED, FINISHED, NEVER_STARTED, RECENT, RUNNING, STOPPED, SweepJob

COLLECTION_FILE = "collection.json"
RECENT_SECONDS = 300.0
"""How long after its last change a folder may belong to a job that runs where locks do not reach."""

_WRITTEN_WHILE_RUNNING = ("run.json", "metrics.jsonl", "history.jsonl", "checkpoint.pt")
# What a stage says of itself that a signal ended, in this version and in earlier ones.
_SIGNALS = ("SystemExit", "KeyboardInterrupt")
# "Try again", Ctrl-C; from 128 on the number of a signal.
_STOPPED_CODES = (LATER, 130)
_TAIL_BYTES = 8192


@dataclass(frozen=True, kw_only=True)
class Looked:
    """A job as found.

    Attributes:
        info: None where it has no readable run.json. judged: by itself.
    """

    job: SweepJob
    folder: Path
    info: RunInfo | None = None
    judged: Judged = field(default_factory=Judged)


@dataclass(frozen=True, kw_only=True)
class _Traces:
    """What a job's process left beside its records.

    Attributes:
        held: its folder is held now. age: seconds since anything in it changed. exit_code: it wrote one last.
        after_start: the metrics are younger than run.json, which is written when a process starts.
    """

    held: bool
    age: float
    exit_code: int | None
    after_start: bool


def job_folders(sweep_dir: Path, plan: SweepPlan) -> list[PlannedJob]:
    """The jobs a sweep was to run, and other runs in its folder; numbers in their order, names after them.

    Raises:
        UserError: the folder is not there, is a single run, or holds no job of a sweep.
    """
    if not sweep_dir.is_dir():
        raise UserError(
            f"there is no folder {sweep_dir}; name that of a sweep, say multirun/2026-01-31_12-00-00_ab12cd"
        )
    if (sweep_dir / "run.json").is_file():
        raise UserError(f"{sweep_dir} is a single run, with a report of its own; name the folder of a sweep")
    below = sorted(p for p in sweep_dir.iterdir() if p.is_dir())
    runs = [p.name for p in below if (p / "run.json").is_file() and not (p / COLLECTION_FILE).is_file()]
    planned = {j.name: j for j in plan.jobs}
    if not runs and not planned:
        raise UserError(_no_jobs(sweep_dir, below))
    others = [PlannedJob(name=n, overrides=[], own=[]) for n in runs if n not in planned]
    return sorted([*planned.values(), *others], key=lambda j: (not j.name.isdecimal(), j.name.zfill(12)))


def look(sweep_dir: Path, planned: PlannedJob, plan: SweepPlan) -> Looked:
    """One job as it stands now; candidates are counted later."""
    folder = sweep_dir / planned.name
    overrides, flags, keep = planned.overrides, plan.flags, False
    if not (folder / "run.json").is_file():
        commands = [job_command(overrides, folder, flags=flags)]
        return Looked(job=_job(planned, NEVER_STARTED, note=_before(folder), commands=commands), folder=folder)
    try:
        info = read_record(folder / "run.json", RunInfo)
        traces = _traces(folder)
    except (UserError, OSError) as error:
        commands = _after_damage(folder, planned, plan)
        note = f"left out: run.json cannot be read ({short(error)})"
        return Looked(job=_job(planned, DAMAGED, note=note, commands=commands), folder=folder)
    state, note = _state(info, traces)
    if not planned.overrides:
        # A run of its own: its command line holds its flags too.
        overrides, flags, keep = overrides_of(info.command) or [], [], _keeps(info)
    if state in (STOPPED, RUNNING, RECENT):
        note = "; ".join(part for part in (note, _progress(folder, info)) if part)
    again = state in (STOPPED, CRASHED) and overrides
    searches = [s.seconds for s in info.stages if s.stage == "search"]
    judged = own_judgement(folder, planned.name)
    job = _job(
        planned,
        state,
        note="; ".join(part for part in (note, judged.note) if part),
        commands=[job_command(overrides, folder, flags=flags, keep=keep)] if again else [],
        verdict=judged.verdict,
        search_seconds=sum(searches) if searches else None,
        starts=info.starts,
        may_restart=state == STOPPED and traces.exit_code == LATER and traces.after_start,
    )
    return Looked(job=job, folder=folder, info=info, judged=judged)


def _no_jobs(sweep_dir: Path, below: Sequence[Path]) -> str:
    sweeps = [p for p in below if (p / MULTIRUN_FILE).is_file()]
    if sweeps:
        return f"{sweep_dir} holds sweeps, and no job itself; name one of them, say {sweeps[-1]}"
    return f"{sweep_dir} is no sweep: neither {MULTIRUN_FILE} nor a folder with a run.json is in it"


def _job(
    planned: PlannedJob,
    state: str,
    *,
    note: str = "",
    commands: Sequence[str] = (),
    verdict: str = "",
    search_seconds: float | None = None,
    starts: int = 0,
    may_restart: bool = False,
) -> SweepJob:
    return SweepJob(
        name=planned.name,
        overrides=planned.own,
        state=state,
        note=note,
        candidates=0,
        best_score=None,
        selection_rate=None,
        verdict=verdict,
        search_seconds=search_seconds,
        starts=starts,
        commands=list(commands),
        may_restart=may_restart,
    )


def _state(info: RunInfo, traces: _Traces) -> tuple[str, str]:
    """The state, and the error of a crash."""
    last = info.stages[-1] if info.stages else None
    if traces.held:
        return RUNNING, ""
    # Runs of earlier versions leave `unfinished` empty whatever became of them.
    if not info.unfinished and last and not last.broken_off:
        return FINISHED, ""
    error = last.summary.removeprefix(STAGE_STOPPED) if last and last.summary.startswith(STAGE_STOPPED) else ""
    error = "" if error in _SIGNALS else error
    ended = traces.exit_code is not None and traces.after_start
    if not ended and traces.age < RECENT_SECONDS:
        return RECENT, ""
    # A process that wrote on after the error, and then wrote no exit code, was another one, and was killed.
    told = error and (traces.exit_code is not None or not traces.after_start)
    if told or _is_failure(traces.exit_code):
        return CRASHED, f"{error or 'an error'} in {last.stage}" if last and error else "an error outside its stages"
    return STOPPED, ""


def _is_failure(exit_code: int | None) -> bool:
    return exit_code is not None and 0 < exit_code < 128 and exit_code not in _STOPPED_CODES


def _traces(folder: Path) -> _Traces:
    changed = {n: os.stat(folder / n).st_mtime for n in _WRITTEN_WHILE_RUNNING if (folder / n).is_file()}
    last = _last_line(folder / "metrics.jsonl")
    exit_code = last.get("exit_code")
    return _Traces(
        held=holder(folder / ".lock") is not None,
        age=time.time() - max(changed.values()),
        exit_code=exit_code if isinstance(exit_code, int) else None,
        after_start=changed.get("metrics.jsonl", 0.0) >= changed["run.json"],
    )


def _before(folder: Path) -> str:
    return "ended before its first record; its log says why" if folder.is_dir() else ""


def _progress(folder: Path, info: RunInfo) -> str:
    """How far an unfinished job came."""
    stage = info.unfinished[0] if info.unfinished else ""
    last = _last_line(folder / "history.jsonl") if stage == "search" else {}
    if not {"restart", "step", "score"} <= set(last):
        return f"in {stage}" if stage else ""
    return f"in search, restart {last['restart']}, step {last['step']}"


def _last_line(path: Path) -> dict[str, Any]:
    """The JSON object in the last whole line; empty where there is none, or the line is longer than is looked at."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        *_, before, _torn = (b"\n" + file.read()).split(b"\n")
    try:
        last = json.loads(before)
    except ValueError:
        return {}
    return last if isinstance(last, dict) else {}


def _keeps(info: RunInfo) -> bool:
    settings = info.config.get("candidates")
    return not isinstance(settings, dict) or settings.get("keep") is not False


def _after_damage(folder: Path, planned: PlannedJob, plan: SweepPlan) -> list[str]:
    """A folder whose run.json cannot be read takes no run: first the file goes out of the way."""
    if not planned.overrides:
        return []
    aside = shlex.join(["mv", str(folder / "run.json"), str(folder / "run.json.damaged")])
    return [aside, job_command(planned.overrides, folder, flags=plan.flags)]
