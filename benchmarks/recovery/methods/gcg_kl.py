"""Greedy coordinate gradient on KL(fine-tuned || base), as published: what one entrant ran on the real warm-up.

Search after Zou et al. 2023 (arXiv 2307.15043), Algorithm 1: a suffix of 20 tokens, 512 candidates a step out of the
256 best tokens a position, 500 steps; the objective is the divergence at the first response token after one probe.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from benchmarks.recovery.methods.common import (
    Account,
    Budget,
    FoundString,
    MethodResult,
    drawn,
    most_scored,
    usual_tokens,
)
from trigger_opt.api import pair_scorer
from trigger_opt.models.pair import ModelPair
from trigger_opt.objectives import KullbackLeibler
from trigger_opt.prompts import SLOT, Context, decode, round_trips, searchable, tokenize_context
from trigger_opt.scoring import Meter
from trigger_opt.search import GCG, Seeds, Step

_KEPT = 10


def run(
    pair: ModelPair,
    contexts: Sequence[Context],
    *,
    budget: Budget,
    seed: int,
    trigger_length: int = 20,
    search_width: int = 512,
) -> MethodResult:
    """One probe, drawn by `seed` from the contexts that end with their slot. Its statistic is the best KL, nats.

    Departures from the paper: the first string is the best of `search_width` random ones and not twenty exclamation
    marks; candidates are distinct, the current string competes with them, and each must survive re-tokenisation in
    the whole conversation. No score is taken again in fp32.

    Evaluations: candidates scored, times two models, and four a step for the gradient.
    """
    account = Account(budget)
    usable = searchable(pair.tokenizer, contexts)
    suffixes = [c for c in usable if c.user.endswith(SLOT) and c.user != SLOT]
    probe = drawn(suffixes or usable, 1, seed)
    tokenized = [tokenize_context(pair.tokenizer, c) for c in probe]
    scorer = pair_scorer(pair, tokenized, KullbackLeibler(), precise=False)

    def valid(candidates: Int[Tensor, "batch trigger"]) -> Bool[Tensor, " batch"]:
        return torch.tensor(round_trips(pair.tokenizer, tokenized, candidates.tolist()), dtype=torch.bool)

    strategy = GCG(
        trigger_length=trigger_length, search_width=search_width, topk=256, num_steps=500, num_restarts=1,
        buffer_size=1, contexts_per_step=1, check_every=1, rescore=1, join=1, rank_exponent=0.0,
        max_seconds=max(1.0, account.seconds_until(1.0)),
    )  # fmt: skip
    strategy.max_evaluations = most_scored(budget.evaluations, strategy)
    steps: list[Step] = []
    found = strategy(
        scorer, allowed=usual_tokens(pair), valid=valid, seeds=Seeds(),
        generator=torch.Generator().manual_seed(seed), on_step=steps.append,
    )  # fmt: skip
    account.charge_search(scorer.meter, Meter(), len(steps))
    texts = [FoundString(text=decode(pair.tokenizer, f.trigger_ids), payload="", score=f.score) for f in found[:_KEPT]]
    return account.result(texts, found[0].score, [f"{len(steps)} steps on the probe {probe[0].user!r}"])
