"""Every allowed token alone in the slot, by Jensen-Shannon divergence at the first response token: no search at all."""

from collections.abc import Sequence

import torch

from benchmarks.recovery.methods.common import Account, Budget, FoundString, MethodResult, drawn, usual_tokens
from trigger_opt.models.pair import ModelPair
from trigger_opt.objectives import JensenShannon
from trigger_opt.prompts import Context, TokenizedContext, decode, round_trips, searchable, tokenize_context
from trigger_opt.scoring import Engine, Request

_CONTEXTS = 4
_BATCH = 128
_KEPT = 3


def run(pair: ModelPair, contexts: Sequence[Context], *, budget: Budget, seed: int) -> MethodResult:
    """Tokens in an order drawn by `seed`, as many as the budget lasts for, in four contexts drawn by it; the best
    three. A token that would be another beside the context's own text is left out. Its statistic is the best mean
    divergence over the contexts, nats.

    Evaluations: tokens scored, times contexts, times two models.
    """
    account = Account(budget)
    tokenized = [
        tokenize_context(pair.tokenizer, c) for c in drawn(searchable(pair.tokenizer, contexts), _CONTEXTS, seed)
    ]
    engine = Engine(pair.finetuned, pair.base, tokenized)
    allowed = usual_tokens(pair).nonzero()[:, 0]
    order = allowed[torch.randperm(len(allowed), generator=torch.Generator().manual_seed(seed))].tolist()
    scores: dict[int, float] = {}
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        # At least once, or there would be nothing to hand over.
        if scores and (account.spent() or account.evaluations_until(1.0) < 2 * len(tokenized) * len(batch)):
            break
        scores |= _scored(pair, engine, tokenized, batch)
        account.evaluations = 2 * len(tokenized) * len(scores)
    best = sorted(scores, key=lambda t: -scores[t])[:_KEPT]
    strings = [FoundString(text=decode(pair.tokenizer, [t]), payload="", score=scores[t]) for t in best]
    note = f"{len(scores):,} tokens of {len(order):,} allowed, in {len(tokenized)} contexts"
    return account.result(strings, strings[0].score if strings else 0.0, [note])


def _scored(
    pair: ModelPair, engine: Engine, contexts: Sequence[TokenizedContext], tokens: Sequence[int]
) -> dict[int, float]:
    """Mean divergence over the contexts of each token that stays itself in all of them."""
    fine = round_trips(pair.tokenizer, contexts, [[t] for t in tokens])
    kept = [t for t, ok in zip(tokens, fine, strict=True) if ok]
    if not kept:
        return {}
    requests = [Request((t,), number) for t in kept for number in range(len(contexts))]
    table = engine.divergences(JensenShannon().from_logits, requests).view(len(kept), len(contexts))
    return dict(zip(kept, table.mean(1).tolist(), strict=True))
