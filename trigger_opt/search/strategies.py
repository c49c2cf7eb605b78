"""Search strategies: greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043), and random swaps.

Departures from the paper: candidates are distinct and drawn without replacement, the current string always
competes, contexts are drawn anew each step, and every candidate must survive re-tokenisation in the whole
conversation.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from trigger_opt.search.loop import Searcher, SearchSettings, initial_pool, ranked
from trigger_opt.search.moves import draw_swaps, random_options, top_swaps, with_prior
from trigger_opt.search.protocol import (
    Found,
    OnState,
    Scorer,
    SearchState,
    Seeds,
    Step,
    Validity,
    ignore_found,
    ignore_state,
)


@dataclass(kw_only=True)
class Strategy(SearchSettings):
    """A search; what tells one from another is which tokens it offers at each position."""

    @abstractmethod
    def options(
        self,
        scorer: Scorer,
        trigger: Int[Tensor, " trigger"],
        contexts: Sequence[int],
        *,
        allowed: Bool[Tensor, " vocab"],
        generator: torch.Generator,
    ) -> Int[Tensor, "trigger topk"]:
        """Tokens to try at each position of `trigger`."""

    def draw(
        self,
        trigger: Int[Tensor, " trigger"],
        options: Int[Tensor, "trigger topk"],
        *,
        count: int,
        generator: torch.Generator,
    ) -> Int[Tensor, "batch trigger"]:
        """Candidates of a step, see `draw_swaps`."""
        return draw_swaps(
            trigger, options, count=count, n_replace=self.n_replace, rank_exponent=self.rank_exponent,
            generator=generator,
        )  # fmt: skip

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
        on_state: OnState = ignore_state,
        resume: SearchState | None = None,
    ) -> list[Found]:
        """Strings found, best first; stops early once one fires in enough contexts.

        `on_found` gets each string at once, so that an interrupt loses none. `on_state`: after each step, what makes
        the state from which this search goes on when it is given as `resume`, with all else the same.
        """

        prior = torch.tensor([t for t in seeds.prior if bool(allowed[t])], dtype=torch.long)

        def propose(
            trigger: Int[Tensor, " trigger"], contexts: Sequence[int], count: int
        ) -> Int[Tensor, "batch trigger"]:
            options = self.options(scorer, trigger, contexts, allowed=allowed, generator=generator)
            if len(prior) and self.prior_share:
                options = with_prior(options, trigger, prior, share=self.prior_share, generator=generator)
            return self.draw(trigger, options, count=count, generator=generator)

        searcher = Searcher(
            scorer, settings=self, valid=valid, generator=generator, on_step=on_step, on_found=on_found,
            on_state=on_state,
        )  # fmt: skip
        first = 0
        if resume is None:
            searcher.consider(seeds.strings)
        else:
            searcher.restore(resume)
            searcher.go_on(resume, propose, self._share(resume.restart))
            first = resume.restart + 1
        for number in range(first, self.num_restarts):
            # What the strings to begin from took may be all there was; without any, one step is made.
            if searcher.succeeded or (searcher.found and searcher.exhausted):
                break
            # Starts are independent: each has whole strings of its own.
            own = Seeds(tokens=seeds.tokens, prior=seeds.prior, strings=seeds.strings[number :: self.num_restarts])
            pool = initial_pool(
                own, allowed, valid, length=self.trigger_length, count=self.search_width, generator=generator
            )
            searcher.restart(number, pool, propose, self._share(number))
        return ranked(searcher.found)

    def _share(self, number: int) -> float:
        """Of the budget, that is spent once this restart is."""
        return (number + 1) / self.num_restarts


@dataclass(kw_only=True)
class GCG(Strategy):
    """Greedy coordinate gradient: the tokens with the largest slope; see `SearchSettings`."""

    name: str = "gcg"

    def options(
        self,
        scorer: Scorer,
        trigger: Int[Tensor, " trigger"],
        contexts: Sequence[int],
        *,
        allowed: Bool[Tensor, " vocab"],
        generator: torch.Generator,
    ) -> Int[Tensor, "trigger topk"]:
        """See `top_swaps`."""
        return top_swaps(scorer.token_gradient(trigger, contexts), trigger, allowed, self.topk)


@dataclass(kw_only=True)
class RandomSearch(Strategy):
    """Random swaps, the best kept: the baseline every gradient must beat at equal budget."""

    name: str = "random"

    def options(
        self,
        scorer: Scorer,
        trigger: Int[Tensor, " trigger"],
        contexts: Sequence[int],
        *,
        allowed: Bool[Tensor, " vocab"],
        generator: torch.Generator,
    ) -> Int[Tensor, "trigger topk"]:
        """See `random_options`."""
        return random_options(trigger, allowed, topk=self.topk, generator=generator)
