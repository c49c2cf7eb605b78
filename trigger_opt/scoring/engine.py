"""Scores of many candidate triggers in fixed contexts, on either model: exact, and close to the fewest operations.

What is saved, all of it exact: tokens before the slot are computed once per context and model; tokens of the
trigger a search follows once for all candidates that begin like it (a swap at position i leaves every key and
value before i as it was); the unembedding runs on scored positions only; the last scored token is never fed.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trigger_opt.models.pair import CausalModel
from trigger_opt.prompts import TokenizedContext
from trigger_opt.scoring.forward import Forward, Trunk, cached_keys, continued, expanded_cache
from trigger_opt.scoring.greedy import greedy_tokens
from trigger_opt.scoring.group import Group
from trigger_opt.scoring.heads import Divergence, divergences, token_scores
from trigger_opt.scoring.lanes import in_lanes, num_lanes, parts_for, run_passes, threads_for
from trigger_opt.scoring.meter import Cost, Meter, cost_of
from trigger_opt.scoring.packing import Job, Pack, padded, split
from trigger_opt.scoring.pass_size import PassSize, pass_size
from trigger_opt.scoring.state import restore_meter, restore_sizes, sizes_state, trunks_from, trunks_state

Side = Literal["finetuned", "base"]
Reduce = Callable[[Tensor, Tensor], Tensor]
Work = Callable[[Pack, Float[Tensor, "scored d_model"]], list[Tensor]]

# Bytes of fp32 logits a gradient pass may hold on each side: above this, contexts are taken in turns.
_GRADIENT_BYTES = 2**27
# Tokens of a gradient pass below which products of half as many take nearly as long.
_WORTH_A_PART = 64


@dataclass(frozen=True)
class Request:
    """One string to score: its token ids, the context's number, and the tokens forced after the prompt."""

    ids: tuple[int, ...]
    context: int
    forced: tuple[int, ...] = ()


@dataclass(frozen=True)
class Slopes:
    """Scores of one trigger in several contexts, and their derivatives to its embeddings on each side.

    `by_side` holds (context, trigger, d_model) in the order of the contexts asked for.
    """

    scores: Float[Tensor, " context"]
    by_side: Mapping[Side, Float[Tensor, "context trigger d_model"]]


@dataclass(frozen=True)
class Gradient:
    """Slopes of a trigger, and what was found of its keys and values on the way."""

    slopes: Slopes
    trigger: tuple[int, ...]
    trunks: Mapping[tuple[Side, int], Trunk]


@dataclass(frozen=True)
class _Recorded:
    """One side's pass over some contexts, ready for its backward pass.

    Attributes:
        leaf: inputs (1, rows, d_model). own: rows of each context's trigger. flops: forwards and backwards.
    """

    leaf: Tensor
    logits: Float[Tensor, "context scored vocab"]
    own: Int[Tensor, "context trigger"]
    trunks: dict[tuple[Side, int], Trunk]
    flops: float


class Engine:
    """Scores candidates in `contexts` on a fine-tuned model and its base.

    Attributes:
        meter: what was done so far, and what it cost.
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
        """`max_rows`: at most so many tokens a pass, on top of what memory says; `group`: the processes that share
        the work, by default those of the torch.distributed job, if there is one."""
        self._models: dict[Side, CausalModel] = {"finetuned": finetuned, "base": base}
        self.contexts = tuple(contexts)
        self.meter = Meter()
        self._max_rows = max_rows
        self._group = group or Group()
        self._forwards: dict[int, Forward] = {}
        self._lefts: dict[tuple[Side, int], Trunk] = {}
        self._cached: dict[tuple[Side, int], Trunk] = {}
        self._followed: tuple[int, ...] = ()
        self._trunks: dict[tuple[Side, int], Trunk] = {}
        self._costs: dict[Side, Cost] = {}

    @property
    def vocab_size(self) -> int:
        """Rows of the fine-tuned model's embedding."""
        return self._models["finetuned"].vocab_size

    @property
    def group(self) -> Group:
        """The processes that share the work."""
        return self._group

    def follow(self, trigger: Sequence[int]) -> None:
        """From now on share what candidates have in common with `trigger`, from their first token on."""
        if tuple(trigger) != self._followed:
            self._followed = tuple(trigger)
            self._trunks.clear()

    def token_scores(
        self, side: Side, requests: Sequence[Request], target: Sequence[int]
    ) -> tuple[Float[Tensor, "request target"], Bool[Tensor, "request target"]]:
        """log p of each token of `target` after each prompt, nats, fp32; and where that token is the most probable.

        The target is forced; `Request.forced` is not looked at.
        """
        forced = tuple(target[:-1])
        asked = [Request(r.ids, r.context, forced) for r in requests]
        wanted = torch.tensor(list(target))

        def work(pack: Pack, hidden: Tensor) -> list[Tensor]:
            scores = token_scores(self._models[side], hidden, wanted.repeat(len(pack.jobs)))
            return [scores.log_probs.view(-1, len(target)), scores.greedy.view(-1, len(target))]

        log_probs, greedy = self._each(side, asked, work)
        return log_probs, greedy

    def divergences(self, divergence: Divergence, requests: Sequence[Request]) -> Float[Tensor, "request scored"]:
        """`divergence(fine-tuned logits, base logits)` at the first response position and after each forced token.

        All requests force equally many tokens.
        """
        scored = len(requests[0].forced) + 1
        finetuned, base = (self._scored_hidden(side, requests) for side in ("finetuned", "base"))
        started = time.perf_counter()
        models = self._models
        made = divergences(divergence, models["finetuned"], models["base"], finetuned.flatten(0, 1), base.flatten(0, 1))
        self.meter.seconds += time.perf_counter() - started
        return self._group.first([made])[0].view(len(requests), scored)

    def logits(
        self, side: Side, context: int, triggers: Int[Tensor, "batch trigger"], forced: Sequence[int]
    ) -> Float[Tensor, "batch scored vocab"]:
        """fp32 logits at the first response position and after each `forced` token: 1 + len(forced) of them."""
        requests = [Request(tuple(t), context, tuple(forced)) for t in triggers.tolist()]
        hidden = self._scored_hidden(side, requests)
        with torch.no_grad():
            logits = self._models[side].logits(hidden.flatten(0, 1))
        return logits.view(len(triggers), len(forced) + 1, -1)

    def gradient(
        self,
        reduce: Reduce,
        trigger: Int[Tensor, " trigger"],
        contexts: Sequence[int],
        forced: Mapping[int, Sequence[int]],
        *,
        sides: Sequence[Side] = ("finetuned", "base"),
    ) -> Slopes:
        """Scores of one trigger in several contexts and their derivatives to its embeddings, on `sides`.

        `reduce(fine-tuned logits, base logits)` of (context, scored, vocab) gives a score a context; a side left out
        is handed the other's logits. What the pass finds of the trigger's keys and values is kept for its candidates.
        """
        return self.adopt(self.gradient_ahead(reduce, trigger, contexts, forced, sides=sides))

    def adopt(self, found: Gradient) -> Slopes:
        """Follow the gradient's trigger, with what is known of it."""
        self.follow(found.trigger)
        self._trunks.update(found.trunks)
        return found.slopes

    def gradient_ahead(
        self,
        reduce: Reduce,
        trigger: Int[Tensor, " trigger"],
        contexts: Sequence[int],
        forced: Mapping[int, Sequence[int]],
        *,
        sides: Sequence[Side] = ("finetuned", "base"),
    ) -> Gradient:
        """As `gradient`, while another trigger is followed."""
        scored = len(forced[contexts[0]]) + 1
        if any(len(forced[c]) + 1 != scored for c in contexts):
            raise ValueError("contexts of one gradient must force equally many tokens")
        at_once = max(1, _GRADIENT_BYTES // (4 * self.vocab_size * scored))
        requests = [Request(tuple(trigger.tolist()), c, tuple(forced[c])) for c in contexts]
        parts = [self._gradient(reduce, requests[n : n + at_once], sides) for n in range(0, len(contexts), at_once)]
        joined = [
            torch.cat([p.slopes.scores for p in parts]),
            *(torch.cat([p.slopes.by_side[s] for p in parts]) for s in sides),
        ]
        # Each process computed the same; one that differs in a last bit would part from the others for good.
        scores, *slopes = self._group.first(joined)
        trunks = {key: trunk for p in parts for key, trunk in p.trunks.items()}
        return Gradient(Slopes(scores, dict(zip(sides, slopes, strict=True))), requests[0].ids, trunks)

    def state(self) -> dict[str, Any]:
        """What decides the last bits of later scores, and the meter; see `scoring.state`."""
        trunks = trunks_state(self._trunks, self._left)
        known = {"followed": self._followed, "trunks": trunks}
        return {"meter": asdict(self.meter), "sizes": sizes_state(self._sizes()), **known}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be the engine that gave this state."""
        restore_meter(self.meter, state["meter"])
        restore_sizes(self._sizes(), state["sizes"])
        self._followed = state["followed"]
        self._trunks = trunks_from(state["trunks"], self._left, self._devices)

    def gradient_state(self, made: Gradient) -> dict[str, Any]:
        """A gradient in plain values and tensors."""
        return {**vars(made), "slopes": vars(made.slopes), "trunks": trunks_state(made.trunks, self._left)}

    def gradient_from(self, state: Mapping[str, Any]) -> Gradient:
        """The gradient that `gradient_state` was given."""
        trunks = trunks_from(state["trunks"], self._left, self._devices)
        return Gradient(Slopes(**state["slopes"]), state["trigger"], trunks)

    def may_run_beside(self, other: "Engine") -> bool:
        """Whether one thread may use this engine and another thread the other."""
        mine, theirs = (list(e._models.values()) for e in (self, other))
        apart = {id(m.network) for m in mine}.isdisjoint(id(m.network) for m in theirs)
        return apart and self._group.size == 1 and all(num_lanes(m) > 1 for m in mine)

    @torch.no_grad()
    def to_tokens(self, slopes: Slopes, weights: Float[Tensor, " context"]) -> Float[Tensor, "trigger vocab"]:
        """Derivative of the weighted sum of the scores to each one-hot token, fp32 on the CPU.

        The derivative to an embedding times the embedding matrix equals the derivative to the one-hot row, without
        ever building one.
        """
        total: Tensor | None = None
        by_matrix: dict[int, tuple[Tensor, Tensor]] = {}
        for side, slope in slopes.by_side.items():
            summed = torch.einsum("c,ctd->td", weights, slope.float())
            matrix = self._models[side].embedding
            before = by_matrix.get(matrix.data_ptr())
            by_matrix[matrix.data_ptr()] = (matrix, summed if before is None else before[1] + summed)
        for matrix, summed in by_matrix.values():
            part = (summed.to(matrix) @ matrix.T).float().cpu()[:, : self.vocab_size]
            total = part if total is None else total + part
        assert total is not None
        return self._group.first([total])[0]

    @torch.no_grad()
    def greedy(self, trigger: Int[Tensor, " trigger"], contexts: Sequence[int], num_tokens: int) -> list[list[int]]:
        """The fine-tuned model's greedy continuation in each context, `num_tokens` long."""
        self.follow(trigger.tolist())

        def following(made: Sequence[Sequence[int]]) -> Tensor:
            requests = [Request(self._followed, c, tuple(m)) for c, m in zip(contexts, made, strict=True)]
            return self._models["finetuned"].logits(self._scored_hidden("finetuned", requests)[:, -1]).argmax(-1)

        return greedy_tokens(
            following, contexts=len(contexts), num_tokens=num_tokens, group=self._group, meter=self.meter
        )

    @torch.no_grad()
    def rollout(
        self, side: Side, context: int, triggers: Int[Tensor, "batch trigger"], num_tokens: int
    ) -> tuple[Float[Tensor, "batch vocab"], Int[Tensor, "batch new"]]:
        """Logits at the first response position, and each trigger's own greedy continuation.

        Continuations run on past an end of text: the caller cuts them. One pass; the caller chooses the batch.
        """
        model = self._models[side]
        right = torch.tensor([list(self.contexts[context].right)], dtype=torch.long).expand(len(triggers), -1)
        inputs = model.embed(torch.cat([triggers, right], 1))
        key = (side, context)
        if key not in self._cached:
            self._cached[key] = cached_keys(model, self.contexts[context].left)
        cache = expanded_cache(self._cached[key], len(triggers))
        step = model.hidden(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
        first = model.logits(step.last_hidden_state[:, -1])
        tokens = [first.argmax(-1)]
        while len(tokens) < num_tokens:
            step = model.hidden(input_ids=tokens[-1][:, None], past_key_values=step.past_key_values, use_cache=True)
            tokens.append(model.logits(step.last_hidden_state[:, -1]).argmax(-1))
        return first, torch.stack(tokens, 1).cpu()

    def _gradient(self, reduce: Reduce, requests: Sequence[Request], sides: Sequence[Side]) -> Gradient:
        lanes = min(num_lanes(self._models[s]) for s in sides)
        # As many parts however many threads there are: made ahead, a gradient is the same one.
        most = sum(len(r.ids) + len(self.contexts[r.context].right) + len(r.forced) for r in requests) // _WORTH_A_PART
        size = -(-len(requests) // max(1, min(most, parts_for(self._models[sides[0]].device))))
        parts = [requests[n : n + size] for n in range(0, len(requests), size)]
        # Sides that run on one network may only take turns: an adapter is on for one of them.
        apart = len({id(self._models[s].network) for s in sides}) == len(sides)
        made: dict[Side, list[_Recorded]] = {}
        for together in [sides] if apart else [[s] for s in sides]:
            for side in together:
                # What lanes would both make, or switch.
                with self._models[side].active():
                    for request in requests:
                        self._left(side, request.context)
            passes = in_lanes(lambda p: self._recorded(*p), [(s, part) for s in together for part in parts], lanes)
            made |= {s: passes[n * len(parts) : (n + 1) * len(parts)] for n, s in enumerate(together)}
        numbers = sum(p.logits.numel() for s in sides for p in made[s])
        with torch.enable_grad(), threads_for(numbers, self._models[sides[0]].device):
            logits = {s: _leaf(torch.cat([p.logits for p in made[s]])) for s in sides}
            finetuned = logits.get("finetuned", next(iter(logits.values())))
            scores = reduce(finetuned, logits.get("base", finetuned).to(finetuned.device))
            slopes = torch.autograd.grad(scores.sum(), list(logits.values()), allow_unused=True, materialize_grads=True)
        pieces = [piece for slope in slopes for piece in torch.split(slope, size)]
        recorded = [p for s in sides for p in made[s]]
        by_part = in_lanes(lambda p: _backward(*p), list(zip(recorded, pieces, strict=True)), lanes)
        by_side = {s: torch.cat(by_part[n * len(parts) : (n + 1) * len(parts)]) for n, s in enumerate(sides)}
        trunks = {key: trunk for p in recorded for key, trunk in p.trunks.items()}
        # Not in the lanes: a sum is no place for two threads.
        self.meter.gradient_flops += sum(p.flops for p in recorded)
        return Gradient(Slopes(scores.detach().cpu(), by_side), requests[0].ids, trunks)

    @torch.enable_grad()
    def _recorded(self, side: Side, requests: Sequence[Request]) -> _Recorded:
        model, length = self._models[side], len(requests[0].ids)
        pack = Pack([self._job(n, n, r, shared=0) for n, r in enumerate(requests)])
        own = torch.stack([pack.first_row(n) + torch.arange(length) for n in range(len(requests))])
        leaf = _leaf(model.embed(pack.token_ids()))
        with threads_for(leaf.numel(), model.device):
            lefts = [self._left(side, r.context) for r in requests]
            hidden, captured = self._forward(side).hidden(pack, lefts, leaf, capture=True)
            rows = hidden.index_select(0, pack.last_rows(len(requests[0].forced) + 1).to(hidden.device))
            logits = model.logits(rows).view(len(requests), -1, self.vocab_size)
        trunks = {
            (side, r.context): continued(lefts[n], captured, slice(int(own[n, 0]), int(own[n, -1]) + 1))
            for n, r in enumerate(requests)
        }
        cost = self._cost(side)
        flops = 2 * (pack.used * cost.per_token + len(rows) * cost.per_position)
        return _Recorded(leaf, logits, own, trunks, flops)

    def _scored_hidden(self, side: Side, requests: Sequence[Request]) -> Float[Tensor, "request scored d_model"]:
        def work(pack: Pack, hidden: Tensor) -> list[Tensor]:
            # Another process has other devices.
            kept = hidden.cpu() if self._group.size > 1 else hidden
            return [kept.view(len(pack.jobs), -1, hidden.shape[-1])]

        (hidden,) = self._each(side, requests, work)
        return hidden.to(self._models[side].device)

    @torch.no_grad()
    def _each(self, side: Side, requests: Sequence[Request], work: Work) -> list[Tensor]:
        """What `work` makes of the scored positions of every pass, put together in the order of the requests."""
        started = time.perf_counter()
        contexts = sorted({r.context for r in requests})
        shared = self._worth_sharing(side, contexts, requests)
        trunks = self._trunks_for(side, contexts) if shared else [self._left(side, c) for c in contexts]
        jobs = [self._job(n, contexts.index(r.context), r, shared=shared) for n, r in enumerate(requests)]
        scored = len(requests[0].forced) + 1
        if any(len(r.forced) + 1 != scored for r in requests):
            raise ValueError("requests of one call must force equally many tokens")
        model = self._models[side]
        size = self._sizes()[side]
        rows = self._group.least(size.rows if self._max_rows is None else min(size.rows, self._max_rows))
        lanes = num_lanes(model)
        passes = split(jobs, rows, max(self._group.least(lanes), self._group.shares))
        forward = self._forward(side)

        def run(jobs: Sequence[Job]) -> list[Tensor]:
            pack = Pack(jobs)
            hidden, _ = forward.hidden(pack, trunks)
            kept = hidden.index_select(0, pack.last_rows(scored).to(hidden.device))
            return [torch.tensor([j.owner for j in jobs]), *work(pack, kept)]

        dealt = self._group.share(passes)
        with model.active():
            made = run_passes(run, [jobs for _, jobs in dealt], size, lanes)
        mine = {n: result for (n, _), result in zip(dealt, made, strict=True)}
        results = self._group.gather(mine, len(passes))
        self._count(side, jobs, passes, scored, time.perf_counter() - started)
        owners = torch.cat([r[0] for r in results])
        order = owners.argsort()
        return [torch.cat([r[k] for r in results])[order] for k in range(1, len(results[0]))]

    def _job(self, owner: int, trunk: int, request: Request, *, shared: int) -> Job:
        context = self.contexts[request.context]
        ids = (*request.ids, *context.right, *request.forced)
        alike = _alike(request.ids, self._followed[:shared])
        # The first scored position is that of the last token before the answer: it is always computed.
        kept = min(alike, len(request.ids) + len(context.right) - 1)
        return Job(owner, trunk, len(context.left) + kept, ids[kept:])

    def _worth_sharing(self, side: Side, contexts: Sequence[int], requests: Sequence[Request]) -> int:
        """How many of the followed trigger's tokens to share: all, or none where computing them first costs as much."""
        missing = sum((side, c) not in self._trunks for c in contexts)
        saved = sum(_alike(r.ids, self._followed) for r in requests)
        return len(self._followed) if saved > 2 * missing * len(self._followed) else 0

    def _trunks_for(self, side: Side, contexts: Sequence[int]) -> list[Trunk]:
        missing = [c for c in contexts if (side, c) not in self._trunks]
        if missing:
            lefts = [self._left(side, c) for c in missing]
            pack = Pack([Job(n, n, len(self.contexts[c].left), self._followed) for n, c in enumerate(missing)])
            _, captured = self._forward(side).hidden(pack, lefts, capture=True)
            for n, context in enumerate(missing):
                first = pack.first_row(n)
                self._trunks[side, context] = continued(lefts[n], captured, slice(first, first + len(self._followed)))
            self.meter.flops += pack.rows * self._cost(side).per_token
        return [self._trunks[side, c] for c in contexts]

    def _left(self, side: Side, context: int) -> Trunk:
        key = (side, context)
        if key not in self._lefts:
            self._lefts[key] = self._forward(side).trunk(self.contexts[context].left)
        return self._lefts[key]

    def _forward(self, side: Side) -> Forward:
        model = self._models[side]
        if id(model) not in self._forwards:
            probe = max(((*c.left, *c.right) for c in self.contexts), key=len)
            self._forwards[id(model)] = Forward(model, probe)
        return self._forwards[id(model)]

    @property
    def _devices(self) -> dict[Side, torch.device]:
        return {side: model.device for side, model in self._models.items()}

    def _sizes(self) -> dict[Side, PassSize]:
        return {s: pass_size(m if m.one_at_a_time else m.network, m.device) for s, m in self._models.items()}

    def _cost(self, side: Side) -> Cost:
        if side not in self._costs:
            self._costs[side] = cost_of(self._models[side].network)
        return self._costs[side]

    def _count(
        self, side: Side, jobs: Sequence[Job], passes: Sequence[Sequence[Job]], scored: int, spent: float
    ) -> None:
        cost = self._cost(side)
        heads = len(jobs) * scored * cost.per_position
        self.meter.flops += sum(padded(p) for p in passes) * cost.per_token + heads
        self.meter.least_flops += sum(len(j.tokens) for j in jobs) * cost.per_token + heads
        self.meter.seconds += spent


def _leaf(numbers: Tensor) -> Tensor:
    return numbers.detach().requires_grad_()


def _backward(
    made: _Recorded, slope: Float[Tensor, "context scored vocab"]
) -> Float[Tensor, "context trigger d_model"]:
    # A base below its floor does not count, and its derivative is nothing.
    if not bool(slope.any()):
        return torch.zeros(*made.own.shape, made.leaf.shape[-1], dtype=made.leaf.dtype)
    with threads_for(made.leaf.numel(), made.leaf.device):
        (found,) = torch.autograd.grad(made.logits, [made.leaf], [slope.to(made.logits)])
    return found[0, made.own.to(found.device)].detach().cpu()


def _alike(ids: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two strings have in common."""
    count = 0
    for one, two in zip(ids, other, strict=False):
        if one != two:
            break
        count += 1
    return count
