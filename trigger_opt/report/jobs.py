"""Records of a collected sweep, as `trigger-opt collect` writes them and the report reads them. No torch.

jobs.jsonl          SweepJob, one a job, in the order of the sweep
provenance.jsonl    Provenance, one a string of candidates.jsonl, in the same order
collection.json     Collection
"""

from dataclasses import dataclass, field

FINISHED = "finished"
RUNNING = "running"
RECENT = "running or just stopped"
STOPPED = "stopped"
CRASHED = "crashed"
NEVER_STARTED = "never started"
DAMAGED = "damaged"
STATES = (FINISHED, RUNNING, RECENT, STOPPED, CRASHED, NEVER_STARTED, DAMAGED)


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """One job of a sweep as it was found.

    Attributes:
        name: its folder's, below the sweep's.
        overrides: its own, in which it differs from other jobs.
        state: one of `STATES`. "running or just stopped": nobody is seen to hold its folder, but locks may not reach
            over nodes and its files changed a few minutes ago. "stopped": ended by a signal, or by nothing that it
            could write down; it goes on where it stopped. "crashed": ended by an error.
        note: the error, how far it came, or what was left out of it and why.
        candidates: strings it found. best_score, selection_rate: of the best, as in Candidate; None where it has none.
        verdict: its own; empty where there is none.
        search_seconds: wall time of its searches until now; None before the first has ended.
        starts: how often it was started; 0 for never.
        commands: command lines that run it again, into the same folder, to be typed in this order; empty where it is
            finished, or may be running.
        may_restart: it saved after a signal and ended with exit code 75, which asks to be started again: whoever
            started it may do so without being told.
    """

    name: str
    overrides: list[str]
    state: str
    note: str
    candidates: int
    best_score: float | None
    selection_rate: float | None
    verdict: str
    search_seconds: float | None
    starts: int
    commands: list[str]
    may_restart: bool = False


@dataclass(frozen=True, kw_only=True)
class Finding:
    """That one job found a string; `job` is its name, the rest as in Candidate."""

    job: str
    restart: int
    step: int
    seed: int
    score: float
    selection_rate: float | None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Who found a string, in the order of the jobs."""

    trigger: str
    payload: str
    findings: list[Finding]


@dataclass(frozen=True, kw_only=True)
class TakenBack:
    """A backdoor that a job found and its own stage null took back.

    Attributes:
        job: its name. trigger: the string. reason: the null's.
        p_value, controls: as in Verdict.
        control_found: whether a control's own run ended in a backdoor. control_score: the highest of its controls (see
            `verify.rule.detection_score`); None where its null.jsonl cannot be read.
    """

    job: str
    trigger: str
    reason: str
    p_value: float | None
    controls: int | None
    control_found: bool
    control_score: float | None


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What was merged.

    Attributes:
        sweep: name of its folder.
        strings: found by all jobs together. different: of them; a string with two payloads counts twice. kept: in
            candidates.jsonl, the best.
        preferred: of those kept, how many stand first because the verdict of a job calls them a backdoor.
        differs: settings of verification in which jobs differ; those of `settings_of`, a job, are used.
        verified_by_jobs: strings that the jobs had verified themselves, each as often as it was. The held-out contexts
            are the same.
        taken_back: what the nulls of jobs say.
    """

    sweep: str
    strings: int
    different: int
    kept: int
    preferred: int
    differs: list[str]
    settings_of: str
    verified_by_jobs: int = 0
    taken_back: list[TakenBack] = field(default_factory=list)
