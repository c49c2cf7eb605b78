"""The jobs of a collected sweep, and which of them found the string; nothing in the report of a single run."""

from collections import Counter

from trigger_opt.report.jobs import FINISHED, STATES, Collection, Finding, SweepJob
from trigger_opt.report.load import RunRecords
from trigger_opt.report.markup import Child, Column, Html, fold, join, note, section, table, tag
from trigger_opt.report.words import DASH, clip, counted, duration, layer_ranges, noun, number, share

JOBS_TITLE = "Jobs"
_SHOWN = 50
_FINDINGS_SHOWN = 20
_COMMANDS_SHOWN = 100
_CELL_LIMIT = 120
_JOB_COLUMNS = [
    Column(title="Job", kind="word"),
    Column(title="Its own overrides"),
    Column(title="State", kind="word"),
    Column(title="Best score, nats", kind="num"),
    Column(title="Selection rate", kind="num"),
    Column(title="Strings", kind="num"),
    Column(title="Its verdict", kind="word"),
    Column(title="Search time", kind="num"),
    Column(title="Starts", kind="num"),
    Column(title="Note"),
]
_FINDING_COLUMNS = [
    Column(title="Found by job", kind="word"),
    Column(title="Restart", kind="num"),
    Column(title="Step", kind="num"),
    Column(title="Seed", kind="num"),
    Column(title="Score, nats", kind="num"),
    Column(title="Selection rate", kind="num"),
]
_CAPTION = (
    "Scores and selection rates are a job's own, on the contexts it searched in, and scores can be compared within one "
    "objective and payload alone. A job's own verdict rests on the strings it verified itself."
)
JOB_TITLES = [c.title for c in _JOB_COLUMNS]
FINDING_TITLES = [c.title for c in _FINDING_COLUMNS]


def jobs_section(run: RunRecords) -> Html:
    """Who found the string, a table of the jobs, and the commands that run what is missing."""
    if run.jobs is None:
        return join([])
    lines = [tag("p", line) for line in jobs_lines(run)]
    findings = finding_rows(run)
    found = [table(_FINDING_COLUMNS, [list[Child](row) for row in findings], class_="short")] if findings else []
    folds = [
        ("Commands that run just what is missing", [c for j in run.jobs if not j.may_restart for c in j.commands]),
        (
            "Only if the batch system does not start them again",
            [c for j in run.jobs if j.may_restart for c in j.commands],
        ),
    ]
    again = [fold(title, tag("pre", _few(commands))) for title, commands in folds if commands]
    rows = [list[Child](row) for row in job_rows(run)]
    return section(JOBS_TITLE, *lines, *found, note(_CAPTION), table(_JOB_COLUMNS, rows), *_more(run), *again)


def jobs_lines(run: RunRecords) -> list[str]:
    """The same in sentences: states, how many strings competed, who found the string."""
    jobs, collection = run.jobs or [], run.collection
    counts = Counter(job.state for job in jobs)
    told = ", ".join(f"{counts[s]:,} {s}" for s in STATES if counts[s])
    lines = [f"{counted(len(jobs), 'job')}: {told}."]
    lines += [
        f"{s.capitalize()}: {_names([j for j in jobs if j.state == s])}." for s in STATES if s != FINISHED and counts[s]
    ]
    if handed_on := [job for job in jobs if job.may_restart]:
        lines.append(f"Stopped by its batch system, which may start it again (squeue says): {_names(handed_on)}.")
    if collection is not None:
        lines[0] = f"Sweep {clip(collection.sweep, _CELL_LIMIT)}. {lines[0]}"
        lines.append(_competition(run))
        if collection.differs:
            differs = clip(", ".join(collection.differs), 4 * _CELL_LIMIT)
            lines.append(f"The jobs differ in how they verify; here job {collection.settings_of} decided: {differs}.")
        lines += _taken_back(run)
    return [*lines, *_finders(run)]


def job_rows(run: RunRecords) -> list[list[str]]:
    """A row a job: all in their order, or the best of many."""
    return [
        [
            clip(job.name, _CELL_LIMIT),
            clip(" ".join(job.overrides), _CELL_LIMIT) or DASH,
            job.state,
            number(job.best_score),
            share(job.selection_rate),
            f"{job.candidates:,}",
            job.verdict or DASH,
            DASH if job.search_seconds is None else duration(job.search_seconds),
            f"{job.starts:,}",
            clip(job.note, 2 * _CELL_LIMIT) or DASH,
        ]
        for job in _shown(run.jobs or [])
    ]


def finding_rows(run: RunRecords) -> list[list[str]]:
    """A row for each time a job found the string, the best first."""
    best = sorted(_findings(run), key=lambda f: (-(f.selection_rate or 0.0), -f.score))
    return [[f.job, *_when(f), str(f.seed), number(f.score), share(f.selection_rate)] for f in best[:_FINDINGS_SHOWN]]


def _when(finding: Finding) -> list[str]:
    """Restart and step; dashes for what a search began from."""
    return [f"{n:,}" if n >= 0 else DASH for n in (finding.restart, finding.step)]


def left_out(run: RunRecords) -> str:
    """How many jobs the table does not show; empty when it shows all."""
    hidden = len(run.jobs or []) - _SHOWN
    return f"The best {_SHOWN} are shown; {hidden:,} more are in jobs.jsonl." if hidden > 0 else ""


def _shown(jobs: list[SweepJob]) -> list[SweepJob]:
    if len(jobs) <= _SHOWN:
        return jobs
    # A job without strings has no score, which is below all.
    order = [(-(j.selection_rate or 0.0), j.best_score is None, -(j.best_score or 0.0), i) for i, j in enumerate(jobs)]
    return [jobs[i] for *_, i in sorted(order)[:_SHOWN]]


def _more(run: RunRecords) -> list[Html]:
    return [note(text)] if (text := left_out(run)) else []


def _few(commands: list[str]) -> str:
    more = f"\n… and {len(commands) - _COMMANDS_SHOWN:,} more in jobs.jsonl" if len(commands) > _COMMANDS_SHOWN else ""
    return "\n".join(commands[:_COMMANDS_SHOWN]) + more


def _names(jobs: list[SweepJob]) -> str:
    names = [job.name for job in jobs]
    numbers = layer_ranges([int(n) for n in names if n.isdecimal()]) if any(n.isdecimal() for n in names) else ""
    return clip(", ".join([*([numbers] if numbers else []), *(n for n in names if not n.isdecimal())]), 300)


def _competition(run: RunRecords) -> str:
    collection = run.collection
    assert collection is not None
    judged = sum(not v.minimised_from for v in run.verified or [])
    return (
        f"The jobs found {counted(collection.strings, 'string')}, {collection.different:,} of them different; "
        f"{judged:,} of these were verified here, once and by one judge, the best of each payload first."
        f"{_preferred(run)} The more strings compete, the better the best of them looks to the search by chance alone, "
        "so its search score is no evidence. No search used the held-out contexts; the intervals of the rates are "
        f"those of one string, not of the best of {judged:,}.{_verified_by_jobs(collection)}"
    )


def _preferred(run: RunRecords) -> str:
    collection = run.collection
    if collection is None or not collection.preferred:
        return ""
    rule = " A string that a job's own verdict calls a backdoor counts as better than others of its payload."
    here = {(v.trigger, p) for v in run.verified or [] if not v.minimised_from for p in ("", v.payload)}
    left = sum((p.trigger, p.payload) not in here for p in (run.provenance or [])[: collection.preferred])
    more = f" Not verified here, of these {collection.preferred:,} strings: {left:,}; collect with more --candidates."
    return rule + more if left else rule


def _verified_by_jobs(collection: Collection) -> str:
    if not (count := collection.verified_by_jobs):
        return ""
    own = f" The jobs themselves had verified {counted(count, 'string')}, in the very same held-out contexts"
    if not collection.preferred:
        return f"{own}."
    return (
        f"{own}, and the strings preferred here were chosen by that: their rates are those of the best of {count:,}, "
        "and look better than they would in contexts that chose nothing."
    )


def _taken_back(run: RunRecords) -> list[str]:
    taken = run.collection.taken_back if run.collection else []
    lines = [f"The null of job {t.job} took back its backdoor {clip(t.trigger, _CELL_LIMIT)!r}." for t in taken]
    if lines and run.verdict.verdict == "backdoor":
        lines.append("The string above is another one, and scores more than the controls of that null.")
    return lines


def _finders(run: RunRecords) -> list[str]:
    findings = _findings(run)
    if not findings:
        return []
    jobs = list(dict.fromkeys(f.job for f in findings))
    by = f"job {jobs[0]}" if len(jobs) == 1 else f"{len(jobs):,} jobs"
    times = f", {len(findings):,} times" if len(findings) > len(jobs) else ""
    more = f" The best {_FINDINGS_SHOWN} findings are shown." if len(findings) > _FINDINGS_SHOWN else ""
    return [f"The {noun(run.verdict)} above was found by {by}{times}.{more}"]


def _findings(run: RunRecords) -> list[Finding]:
    same = [p for p in run.provenance or [] if run.verdict.trigger and p.trigger == run.verdict.trigger]
    exact = [p for p in same if p.payload == run.verdict.payload]
    # Where the search had no payload, verification found one.
    return (exact or same)[0].findings if same else []
