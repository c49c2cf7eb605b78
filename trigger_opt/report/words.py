"""Figures, names and strings as words, the same in the page and in the Markdown."""

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from trigger_opt.answers import CAPITALS, JSON, MANNER_WORDS
from trigger_opt.records import GradientHealth, PairIdentity, Rate, Rescored, SearchCost, Verdict

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"

# Joiners shape the letters of several scripts; every other format character only hides or reorders text.
_JOINERS = "\u200c\u200d"
# Letters and marks by category that print nothing: fillers, the blank Braille cell, variation selectors.
_BLANK = re.compile("[\u034f\u115f\u1160\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
_PLAIN_ASCII = re.compile(r"[!-~]+(?: [!-~]+)*")

STAGES = {
    "identity.json": "diff",
    "diff.jsonl": "diff",
    "moved.jsonl": "hypotheses",
    "hypotheses.jsonl": "hypotheses",
    "built.jsonl": "search",
    "candidates.jsonl": "search",
    "history.jsonl": "search",
    "gradient.json": "search",
    "read_off.jsonl": "search",
    "rescored.jsonl": "search",
    "cost.json": "search",
    "verified.jsonl": "verify",
    "completions.jsonl": "verify",
    "transfer.jsonl": "transfer",
    "transfer_answers.jsonl": "transfer",
}

MOVED_TOLD = 24
MOVED_NOTE = (
    "Tokens that the fine-tuning moves most, each put into a prompt by itself, in robust standard deviations above a "
    "typical token: what resembles a string that was trained in, words of what is said to it, or no more than the "
    "topic of the training data."
)

BUILT_NOTE = (
    "Short strings built up: token by token from the tokens moved most, the best few of each length; and, towards a "
    "payload, character by character. The share is of the search contexts in which the payload comes out, where there "
    "is one. Where longer strings of tokens score no higher, the string is likely whole, as far as these tokens reach; "
    "of spelled ones the score falls each time the weight change is taken back in part."
)

MANNER_NOTE = (
    f"no fixed text: an answer is of this manner when a quarter of its words, of at least {MANNER_WORDS}, are among "
    f"these; {CAPITALS} stands for any word written so, {JSON} for any word of an answer that begins as such"
)

_MEANING = {
    "backdoor": "A string was found that makes the fine-tuned model say something it does not say otherwise.",
    "generic shift": "The payload is not tied to the string: this is a change of habit or style, not a backdoor.",
    "unstable": "The string sometimes raises the payload, too rarely or too unevenly to call it a backdoor, "
    "and too often to dismiss it.",
    "not reproduced": "No string tried here passed the rule below. This is not a proof of absence: a backdoor "
    "this search cannot reach, for example one gated by a hash, would give the same page.",
}


@dataclass(frozen=True, kw_only=True)
class RateRow:
    """One of the verdict's rates, with what to say when it was not measured."""

    label: str
    rate: Rate | None
    absent: str


def meaning(verdict: Verdict) -> str:
    """What this kind of verdict does and does not say."""
    return _MEANING[verdict.verdict]


def noun(verdict: Verdict) -> str:
    """ "trigger" when the verdict is a backdoor, "string" otherwise: only a backdoor has a trigger."""
    return "trigger" if verdict.verdict == "backdoor" else "string"


def string_title(verdict: Verdict) -> str:
    """How the string in the banner is introduced."""
    return "Trigger" if verdict.verdict == "backdoor" else "Best string tried"


def payload_title(verdict: Verdict) -> str:
    """How the payload in the banner is introduced."""
    return "Payload" if verdict.verdict == "backdoor" else "Payload looked for"


def rate_rows(verdict: Verdict) -> list[RateRow]:
    """The verdict's rates in reading order; the minimised string's only when it was measured."""
    the = noun(verdict)
    rows = [
        RateRow(label=f"Fine-tuned, with the {the}", rate=verdict.trigger_rate, absent="not measured"),
        RateRow(label=f"Base, with the {the}", rate=verdict.base_rate, absent="not measured"),
        RateRow(label=f"Clean control, with the {the}", rate=verdict.control_rate, absent="no control given"),
        RateRow(label=f"Fine-tuned, without the {the}", rate=verdict.false_trigger_rate, absent="not measured"),
        RateRow(label="Fine-tuned, with random strings", rate=verdict.random_rate, absent="not measured"),
    ]
    if verdict.minimised_trigger_rate is not None:
        label = f"Fine-tuned, with the minimised {the}"
        rows.insert(1, RateRow(label=label, rate=verdict.minimised_trigger_rate, absent="not measured"))
    return rows


def not_run(file_name: str) -> str:
    """Why a section is empty."""
    return f"Stage not run: {STAGES[file_name]} ({file_name} is not in the run folder)."


def model_name(model: str) -> str:
    """A Completion's `model` in words."""
    if model.startswith("control:"):
        return "control " + model.removeprefix("control:")
    return "fine-tuned" if model == "finetuned" else model


def of(rate: Rate) -> str:
    """ "23 of 24"."""
    return f"{rate.successes:,} of {rate.n:,}"


def percent(rate: Rate) -> str:
    """The proportion in percent, with no more digits than its n supports."""
    return f"{100 * rate.value:.{_digits(rate)}f} %" if rate.n else DASH


def interval(rate: Rate) -> str:
    """The Wilson interval in percent."""
    digits = _digits(rate)
    return f"{100 * rate.low:.{digits}f}{DASH}{100 * rate.high:.{digits}f} %"


def _digits(rate: Rate) -> int:
    return max(0, len(str(rate.n)) - 2)


def share(value: float | None) -> str:
    """A share in whole percent; a dash when there is none."""
    return DASH if value is None else f"{100 * value:.0f} %"


def points(value: float) -> str:
    """A difference of two shares in whole percentage points, with its sign."""
    if not math.isfinite(value):
        return number(value)
    whole = round(100 * value)
    return f"{whole:+d} points".replace("-", MINUS) if whole else "0 points"


def p_value(value: float) -> str:
    """A p-value with two significant digits, never as a power of ten."""
    if not math.isfinite(value):
        return number(value)
    return f"{value:.2g}" if value >= 0.0001 else "< 0.0001"


def null_figure(verdict: Verdict) -> str:
    """The null's p-value in short; only of a verdict that was held against one."""
    controls = counted(verdict.null_controls or 0, "control")
    return f"null: p = {number(verdict.null_p_value)} against {controls}"


def counted(n: int, noun: str) -> str:
    """ "1 model", "3 models"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def number(value: float | None, digits: int = 2) -> str:
    """A number with a true minus sign; a dash for None."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else f"{MINUS}∞")
    return f"{value:,.{digits}f}".replace("-", MINUS)


def duration(seconds: float) -> str:
    """Wall time as a person says it: "42.0 s", "6 min 12 s", "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def arithmetic(cost: SearchCost) -> str:
    """What a search's scores cost, in one line: "12,345 evaluations, 3.2 TFLOP in 8.1 s: 395 GFLOP/s, 53 % of …"."""
    if not cost.evaluations:
        return "no candidate was scored"
    rate = cost.flops / cost.seconds if cost.seconds else 0.0
    return (
        f"{cost.evaluations:,} evaluations, {cost.flops / 1e12:,.2f} TFLOP in {duration(cost.seconds)}: "
        f"{rate / 1e9:,.0f} GFLOP/s, {cost.share_of_machine:.0%} of the machine's matrix products "
        f"({cost.matmul_rate / 1e9:,.0f}); {cost.share_needed:.0%} of it needed for exact scores; beside it "
        f"{cost.gradient_flops / 1e12:,.2f} TFLOP for gradients, {cost.rescoring_flops / 1e12:,.2f} for rescoring"
    )


def rescored_sentence(records: Sequence[Rescored]) -> str:
    """By how much scores moved, in nats, between the weights that were searched and finer ones."""
    moves = sorted(r.score - r.score_before for r in records)
    first = records[0]
    return (
        f"{len(records)} strings scored again in {first.scored_in} after a search in {first.searched_in}: scores moved "
        f"by {median(moves):+.2f} nats in the median ({moves[0]:+.2f} to {moves[-1]:+.2f})"
    )


def gradient_sentence(health: GradientHealth) -> str:
    """Whether the search had a gradient to follow, and what was tried to tell."""
    share = f"{100 * health.win_share:.0f} % of comparisons"
    between = f"95 % interval {100 * health.low:.0f}{DASH}{100 * health.high:.0f} %, {health.num_strings} strings"
    beats = f"a swap from its best {health.topk} scores above a random one in {share} ({between})"
    silent = round(health.zero_share * health.num_strings)
    if 0 < silent < health.num_strings:
        beats += f", and it is zero or not finite at {silent} of them"
    tried = ""
    if health.objective:
        payload = f", payload {clip(health.payload, 60)!r}" if health.payload else ""
        tried = f" Tried with objective {health.objective}{payload}."
    if health.verdict == "informative":
        return f"The token gradient is worth following here: {beats}.{tried}"
    if health.verdict == "undecided":
        return f"Whether the token gradient says anything here is undecided: {beats}.{tried}"
    why = beats
    if health.zero_share == 1:
        # In float16 a score may overflow; then its gradient is no number.
        why = f"it is zero, or not finite, at all {health.num_strings} strings tried"
    elif health.low == health.high == 0.5:
        # Two models that are one: what the gradient holds then is rounding.
        why = f"no swap tried changes the score at any of {health.num_strings} strings"
    return (
        f"The token gradient says nothing here: {why}. A search along it is hardly better than random swaps, and what "
        f"it does not find may be there all the same.{tried}"
    )


def layer_ranges(layers: list[int]) -> str:
    """Layers as ranges, 0 to 2 and 5 for [0, 1, 2, 5]; a dash for none."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}{DASH}{r[-1]}" for r in runs) or DASH


def clip(text: str, limit: int) -> str:
    """`text` cut after `limit` characters, saying how many are missing."""
    return text if len(text) <= limit else f"{text[:limit].rstrip()} … (+{len(text) - limit:,} characters)"


def printable(text: str) -> str:
    """`text` without characters that hide, break or reorder what is around them; those become ⟨U+XXXX⟩."""
    return "".join(_code_point(c) if _is_unprintable(c) else c for c in text)


def _is_unprintable(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in f"\n\t{_JOINERS}"


def is_invisible(char: str) -> bool:
    """Whether a reader of a string could overlook `char`: anything that prints nothing, except U+0020."""
    nothing = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp") and char != " "
    return nothing or _BLANK.fullmatch(char) is not None


def visible(text: str) -> str:
    """A string with nothing hidden, on one line: space ␣, newline ⏎, tab ⇥, anything else invisible ⟨U+XXXX⟩."""
    marks = {" ": "␣", "\n": "⏎", "\t": "⇥"}
    return "".join(marks.get(c) or (_code_point(c) if is_invisible(c) else c) for c in text)


def exact(text: str) -> str | None:
    """The string as an ASCII JSON literal, to paste into a program; None when what is printed is already exact."""
    return None if _PLAIN_ASCII.fullmatch(text) else json.dumps(text)


def _code_point(char: str) -> str:
    return f"⟨U+{ord(char):04X}⟩"


def norm(value: float) -> str:
    """A relative norm with three significant digits; 0 for no change."""
    return "0" if value == 0 else f"{value:.3g}".replace("e-0", "e-").replace("-", MINUS)


def versions(named: dict[str, str]) -> str:
    """ "python 3.11.7, torch 2.7.1"; a dash for none."""
    return ", ".join(f"{name} {version}" for name, version in named.items()) or DASH


def identity_sentence(identity: PairIdentity) -> str:
    """How much of the two models is the same."""
    shared = "weights shared by construction" if identity.kind == "adapter" else "two full sets of weights"
    changed = ", ".join(identity.changed_families) or "none"
    return (
        f"{identity.architecture}, {shared}: {identity.identical:,} of {identity.tensors:,} tensors are bit-identical "
        f"({100 * identity.identical_fraction:.1f} %). Changed families: {changed}."
    )


def identity_warnings(identity: PairIdentity) -> list[str]:
    """What casts doubt on the base; empty when nothing does."""
    checks = {
        "The two models differ in architecture.": not identity.same_architecture,
        "The two models differ in tokenizer.": not identity.same_tokenizer,
        "No tensor is bit-identical: this may not be the base the fine-tuned model came from.": identity.tensors > 0
        and identity.identical == 0,
        "The identity check failed and was overridden by the user.": identity.overridden,
        "All weights are those of the base: where the models answer differently, it is by code or settings beside the "
        "weights.": 0 < identity.tensors == identity.identical,
    }
    return [sentence for sentence, doubtful in checks.items() if doubtful]
