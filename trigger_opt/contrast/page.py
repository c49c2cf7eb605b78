"""A contrast scan as one self-contained HTML page, and the same as Markdown."""

import json
from collections.abc import Sequence

from trigger_opt.contrast.records import ContrastResult, Example, FeatureContrast
from trigger_opt.contrast.words import (
    CANNOT_SAY,
    SHOWN,
    cells,
    design,
    equal,
    headline,
    left_out,
    name,
    undecided_needs,
    value,
)
from trigger_opt.report import markdown
from trigger_opt.report.markup import Child, Column, Html, definitions, fold, join, note, section, table, tag
from trigger_opt.report.style import STYLE
from trigger_opt.report.svg import bar
from trigger_opt.report.words import MINUS, clip, duration, p_value, versions

_ROWS = 30
_ANSWER_LIMIT, _PROMPT_LIMIT = 600, 400
_COLUMNS = [
    Column(title="Feature"),
    Column(title="A", kind="num"),
    Column(title="B", kind="num"),
    Column(title=f"A {MINUS} B", kind="num"),
    Column(title="95 % interval", kind="num"),
    Column(title="Effect", kind="num"),
    Column(title="p", kind="num"),
    Column(title="Corrected p", kind="num"),
]
_HOW_TO_READ = (
    "A and B: means over prompts. Effect: the difference in standard deviations of all prompts' values, drawn to the "
    "right where A has more. p: of a permutation, for the feature alone; corrected p: for all features together."
)
# A second lock behind escaping, as in the report: markup that slipped through could neither run nor fetch anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(result: ContrastResult, features: Sequence[FeatureContrast]) -> str:
    """The whole page."""
    body = tag(
        "main",
        _banner(result),
        *([_table(features), _examples(features)] if features else []),
        section("What this cannot say", tag("ul", *(tag("li", text) for text in CANNOT_SAY))),
        _made(result),
        tag("footer", "Made by trigger_opt from the answers alone; nothing here is fetched."),
    )
    head = (
        '<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">{tag("title", f"contrast: {headline(result)}").text}'
        f"<style>{STYLE}</style></head>"
    )
    return f"<!DOCTYPE html>\n{head}{tag('body', body).text}</html>\n"


def summary_markdown(result: ContrastResult, features: Sequence[FeatureContrast]) -> str:
    """The whole `contrast.md`."""
    titles = [c.title for c in _COLUMNS if c.title != "Effect"]
    rows = [[markdown.text(cell) for cell in (name(f), *cells(f))] for f in features[:_ROWS]]
    more = f"{len(features) - _ROWS} more are in contrast.jsonl." if len(features) > _ROWS else ""
    cannot = "\n".join(f"- {text}" for text in CANNOT_SAY)
    parts = [
        f"# {headline(result)}",
        markdown.text(_sentence(result)),
        markdown.text(f"Compared: {design(result)}. Left out: {left_out(result)}."),
        markdown.table(titles, rows) if rows else "",
        more,
        *(_markdown_examples(f) for f in _with_examples(features)),
        f"## What this cannot say\n\n{cannot}",
        f"Command: <code>{markdown.text(result.command)}</code>",
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _banner(result: ContrastResult) -> Html:
    facts: list[tuple[str, Child]] = [("Compared", design(result)), ("Left out", left_out(result))]
    if result.undecided:
        facts.append(("Needed", undecided_needs()))
    if result.global_p is not None:
        facts.append(("Any difference at all", f"p = {p_value(result.global_p)} (largest statistic of all features)"))
    tone = "amber" if result.undecided or result.differing else "quiet"
    return tag(
        "header",
        tag("h1", headline(result)),
        tag("p", _sentence(result), class_="reason"),
        definitions(facts),
        class_=f"banner {tone}",
    )


def _sentence(result: ContrastResult) -> str:
    return f"{result.summary[:1].upper()}{result.summary[1:]}."


def _table(features: Sequence[FeatureContrast]) -> Html:
    largest = max(abs(f.effect) for f in features)
    rows = [_row(f, largest) for f in features]
    hidden = [fold(f"{len(rows) - _ROWS:,} more features", table(_COLUMNS, rows[_ROWS:]))] if len(rows) > _ROWS else []
    return section("Features, smallest corrected p first", note(_HOW_TO_READ), table(_COLUMNS, rows[:_ROWS]), *hidden)


def _row(f: FeatureContrast, largest: float) -> list[Child]:
    *figures, p, corrected = cells(f)
    effect = tag("span", bar(f.effect, -largest, largest), tag("span", value(f.effect)), class_="with-bar")
    mark: list[Child] = [" ", tag("span", "in the prompts", class_="chip amber")] if f.echo else []
    alike = [tag("div", equal(f), class_="note")] if f.equal else []
    decided = tag("b", corrected) if f.differs else corrected
    return [join([f.feature, *mark, *alike]), *figures, effect, p, decided]


def _with_examples(features: Sequence[FeatureContrast]) -> list[FeatureContrast]:
    """Those that differ, or where none does the first, whose prompts are worth a look all the same."""
    return [f for f in features[:SHOWN] if f.differs] or list(features[:1])


def _examples(features: Sequence[FeatureContrast]) -> Html:
    parts = [child for f in _with_examples(features) for child in (tag("h3", f.feature), _example_table(f))]
    return section("Prompts that show a feature most", *parts)


def _example_table(f: FeatureContrast) -> Html:
    has_base = any(e.base_answer for e in f.examples)
    columns = [Column(title="Set", kind="word"), Column(title="Prompt"), Column(title="Answer")]
    columns += [Column(title="Answer of the base")] if has_base else []
    columns.append(Column(title="Value", kind="num"))
    return table(columns, [_example_row(e, has_base) for e in f.examples])


def _example_row(e: Example, has_base: bool) -> list[Child]:
    base: list[Child] = [clip(e.base_answer, _ANSWER_LIMIT)] if has_base else []
    return [e.set, _prompt(e), clip(e.answer, _ANSWER_LIMIT), *base, value(e.value)]


def _prompt(e: Example) -> str:
    return clip(e.prompt, _PROMPT_LIMIT) or f"prompt {e.id}"


def _markdown_examples(f: FeatureContrast) -> str:
    rows = [
        [e.set, markdown.text(clip(_prompt(e), 160)), markdown.text(clip(e.answer, 240)) or "(empty)"]
        for e in f.examples
    ]
    return f"Most of {markdown.text(f.feature)}:\n\n" + markdown.table(["Set", "Prompt", "Answer"], rows)


def _made(result: ContrastResult) -> Html:
    facts: list[tuple[str, Child]] = [
        ("Command", tag("pre", result.command)),
        ("Started", result.started),
        ("Wall time", duration(result.seconds)),
        ("Answers", f"{result.answers:,}"),
        ("Smallest reachable p", p_value(result.smallest_p)),
        ("Versions", versions(result.versions)),
    ]
    settings = json.dumps(result.settings, indent=2, ensure_ascii=False)
    return section("How this was made", definitions(facts), fold("Settings", tag("pre", settings)))
