"""The best of many short strings within a budget: all are scored in one context, the most promising in several."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from trigger_opt.search.protocol import Scorer, Validity

Ids = tuple[int, ...]
# Scored at once: between two batches the time is looked at.
_BATCH = 64
# How many are told apart by how natural they are, too.
_NATURAL = 64
_ENDLESS = 2**62


@dataclass(frozen=True, kw_only=True)
class Built:
    """A string that was built up.

    Attributes:
        score: nats, mean over the contexts drawn. natural: what is added to it where strings are ranked.
    """

    trigger_ids: Ids
    score: float
    natural: float = 0.0

    @property
    def rank(self) -> float:
        """What it is ranked by."""
        return self.score + self.natural


class Shortlist:
    """Scores of strings, until the budget is spent."""

    def __init__(
        self,
        scorer: Scorer,
        valid: Validity,
        generator: torch.Generator,
        *,
        contexts: int,
        finalists: int,
        keep: int = 1,
        max_seconds: float | None = None,
        max_evaluations: int | None = None,
        natural: Callable[[Sequence[Ids]], list[float]] | None = None,
        on_progress: Callable[[int, Built], None] = lambda done, best: None,
    ) -> None:
        """
        Args:
            natural: added to the scores of the best, nats, before the finalists are chosen.
            contexts: how many are drawn. finalists: strings scored in all of them; at least `keep`, whatever is left.
            max_seconds, max_evaluations: bounds; what was scored until then counts.
            on_progress: gets the number of strings scored so far and the best of this call, with its score in one
                context.
        """
        self._scorer, self._valid = scorer, valid
        self._finalists, self._keep = finalists, keep
        self._max_seconds, self._max_evaluations = max_seconds, max_evaluations
        self._natural, self._on_progress = natural, on_progress
        self._start, self._first_evaluation = scorer.seconds(), scorer.evaluations
        drawn = torch.randperm(scorer.num_contexts, generator=generator)[:contexts].tolist()
        self._first, self._others = drawn[:1], drawn[1:]
        self._done = 0

    def use(self, scorer: Scorer) -> None:
        """Score with another scorer of the same contexts from now on; the budget stays one."""
        self._first_evaluation = scorer.evaluations - (self._scorer.evaluations - self._first_evaluation)
        self._scorer = scorer

    def best(self, strings: Iterable[Ids]) -> list[Built]:
        """Those of `strings`, of any lengths, that got into the final, best first, with their mean over all contexts
        drawn."""
        left = list(dict.fromkeys(strings))
        reference: Ids | None = None
        keep = max(self._finalists, self._keep, _NATURAL if self._natural else 0)
        scored: dict[Ids, float] = {}
        while left and (room := self._room()):
            # The likeliest first, should the budget end; of these, those that begin alike beside each other: their
            # beginnings are computed once.
            batch, left = self._usable(left[: min(room, _BATCH)]), left[min(room, _BATCH) :]
            if not batch:
                continue
            if reference is None:
                # Of a divergence over several tokens all are forced along what one of them brings out.
                reference = batch[0]
                self._scorer.prepare(torch.tensor(reference), self._first)
            batch.sort()
            # What cannot get into the final need not be scored to the end.
            scored |= self._scores(batch, self._first, keep=keep)
            self._done += len(batch)
            leader = max(scored, key=lambda s: scored[s])
            self._on_progress(self._done, Built(trigger_ids=leader, score=scored[leader]))
        order = sorted((s for s in scored if math.isfinite(scored[s])), key=lambda s: -scored[s])
        natural = dict.fromkeys(order, 0.0)
        if self._natural and order:
            order = order[:_NATURAL]
            natural = dict(zip(order, self._natural(order), strict=True))
            order.sort(key=lambda s: -scored[s] - natural[s])
        if order:
            count = len(self._others)
            room = self._room() // count if count else self._finalists
            order = order[: max(self._keep, min(self._finalists, room))]
        if self._others and order and reference is not None:
            self._scorer.prepare(torch.tensor(reference), self._others)
            others = self._scores(order, self._others)
            scored |= {s: (scored[s] + count * o) / (count + 1) for s, o in others.items()}
        made = [Built(trigger_ids=s, score=scored[s], natural=natural[s]) for s in order if math.isfinite(scored[s])]
        return sorted(made, key=lambda b: -b.rank)

    def _usable(self, strings: Sequence[Ids]) -> list[Ids]:
        """The valid ones, in the order given."""
        fine: set[Ids] = set()
        for alike in _by_length(strings):
            fine |= {s for s, ok in zip(alike, self._valid(torch.tensor(alike)).tolist(), strict=True) if ok}
        return [s for s in strings if s in fine]

    def _room(self) -> int:
        """Evaluations that are left; none once the time is up."""
        if self._max_seconds is not None and self._scorer.seconds() - self._start >= self._max_seconds:
            return 0
        spent = self._scorer.evaluations - self._first_evaluation
        return _ENDLESS if self._max_evaluations is None else max(0, self._max_evaluations - spent)

    def _scores(self, strings: Sequence[Ids], contexts: Sequence[int], *, keep: int | None = None) -> dict[Ids, float]:
        """Mean over the contexts; of others than the best `keep` of each length perhaps -inf."""
        scored: dict[Ids, float] = {}
        for alike in _by_length(strings):
            means = self._scorer.score(torch.tensor(alike), contexts, keep=keep).mean(1).tolist()
            # Not a number, as float16 may give, is no score.
            scored |= {s: -math.inf if math.isnan(m) else m for s, m in zip(alike, means, strict=True)}
        return scored


def _by_length(strings: Sequence[Ids]) -> list[list[Ids]]:
    groups: dict[int, list[Ids]] = {}
    for string in strings:
        groups.setdefault(len(string), []).append(string)
    return list(groups.values())
