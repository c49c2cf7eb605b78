"""Which parts of the string matter: near misses as a table, and the rate against the number of tokens kept."""

from trigger_opt.records import Ablation, AblationRow
from trigger_opt.report.labelled_chart import Frame, NamedLine, Span, labelled_charts
from trigger_opt.report.load import RunRecords
from trigger_opt.report.markup import Child, Column, Html, clipped_string, fold, join, note, section, table, tag
from trigger_opt.report.svg import Point, bar
from trigger_opt.report.words import clip, counted, interval, noun, of, share, visible

ABLATION_TITLE = "Which parts matter"
_STRING_LIMIT = 80
_LISTED = 12
_COLUMNS = [
    Column(title="Change"),
    Column(title="String", kind="string"),
    Column(title="Fires", kind="num"),
    Column(title="95 % interval", kind="num"),
]
_NEAR = ": neighbours swapped, a token replaced, case or spaces changed"
_PARTS = " of some of the tokens, their order kept"
_NONE = "No single token matters: without any one of them more than half the rate is left."
_SHAPES = {
    "sharp": "Sharp: a part of it fires about as the whole does, or hardly at all.",
    "graded": "Graded: many of its parts fire in some contexts and not in others.",
    "any part": "Every part tried fires nearly as often as the whole, so no token carries the effect.",
    "silent": "The whole did not fire in these contexts, so nothing can be said of its parts.",
}


def ablation_section(run: RunRecords) -> Html:
    """The tokens that matter, every near miss, and the curve; nothing at all where nothing was ablated."""
    ablation = run.ablation
    if ablation is None:
        return join([])
    opened = [r for r in ablation.rows if r.kind in ("whole", "dropped")]
    near = [r for r in ablation.rows if r.kind not in ("whole", "dropped", "subset")]
    parts = [r for r in ablation.rows if r.kind == "subset"]
    folded = [
        fold(f"{counted(len(rows), what)}{more}", _table(ablation, rows))
        for rows, what, more in ((near, "near-miss string", _NEAR), (parts, "string", _PARTS))
        if rows
    ]
    return section(
        ABLATION_TITLE,
        tag("p", *_essential(ablation, noun(run.verdict)), f" {_SHAPES[ablation.shape]}"),
        note(_caption(ablation)),
        _table(ablation, opened),
        *folded,
        *_curve(ablation),
    )


def ablation_lines(run: RunRecords) -> list[str]:
    """The same in plain sentences; empty where nothing was ablated."""
    ablation = run.ablation
    if ablation is None:
        return []
    named = [_quoted(r.changed) for r in ablation.essential]
    matter = f"Without any one of these at most half the rate is left: {', '.join(named)}." if named else _NONE
    rows = [r for r in ablation.rows if r.kind != "subset"]
    more = [f"{counted(len(rows) - _LISTED, 'more row')} in report.html."] if len(rows) > _LISTED else []
    curve = "; ".join(
        f"{p.kept} of {ablation.num_tokens} tokens {of(p.rate)} ({share(p.rate.value)})" for p in ablation.curve
    )
    return [
        *([matter] if ablation.shape != "silent" else []),
        _SHAPES[ablation.shape],
        *(_row_line(r) for r in rows[:_LISTED]),
        *more,
        f"Tokens kept, and answers that fired: {curve}.",
        _caption(ablation),
    ]


def _essential(ablation: Ablation, the: str) -> list[Child]:
    if ablation.shape == "silent":
        return []
    if not ablation.essential:
        return [_NONE]
    tokens: list[Child] = []
    for row in ablation.essential:
        tokens += [", " if tokens else "", clipped_string(row.changed, _STRING_LIMIT)]
    return [f"These tokens of the {the} matter, each by itself: ", *tokens, "."]


def _caption(ablation: Ablation) -> str:
    return (
        f"Greedy answers of the fine-tuned model in {counted(len(ablation.contexts), 'held-out context')}, the same "
        "for every string; strings are put in as text and tokenised afresh. A token matters when without it at most "
        "half the rate is left. Where two tokens can stand in for each other, neither matters by itself. With so few "
        "contexts the rates are coarse: read the intervals."
    )


def _table(ablation: Ablation, rows: list[AblationRow]) -> Html:
    essential = ablation.essential
    return table(_COLUMNS, [_row(r, any(r is e for e in essential)) for r in rows], "near")


def _row(row: AblationRow, matters: bool) -> list[Child]:
    change: list[Child] = _change(row)
    if matters:
        change += [" ", tag("span", "matters", class_="chip backdoor")]
    fires = tag("span", bar(row.rate.value, 0.0, 1.0), tag("span", of(row.rate)), class_="with-bar")
    written: Child = clipped_string(row.string, _STRING_LIMIT) if row.string else tag("span", "nothing", class_="muted")
    return [join(change), written, fires, interval(row.rate)]


def _change(row: AblationRow) -> list[Child]:
    changed: Child = clipped_string(row.changed, _STRING_LIMIT)
    words: dict[str, list[Child]] = {
        "whole": ["as found"],
        "dropped": ["without ", changed],
        "swapped": ["swapped ", changed],
        "replaced": ["another token for ", changed],
        "subset": [counted(row.kept, "token")],
    }
    return words.get(row.kind, [row.changed])


def _row_line(row: AblationRow) -> str:
    changed = _quoted(row.changed)
    words = {
        "whole": "As found",
        "dropped": f"Without {changed}",
        "swapped": f"Swapped {changed}",
        "replaced": f"Another token for {changed}",
    }
    written = _quoted(row.string) if row.string else "nothing"
    return f"{words.get(row.kind, row.changed.capitalize())}: {written} fires in {of(row.rate)} ({interval(row.rate)})."


def _quoted(written: str) -> str:
    return f'"{clip(visible(written), _STRING_LIMIT)}"'


def _curve(ablation: Ablation) -> list[Html]:
    if len(ablation.curve) < 2:
        return []
    points = [Point(x=float(p.kept), y=100 * p.rate.value) for p in ablation.curve]
    spans = [Span(x=float(p.kept), low=100 * p.rate.low, high=100 * p.rate.high) for p in ablation.curve]
    line = NamedLine(name="whole", short="whole", style="c0", points=points, spans=spans)
    frame = Frame(
        x_label=f"tokens kept, of {ablation.num_tokens}",
        y_label="answers that fire, percent, with 95 % intervals",
        low=0.0,
        high=100.0,
        digits=0,
        width=560.0,
        height=220.0,
    )
    strings = sum(p.num_strings for p in ablation.curve) - 1
    told = (
        f"{counted(strings, 'string')} made of some of the tokens, drawn at random, their order kept; pooled by size. "
        "Which are kept may count more than how many."
    )
    return [tag("h3", "How much of it is needed"), *labelled_charts([line], frame), note(told)]
