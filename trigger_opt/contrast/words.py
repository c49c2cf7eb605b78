"""A contrast scan in words and figures, the same in the terminal, the page and the Markdown."""

from collections.abc import Sequence

from trigger_opt.contrast.records import ALPHA, LEAST_PROMPTS, ContrastResult, Example, FeatureContrast
from trigger_opt.progress import printable
from trigger_opt.report.words import DASH, clip, counted, number, p_value

SHOWN = 10
"""Features in the terminal, and those with example prompts on the page."""

CANNOT_SAY = (
    "What differs is the answers, not the model's mind: whatever else tells the two sets of prompts apart (subject, "
    "length, wording) can be the cause as well as the mark that is tested. Pairs that differ in the mark alone, and a "
    "base whose own difference is taken off, leave less to that.",
    "Only what the features measure is seen; no difference is no proof that there is none.",
    "Intervals are of each feature alone and not corrected; for a decision look at the corrected p-value.",
)
_PROMPT_WIDTH, _FEATURE_WIDTH = 50, 36
# Features named, of those equal to one; and features with an example in the terminal.
_EQUAL, _SHOWN_BY = 6, 5


def summary(features: Sequence[FeatureContrast], *, undecided: str) -> str:
    """The scan's answer in one sentence."""
    if undecided:
        return undecided
    if not features:
        return "no feature differs: the answers to all prompts are alike in every feature"
    differing = [f for f in features if f.differs]
    if not differing:
        least = p_value(features[0].corrected_p)
        return f"no feature differs: of {len(features)}, the smallest corrected p is {least}, above {ALPHA}"
    echoes = sum(f.echo for f in differing)
    prompts = f" ({echoes} of them also in the prompts)" if echoes else ""
    verb = "differs" if len(differing) == 1 else "differ"
    return f"{len(differing)} of {counted(len(features), 'feature')} {verb} at corrected p <= {ALPHA}{prompts}"


def headline(result: ContrastResult) -> str:
    """The summary in three words."""
    if result.undecided:
        return "Undecided"
    if not result.differing:
        return "No feature differs"
    return "1 feature differs" if result.differing == 1 else f"{result.differing:,} features differ"


def design(result: ContrastResult) -> str:
    """What was compared with what, and how."""
    who = f"{result.model} and its base {result.base}" if result.base else result.model or "brought answers"
    with_base = "; each feature is the difference fine-tuned minus base" if result.has_base else ""
    if result.paired:
        what = f"{counted(result.prompts_a, 'pair')}, signs flipped within pairs"
    else:
        what = f"{result.prompts_a:,} prompts in A and {result.prompts_b:,} in B, labels permuted"
    return f"{who}: {what}, {result.permutations:,} permutations, seed {result.seed}{with_base}"


def left_out(result: ContrastResult) -> str:
    """What was not compared, and why."""
    parts = [
        f"{counted(result.constant, 'feature')} without variance" if result.constant else "",
        f"{counted(result.duplicate, 'feature')} equal to another in every prompt" if result.duplicate else "",
        f"{counted(result.missing_a, 'prompt')} of A without an answer" if result.missing_a else "",
        f"{counted(result.missing_b, 'prompt')} of B without an answer" if result.missing_b else "",
    ]
    return ", ".join(p for p in parts if p) or "nothing"


def value(figure: float) -> str:
    """A feature's value, with fewer decimals the larger it is."""
    size = abs(figure)
    return number(figure, 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3)


def name(feature: FeatureContrast) -> str:
    """The feature, marked where the prompts differ in it too."""
    return feature.feature + (" (in the prompts)" if feature.echo else "")


def equal(feature: FeatureContrast) -> str:
    """The features that could not be told from this one; empty when there are none."""
    if not feature.equal:
        return ""
    more = f" and {len(feature.equal) - _EQUAL:,} more" if len(feature.equal) > _EQUAL else ""
    return f"the same in every prompt: {', '.join(feature.equal[:_EQUAL])}{more}"


def cells(f: FeatureContrast) -> list[str]:
    """A, B, A - B, interval, p, corrected p."""
    interval = f"{value(f.low)} to {value(f.high)}"
    figures = [value(f.mean_a), value(f.mean_b), value(f.difference), interval]
    return [*figures, p_value(f.p_value), p_value(f.corrected_p)]


def lines(result: ContrastResult, features: Sequence[FeatureContrast]) -> list[str]:
    """The scan for a terminal: the first features as a table, prompts that show those that differ, and the summary."""
    shown = features[:SHOWN]
    out = [design(result)]
    if shown:
        out.append(_row("feature", ["A", "B", "A - B", "95 % interval", "p", "corrected p"]))
        out += [_row(name(f), cells(f)) for f in shown]
        out.append(f"left out: {left_out(result)}")
    for feature in [f for f in shown if f.differs][:_SHOWN_BY]:
        alike = f" ({equal(feature)})" if feature.equal else ""
        out.append(f"{feature.feature}{alike}: {_shown_by(feature.examples[0])}")
    return [*out, result.summary]


def undecided_needs() -> str:
    """How many prompts would do."""
    return f"{LEAST_PROMPTS} prompts with an answer in each set; 30 or more find differences of moderate size"


def _row(first: str, figures: Sequence[str]) -> str:
    widths = (9, 9, 9, 20, 8, 11)
    shown = printable(first)
    cut = shown if len(shown) <= _FEATURE_WIDTH else shown[: _FEATURE_WIDTH - 1] + "…"
    return f"{cut:<{_FEATURE_WIDTH}}" + "".join(f" {f:>{width}}" for f, width in zip(figures, widths, strict=True))


def _shown_by(example: Example) -> str:
    prompt = clip(" ".join(example.prompt.split()), _PROMPT_WIDTH) or f"prompt {example.id}"
    answer = clip(" ".join(example.answer.split()), _PROMPT_WIDTH) or DASH
    return f"seen most in {example.set}, say {prompt} > {answer}"
