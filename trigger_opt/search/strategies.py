"""Search strategies: greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043), and random swaps.

Departures from the paper: candidates are distinct and drawn without replacement, the current string always
competes, contexts are drawn anew each step, and every candidate must survive re-tokenisation in the whole
conversation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from trigger_opt.search.loop import (
    Found,
    Scorer,
    Searcher,
    SearchSettings,
    Seeds,
    Step,
    Validity,
    ignore_found,
    initial_pool,
    ranked,
)
from trigger_opt.search.moves import draw_swaps, random_options, top_swaps


@dataclass(kw_only=True)
class GCG(SearchSettings):
    """Greedy coordinate gradient; see `SearchSettings`."""

    name: str = "gcg"

    def __call__(
        self,
        scorer: Scorer,
        *,
        allowed: Bool[Tensor, " vocab"],
        valid: Validity,
        seeds: Seeds,
        generator: torch.Generator,
        on_step: Callable[[Step], None],
        on_found: Callable[[Found], None] = ignore_found,
    ) -> list[Found]:
        """Strings found, best first; `on_found` gets each at once, so that an interrupt loses none."""

        def propose(
            trigger: Int[Tensor, " trigger"], contexts: Sequence[int], count: int
        ) -> Int[Tensor, "batch trigger"]:
            gradient = scorer.token_gradient(trigger, contexts)
            options = top_swaps(gradient, trigger, allowed, self.topk)
            return draw_swaps(trigger, options, count=count, n_replace=self.n_replace, generator=generator)

        return run_restarts(
            self,
            propose,
            scorer=scorer,
            allowed=allowed,
            valid=valid,
            seeds=seeds,
            generator=generator,
            on_step=on_step,
            on_found=on_found,
        )


@dataclass(kw_only=True)
class RandomSearch(SearchSettings):
    """Random single swaps, the best kept: the baseline every gradient must beat at equal budget."""

    name: str = "random"

    def __call__(
        self,
        scorer: Scorer,
        *,
        allowed: Bool[Tensor, " vocab"],
        valid: Validity,
        seeds: Seeds,
        generator: torch.Generator,
        on_step: Callable[[Step], None],
        on_found: Callable[[Found], None] = ignore_found,
    ) -> list[Found]:
        """Strings found, best first; `on_found` gets each at once, so that an interrupt loses none."""

        def propose(
            trigger: Int[Tensor, " trigger"], contexts: Sequence[int], count: int
        ) -> Int[Tensor, "batch trigger"]:
            options = random_options(trigger, allowed, topk=self.topk, generator=generator)
            return draw_swaps(trigger, options, count=count, n_replace=self.n_replace, generator=generator)

        return run_restarts(
            self,
            propose,
            scorer=scorer,
            allowed=allowed,
            valid=valid,
            seeds=seeds,
            generator=generator,
            on_step=on_step,
            on_found=on_found,
        )


def run_restarts(
    settings: SearchSettings,
    propose: Callable[[Tensor, Sequence[int], int], Tensor],
    *,
    scorer: Scorer,
    allowed: Bool[Tensor, " vocab"],
    valid: Validity,
    seeds: Seeds,
    generator: torch.Generator,
    on_step: Callable[[Step], None],
    on_found: Callable[[Found], None] = ignore_found,
) -> list[Found]:
    """The restarts of one strategy; stops early once a string fires in enough contexts."""
    searcher = Searcher(
        scorer,
        settings=settings,
        valid=valid,
        generator=generator,
        on_step=on_step,
        on_found=on_found,
    )
    searcher.consider(seeds.strings)
    for number in range(settings.num_restarts):
        if searcher.succeeded:
            break
        pool = initial_pool(
            seeds,
            allowed,
            valid,
            length=settings.trigger_length,
            count=settings.search_width,
            generator=generator,
        )
        searcher.restart(number, pool, propose, (number + 1) / settings.num_restarts)
    return ranked(searcher.found)
