"""Scores by whole forward passes, one sequence at a time: what the engine must equal."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests import tiny
from trigger_opt.models.pair import CausalModel, ModelPair
from trigger_opt.objectives import Objective, score_logits
from trigger_opt.prompts import Context, TokenizedContext
from trigger_opt.scoring import Engine, Request, Side, js_divergence

SIDES: tuple[Side, Side] = ("finetuned", "base")
TRIGGERS = torch.tensor([[262, 301, 270], [280, 17, 390 - 1], [33, 34, 35], [262, 301, 271]])


def contexts_with_empty_sides() -> list[TokenizedContext]:
    """`tiny.CONTEXTS`, one with nothing before the slot (3) and one with nothing after it (4)."""
    usual = tiny.tokenized()
    slot = Context(user="{trigger}")
    return [*usual, TokenizedContext(slot, (), usual[0].right), TokenizedContext(slot, usual[2].left, ())]


def make_engine(pair: ModelPair, *, max_rows: int | None = None) -> Engine:
    """An engine in `tiny.CONTEXTS`."""
    return Engine(pair.finetuned, pair.base, tiny.tokenized(), max_rows=max_rows)


def requests(triggers: Tensor, context: int, forced: Sequence[int] = ()) -> list[Request]:
    """One a row of `triggers`."""
    return [Request(tuple(t), context, tuple(forced)) for t in triggers.tolist()]


def whole(context: TokenizedContext, trigger: Sequence[int], forced: Sequence[int]) -> list[int]:
    """The sequence a plain forward pass sees."""
    return [*context.left, *trigger, *context.right, *forced]


def slow_logits(model: CausalModel, context: TokenizedContext, trigger: Sequence[int], forced: Sequence[int]) -> Tensor:
    """Logits at the scored positions, one uncached pass over the whole sequence."""
    return tiny.naive_logits(model.network, whole(context, trigger, forced))[-(len(forced) + 1) :]


def slow_scores(pair: ModelPair, objective: Objective, context: TokenizedContext, ids: Sequence[int],
                target: Sequence[int], along: Sequence[int] = ()) -> float:  # fmt: skip
    """An objective's score of one string: of `target`, or for a divergence along the tokens `along`."""
    forced = target[:-1] if objective.needs_payload else along
    finetuned, base = (slow_logits(m, context, ids, forced)[None] for m in (pair.finetuned, pair.base))
    scored = torch.tensor([*target] if objective.needs_payload else [*along, 0])
    return float(score_logits(objective, finetuned, base, scored)[0])


def jensen(finetuned: Tensor, base: Tensor) -> Tensor:
    """A score a context from (context, scored, vocab) logits of both models."""
    return js_divergence(finetuned, base).mean(-1)
