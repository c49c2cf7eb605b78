"""Jobs of the same pair in the same contexts, whose candidates compete: one answer each."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trigger_opt.collect.jobs import Looked, job_folders, look
from trigger_opt.collect.merge import Merge
from trigger_opt.collect.overrides import SweepPlan
from trigger_opt.errors import UserError
from trigger_opt.records import RunInfo
from trigger_opt.report.jobs import SweepJob, TakenBack
from trigger_opt.run_folder import differences

# What decides whether strings of two jobs compete for one answer, and what the judge of them all takes from the first.
_SAME = ("model", "contexts")
_JUDGED_BY = ("verify", "tokens")


@dataclass
class Suspect:
    """One pair in one set of contexts.

    Attributes:
        name: of its folder, where there are several. info: of the first job, whose settings judge all. first: its name.
        jobs: in the order of the sweep; a job without records may be any suspect's, and is listed with all.
        differs: settings of verification in which later jobs differ, as the first has them.
        evaluations, seconds: of all stages of all its jobs.
        verified: strings its jobs verified themselves. taken_back: backdoors that their own nulls took back.
    """

    name: str
    info: RunInfo
    first: str
    merge: Merge = field(default_factory=Merge)
    jobs: list[SweepJob] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    evaluations: int = 0
    seconds: float = 0.0
    verified: int = 0
    taken_back: list[TakenBack] = field(default_factory=list)


@dataclass(frozen=True)
class Gathered:
    """All jobs of a sweep, and its suspects."""

    jobs: list[SweepJob]
    suspects: list[Suspect]


def gather(sweep_dir: Path, plan: SweepPlan, *, on_job: Callable[[int, int], None]) -> Gathered:
    """Look at every job, one after another, and merge what they found.

    Raises:
        UserError: see `job_folders`.
    """
    planned = job_folders(sweep_dir, plan)
    suspects: dict[str, Suspect] = {}
    jobs: list[SweepJob] = []
    owners: list[Suspect | None] = []
    for number, each in enumerate(planned, 1):
        looked = look(sweep_dir, each, plan)
        suspect = _suspect(looked, suspects)
        jobs.append(_merged(looked, suspect) if suspect else looked.job)
        owners.append(suspect)
        on_job(number, len(planned))
    for suspect in suspects.values():
        suspect.jobs = [job for job, owner in zip(jobs, owners, strict=True) if owner in (suspect, None)]
    return Gathered(jobs, list(suspects.values()))


def _suspect(looked: Looked, known: dict[str, Suspect]) -> Suspect | None:
    info = looked.info
    if info is None:
        return None
    key = _text({part: _where_it_matters(info.config.get(part)) for part in _SAME})
    if key not in known:
        # The whole record of one job; of a thousand they would take more memory than their candidates.
        known[key] = Suspect(_folder_name(info.config, [s.name for s in known.values()]), info, looked.job.name)
    suspect = known[key]
    new = differences(suspect.info.config, info.config, _JUDGED_BY)
    suspect.differs += [d for d in new if d not in suspect.differs]
    suspect.evaluations += sum(s.evaluations for s in info.stages)
    suspect.seconds += sum(s.seconds for s in info.stages)
    suspect.verified += looked.judged.strings
    if (taken := looked.judged.taken_back) is not None:
        suspect.taken_back.append(taken)
    return suspect


def _where_it_matters(settings: Any) -> Any:
    # The same pair, whatever card of a cluster its weights lay on.
    return {k: v for k, v in settings.items() if k != "device"} if isinstance(settings, dict) else settings


def _merged(looked: Looked, suspect: Suspect) -> SweepJob:
    job, path = looked.job, looked.folder / "candidates.jsonl"
    if looked.judged.backdoor:
        suspect.merge.prefer(looked.judged.backdoor)
    if not path.is_file():
        return job
    assert looked.info is not None
    try:
        tally = suspect.merge.add(path, job=job.name, scale=_text(looked.info.config.get("objective")))
    except (UserError, OSError) as error:
        why = str(error) if isinstance(error, UserError) else error.strerror
        note = f"its candidates are left out: candidates.jsonl, {why}"
        return replace(job, note="; ".join(part for part in (job.note, note) if part))
    return replace(job, candidates=tally.count, best_score=tally.best_score, selection_rate=tally.selection_rate)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _folder_name(config: dict[str, Any], taken: list[str]) -> str:
    model = config.get("model")
    named = str(model.get("finetuned", "")) if isinstance(model, dict) else ""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", re.split("[/:]", named.rstrip("/"))[-1]).strip("._") or "suspect"
    number = 1
    while (made := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return made
