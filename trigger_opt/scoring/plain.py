"""Scores by whole forward passes: for models with code of their own, which may do anything with their token ids.

Nothing is kept, shared, packed or padded: each candidate's conversation goes through the body from its first token on,
beside others of its length. Exact as the engine is, and slower.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trigger_opt.models.pair import CausalModel
from trigger_opt.prompts import TokenizedContext
from trigger_opt.scoring.engine import Engine, Gradient, Reduce, Request, Side, Slopes
from trigger_opt.scoring.greedy import greedy_tokens
from trigger_opt.scoring.group import Group
from trigger_opt.scoring.heads import Divergence, divergences, token_scores
from trigger_opt.scoring.lanes import run_passes
from trigger_opt.scoring.meter import Cost, Meter, cost_of
from trigger_opt.scoring.packing import Job
from trigger_opt.scoring.pass_size import PassSize, pass_size
from trigger_opt.scoring.state import restore_meter, restore_sizes, sizes_state


class PlainEngine:
    """What `Engine` gives, by whole forward passes; methods without a word of their own are described there.

    Attributes:
        meter: what was done so far, and what it cost. Nothing less than whole passes would have done.
    """

    def __init__(
        self,
        finetuned: CausalModel,
        base: CausalModel,
        contexts: Sequence[TokenizedContext],
        *,
        max_rows: int | None = None,
        group: Group | None = None,
    ) -> None:
        """`max_rows`: at most so many tokens a pass, on top of what memory says."""
        self._models: dict[Side, CausalModel] = {"finetuned": finetuned, "base": base}
        self.contexts = tuple(contexts)
        self.meter = Meter()
        self._max_rows = max_rows
        self._costs: dict[Side, Cost] = {}
        # Asked only for what needs no forward pass, which is the same for both.
        self._without_passes = Engine(finetuned, base, contexts, group=group)

    @property
    def vocab_size(self) -> int:
        """Rows of the fine-tuned model's embedding."""
        return self._without_passes.vocab_size

    @property
    def group(self) -> Group:
        """The processes that share the work."""
        return self._without_passes.group

    def follow(self, trigger: Sequence[int]) -> None:
        """Nothing is shared with a trigger."""

    def token_scores(
        self, side: Side, requests: Sequence[Request], target: Sequence[int]
    ) -> tuple[Float[Tensor, "request target"], Bool[Tensor, "request target"]]:
        """See `Engine.token_scores`."""
        forced = tuple(target[:-1])
        hidden = self._scored_hidden(side, [Request(r.ids, r.context, forced) for r in requests])
        started = time.perf_counter()
        wanted = torch.tensor(list(target)).repeat(len(requests))
        scores = token_scores(self._models[side], hidden.flatten(0, 1), wanted)
        self.meter.seconds += time.perf_counter() - started
        made = [scores.log_probs.view(-1, len(target)), scores.greedy.view(-1, len(target))]
        log_probs, greedy = self.group.first(made)
        return log_probs, greedy

    def divergences(self, divergence: Divergence, requests: Sequence[Request]) -> Float[Tensor, "request scored"]:
        """See `Engine.divergences`."""
        finetuned, base = (self._scored_hidden(side, requests).flatten(0, 1) for side in ("finetuned", "base"))
        started = time.perf_counter()
        made = divergences(divergence, self._models["finetuned"], self._models["base"], finetuned, base)
        self.meter.seconds += time.perf_counter() - started
        return self.group.first([made])[0].view(len(requests), -1)

    def logits(
        self, side: Side, context: int, triggers: Int[Tensor, "batch trigger"], forced: Sequence[int]
    ) -> Float[Tensor, "batch scored vocab"]:
        """See `Engine.logits`."""
        hidden = self._scored_hidden(side, [Request(tuple(t), context, tuple(forced)) for t in triggers.tolist()])
        with torch.no_grad():
            return self._models[side].logits(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)

    def gradient(
        self,
        reduce: Reduce,
        trigger: Int[Tensor, " trigger"],
        contexts: Sequence[int],
        forced: Mapping[int, Sequence[int]],
        *,
        sides: Sequence[Side] = ("finetuned", "base"),
    ) -> Slopes:
        """See `Engine.gradient`: one pass a context and side, from the embeddings of the whole conversation."""
        ids = tuple(trigger.tolist())
        made = [self._gradient(reduce, Request(ids, c, tuple(forced[c])), sides) for c in contexts]
        joined = [torch.cat([m.scores for m in made]), *(torch.cat([m.by_side[s] for m in made]) for s in sides)]
        # Each process computed the same; one that differs in a last bit would part from the others for good.
        scores, *slopes = self.group.first(joined)
        return Slopes(scores, dict(zip(sides, slopes, strict=True)))

    def gradient_ahead(
        self,
        reduce: Reduce,
        trigger: Int[Tensor, " trigger"],
        contexts: Sequence[int],
        forced: Mapping[int, Sequence[int]],
        *,
        sides: Sequence[Side] = ("finetuned", "base"),
    ) -> Gradient:
        """See `Engine.gradient_ahead`; there are no keys and values to keep."""
        return Gradient(self.gradient(reduce, trigger, contexts, forced, sides=sides), tuple(trigger.tolist()), {})

    def adopt(self, found: Gradient) -> Slopes:
        """See `Engine.adopt`."""
        return found.slopes

    def state(self) -> dict[str, Any]:
        """See `Engine.state`; nothing is shared between passes."""
        return {"meter": asdict(self.meter), "sizes": sizes_state(self._sizes())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Engine.restore`."""
        restore_meter(self.meter, state["meter"])
        restore_sizes(self._sizes(), state["sizes"])

    def gradient_state(self, made: Gradient) -> dict[str, Any]:
        """See `Engine.gradient_state`."""
        return self._without_passes.gradient_state(made)

    def gradient_from(self, state: Mapping[str, Any]) -> Gradient:
        """See `Engine.gradient_from`."""
        return self._without_passes.gradient_from(state)

    def to_tokens(self, slopes: Slopes, weights: Float[Tensor, " context"]) -> Float[Tensor, "trigger vocab"]:
        """See `Engine.to_tokens`."""
        return self._without_passes.to_tokens(slopes, weights)

    def greedy(self, trigger: Int[Tensor, " trigger"], contexts: Sequence[int], num_tokens: int) -> list[list[int]]:
        """See `Engine.greedy`."""
        ids = tuple(trigger.tolist())

        def following(made: Sequence[Sequence[int]]) -> Tensor:
            requests = [Request(ids, c, tuple(m)) for c, m in zip(contexts, made, strict=True)]
            return self._argmax("finetuned", self._scored_hidden("finetuned", requests)[:, -1])

        return greedy_tokens(
            following, contexts=len(contexts), num_tokens=num_tokens, group=self.group, meter=self.meter
        )

    @torch.no_grad()
    def rollout(
        self, side: Side, context: int, triggers: Int[Tensor, "batch trigger"], num_tokens: int
    ) -> tuple[Float[Tensor, "batch vocab"], Int[Tensor, "batch new"]]:
        """See `Engine.rollout`; a whole pass for each new token."""
        model, given = self._models[side], self.contexts[context]
        left, right = (
            torch.tensor(part, dtype=torch.long).expand(len(triggers), -1) for part in (given.left, given.right)
        )
        ids = torch.cat([left, triggers, right], 1).to(model.device)
        prompt = ids.shape[1]
        first = model.logits(self._last_hidden(model, ids, 1).flatten(0, 1))
        ids = torch.cat([ids, first.argmax(-1).to(ids.device)[:, None]], 1)
        while ids.shape[1] < prompt + num_tokens:
            token = self._argmax(side, self._last_hidden(model, ids, 1).flatten(0, 1))
            ids = torch.cat([ids, token.to(ids.device)[:, None]], 1)
        return first, ids[:, prompt:].cpu()

    @torch.enable_grad()
    def _gradient(self, reduce: Reduce, request: Request, sides: Sequence[Side]) -> Slopes:
        start = len(self.contexts[request.context].left)
        scored, ids = len(request.forced) + 1, torch.tensor([self._whole(request)])
        leaves, logits = {}, {}
        for side in sides:
            model = self._models[side]
            leaves[side] = model.embed(ids).detach().requires_grad_()
            hidden = model.hidden(inputs_embeds=leaves[side], use_cache=False).last_hidden_state[0, -scored:]
            logits[side] = model.logits(hidden)[None]
            cost = self._cost(side)
            self.meter.gradient_flops += 2 * (ids.numel() * cost.per_token + scored * cost.per_position)
        finetuned = logits.get("finetuned", next(iter(logits.values())))
        scores = reduce(finetuned, logits.get("base", finetuned).to(finetuned.device))
        found = torch.autograd.grad(scores.sum(), [leaves[s] for s in sides], allow_unused=True, materialize_grads=True)
        own = slice(start, start + len(request.ids))
        by_side = {s: slope[:, own].detach().cpu() for s, slope in zip(sides, found, strict=True)}
        return Slopes(scores.detach().cpu(), by_side)

    @torch.no_grad()
    def _scored_hidden(self, side: Side, requests: Sequence[Request]) -> Float[Tensor, "request scored d_model"]:
        """The body's output at the scored positions."""
        started = time.perf_counter()
        scored = len(requests[0].forced) + 1
        if any(len(r.forced) + 1 != scored for r in requests):
            raise ValueError("requests of one call must force equally many tokens")
        model = self._models[side]
        size = self._sizes()[side]
        rows = self.group.least(size.rows if self._max_rows is None else min(size.rows, self._max_rows))
        jobs = [Job(n, 0, 0, self._whole(r)) for n, r in enumerate(requests)]
        passes = _passes(jobs, rows)

        def run(jobs: Sequence[Job]) -> list[Tensor]:
            ids = torch.tensor([j.tokens for j in jobs], device=model.device)
            hidden = self._last_hidden(model, ids, scored)
            # Another process has other devices.
            return [hidden.cpu() if self.group.size > 1 else hidden]

        dealt = self.group.share(passes)
        made = run_passes(run, [jobs for _, jobs in dealt], size, 1)
        results = self.group.gather({n: r for (n, _), r in zip(dealt, made, strict=True)}, len(passes))
        self._count(side, jobs, scored, time.perf_counter() - started)
        order = torch.tensor([j.owner for jobs in passes for j in jobs]).argsort()
        joined = torch.cat([r[0] for r in results])
        return joined[order.to(joined.device)].to(model.device)

    @staticmethod
    def _last_hidden(model: CausalModel, ids: Int[Tensor, "batch seq"], count: int) -> Tensor:
        hidden: Tensor = model.hidden(input_ids=ids, use_cache=False).last_hidden_state
        return hidden[:, -count:]

    @torch.no_grad()
    def _argmax(self, side: Side, hidden: Float[Tensor, "rows d_model"]) -> Int[Tensor, " rows"]:
        return self._models[side].logits(hidden).argmax(-1)

    def _whole(self, request: Request) -> tuple[int, ...]:
        context = self.contexts[request.context]
        return (*context.left, *request.ids, *context.right, *request.forced)

    def _sizes(self) -> dict[Side, PassSize]:
        return {s: pass_size(m if m.one_at_a_time else m.network, m.device) for s, m in self._models.items()}

    def _cost(self, side: Side) -> Cost:
        if side not in self._costs:
            self._costs[side] = cost_of(self._models[side].network)
        return self._costs[side]

    def _count(self, side: Side, jobs: Sequence[Job], scored: int, spent: float) -> None:
        cost = self._cost(side)
        done = sum(len(j.tokens) for j in jobs) * cost.per_token + len(jobs) * scored * cost.per_position
        self.meter.flops += done
        self.meter.least_flops += done
        self.meter.seconds += spent


AnyEngine = Engine | PlainEngine
"""What scores candidates on a pair."""


def engine_for(
    finetuned: CausalModel,
    base: CausalModel,
    contexts: Sequence[TokenizedContext],
    *,
    plain: bool,
    group: Group | None = None,
) -> AnyEngine:
    """The engine, or with `plain` the one that runs whole passes."""
    return (PlainEngine if plain else Engine)(finetuned, base, contexts, group=group)


def may_run_beside(one: AnyEngine, other: AnyEngine) -> bool:
    """Whether one thread may use one engine and another thread the other; foreign code is not trusted with that."""
    return isinstance(one, Engine) and isinstance(other, Engine) and one.may_run_beside(other)


def _passes(jobs: Sequence[Job], max_rows: int) -> list[list[Job]]:
    """Jobs of one length together, at most `max_rows` tokens a pass where a single job allows it."""
    by_length: dict[int, list[Job]] = {}
    for job in jobs:
        by_length.setdefault(len(job.tokens), []).append(job)
    passes = []
    for length, same in sorted(by_length.items()):
        size = max(1, max_rows // length)
        passes += [same[n : n + size] for n in range(0, len(same), size)]
    return passes
