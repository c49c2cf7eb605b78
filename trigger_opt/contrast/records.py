"""What a contrast scan reads and writes, as frozen records; those in files are read back by `records.read_records`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

ALPHA = 0.05
"""A feature differs when its corrected p-value is at most this."""

LEAST_PROMPTS = 8
"""Prompts with an answer that each set needs before anything is compared."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One conversation to be answered.

    Attributes:
        id: unique in its set. named: the user gave the id; else it is the number of the line.
        text: the user's turn; empty where only answers were brought. system: the system prompt; None leaves the chat
            template's own default.
    """

    id: str
    named: bool
    text: str
    system: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt with its answers, repeats together: the unit that is permuted.

    Attributes:
        answers: of the model under judgement; none where it did not answer.
        base_answers: of the base; empty when there is no base.
        values: features of the prompt that no text shows, by name; of a pair already the difference.
    """

    prompt: Prompt
    answers: Sequence[str]
    base_answers: Sequence[str] = ()
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sets:
    """Both sets, prompts without an answer left out and counted.

    Attributes:
        paired: `a[i]` and `b[i]` are one pair. has_base: features are differences from the base's answers.
    """

    a: Sequence[Sample]
    b: Sequence[Sample]
    paired: bool
    has_base: bool
    missing_a: int = 0
    missing_b: int = 0


@dataclass(frozen=True, kw_only=True)
class AnswerLine:
    """One answer as a file holds it: what `--answers-a` and its sisters read. `id` is None where the user gave none."""

    id: str | None
    prompt: str
    system: str | None
    answer: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt that shows a feature.

    Attributes:
        set: "A" or "B". value: of the feature, as in `FeatureContrast`.
        base_answer: empty when there is no base.
    """

    set: str
    id: str
    prompt: str
    answer: str
    base_answer: str
    value: float


@dataclass(frozen=True, kw_only=True)
class FeatureContrast:
    """One feature of the answers, set A against set B.

    Attributes:
        equal: features with the same value in every prompt, which therefore were not compared again.
        mean_a, mean_b: over prompts, repeats averaged first; with a base, of fine-tuned minus base.
        difference: mean_a - mean_b. low, high: its 95 % percentile bootstrap interval, not corrected.
        effect: difference in standard deviations of all prompts' values.
        statistic: in [-1, 1], by which features are ranked; see `permutation.max_t_test`.
        p_value: two-sided, of a permutation. corrected_p: for all features together (family-wise).
        echo: the prompts themselves differ in this word (or one of `equal`), in the same direction.
        examples: prompts that make most of the difference, of the set with more of the feature; with a base of the set
            in which the two models are further apart.
    """

    feature: str
    equal: list[str]
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    effect: float
    statistic: float
    p_value: float
    corrected_p: float
    echo: bool
    examples: list[Example]

    @property
    def differs(self) -> bool:
        """Whether its corrected p-value is at most `ALPHA`."""
        return self.corrected_p <= ALPHA


@dataclass(frozen=True, kw_only=True)
class ContrastResult:
    """The scan as a whole.

    Attributes:
        summary: one sentence. undecided: why nothing could be decided; empty when it could.
        model, base: as the user named them; empty where answers were brought, or no base given.
        has_base: features are differences from the base's answers.
        prompts_a, prompts_b: that were compared. missing_a, missing_b: without an answer, left out.
        paired: signs were flipped within pairs; else labels were permuted.
        features: compared. differing: of them, at corrected p <= `ALPHA`. constant: left out because no two prompts (of
            no pair) differ in them. duplicate: left out because they equal another in every prompt.
        smallest_p: the smallest p-value these prompts and permutations can give.
        global_p: that no feature differs at all; None when undecided.
        settings: of the command line.
    """

    summary: str
    undecided: str
    model: str
    base: str
    has_base: bool
    paired: bool
    prompts_a: int
    prompts_b: int
    answers: int
    missing_a: int
    missing_b: int
    features: int
    differing: int
    constant: int
    duplicate: int
    permutations: int
    smallest_p: float
    global_p: float | None
    seed: int
    command: str
    started: str
    seconds: float
    settings: dict[str, str | int | float | bool | None]
    versions: dict[str, str]
