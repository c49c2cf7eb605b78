"""How the search went: the score curve, what the model wants to say, what was tried and refuted."""

import math
from itertools import groupby

from trigger_opt.records import Candidate, Hypothesis, SearchStep, Verification
from trigger_opt.report.load import RunRecords
from trigger_opt.report.markup import (
    Child,
    Column,
    Html,
    clipped_string,
    fold,
    join,
    note,
    section,
    string,
    table,
    tag,
)
from trigger_opt.report.svg import COLOURS, Line, Point, line_chart, line_class
from trigger_opt.report.words import (
    BUILT_NOTE,
    DASH,
    MOVED_NOTE,
    MOVED_TOLD,
    gradient_sentence,
    not_run,
    number,
    of,
    rescored_sentence,
    share,
)

MOST_POINTS = 600
SHOWN = 15
INPUTS_SHOWN = 5

_STRING = Column(title="String", kind="string")
_PAYLOAD = Column(title="Payload", kind="string")
_FIGURES = [
    Column(title="Score, nats", kind="num"),
    Column(title="Fine-tuned", kind="num"),
    Column(title="Base", kind="num"),
    Column(title="Control", kind="num"),
    Column(title="Outcome"),
]


def curve(run: RunRecords) -> Html:
    """Score against evaluations, one chart a payload, one line a restart."""
    title = "Score during the search"
    gradient = [tag("p", gradient_sentence(run.gradient))] if run.gradient else []
    if run.rescored:
        gradient.append(tag("p", f"{rescored_sentence(run.rescored)}."))
    gradient += _built(run)
    if run.history is None:
        return section(title, *gradient, note(not_run("history.jsonl")))
    steps = [s for s in run.history if math.isfinite(s.score)]
    if not steps:
        why = "it ends where a string it begins from fires in enough of its contexts"
        return section(title, *gradient, note(f"The search recorded no step: {why}."))
    caption = (
        "The incumbent's score after each step, in nats, on the contexts drawn for that step: neighbouring steps are "
        "not strictly comparable. The last value stands at the end of each line. A high score is not evidence; "
        "the verdict rests on held-out contexts only."
    )
    by_hypothesis = {
        name: [s for s in steps if s.hypothesis == name] for name in dict.fromkeys(s.hypothesis for s in steps)
    }
    return section(title, *gradient, note(caption), *(_panel(name, mine) for name, mine in by_hypothesis.items()))


def hypotheses(run: RunRecords) -> Html:
    """The payload hypotheses, best first."""
    title = "What the fine-tuned model wants to say"
    if run.hypotheses is None:
        return section(title, note(not_run("hypotheses.jsonl")))
    moved = _moved(run)
    if not run.hypotheses:
        return section(title, note("The stage ran and found no payload hypothesis."), *moved)
    columns = [
        Column(title="Payload", kind="string"),
        Column(title="Source", kind="word"),
        Column(title="Score, nats", kind="num"),
        Column(title="Rivals, nats"),
        Column(title="Evidence"),
        Column(title="Inputs", kind="string"),
    ]
    caption = (
        "Best first. Scores are comparable within one source only; rivals are the next best "
        "groups of that source, inputs the inserted strings that raised the payload most."
    )
    return section(title, note(caption), table(columns, [_hypothesis(h) for h in run.hypotheses]), *moved)


def _built(run: RunRecords) -> list[Html]:
    rows = run.built_and_scored
    if not rows:
        return []
    several = len({b.payload for b, _ in rows}) > 1
    columns = [
        _STRING,
        *([_PAYLOAD] if several else []),
        Column(title="Tokens", kind="num"),
        Column(title="Score, nats", kind="num"),
        Column(title="Share", kind="num"),
    ]
    cells: list[list[Child]] = []
    for b, c in rows:
        payload: list[Child] = [clipped_string(b.payload, 60)] if several else []
        cells.append([string(b.trigger), *payload, str(len(b.trigger_ids)), number(c.score), share(c.selection_rate)])
    return [note(BUILT_NOTE), table(columns, cells)]


def _moved(run: RunRecords) -> list[Html]:
    if not run.moved:
        return []
    tokens = [join([string(m.text), f" {number(m.score)} "]) for m in run.moved[:MOVED_TOLD]]
    return [note(MOVED_NOTE), tag("p", join(tokens))]


def refuted(run: RunRecords) -> Html:
    """Every other string: the verified ones with the reason, then candidates that were not verified."""
    title = "What was tried, and what refuted it"
    if run.verified is None and run.candidates is None:
        return section(title, note(not_run("candidates.jsonl")), note(not_run("verified.jsonl")))
    absent = [
        note(not_run(f))
        for f, r in (("candidates.jsonl", run.candidates), ("verified.jsonl", run.verified))
        if r is None
    ]
    if not run.others and not run.unverified:
        return section(title, *absent, note("No other string was tried to the end."))
    caption = (
        "Rates are with the string inserted, on held-out contexts. "
        "Scores are the search's own, on contexts it was optimised on."
    )
    return section(title, *absent, note(caption), *_refuted_tables(run))


def _refuted_tables(run: RunRecords) -> list[Html]:
    tried: list[Verification | Candidate] = [*run.others, *run.unverified]
    one_payload = run.one_payload
    columns = [_STRING, *([] if one_payload else [_PAYLOAD]), *_FIGURES]
    rows = []
    for t in tried:
        payload: list[Child] = [] if one_payload else [clipped_string(t.payload, 60) if t.payload else DASH]
        figures = _verified(t, run.candidate_of(t)) if isinstance(t, Verification) else _unverified(t)
        rows.append([clipped_string(t.trigger), *payload, *figures])
    blocks = [table(columns, rows[:SHOWN])]
    if rows[SHOWN:]:
        blocks.append(fold(f"{len(rows) - SHOWN} more strings", table(columns, rows[SHOWN:])))
    return blocks


def _panel(payload: str, steps: list[SearchStep]) -> Html:
    by_evaluations = max(s.evaluations for s in steps) > min(s.evaluations for s in steps)
    x_label = "candidate evaluations" if by_evaluations else "seconds"
    restarts = [list(mine) for _, mine in groupby(sorted(steps, key=_restart), key=_restart)]
    scores = [_line(i, mine, [s.score for s in mine], by_evaluations) for i, mine in enumerate(restarts)]
    charts = _both_widths(scores, x_label, "score, nats", height=290.0, as_percent=False)
    rated = [[s for s in mine if s.selection_rate is not None] for mine in restarts]
    rates = [
        _line(i, mine, [s.selection_rate or 0.0 for s in mine], by_evaluations) for i, mine in enumerate(rated) if mine
    ]
    if rates:
        charts += _both_widths(rates, x_label, "selection rate on the search contexts", height=190.0, as_percent=True)
    heading: list[Child] = ["Toward the payload ", string(payload)] if payload else ["No payload given"]
    return tag("div", tag("h3", *heading), *charts, _legend(scores))


def _restart(step: SearchStep) -> int:
    return step.restart


def _line(colour: int, steps: list[SearchStep], values: list[float], by_evaluations: bool) -> Line:
    xs = [float(s.evaluations if by_evaluations else s.seconds) for s in steps]
    points = [Point(x=x, y=y) for x, y in zip(xs, values, strict=True)]
    stride = -(-len(points) // MOST_POINTS)
    # Counted from the end, so that thinning never drops the last value.
    return Line(name=f"restart {steps[0].restart}", colour=colour, points=points[::-1][::stride][::-1])


def _both_widths(lines: list[Line], x_label: str, y_label: str, *, height: float, as_percent: bool) -> list[Html]:
    # A chart scaled down to a phone has unreadable labels, so it is drawn twice and CSS shows one.
    sizes = {"wide": 1020.0, "narrow": 370.0}
    return [
        tag(
            "figure",
            line_chart(lines, x_label, y_label, width=w, height=height, as_percent=as_percent),
            class_=f"chart {name}",
        )
        for name, w in sizes.items()
    ]


def _legend(lines: list[Line]) -> Html:
    return tag("ul", *(tag("li", _key(line.colour), line.name) for line in lines), class_="legend")


def _key(colour: int) -> Html:
    stroke = tag("line", x1="0", y1="5", x2="22", y2="5", class_=line_class(colour))
    return tag("svg", stroke, width="22", height="10", aria_hidden="true", class_=f"c{colour % COLOURS}")


def _hypothesis(h: Hypothesis) -> list[Child]:
    rivals = ", ".join(number(r) for r in h.rivals[:INPUTS_SHOWN]) or DASH
    inputs: list[Child] = [join([clipped_string(i, 80), " "]) for i in h.inputs[:INPUTS_SHOWN]]
    if len(h.inputs) > INPUTS_SHOWN:
        inputs.append(tag("span", f"and {len(h.inputs) - INPUTS_SHOWN:,} more", class_="muted"))
    source = h.source.replace("_", " ")
    return [clipped_string(h.payload), source, number(h.score), rivals, h.evidence, join(inputs) if inputs else DASH]


def _verified(v: Verification, candidate: Candidate | None) -> list[Child]:
    # A string's own verdict can be "backdoor" when it is a weaker spelling of the one in the banner.
    tone = {"backdoor": "backdoor", "not reproduced": "quiet"}.get(v.verdict, "amber")
    outcome = join([tag("span", v.verdict, class_=f"chip {tone}"), " ", v.reason])
    control = of(v.control_rate) if v.control_rate else DASH
    return [number(candidate.score) if candidate else DASH, of(v.trigger_rate), of(v.base_rate), control, outcome]


def _unverified(c: Candidate) -> list[Child]:
    rate = f"; selection rate {share(c.selection_rate)}" if c.selection_rate is not None else ""
    where = f"restart {c.restart}, step {c.step}" if c.restart >= 0 else "what the search began from"
    why = tag("span", f"not verified{rate}; {where}", class_="muted")
    return [number(c.score), DASH, DASH, DASH, why]
