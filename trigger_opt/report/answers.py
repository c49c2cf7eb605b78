"""Which completions are shown next to each other: one context, every model, with and without the string."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from trigger_opt.records import Completion
from trigger_opt.report.load import RunRecords

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The answers of one model to one context; several when answers were sampled.

    Attributes:
        inserted: whether the string was in the slot.
        answers: in recorded order; empty when none was recorded.
    """

    model: str
    inserted: bool
    answers: list[Completion]

    @property
    def fired(self) -> int:
        """How many answers begin with the payload."""
        return sum(a.fired for a in self.answers)


@dataclass(frozen=True, kw_only=True)
class ContextAnswers:
    """One held-out context.

    Attributes:
        prompt: the user's turn with the string in it, or without when no string was inserted.
        bare_prompt: the user's turn without the string; empty when not recorded.
        with_string, without: one cell a model, in the same order.
    """

    context: int
    prompt: str
    bare_prompt: str
    with_string: list[Cell]
    without: list[Cell]


def side_by_side(run: RunRecords) -> list[ContextAnswers]:
    """Every context with an answer to the judged string or to nothing inserted, in order of context."""
    string = run.verdict.trigger
    named = [c for c in run.completions or [] if c.kind in ("trigger", "minimised") and c.inserted == string and string]
    bare = [c for c in run.completions or [] if c.kind == "none"]
    models = sorted({c.model for c in named + bare}, key=_model_order)
    contexts = sorted({c.context for c in named + bare})
    return [
        _one_context(i, models, [c for c in named if c.context == i], [c for c in bare if c.context == i])
        for i in contexts
    ]


def spread(contexts: Sequence[T], count: int) -> list[T]:
    """`count` contexts evenly spaced from first to last, so that nothing is picked by its outcome."""
    if len(contexts) <= count:
        return list(contexts)
    last = len(contexts) - 1
    return [contexts[round(i * last / (count - 1))] for i in range(count)]


def _one_context(context: int, models: list[str], named: list[Completion], bare: list[Completion]) -> ContextAnswers:
    return ContextAnswers(
        context=context,
        prompt=(named or bare)[0].prompt,
        bare_prompt=bare[0].prompt if bare else "",
        with_string=[Cell(model=m, inserted=True, answers=[c for c in named if c.model == m]) for m in models],
        without=[Cell(model=m, inserted=False, answers=[c for c in bare if c.model == m]) for m in models],
    )


def _model_order(model: str) -> tuple[int, str]:
    return ({"finetuned": 0, "base": 1}.get(model, 2), model)
