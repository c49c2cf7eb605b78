"""Short strings built up token by token, from a few hundred tokens that may belong to the trigger.

A search of a fixed length finds strings of that length, with the trigger's tokens somewhere among others. Where the
fine-tuning itself tells which tokens it was taught (`hypotheses.lens`), few enough are left to try every one at every
place. A planted string of such tokens, each of which tells behind those before it, then comes out whole: no longer
string scores higher.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from trigger_opt.search.protocol import Scorer, Validity

Ids = tuple[int, ...]
# Scored at once: between two batches the time is looked at.
_BATCH = 256
_ENDLESS = 2**62


@dataclass(kw_only=True)
class BuildSettings:
    """How far strings are built up before a search.

    Attributes:
        max_tokens: of the longest; 0 for no building. pool: tokens tried at each place, the most likely ones.
            singles: beside them, those that score most by themselves, of all the tokens given.
        beam: strings of each length that the next ones are made of.
        contexts: search contexts drawn. All strings are scored in the first, the best `finalists` in all.
        keep: strings of each length that take part in the search.
        share: most of a search's seconds and evaluations, where these are bounded. What it cuts off are the longest
            strings, and of these the last tokens of the pool.
    """

    max_tokens: Annotated[int, Field(ge=0)] = 4
    pool: Annotated[int, Field(ge=1)] = 256
    singles: Annotated[int, Field(ge=0)] = 64
    beam: Annotated[int, Field(ge=1)] = 3
    contexts: Annotated[int, Field(ge=1)] = 4
    finalists: Annotated[int, Field(ge=1)] = 64
    keep: Annotated[int, Field(ge=1)] = 2
    share: Annotated[float, Field(gt=0, le=1)] = 0.5

    def __post_init__(self) -> None:
        if (most := max(self.beam, self.singles, self.keep)) > self.finalists:
            raise ValueError(
                f"finalists={self.finalists} is less than beam, singles or keep ({most}), which are chosen among them; "
                f"raise finalists to {most} or lower that one"
            )


@dataclass(frozen=True, kw_only=True)
class Built:
    """A string that was built up, and its score, nats, mean over the contexts drawn."""

    trigger_ids: Ids
    score: float


def build_up(
    scorer: Scorer,
    tokens: Sequence[int],
    *,
    settings: BuildSettings,
    valid: Validity,
    generator: torch.Generator,
    max_seconds: float | None = None,
    max_evaluations: int | None = None,
    on_progress: Callable[[int, Built], None] = lambda done, best: None,
) -> list[Built]:
    """The best `keep` strings of each length from one token on, shortest first.

    One length after the other: each of the pool's tokens is put at each place of the last length's best strings.

    Args:
        tokens: the most likely first.
        max_seconds, max_evaluations: bounds; the length under way is finished with what was scored until then.
        on_progress: gets the number of strings scored so far and the best of this length, with its score in one
            context.
    """
    table = _Table(scorer, settings, valid, generator, (max_seconds, max_evaluations), on_progress)
    built: list[Built] = []
    pool: list[int] = []
    beam: list[Ids] = []
    for _ in range(settings.max_tokens):
        best = table.best(_insertions(beam, pool) if beam else [(t,) for t in dict.fromkeys(tokens)])
        if not best:
            break
        if not beam:
            alone = [b.trigger_ids[0] for b in best[: settings.singles]]
            pool = list(dict.fromkeys([*alone, *tokens[: settings.pool]]))
        built += best[: settings.keep]
        beam = [b.trigger_ids for b in best[: settings.beam]]
    return built


class _Table:
    """Scores of strings, until the budget is spent."""

    def __init__(
        self,
        scorer: Scorer,
        settings: BuildSettings,
        valid: Validity,
        generator: torch.Generator,
        bounds: tuple[float | None, int | None],
        on_progress: Callable[[int, Built], None],
    ) -> None:
        self._scorer, self._settings, self._valid = scorer, settings, valid
        self._max_seconds, self._max_evaluations = bounds
        self._on_progress = on_progress
        self._start, self._first_evaluation = scorer.seconds(), scorer.evaluations
        drawn = torch.randperm(scorer.num_contexts, generator=generator)[: settings.contexts].tolist()
        self._first, self._others = drawn[:1], drawn[1:]
        self._done = 0

    def best(self, strings: Iterable[Ids]) -> list[Built]:
        """Those of `strings` that got into the final, best first, with their mean over all contexts drawn."""
        distinct = list(dict.fromkeys(strings))
        valid = self._valid(torch.tensor(distinct)).tolist() if distinct else []
        left = [s for s, ok in zip(distinct, valid, strict=True) if ok]
        if not left:
            return []
        # Of a divergence over several tokens all are forced along what one of them brings out.
        reference = left[0]
        self._scorer.prepare(torch.tensor(reference), self._first)
        scored: dict[Ids, float] = {}
        while left and (room := self._room()):
            # The likeliest first, should the budget end; of these, those that begin alike beside each other: their
            # beginnings are computed once.
            batch, left = sorted(left[: min(room, _BATCH)]), left[min(room, _BATCH) :]
            scored |= dict(zip(batch, self._scores(batch, self._first), strict=True))
            self._done += len(batch)
            leader = max(scored, key=lambda s: scored[s])
            self._on_progress(self._done, Built(trigger_ids=leader, score=scored[leader]))
        order = sorted(scored, key=lambda s: -scored[s])
        if self._others and order:
            count = len(self._others)
            order = order[: max(self._settings.keep, min(self._settings.finalists, self._room() // count))]
            self._scorer.prepare(torch.tensor(reference), self._others)
            others = self._scores(order, self._others)
            scored |= {s: (scored[s] + count * o) / (count + 1) for s, o in zip(order, others, strict=True)}
        made = (Built(trigger_ids=s, score=scored[s]) for s in order if math.isfinite(scored[s]))
        return sorted(made, key=lambda b: -b.score)

    def _room(self) -> int:
        """Evaluations that are left; none once the time is up."""
        if self._max_seconds is not None and self._scorer.seconds() - self._start >= self._max_seconds:
            return 0
        spent = self._scorer.evaluations - self._first_evaluation
        return _ENDLESS if self._max_evaluations is None else max(0, self._max_evaluations - spent)

    def _scores(self, strings: Sequence[Ids], contexts: Sequence[int]) -> list[float]:
        means: list[float] = self._scorer.score(torch.tensor(strings), contexts).mean(1).tolist()
        # Not a number, as float16 may give, is no score.
        return [-torch.inf if math.isnan(m) else m for m in means]


def _insertions(strings: Sequence[Ids], pool: Sequence[int]) -> list[Ids]:
    """Those with the pool's first tokens first."""
    return [(*s[:place], t, *s[place:]) for t in pool for s in strings for place in range(len(s) + 1)]
