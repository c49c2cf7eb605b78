"""What models without weights were asked and answered: as sentences, rates and contexts, the same in both formats."""

from collections.abc import Sequence
from dataclasses import dataclass

from trigger_opt.answers import fires, payload_words
from trigger_opt.records import TRANSFER_VERDICTS, Rate, TransferAnswer, TransferOutcome
from trigger_opt.report.load import RunRecords
from trigger_opt.report.words import RateRow, clip, counted, points, share

NAME_LIMIT = 80
NAMES_SHOWN = 8
KINDS = {
    "trigger": "with the string",
    "near_miss": "with a near miss",
    "random": "with a random string",
    "none": "with nothing inserted",
}
NOTHING_SENT = (
    "The stage ran and had nothing to send: no verified string has a verdict that is asked for, and none was given."
)
EMERGED = (
    "Found in the answers themselves: in one half of the contexts, and judged on the other half, which alone the "
    "rates count. It is a suspicion and no verdict: given as the payload, it can be judged in further contexts."
)

GAP = "A gap (…) stands for words of the string, or of what was inserted in its place."


@dataclass(frozen=True, kw_only=True)
class RemoteCell:
    """What one model said in one context to one kind of question; several answers when there were repeats.

    Attributes:
        kind: a key of `KINDS`.
        answers: by repeat; questions without an answer are left out. errors: why those have none.
        fired: of each answer, whether it begins with the payload.
    """

    kind: str
    answers: list[TransferAnswer]
    errors: list[str]
    fired: list[bool]


@dataclass(frozen=True, kw_only=True)
class RemoteContext:
    """One held-out context: a cell for each kind of question, in the order of `KINDS`.

    Attributes:
        prompt: the user's turn with the string; the first one asked when the string was not.
    """

    context: int
    prompt: str
    cells: list[RemoteCell]


def is_told(run: RunRecords) -> bool:
    """Whether a reader expects a word on other models: the stage left a file, or was to be run."""
    stages = run.info.config.get("stages") if run.info else None
    planned = isinstance(stages, list) and "transfer" in stages
    return planned or run.transfer is not None or run.transfer_answers is not None


def lead(run: RunRecords) -> str:
    """What was asked of whom, what came back, and how much that can show."""
    outcomes, answers = run.transfer or [], run.transfer_answers or []
    models = {o.model for o in outcomes} | {a.model for a in answers}
    strings = {o.string for o in outcomes} | {a.string for a in answers if a.kind != "none"}
    came = counted(sum(not a.error for a in answers), "answer") if run.transfer_answers is not None else "answers"
    were = "was" if len(models) == 1 else "were"
    return (
        f"{counted(len(models), 'model')} {were} asked with {counted(len(strings), 'string')} and with controls: "
        f"{came}, {_missing(run):,} missing. Such models can only be asked: their weights and probabilities are not "
        "known, so all that is said of each is transfers, does not transfer, or undecided, from text alone."
    )


def banner_line(outcomes: Sequence[TransferOutcome]) -> str:
    """Which models the strings transfer to, in one line; a model counts by its best string.

    Raises:
        ValueError: there is no outcome.
    """
    if not outcomes:
        raise ValueError("no outcome to speak of")
    best = {verdict: _listed(outcomes, verdict) for verdict in TRANSFER_VERDICTS}
    parts = [f"transfers to {best['transfers']}"] if best["transfers"] else []
    if best["does not transfer"]:
        parts.append(f"{'not to' if parts else 'does not transfer to'} {best['does not transfer']}")
    if best["undecided"]:
        parts.append(f"undecided for {best['undecided']}")
    return f"Other models: {'; '.join(parts)}."


def remote_rate_rows(outcome: TransferOutcome) -> list[RateRow]:
    """The rates of one outcome in reading order."""
    rates = [
        ("With the string", outcome.trigger_rate),
        ("With near misses of it", outcome.near_miss_rate),
        ("With random strings", outcome.random_rate),
        ("With nothing inserted", outcome.none_rate),
    ]
    return [RateRow(label=label, rate=_counted_rate(r), absent=_absent(r)) for label, r in rates]


def figures(outcome: TransferOutcome) -> str:
    """What else decided, in one line."""
    parts = [
        f"effect {points(outcome.effect)}",
        f"degenerate answers with the string {share(outcome.degenerate_share)}",
    ]
    if outcome.missing:
        parts.append(f"{counted(outcome.missing, 'question')} without an answer")
    if outcome.needs is not None:
        parts.append(f"about {counted(outcome.needs, 'more answer')} with the string could decide")
    return " · ".join([*parts, clip(outcome.server, NAME_LIMIT)])


def shifts_sentence(outcome: TransferOutcome) -> str:
    """How to read the p-values of an outcome that has shifts."""
    tested = len(outcome.shifts)
    threshold = 0.05 / tested
    below = sum(s.p_value < threshold for s in outcome.shifts)
    return (
        "Shift: how far the string moves a module's mean output, against random strings in the same contexts, in units "
        "of the mean norm there. The p-value tests whether the string moves the module the same way in all contexts, "
        "which any fixed string may, for the random strings differ from context to context: compare shifts between "
        f"strings, not to zero. The p-values are not corrected: {counted(tested, 'module')} tested, so the "
        f"Bonferroni threshold is 0.05/{tested} = {threshold:.6f}; {below:,} of {tested:,} below it."
    )


def remote_contexts(outcome: TransferOutcome, answers: Sequence[TransferAnswer]) -> list[RemoteContext]:
    """Every context in which the outcome's model was asked its string or a control, in order of context."""
    mine = [a for a in answers if a.model == outcome.model and (a.kind == "none" or a.string == outcome.string)]
    kinds = [k for k in KINDS if any(a.kind == k for a in mine)]
    by_context: dict[int, list[TransferAnswer]] = {}
    for answer in mine:
        by_context.setdefault(answer.context, []).append(answer)
    return [_one_context(outcome, kinds, i, by_context[i]) for i in sorted(by_context)]


def _one_context(
    outcome: TransferOutcome, kinds: list[str], context: int, asked: list[TransferAnswer]
) -> RemoteContext:
    cells = [_cell(outcome.payload, kind, [a for a in asked if a.kind == kind]) for kind in kinds]
    first = next((a for kind in kinds for a in asked if a.kind == kind), asked[0])
    return RemoteContext(context=context, prompt=first.prompt, cells=cells)


def _cell(payload: str, kind: str, asked: list[TransferAnswer]) -> RemoteCell:
    answered = sorted((a for a in asked if not a.error), key=lambda a: a.repeat)
    can_fire = bool(payload_words(payload))
    return RemoteCell(
        kind=kind,
        answers=answered,
        errors=[a.error for a in asked if a.error],
        fired=[can_fire and fires(payload, a.answer) for a in answered],
    )


def _missing(run: RunRecords) -> int:
    outcomes = run.transfer or []
    # A question with nothing inserted serves every string, so the sum over strings would count it more than once.
    least = sum(max(o.missing for o in outcomes if o.model == m) for m in {o.model for o in outcomes})
    return max(least, sum(bool(a.error) for a in run.transfer_answers or []))


def _models_at_best(outcomes: Sequence[TransferOutcome], verdict: str) -> list[str]:
    better = {"transfers": [], "undecided": ["transfers"], "does not transfer": ["transfers", "undecided"]}[verdict]
    reached = {o.model for o in outcomes if o.verdict in better}
    return list(dict.fromkeys(o.model for o in outcomes if o.verdict == verdict and o.model not in reached))


def _listed(outcomes: Sequence[TransferOutcome], verdict: str) -> str:
    models = _models_at_best(outcomes, verdict)
    more = f" and {len(models) - NAMES_SHOWN:,} more" if len(models) > NAMES_SHOWN else ""
    return ", ".join(_named(outcomes, model, verdict) for model in models[:NAMES_SHOWN]) + more


def _named(outcomes: Sequence[TransferOutcome], model: str, verdict: str) -> str:
    emerged = any(o.payload_source == "emerged" for o in outcomes if o.model == model and o.verdict == verdict)
    return clip(model, NAME_LIMIT) + (" (a payload of its own emerged)" if emerged and verdict == "undecided" else "")


def _counted_rate(rate: Rate | None) -> Rate | None:
    return rate if rate is not None and rate.n else None


def _absent(rate: Rate | None) -> str:
    return "not asked" if rate is None else "no answer"
