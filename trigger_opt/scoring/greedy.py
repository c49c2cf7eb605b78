"""Greedy continuations by whatever scores: what they cost is no candidate's."""

from collections.abc import Callable, Sequence

from jaxtyping import Int
from torch import Tensor

from trigger_opt.scoring.group import Group
from trigger_opt.scoring.meter import Meter

Next = Callable[[Sequence[Sequence[int]]], Int[Tensor, " context"]]
"""The most probable token in each context after what was said there so far."""


def greedy_tokens(following: Next, *, contexts: int, num_tokens: int, group: Group, meter: Meter) -> list[list[int]]:
    """`num_tokens` greedy tokens in each of so many contexts; `following` counts its passes on `meter`."""
    made: list[list[int]] = [[] for _ in range(contexts)]
    before = meter.flops, meter.least_flops, meter.seconds
    for _ in range(num_tokens):
        # Of unlike devices one may see another token first, and then go on from it.
        tokens = group.first([following(made).cpu()])[0]
        for row, token in zip(made, tokens.tolist(), strict=True):
            row.append(token)
    # No candidate was scored: what it cost stands with the gradient.
    meter.gradient_flops += meter.flops - before[0]
    meter.flops, meter.least_flops, meter.seconds = before
    return made
