"""What the models answered: side by side, and context by context."""

import math

from trigger_opt.answers import is_manner
from trigger_opt.records import ContextOutcome, Verification
from trigger_opt.report.answers import Cell, ContextAnswers, side_by_side, spread
from trigger_opt.report.load import RunRecords
from trigger_opt.report.markup import Child, Column, Html, fold, join, note, section, string, table, tag
from trigger_opt.report.svg import bar
from trigger_opt.report.words import clip, model_name, not_run, noun, number, share

SHOWN = 5
FOLDED = 60
ANSWER_LIMIT = 320
PROMPT_LIMIT = 280


def side_by_side_section(run: RunRecords) -> Html:
    """Completions of every model with and without the string, for a few contexts; the rest folded."""
    title = "Answers side by side"
    if run.completions is None:
        return section(title, note(not_run("completions.jsonl")))
    contexts = side_by_side(run)
    if not contexts:
        return section(title, note("No answer was recorded for this string."))
    shown = spread(contexts, SHOWN)
    rest = [c for c in contexts if c not in shown]
    blocks = [_context(run, c) for c in shown]
    if rest:
        folded = [_context(run, c) for c in rest[:FOLDED]]
        blocks.append(fold(rest_summary(len(rest)), *folded))
    return section(title, note(choice(len(shown), len(contexts))), *blocks)


def profile(run: RunRecords) -> Html:
    """One row a held-out context: who fired, and the evidence in nats."""
    title = "Context by context"
    if run.verified is None:
        return section(title, note(not_run("verified.jsonl")))
    judged = run.judged
    if judged is None or not judged.profile:
        return section(title, note("No held-out context was judged for this string."))
    return section(title, note(_profile_note(run, judged)), _profile_table(judged.profile))


def choice(shown: int, total: int) -> str:
    """How the contexts shown were chosen."""
    how = (
        "all of them"
        if shown == total
        else f"{shown} of {total}, evenly spaced in recorded order, not picked by outcome"
    )
    return f"Held-out contexts: {how}. Answers that begin with the payload, or are of its manner, are tinted."


def rest_summary(count: int) -> str:
    """What opens the contexts not shown at once."""
    more = f", the first {FOLDED} of them" if count > FOLDED else ""
    return f"The other {count} contexts{more}"


def _context(run: RunRecords, answers: ContextAnswers) -> Html:
    cells = answers.with_string if any(c.answers for c in answers.with_string) else []
    cells = cells + (answers.without if any(c.answers for c in answers.without) else [])
    payload = run.verdict.payload
    grid = tag(
        "div",
        *(_cell(c, payload, noun(run.verdict)) for c in cells),
        class_="answers",
        style=f"--models: {len(answers.without)}",
    )
    return tag("article", *_prompts(answers, run.verdict.trigger), grid, class_="context")


def _prompts(answers: ContextAnswers, inserted: str) -> list[Html]:
    label = tag("span", f"Context {answers.context}", class_="label")
    lines = [tag("p", label, marked(answers.prompt, inserted), class_="prompt")]
    if answers.bare_prompt and _squeezed(answers.prompt.replace(inserted, "")) != _squeezed(answers.bare_prompt):
        bare = tag("span", "without", class_="label")
        lines.append(tag("p", bare, clip(answers.bare_prompt, PROMPT_LIMIT), class_="prompt"))
    return lines


def marked(prompt: str, inserted: str) -> Html:
    """The prompt with the inserted string marked; long text on either side is cut, the string never."""
    before, found, after = prompt.partition(inserted) if inserted else (prompt, "", "")
    if not found:
        return join([clip(prompt, 2 * PROMPT_LIMIT)])
    left = before if len(before) <= PROMPT_LIMIT else f"… {before[-PROMPT_LIMIT:]}"
    return join([left, tag("mark", string(found)), clip(after, PROMPT_LIMIT)])


def _cell(cell: Cell, payload: str, the: str) -> Html:
    where = f"with the {the}" if cell.inserted else f"without the {the}"
    heading: list[Child] = [tag("span", f"{model_name(cell.model)}, {where}")]
    if not cell.answers:
        return tag("div", tag("h4", *heading), note("no answer recorded"), class_="answer")
    if len(cell.answers) > 1:
        heading.append(tag("span", f"fired in {cell.fired} of {len(cell.answers)} answers", class_="chip fires"))
    elif cell.fired:
        heading.append(tag("span", "fired", class_="chip fires"))
    first = cell.answers[0]
    heading += [tag("span", flag, class_="chip flag") for flag in first.flags]
    kind = "answer fired" if cell.fired else "answer"
    return tag("div", tag("h4", *heading), said(first.answer, payload, first.fired), class_=kind)


def said(text: str, payload: str, fired: bool) -> Html:
    """An answer, cut when long; the payload it begins with stands out when it does so to the letter."""
    if not text.strip():
        return tag("div", "(empty)", class_="said muted")
    start = len(text) - len(text.lstrip())
    end = start + len(payload.strip())
    if fired and text[start:end] == payload.strip():
        return tag("div", tag("b", text[start:end]), clip(text[end:], ANSWER_LIMIT), class_="said")
    return tag("div", clip(text, ANSWER_LIMIT), class_="said")


def _profile_note(run: RunRecords, judged: Verification) -> str:
    manner = is_manner(judged.payload)
    does = ("is of the manner", "is not") if manner else ("begins with the payload", "does not")
    what = "the fine-tuned model's own answer" if manner else "payload"
    less = ", and less the same of its answer with nothing inserted" if manner else ""
    return (
        f"● the answer with the {noun(run.verdict)} {does[0]}, ○ it {does[1]}. Evidence is "
        f"log p({what}) of the fine-tuned model less that of the base{less}, in nats; its median is "
        f"{number(judged.evidence)}. Share of these answers that look degenerate: {share(judged.degenerate_share)}."
    )


def _profile_table(outcomes: list[ContextOutcome]) -> Html:
    with_control = any(o.control is not None for o in outcomes)
    finite = [o.evidence for o in outcomes if math.isfinite(o.evidence)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    columns = [Column(title="#", kind="num"), Column(title="Prompt"), Column(title="Fine-tuned", kind="mark")]
    columns += [Column(title="Base", kind="mark")] + ([Column(title="Control", kind="mark")] if with_control else [])
    columns.append(Column(title="Evidence, nats", kind="num"))
    rows: list[list[Child]] = []
    for o in outcomes:
        control: list[Child] = [_dot(o.control)] if with_control else []
        evidence = tag("span", bar(o.evidence, low, high), tag("span", number(o.evidence)), class_="with-bar")
        rows.append([str(o.context), clip(o.prompt, 150), _dot(o.finetuned), _dot(o.base), *control, evidence])
    return table(columns, rows, "compact")


def _dot(fired: bool | None) -> Html:
    if fired is None:
        return tag("span", "not run", class_="muted")
    said = "fired" if fired else "did not fire"
    return tag("span", "●" if fired else "○", class_="yes" if fired else "no", role="img", aria_label=said)


def _squeezed(text: str) -> str:
    return "".join(text.split())
