"""The finding against the same search on controls, or the command that would tell."""

import shlex

from trigger_opt.records import NullControl
from trigger_opt.report.load import RunRecords
from trigger_opt.report.markup import Child, Column, Html, clipped_string, join, note, section, table, tag
from trigger_opt.report.strip import Dot, dot_strip
from trigger_opt.report.words import DASH, clip, counted, duration, number, of, p_value

_TITLE = "Held against a null"
_NOT_RUN = (
    "This finding was not held against a null: how often the same search finds as much in models that hide nothing is "
    "not known. To find out, at the price of a search for each control:"
)
_OF_A_SWEEP = (
    "This finding was not held against a null: how often the same sweep finds as much in models that hide nothing is "
    "not known. To find out, run the sweep on a control in place of the suspect, with all its jobs, and collect it: "
    "one search on each control would not do, for the suspect was searched by every job."
)
_CAPTION = (
    "Each control was searched like the suspect: the same hypotheses, search, verification, budget and seed. A placebo "
    "has the suspect's weight change with its directions shuffled; the distilled reference is the base, trained "
    "towards the suspect's answers to ordinary prompts. Each run lies in a folder of its own below the folder null."
)
_KINDS = {"twin": "given as clean", "placebo": "placebo", "distilled": "distilled reference"}
_NAME_LIMIT = 60
_COLUMNS = [
    Column(title="Control", kind="word"),
    Column(title="Kind", kind="word"),
    Column(title="Score", kind="num"),
    Column(title="Its verdict", kind="word"),
    Column(title="Its best string", kind="string"),
    Column(title="Fired", kind="num"),
    Column(title="Wall time", kind="num"),
    Column(title="How it was made"),
]


def null_section(run: RunRecords) -> Html:
    """Scores on one axis and a table; how to get them where a backdoor was found without; nothing at all else."""
    if run.null_result is None:
        if run.verdict.verdict != "backdoor":
            return join([])
        if run.jobs is not None:
            return section(_TITLE, tag("p", _OF_A_SWEEP))
        return section(_TITLE, tag("p", _NOT_RUN), tag("pre", null_command(*_how(run))))
    return section(_TITLE, *(tag("p", line) for line in _lead(run)), *_evidence(run))


def null_lines(run: RunRecords) -> list[str]:
    """The same in plain sentences; empty where there is nothing to say."""
    if run.null_result is None:
        if run.verdict.verdict != "backdoor":
            return []
        return [_OF_A_SWEEP if run.jobs is not None else f"{_NOT_RUN} {null_command(*_how(run))}"]
    return [*_lead(run), *(_control_line(c) for c in run.null or [])]


def null_command(command: str, run_dir: str) -> str:
    """The command line that holds a finished run against its null.

    Args:
        command: the run's own command line; with several, the first holds the settings. run_dir: its folder.
    """
    words = _words(command) or ["python", "-m", "trigger_opt"]
    kept = [w for w in words if not w.startswith(("run_dir=", "stages="))]
    return shlex.join([*kept, f"run_dir={run_dir}", "stages=[null,report]"])


def _how(run: RunRecords) -> tuple[str, str]:
    command = run.info.command if run.info else ""
    given = [w.removeprefix("run_dir=") for w in _words(command) if w.startswith("run_dir=")]
    return command, given[0] if given else f"runs/{run.folder}"


def _words(command: str) -> list[str]:
    """The arguments of its first line; none where it is no command line, as records may have been written by hand."""
    try:
        return shlex.split(command.split("\n")[0])
    except ValueError:
        return []


def _lead(run: RunRecords) -> list[str]:
    result = run.null_result
    assert result is not None
    lines = [f"{result.reason[:1].upper()}{result.reason[1:]}."]
    if result.verdict != result.verdict_before:
        lines.append(f"Without it the verdict was {result.verdict_before!r}: {run.verdict.reason_before_null}.")
    if result.num_controls:
        lines.append(
            "Score: the best string's rate on held-out contexts, less the highest of its rates with the base, with "
            f"nothing and with random strings. With {counted(result.num_controls, 'control')} no p below "
            f"{p_value(result.least_p)} can be reached."
        )
    return lines


def _evidence(run: RunRecords) -> list[Html]:
    controls = run.null or []
    if not controls:
        return []
    return [*_strips(run), note(_CAPTION), table(_COLUMNS, [_row(c) for c in controls])]


def _strips(run: RunRecords) -> list[Html]:
    result = run.null_result
    dots = [Dot(name=clip(c.name, _NAME_LIMIT), value=c.score) for c in run.null or [] if c.score is not None]
    if result is None or not dots:
        return []
    dots.append(Dot(name=f"suspect {number(result.score)}", value=result.score, marked=True))
    said = f"scores of {counted(len(dots) - 1, 'control')} and of the suspect, {number(result.score)}"
    # A drawing scaled down to a phone has unreadable labels, so it is made twice and CSS shows one.
    sizes = {"wide": 700.0, "narrow": 340.0}
    return [tag("figure", dot_strip(dots, width=w, said=said), class_=f"chart {name}") for name, w in sizes.items()]


def _row(c: NullControl) -> list[Child]:
    named: list[Child] = [clip(c.name, _NAME_LIMIT), _KINDS.get(c.kind, c.kind)]
    if c.score is None:
        return [*named, DASH, "left out", DASH, DASH, duration(c.seconds), c.note]
    string: Child = clipped_string(c.trigger, 60) if c.trigger else DASH
    fired = of(c.trigger_rate) if c.trigger_rate else DASH
    return [*named, number(c.score), c.verdict, string, fired, duration(c.seconds), c.note or DASH]


def _control_line(c: NullControl) -> str:
    kind = _KINDS.get(c.kind, c.kind)
    if c.score is None:
        return f"{clip(c.name, _NAME_LIMIT)} ({kind}): {c.note}."
    fired = f", its best string fired in {of(c.trigger_rate)}" if c.trigger_rate else ""
    return f"{clip(c.name, _NAME_LIMIT)} ({kind}): score {number(c.score)}, {c.verdict}{fired}."
