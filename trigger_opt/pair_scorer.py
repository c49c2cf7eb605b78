"""An objective on a pair of models, as a search sees it: scores, bounds, memory and gradients."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trigger_opt.objectives import Likelihood, Objective, aggregate, score_logits
from trigger_opt.progress import say
from trigger_opt.scoring import (
    AnyEngine,
    Gradient,
    Meter,
    Reduce,
    Request,
    Side,
    Slopes,
    beside,
    may_run_beside,
    out_of_memory,
)

Ids = tuple[int, ...]
Ahead = tuple[Int[Tensor, " trigger"], Sequence[int]]

# Scores remembered: about 200 bytes each.
_MOST_REMEMBERED = 400_000
# A bound is computed from the same numbers as the score, but summed up in another order.
_ROUNDING = 1e-5
# Candidates of one block of `_Table.race`'s second half: enough to fill a pass, few enough to raise the bar early.
_BLOCK = 64


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of a string in a context.

    Attributes:
        finetuned: log p of the payload on the fine-tuned model, nats. greedy: whether the payload comes out there.
        bound: the score, or the most it can be. exact: whether it is the score.
    """

    bound: float
    exact: bool
    finetuned: float = 0.0
    greedy: bool = False


class PairScorer:
    """An objective on a pair of models, as a search sees it (`search.Scorer`).

    A candidate's score in a context is computed once. A candidate that cannot get among the best is left where that
    is certain: each context's score is bounded, and a payload's log probability on the fine-tuned model alone bounds
    its score whatever the base says.

    Args:
        payload_ids: tokens of the payload hypothesis; empty for a divergence.
        precise: a scorer of the same objective, payload and contexts on the same models in a higher precision.
    """

    def __init__(
        self,
        engine: AnyEngine,
        objective: Objective,
        payload_ids: Sequence[int] = (),
        *,
        precise: "PairScorer | None" = None,
    ) -> None:
        self._precise = precise
        self._engine = engine
        self._objective = objective
        self._payload = tuple(payload_ids)
        self._continuations: dict[int, Ids] = {}
        self._known: dict[tuple[int, Ids, Ids], _Known] = {}
        self._seen: set[Ids] = set()
        self._leader: Ids = ()
        self._seen_in: object = None
        self._slopes: tuple[object, Slopes] | None = None
        self._ahead: tuple[object, Gradient] | None = None

    @property
    def num_contexts(self) -> int:
        """Contexts that may be named in calls."""
        return len(self._engine.contexts)

    @property
    def evaluations(self) -> int:
        """Candidates scored so far, counted once per context; remembered ones cost nothing and do not count."""
        return self._engine.meter.evaluations

    @property
    def meter(self) -> Meter:
        """What the fast scores cost."""
        return self._engine.meter

    @property
    def precise_meter(self) -> Meter:
        """What rescoring cost."""
        return self._precise.meter if self._precise else Meter()

    def seconds(self) -> float:
        """A monotonic clock, the same on all processes of a search."""
        return self._engine.group.clock()

    def prepare(self, trigger: Int[Tensor, " trigger"], contexts: Sequence[int]) -> None:
        """Fix what the next calls score against: for a divergence over several tokens, a fresh continuation
        under the incumbent, which all its rivals are then forced along."""
        self._engine.follow(trigger.tolist())
        if tuple(trigger.tolist()) != self._leader:
            # What lost against another incumbent may beat this one (a new restart's); its score is remembered.
            self._leader = tuple(trigger.tolist())
            self._seen.clear()
        if isinstance(self._objective, Likelihood):
            return
        made = self._engine.greedy(trigger, contexts, self._objective.num_tokens - 1)
        self._continuations.update({c: tuple(m) for c, m in zip(contexts, made, strict=True)})

    def score(
        self,
        candidates: Int[Tensor, "batch trigger"],
        contexts: Sequence[int],
        *,
        keep: int | None = None,
        incumbents: int = 0,
    ) -> Float[Tensor, "batch context"]:
        """Scores in each context, on the CPU.

        Args:
            keep: only the best `keep` matter: others may hold -inf where they were not scored to the end. None: all.
            incumbents: the first so many rows; what does not reach the worst of them does not matter either.
        """
        self._forget()
        strings = [tuple(c) for c in candidates.tolist()]
        table = _Table(self, strings, contexts)
        if keep is None:
            table.complete(list(range(len(strings))))
        else:
            table.race(keep, incumbents)
        self._remember_seen(strings, contexts)
        return table.scores()

    def refine(
        self,
        candidates: Int[Tensor, "batch trigger"],
        contexts: Sequence[int],
        *,
        keep: int,
        incumbents: int,
        ahead: Ahead | None = None,
    ) -> Float[Tensor, "batch context"] | None:
        """As `score` in the higher precision; None where there is none.

        The best of hundreds of scores taken in bf16 is in part a lucky draw of the rounding. One string is little work
        for all cores: where two threads can share them, the gradient that `ahead` foresees is made meanwhile.
        """
        if self._precise is None:
            return None
        self._precise._continuations = self._continuations
        try:
            with self._going_ahead(ahead):
                return self._precise.score(candidates, contexts, keep=keep, incumbents=incumbents)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            say("fp32 scores of the best do not fit in memory: the search goes on without them")
            self._precise = None
            return None

    @contextmanager
    def _going_ahead(self, ahead: Ahead | None) -> Iterator[None]:
        assert self._precise is not None
        # A search that never asks for gradients needs none; what a divergence is forced along is not known yet.
        wanted = ahead is not None and self._slopes is not None and self._payload
        if ahead is None or not wanted or not may_run_beside(self._engine, self._precise._engine):
            yield
            return
        trigger, contexts = ahead
        asked = self._asked(trigger, contexts)
        with beside(lambda: self._engine.gradient_ahead(*asked, sides=self._sides)) as made:
            yield
        # Where both at once did not fit, the gradient is made when it is asked for.
        if (error := made.exception()) is None or not out_of_memory(error):
            self._ahead = (tuple(trigger.tolist()), self._state(contexts)), made.result()

    def known(self, candidates: Int[Tensor, "batch trigger"], contexts: Sequence[int]) -> Bool[Tensor, " batch"]:
        """Which candidates were scored since this incumbent came, in exactly these contexts."""
        if self._state(contexts) != self._seen_in:
            return torch.zeros(len(candidates), dtype=torch.bool)
        return torch.tensor([tuple(c) in self._seen for c in candidates.tolist()], dtype=torch.bool)

    def aggregate(self, scores: Float[Tensor, "batch context"]) -> Float[Tensor, " batch"]:
        """One score a candidate, see `objectives.aggregate`."""
        joined = aggregate(scores, soft_minimum=self._objective.soft_minimum)
        # Not a number, as float16 may give, is no score: it must not come first in an order.
        return torch.where(joined.isnan(), -torch.inf, joined)

    def token_gradient(
        self, trigger: Int[Tensor, " trigger"], contexts: Sequence[int]
    ) -> Float[Tensor, "trigger vocab"]:
        """Derivative of the aggregated score to each one-hot token.

        A soft minimum's derivative is the contexts' derivatives weighted by softmax(-score), so the weights can come
        last. The last one is remembered: an unchanged trigger's is not computed again.
        """
        key = (tuple(trigger.tolist()), self._state(contexts))
        if self._slopes is None or self._slopes[0] != key:
            if self._ahead is not None and self._ahead[0] == key:
                found = self._engine.adopt(self._ahead[1])
            else:
                found = self._engine.gradient(*self._asked(trigger, contexts), sides=self._sides)
            self._slopes, self._ahead = (key, found), None
        slopes = self._slopes[1]
        flat = torch.full_like(slopes.scores, 1 / len(contexts))
        weights = (-slopes.scores).softmax(0) if self._objective.soft_minimum else flat
        return self._engine.to_tokens(slopes, weights)

    @torch.no_grad()
    def fires(self, trigger: Int[Tensor, " trigger"], contexts: Sequence[int]) -> Bool[Tensor, " context"] | None:
        """Where the fine-tuned model's greedy answer begins with the payload (behind an opening it was given: goes on);
        None when there is none.

        Teacher-forced: greedy decoding gives the payload exactly when every payload token is the most probable.
        """
        if not self._payload:
            return None
        ids = tuple(trigger.tolist())
        self._finetuned([(ids, c) for c in contexts])
        return torch.tensor([self._known[c, ids, ()].greedy for c in contexts])

    def state(self) -> dict[str, Any]:
        """See `search.Scorer.state`; scores are kept, too, so that none is computed twice."""
        slopes, ahead = self._slopes, self._ahead
        return {
            "known": _known_state(self._known),
            "seen": sorted(self._seen),
            "seen_in": self._seen_in,
            "leader": self._leader,
            "continuations": dict(self._continuations),
            "slopes": slopes and (slopes[0], vars(slopes[1])),
            "ahead": ahead and (ahead[0], self._engine.gradient_state(ahead[1])),
            "engine": self._engine.state(),
            "precise": self._precise.state() if self._precise else None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `search.Scorer.restore`."""
        slopes, ahead = state["slopes"], state["ahead"]
        self._known = _known_from(state["known"])
        self._seen, self._seen_in = set(state["seen"]), state["seen_in"]
        self._leader, self._continuations = state["leader"], dict(state["continuations"])
        self._slopes = slopes and (slopes[0], Slopes(**slopes[1]))
        self._ahead = ahead and (ahead[0], self._engine.gradient_from(ahead[1]))
        self._engine.restore(state["engine"])
        if state["precise"] is None:
            # It had run out of memory for that.
            self._precise = None
            return
        if self._precise is None:
            raise ValueError("the state is of a scorer that scores finalists in a higher precision; this one has none")
        self._precise.restore(state["precise"])

    def bounds(self, string: Ids, contexts: Sequence[int]) -> list[float]:
        """The most each context can give, by what is known; exact where the score is."""
        return [self._bound(string, c) for c in contexts]

    @property
    def upper_bound(self) -> float:
        """The objective's."""
        return self._objective.upper_bound

    def is_complete(self, string: Ids, context: int) -> bool:
        """Whether the score itself is known."""
        known = self._known.get(self._key(string, context))
        return known is not None and known.exact

    def look(self, pairs: Sequence[tuple[Ids, int]]) -> None:
        """Compute what bounds scores at half of the price; for a divergence, which has no halves, the scores."""
        if isinstance(self._objective, Likelihood):
            self._finetuned(pairs)
        else:
            self.finish(pairs)

    @property
    def has_halves(self) -> bool:
        """Whether `look` costs half."""
        return isinstance(self._objective, Likelihood)

    def finish(self, pairs: Sequence[tuple[Ids, int]]) -> None:
        """Compute the scores of (string, context) pairs that are not known yet."""
        missing = [p for p in pairs if not self.is_complete(*p)]
        if not missing:
            return
        if not isinstance(self._objective, Likelihood):
            self._diverge(missing)
            return
        self._finetuned(missing)
        if not self._objective.needs_base:
            return
        known = [self._known[c, s, ()] for s, c in missing]
        said = torch.tensor([k.finetuned for k in known])
        base = self._log_probs("base", missing)[0]
        scores = self._objective.from_log_probs(said, base, len(self._payload)).tolist()
        for (string, context), k, score in zip(missing, known, scores, strict=True):
            self._known[context, string, ()] = replace(k, bound=score, exact=True)

    def _finetuned(self, pairs: Sequence[tuple[Ids, int]]) -> None:
        missing = [(s, c) for s, c in pairs if (c, s, ()) not in self._known]
        if not missing:
            return
        assert isinstance(self._objective, Likelihood)
        log_probs, greedy = self._log_probs("finetuned", missing)
        bounds = self._objective.from_log_probs(log_probs, None, len(self._payload))
        exact = not self._objective.needs_base
        rows = zip(missing, bounds.tolist(), log_probs.tolist(), greedy.tolist(), strict=True)
        for (string, context), bound, said, fires in rows:
            self._known[context, string, ()] = _Known(bound, exact, said, fires)
        self._engine.meter.evaluations += len(missing)

    def _log_probs(self, side: Side, pairs: Sequence[tuple[Ids, int]]) -> tuple[Tensor, Tensor]:
        log_probs, greedy = self._engine.token_scores(side, [Request(s, c) for s, c in pairs], self._payload)
        return log_probs.sum(1), greedy.all(1)

    def _diverge(self, pairs: Sequence[tuple[Ids, int]]) -> None:
        assert not isinstance(self._objective, Likelihood)
        requests = [Request(s, c, self._forced(c)) for s, c in pairs]
        scores = self._engine.divergences(self._objective.from_logits, requests).mean(1).tolist()
        for (string, context), score in zip(pairs, scores, strict=True):
            self._known[self._key(string, context)] = _Known(score, exact=True)
        self._engine.meter.evaluations += len(pairs)

    def _bound(self, string: Ids, context: int) -> float:
        known = self._known.get(self._key(string, context))
        return self._objective.upper_bound if known is None else known.bound

    @property
    def _sides(self) -> Sequence[Side]:
        alone = isinstance(self._objective, Likelihood) and not self._objective.needs_base
        return ("finetuned",) if alone else ("finetuned", "base")

    def _asked(
        self, trigger: Int[Tensor, " trigger"], contexts: Sequence[int]
    ) -> tuple[Reduce, Int[Tensor, " trigger"], Sequence[int], dict[int, Ids]]:
        objective = self._objective
        forced = {c: self._forced(c) for c in contexts}
        # A divergence scores no tokens; the ids only carry how many positions there are.
        target = torch.tensor(self._payload or [*forced[contexts[0]], 0])

        def reduce(finetuned: Tensor, base: Tensor) -> Tensor:
            return score_logits(objective, finetuned, base, target.to(finetuned.device))

        return reduce, trigger, contexts, forced

    def _forced(self, context: int) -> Ids:
        return self._payload[:-1] if self._payload else self._continuations.get(context, ())

    def _key(self, string: Ids, context: int) -> tuple[int, Ids, Ids]:
        # What a divergence is forced along changes with the incumbent, and scores with it; a payload does not.
        return context, string, () if self._payload else self._forced(context)

    def _state(self, contexts: Sequence[int]) -> object:
        return tuple((c, () if self._payload else self._forced(c)) for c in contexts)

    def _remember_seen(self, strings: Sequence[Ids], contexts: Sequence[int]) -> None:
        state = self._state(contexts)
        if state != self._seen_in:
            self._seen_in = state
            self._seen.clear()
        self._seen.update(strings)

    def _forget(self) -> None:
        if len(self._known) > _MOST_REMEMBERED:
            for key in list(self._known)[: _MOST_REMEMBERED // 2]:
                del self._known[key]


def _known_state(known: Mapping[tuple[int, Ids, Ids], _Known]) -> dict[str, Tensor]:
    """In tensors: hundreds of thousands of tuples would take minutes to read again."""
    strings, forced = [ids for _, ids, _ in known], [ids for _, _, ids in known]
    values = [(k.bound, k.finetuned, k.exact, k.greedy) for k in known.values()]
    return {
        "contexts": torch.tensor([c for c, _, _ in known], dtype=torch.int32),
        "lengths": torch.tensor([[len(s), len(f)] for s, f in zip(strings, forced, strict=True)], dtype=torch.int32),
        "ids": torch.tensor([i for s, f in zip(strings, forced, strict=True) for i in (*s, *f)], dtype=torch.int32),
        "values": torch.tensor(values, dtype=torch.float64),
    }


def _known_from(state: Mapping[str, Tensor]) -> dict[tuple[int, Ids, Ids], _Known]:
    """What `_known_state` was given, in the same order: the oldest is forgotten first."""
    ids = iter(state["ids"].tolist())
    known = {}
    rows = zip(state["contexts"].tolist(), state["lengths"].tolist(), state["values"].tolist(), strict=True)
    for context, (length, forced), (bound, finetuned, exact, greedy) in rows:
        key = context, tuple(islice(ids, length)), tuple(islice(ids, forced))
        known[key] = _Known(bound, bool(exact), finetuned, bool(greedy))
    return known


class _Table:
    """Scores and bounds of some strings in some contexts while they are computed."""

    def __init__(self, scorer: PairScorer, strings: Sequence[Ids], contexts: Sequence[int]) -> None:
        self._scorer = scorer
        self._strings = strings
        self._contexts = list(contexts)
        self._bounds = torch.tensor([scorer.bounds(s, contexts) for s in strings], dtype=torch.float32)

    def complete(self, rows: Sequence[int]) -> None:
        """Score these rows in all contexts."""
        self._scorer.finish([(self._strings[r], c) for r in rows for c in self._contexts])
        self._refresh(rows)

    def race(self, keep: int, incumbents: int) -> None:
        """Score all rows as far as they can still get among the best `keep` and reach the incumbents."""
        rows = list(range(len(self._strings)))
        if math.isinf(self._scorer.upper_bound):
            self.complete(rows)
            return
        # All rows at once in a first context: what the bar is made of needs no small pass of its own there, and is
        # then chosen from the most promising.
        self._look(self._alive(rows, keep, incumbents), self._contexts[0])
        rivals = sorted(rows[incumbents:], key=self._by_bound())
        first = [*rows[:incumbents], *rivals[: max(0, keep - incumbents)]]
        self.complete(first)
        rows = [r for r in rows if r not in set(first)]
        # Then the cheap half, context by context: most rows end here.
        for context in self._contexts[1:] if self._scorer.has_halves else []:
            rows = self._alive(rows, keep, incumbents)
            self._look(rows, context)
        # Then the most promising first: their scores raise the bar for the others.
        while rows := [r for r in self._alive(rows, keep, incumbents) if not self._is_complete(r)]:
            self._advance(sorted(rows, key=self._by_bound())[:_BLOCK])

    def _look(self, rows: Sequence[int], context: int) -> None:
        self._scorer.look([(self._strings[r], context) for r in rows])
        self._refresh(rows)

    def _by_bound(self) -> Callable[[int], float]:
        bounds = self._aggregate(self._bounds).tolist()
        return lambda row: -bounds[row]

    def scores(self) -> Float[Tensor, "batch context"]:
        """What is known exactly, -inf for the rest."""
        exact = [[self._scorer.is_complete(s, c) for c in self._contexts] for s in self._strings]
        return self._bounds.masked_fill(~torch.tensor(exact), -torch.inf)

    def _advance(self, rows: Sequence[int]) -> None:
        # One context more for each: what it says may end it.
        pairs = []
        for row in rows:
            string = self._strings[row]
            missing = [c for c in self._contexts if not self._scorer.is_complete(string, c)]
            # Those with the highest bound have the most to lose.
            bounds = self._scorer.bounds(string, missing)
            pairs.append((string, missing[max(range(len(missing)), key=lambda n: bounds[n])]))
        self._scorer.finish(pairs)
        self._refresh(rows)

    def _alive(self, rows: Sequence[int], keep: int, incumbents: int) -> list[int]:
        bar = self._bar(keep, incumbents)
        bounds = self._aggregate(self._bounds)
        return [r for r in rows if float(bounds[r]) >= bar - _ROUNDING]

    def _bar(self, keep: int, incumbents: int) -> float:
        wholes: list[float] = self._aggregate(self._bounds).tolist()
        complete = [r for r in range(len(self._strings)) if self._is_complete(r)]
        best = sorted((wholes[r] for r in complete), reverse=True)
        bar = best[keep - 1] if len(best) >= keep else -math.inf
        if incumbents and complete[:incumbents] == list(range(incumbents)):
            return max(bar, min(wholes[:incumbents]))
        return bar

    def _is_complete(self, row: int) -> bool:
        return all(self._scorer.is_complete(self._strings[row], c) for c in self._contexts)

    def _aggregate(self, scores: Float[Tensor, "batch context"]) -> Float[Tensor, " batch"]:
        return self._scorer.aggregate(scores)

    def _refresh(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._bounds[row] = torch.tensor(self._scorer.bounds(self._strings[row], self._contexts))
