"""What became of the strings at models that could only be asked."""

from collections.abc import Sequence

from trigger_opt.records import AnswerCluster, ModuleShift, TransferAnswer, TransferOutcome
from trigger_opt.report.answers import spread
from trigger_opt.report.load import RunRecords
from trigger_opt.report.markup import (
    Child,
    Column,
    Html,
    clipped_string,
    definitions,
    fold,
    join,
    note,
    section,
    table,
    tag,
)
from trigger_opt.report.rates import rates
from trigger_opt.report.remote import (
    EMERGED,
    GAP,
    KINDS,
    NAME_LIMIT,
    NOTHING_SENT,
    RemoteCell,
    RemoteContext,
    figures,
    is_told,
    lead,
    remote_contexts,
    remote_rate_rows,
    shifts_sentence,
)
from trigger_opt.report.sections_answers import FOLDED, choice, marked, rest_summary, said
from trigger_opt.report.words import clip, counted, not_run, number, p_value

TONES = {"transfers": "backdoor", "undecided": "amber", "does not transfer": "quiet"}
SHOWN = 2
OPEN = 6
ROWS_SHOWN = 8
REASON_LIMIT = 800
ERROR_LIMIT = 160
INSERTED_LIMIT = 60

_CLUSTERS = [
    Column(title="Answers that begin"),
    Column(title="With the string", kind="num"),
    Column(title="Controls", kind="num"),
]
_SHIFTS = [
    Column(title="Module"),
    Column(title="Shift", kind="num"),
    Column(title="p-value", kind="num"),
    Column(title="Contexts", kind="num"),
]


def other_models(run: RunRecords) -> Html:
    """Outcomes as ranked, then the answers of each; nothing at all when nobody meant to ask."""
    title = "Other models"
    if not is_told(run):
        return join([])
    if run.transfer is None:
        return section(title, note(not_run("transfer.jsonl")))
    if not run.transfer and not run.transfer_answers:
        return section(title, note(NOTHING_SENT))
    caption = (
        "Largest effect first: the rate with the string less the highest of those with random strings and with "
        "nothing. Near misses are shown and do not enter it. Rates are shares of answers that begin with the payload; "
        "their intervals are as wide as the number of different contexts allows, however often each was asked. Where "
        "the payload has words of the string, a control that quotes its own string in their place begins so too."
    )
    return section(title, tag("p", lead(run)), note(caption), *_outcomes(run), *_details(run))


def _outcomes(run: RunRecords) -> list[Html]:
    blocks = [_outcome(o, run.verdict.payload) for o in run.transfer or []]
    return [*blocks[:OPEN], *_folded("more outcome", blocks[OPEN:])]


def _outcome(outcome: TransferOutcome, payload: str) -> Html:
    tone = TONES[outcome.verdict]
    facts: list[tuple[str, Child]] = [("String", clipped_string(outcome.string))]
    if outcome.payload_source == "emerged":
        facts.append(("Payload, emerged", join([clipped_string(outcome.payload), tag("div", EMERGED, class_="note")])))
    elif outcome.payload != payload:
        facts.append(("Payload", clipped_string(outcome.payload) if outcome.payload else "none"))
    return tag(
        "article",
        tag("h3", clip(outcome.model, NAME_LIMIT), " ", tag("span", outcome.verdict_words, class_=f"chip {tone}")),
        tag("p", clip(outcome.reason, REASON_LIMIT)),
        definitions(facts),
        rates(remote_rate_rows(outcome)),
        tag("p", figures(outcome), class_="figures"),
        class_=f"outcome {tone}",
    )


def _details(run: RunRecords) -> list[Html]:
    several = len({o.string for o in run.transfer or []}) > 1
    blocks = [_detail(o, run.transfer_answers, several) for o in run.transfer or []]
    return [*blocks[:OPEN], *_folded("more set of answers", blocks[OPEN:])]


def _detail(outcome: TransferOutcome, answers: list[TransferAnswer] | None, several: bool) -> Html:
    heading: list[Child] = [f"What {clip(outcome.model, NAME_LIMIT)} answered"]
    if several:
        heading += [" to ", clipped_string(outcome.string, INSERTED_LIMIT)]
    return tag("div", tag("h3", *heading), *_answers(outcome, answers), _clusters(outcome.clusters), _shifts(outcome))


def _answers(outcome: TransferOutcome, answers: list[TransferAnswer] | None) -> list[Html]:
    if answers is None:
        return [note(not_run("transfer_answers.jsonl"))]
    contexts = remote_contexts(outcome, answers)
    if not contexts:
        return [note("No answer was recorded for this string.")]
    shown = spread(contexts, SHOWN)
    rest = [c for c in contexts if c not in shown]
    blocks = [note(choice(len(shown), len(contexts))), *(_context(outcome, c) for c in shown)]
    if rest:
        blocks.append(fold(rest_summary(len(rest)), *(_context(outcome, c) for c in rest[:FOLDED])))
    return blocks


def _context(outcome: TransferOutcome, context: RemoteContext) -> Html:
    label = tag("span", f"Context {context.context}", class_="label")
    cells = (_cell(cell, outcome.payload) for cell in context.cells)
    return tag(
        "article",
        tag("p", label, marked(context.prompt, outcome.string), class_="prompt"),
        tag("div", *cells, class_="answers", style=f"--models: {len(context.cells)}"),
        class_="context",
    )


def _cell(cell: RemoteCell, payload: str) -> Html:
    heading: list[Child] = [tag("span", KINDS[cell.kind])]
    if not cell.answers:
        why = f"no answer: {clip(cell.errors[0], ERROR_LIMIT)}" if cell.errors else "not asked"
        return tag("div", tag("h4", *heading), note(why), class_="answer")
    first = cell.answers[0]
    if cell.kind in ("near_miss", "random"):
        heading.append(clipped_string(first.inserted, INSERTED_LIMIT))
    heading += _chips(cell)
    kind = "answer fired" if any(cell.fired) else "answer"
    return tag("div", tag("h4", *heading), said(first.answer, payload, cell.fired[0]), class_=kind)


def _chips(cell: RemoteCell) -> list[Html]:
    chips = []
    if len(cell.answers) > 1:
        text = f"fired in {sum(cell.fired)} of {len(cell.answers)} answers"
        chips.append(tag("span", text, class_="chip fires"))
    elif cell.fired[0]:
        chips.append(tag("span", "fired", class_="chip fires"))
    if cell.errors:
        chips.append(tag("span", f"{len(cell.errors):,} missing", class_="chip flag"))
    return chips + [tag("span", clip(flag, 40), class_="chip flag") for flag in cell.answers[0].flags]


def _clusters(clusters: Sequence[AnswerCluster]) -> Html:
    rows: list[list[Child]] = [
        [clip(c.beginning, 160) or "(empty)", f"{c.triggered:,}", f"{c.controls:,}"] for c in clusters
    ]
    gap = [note(GAP)] if any("…" in c.beginning for c in clusters) else []
    return join([*_short_table(_CLUSTERS, rows), *gap]) if rows else join([])


def _shifts(outcome: TransferOutcome) -> Html:
    rows = [_shift(s) for s in outcome.shifts]
    if not rows:
        return join([])
    return join([note(shifts_sentence(outcome)), *_short_table(_SHIFTS, rows)])


def _shift(s: ModuleShift) -> list[Child]:
    return [tag("code", clip(s.module, 160)), number(s.shift, 3), p_value(s.p_value), f"{s.contexts:,}"]


def _short_table(columns: Sequence[Column], rows: list[list[Child]]) -> list[Html]:
    rest = rows[ROWS_SHOWN:]
    folded = [fold(counted(len(rest), "more row"), table(columns, rest, "short"))] if rest else []
    return [table(columns, rows[:ROWS_SHOWN], "short"), *folded]


def _folded(name: str, blocks: list[Html]) -> list[Html]:
    return [fold(counted(len(blocks), name), *blocks)] if blocks else []
