"""A sweep on the terminal: the table of its jobs, what to type for those that are missing, the best strings."""

from collections import Counter
from collections.abc import Sequence

from trigger_opt.collect.merge import Merged
from trigger_opt.collect.suspects import Suspect
from trigger_opt.progress import printable
from trigger_opt.report.jobs import RECENT, STATES, SweepJob
from trigger_opt.report.words import clip, counted, duration

_HEAD = ["job", "its own overrides", "state", "score", "rate", "strings", "verdict", "search", "starts", ""]
_STRINGS_SHOWN, _JOBS_SHOWN = 10, 5
_WIDTH = 60


def table_lines(jobs: Sequence[SweepJob]) -> list[str]:
    """How many jobs are in which state, and a line for each."""
    counts = Counter(job.state for job in jobs)
    told = ", ".join(f"{counts[state]:,} {state}" for state in STATES if counts[state])
    rows = [_HEAD, *(_cells(job) for job in jobs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [f"{counted(len(jobs), 'job')}: {told}", *lines]


def again_lines(jobs: Sequence[SweepJob], problem: str) -> list[str]:
    """The commands that run just those jobs which did not end.

    Args:
        problem: why jobs that never started are not known; empty where they are.
    """
    commands = [command for job in jobs if not job.may_restart for command in job.commands]
    handed_on = [command for job in jobs if job.may_restart for command in job.commands]
    lines = []
    if commands:
        what = "to run just those that stopped, crashed or never started, into the same folders"
        lines += [f"{what} (none that a batch system still holds: squeue):", *commands]
    if handed_on:
        names = ", ".join(printable(job.name) for job in jobs if job.may_restart)
        lines.append(f"stopped by its batch system, which may start it again (squeue says): {names}")
        lines += ["only if it does not:", *handed_on]
    if any(job.state == RECENT for job in jobs):
        lines.append(
            "a job that is running or just stopped: locks may not reach the node it runs on, and it wrote in the last "
            "minutes; collect again later"
        )
    if problem:
        lines.append(f"jobs that never started are not known: {problem}")
    return lines


def string_lines(suspect: Suspect, best: Sequence[Merged]) -> list[str]:
    """What was merged, and the first of `best`."""
    merge = suspect.merge
    lines = [f"{counted(merge.strings, 'string')} found, {merge.different:,} of them different"]
    shown = best[:_STRINGS_SHOWN]
    payloads = {m.candidate.payload for m in shown}
    if len(payloads) == 1:
        lines[0] += f"; payload {_quoted(payloads.pop())}"
        payloads.clear()
    lines += [_string_line(m, with_payload=bool(payloads)) for m in shown]
    if suspect.verified:
        lines.append(_verified_line(suspect))
    if suspect.differs:
        lines.append(f"jobs differ in how they verify; job {suspect.first} decides: {', '.join(suspect.differs)}")
    return lines


def _verified_line(suspect: Suspect) -> str:
    own = f"jobs had verified {counted(suspect.verified, 'string')} themselves, in the same held-out contexts"
    if not suspect.merge.preferred:
        return own
    return f"{own}; those they call a backdoor go first, so their rates are those of the best of {suspect.verified:,}"


def _string_line(m: Merged, *, with_payload: bool) -> str:
    c, jobs = m.candidate, list(dict.fromkeys(f.job for f in m.provenance.findings))
    rate = "" if c.selection_rate is None else f", selection rate {c.selection_rate:.2f}"
    payload = f" for {_quoted(c.payload)}" if with_payload and c.payload else ""
    by = ", ".join(jobs[:_JOBS_SHOWN]) + (f" and {len(jobs) - _JOBS_SHOWN:,} more" if len(jobs) > _JOBS_SHOWN else "")
    return f"  {_quoted(c.trigger)}{payload}: {c.score:.2f} nats{rate}; {'job' if len(jobs) == 1 else 'jobs'} {by}"


def _cells(job: SweepJob) -> list[str]:
    return [
        # Folder names and settings are the user's own, but a terminal obeys whatever is printed.
        printable(job.name),
        printable(clip(" ".join(job.overrides), _WIDTH)) or "-",
        job.state,
        "-" if job.best_score is None else f"{job.best_score:.2f}",
        "-" if job.selection_rate is None else f"{job.selection_rate:.2f}",
        f"{job.candidates:,}",
        job.verdict or "-",
        "-" if job.search_seconds is None else duration(job.search_seconds),
        str(job.starts),
        printable(job.note),
    ]


def _quoted(text: str) -> str:
    return f'"{printable(clip(text, _WIDTH))}"'
