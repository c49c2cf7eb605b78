"""The optimisation loop that every strategy shares: draw contexts, propose, score, keep the best.

Each step draws contexts anew and scores the incumbents on the same contexts as their rivals, so that no
string lives on a lucky draw. Now and then the incumbent is scored on all contexts; those scores rank what is
returned.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from trigger_opt.search.moves import distinct, joined_changes, random_triggers
from trigger_opt.search.protocol import (
    Found,
    OnState,
    Propose,
    Scorer,
    SearchState,
    Seeds,
    Step,
    Validity,
    ignore_found,
    ignore_state,
)

# Whole strings scored on all contexts between two looks at the budget.
_CONSIDERED_AT_ONCE = 4


class NoValidStringError(ValueError):
    """No string of allowed tokens can be typed in the contexts given."""


@dataclass(kw_only=True)
class SearchSettings:
    """What every strategy shares.

    Attributes:
        trigger_length: tokens. num_steps: per restart. num_restarts: independent starts, each with an equal
            share of the budget; what one leaves over goes to the next.
        search_width: candidates scored in one step. n_replace: positions changed at once. join: changes of that step
            that are tried together as well, the best two, the best three and so on up to this many, where each is
            better than the incumbent alone; at most `join` - 1 strings more. 1: none.
        topk: options a position. rank_exponent: of these, one is drawn in proportion to its rank, from the steepest
            slope on, to the power of minus this; 0: all alike. prior_share: of these, how many are tokens of the prior
            (`Seeds.prior`), where there is one; the others are as without it. buffer_size: best strings of a step that
            compete again in the next.
        contexts_per_step: search contexts drawn for a step. check_every: steps between scorings on all of them.
        stop_rate: stop when the payload comes out in this share of all search contexts (above 1: never).
        max_seconds, max_evaluations: whole search; None is no bound.
    """

    trigger_length: Annotated[int, Field(ge=1)] = 6
    num_steps: Annotated[int, Field(ge=1)] = 100
    num_restarts: Annotated[int, Field(ge=1)] = 2
    search_width: Annotated[int, Field(ge=2)] = 64
    topk: Annotated[int, Field(ge=1)] = 128
    rank_exponent: Annotated[float, Field(ge=0, le=8)] = 1.0
    prior_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    n_replace: Annotated[int, Field(ge=1)] = 1
    join: Annotated[int, Field(ge=1)] = 8
    buffer_size: Annotated[int, Field(ge=1)] = 2
    contexts_per_step: Annotated[int, Field(ge=1)] = 4
    check_every: Annotated[int, Field(ge=1)] = 5
    rescore: Annotated[int, Field(ge=1)] = 3
    stop_rate: Annotated[float, Field(gt=0)] = 0.95
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    max_evaluations: Annotated[int, Field(ge=1)] | None = None

    def __post_init__(self) -> None:
        if self.n_replace > self.trigger_length:
            raise ValueError(f"n_replace={self.n_replace} exceeds trigger_length={self.trigger_length}; lower it")
        if self.buffer_size >= self.search_width:
            raise ValueError(
                f"buffer_size={self.buffer_size} leaves no room for new strings in search_width={self.search_width}; "
                "raise search_width or lower buffer_size"
            )


class Searcher:
    """One search: a scorer, settings and the loop over restarts; strategies differ in `propose` only."""

    def __init__(
        self,
        scorer: Scorer,
        *,
        settings: SearchSettings,
        valid: Validity,
        generator: torch.Generator,
        on_step: Callable[[Step], None],
        on_found: Callable[[Found], None] = ignore_found,
        on_state: OnState = ignore_state,
    ) -> None:
        self._scorer = scorer
        self._settings = settings
        self._valid = valid
        self._generator = generator
        self._on_step = on_step
        self._on_found = on_found
        self._on_state = on_state
        self._start = scorer.seconds()
        self._first_evaluation = scorer.evaluations
        self._rivals_win = True
        self.found: list[Found] = []

    def restart(self, number: int, pool: Int[Tensor, "batch trigger"], propose: Propose, share: float) -> None:
        """Run one restart from the best of `pool`, within `share` (0 to 1) of the whole budget.

        `propose(trigger, contexts, count)` returns candidates.
        """
        contexts, upcoming = self._drawn_contexts(), self._drawn_contexts()
        self._scorer.prepare(pool[0], contexts)
        buffer = self._best_of(pool[:0], pool, contexts, upcoming)[0]
        self._steps(number, 0, (buffer, upcoming), propose, share)

    def go_on(self, state: SearchState, propose: Propose, share: float) -> None:
        """The rest of the restart that `state` is of, after `restore`; see `restart`."""
        if not state.ended:
            self._steps(state.restart, state.step + 1, (state.buffer, state.upcoming), propose, share)

    def restore(self, state: SearchState) -> None:
        """Be the searcher that gave this state; what it had found is told again."""
        self._scorer.restore(state.scorer)
        self._generator.set_state(state.generator)
        self._rivals_win = state.rivals_win
        self._start = self._scorer.seconds() - state.seconds
        self._first_evaluation = self._scorer.evaluations - state.evaluations
        self.found = list(state.found)
        for found in self.found:
            self._on_found(found)

    def _steps(self, number: int, first: int, begun: tuple[Tensor, list[int]], propose: Propose, share: float) -> None:
        """Steps from `first` on; `begun`: the buffer, and the contexts drawn."""
        buffer, upcoming = begun
        for step in range(first, self._settings.num_steps):
            contexts = upcoming
            self._scorer.prepare(buffer[0], contexts)
            rivals = self._proposals(propose, buffer[0], contexts)
            upcoming = self._drawn_contexts() if step + 1 < self._settings.num_steps else []
            buffer, score = self._best_of(buffer, rivals, contexts, upcoming)
            last = step + 1 == self._settings.num_steps or self._exhausted(share)
            due = last or (step + 1) % self._settings.check_every == 0
            found = self._check(buffer[:1], number, step) if due else None
            told = self._told(number, step, buffer[0], score, found)
            self._on_step(told)
            ended = last or (found is not None and self._fires_enough(found))
            self._on_state(partial(self._state, told, buffer, upcoming, ended=ended))
            if ended:
                return

    def consider(self, strings: Sequence[Sequence[int]]) -> None:
        """Score whole strings on all contexts and keep them among the found; the first few at least, the others while
        the budget lasts."""
        parts = []
        for length in sorted({len(s) for s in strings}):
            alike = [list(s) for s in strings if len(s) == length]
            parts += [(i, alike[i : i + _CONSIDERED_AT_ONCE]) for i in range(0, len(alike), _CONSIDERED_AT_ONCE)]
        # The first of every length first.
        for _, some in sorted(parts, key=lambda part: part[0]):
            if self.found and self.exhausted:
                return
            self._check(torch.tensor(some), -1, -1)

    @property
    def exhausted(self) -> bool:
        """Whether the whole budget is spent."""
        return self._exhausted(1.0)

    @property
    def succeeded(self) -> bool:
        """Whether some string already fires in enough of the search contexts."""
        return any(self._fires_enough(f) for f in self.found)

    def _exhausted(self, share: float) -> bool:
        seconds, evaluations = self._settings.max_seconds, self._settings.max_evaluations
        late = seconds is not None and self.seconds >= seconds * share
        return late or (evaluations is not None and self.evaluations >= evaluations * share)

    @property
    def seconds(self) -> float:
        """Wall time since the search began."""
        return self._scorer.seconds() - self._start

    @property
    def evaluations(self) -> int:
        """Evaluations this search spent."""
        return self._scorer.evaluations - self._first_evaluation

    def _state(self, told: Step, buffer: Tensor, upcoming: list[int], *, ended: bool) -> SearchState:
        # Nothing here may ask other processes: one alone keeps states. So the seconds are those told.
        return SearchState(
            restart=told.restart, step=told.step, ended=ended, buffer=buffer.clone(), upcoming=upcoming,
            generator=self._generator.get_state(), rivals_win=self._rivals_win, found=list(self.found),
            seconds=told.seconds, evaluations=told.evaluations, scorer=self._scorer.state(),
        )  # fmt: skip

    def _drawn_contexts(self) -> list[int]:
        count = min(self._settings.contexts_per_step, self._scorer.num_contexts)
        drawn: list[int] = torch.randperm(self._scorer.num_contexts, generator=self._generator)[:count].tolist()
        return sorted(drawn)

    def _proposals(self, propose: Propose, trigger: Tensor, contexts: Sequence[int]) -> Tensor:
        wanted = self._settings.search_width - self._settings.buffer_size
        # Twice as many are drawn as are kept: about half of random swaps do not survive re-tokenisation.
        rivals = propose(trigger, contexts, 2 * wanted)
        rivals = rivals[~self._scorer.known(rivals, contexts)]
        return rivals[self._valid(rivals)][:wanted]

    def _best_of(
        self, buffer: Tensor, rivals: Tensor, contexts: Sequence[int], upcoming: Sequence[int]
    ) -> tuple[Tensor, float]:
        """The best `buffer_size` of both and the best score; a tie goes to what is in the buffer already.

        `upcoming`: the next step's contexts, if there is one.
        """
        keep, incumbents = self._settings.buffer_size, len(buffer)
        pool = distinct(torch.cat([buffer, rivals]))
        few = max(keep, self._settings.rescore + incumbents)
        asked = max(few, incumbents + self._settings.join) if incumbents else few
        # A buffer that is not full yet has room below its worst.
        bar = incumbents if incumbents >= keep else 0
        scores = self._scorer.aggregate(self._scorer.score(pool, contexts, keep=asked, incumbents=bar))
        joined = self._joined(pool, scores, contexts) if incumbents else pool[:0]
        if len(joined):
            # Of the strings of before, whose scores are remembered, only those that can still be chosen.
            rest = scores[incumbents:].argsort(descending=True, stable=True)[:few] + incumbents
            pool = distinct(torch.cat([pool[:incumbents], joined, pool[rest]]))
            scores = self._scorer.aggregate(self._scorer.score(pool, contexts, keep=few, incumbents=bar))
        best = [r for r in scores.argsort(descending=True, stable=True)[:few].tolist() if scores[r] > -torch.inf]
        rivals_seen = [r for r in best if r >= incumbents][: max(keep, self._settings.rescore)]
        rows = [*range(incumbents), *rivals_seen]
        refined = self._refined(pool[rows], incumbents, contexts, upcoming) if rivals_seen else None
        if refined is not None:
            pool, scores = refined
        order = scores.argsort(descending=True, stable=True)[:keep]
        return pool[order], float(scores[order[0]])

    def _joined(
        self, pool: Int[Tensor, "batch trigger"], scores: Float[Tensor, " batch"], contexts: Sequence[int]
    ) -> Int[Tensor, "joined trigger"]:
        """Changes of the incumbent, which is first in `pool`, that improve on it one by one, several at once."""
        best = scores.argsort(descending=True, stable=True)[: self._settings.join]
        better = pool[best[scores[best] > scores[0]]]
        strings = joined_changes(pool[0], better, self._settings.join)
        strings = strings[~self._scorer.known(strings, contexts)]
        return strings[self._valid(strings)]

    def _refined(
        self, pool: Tensor, incumbents: int, contexts: Sequence[int], upcoming: Sequence[int]
    ) -> tuple[Tensor, Tensor] | None:
        """Incumbents, which come first in `pool`, and the rivals that had to be looked at, with their scores in the
        best precision.

        Rivals come one after the other, the most promising first, until enough of them beat the incumbents: each
        costs several fast scores. None where nothing is to be gained by it.
        """
        keep = self._settings.buffer_size
        bar_rows = incumbents if incumbents >= keep else 0
        refined: tuple[Tensor, Tensor] | None = None
        leads = False
        for count in range(incumbents + (1 if incumbents else min(keep, len(pool))), len(pool) + 1):
            # Where rivals that looked best did not win of late, this one may not either.
            likely = pool[incumbents if refined is None else count - 1]
            ahead = (likely, upcoming) if upcoming and self._rivals_win and not leads else None
            rows = pool[:count]
            table = self._scorer.refine(rows, contexts, keep=keep, incumbents=bar_rows, ahead=ahead)
            if table is None:
                return None
            scores = self._scorer.aggregate(table)
            refined = rows, scores
            leads = int(scores.argmax()) >= incumbents
            bar = scores[:incumbents].min() if bar_rows else -torch.inf
            if int((scores[incumbents:] > bar).sum()) >= keep:
                break
        self._rivals_win = leads
        return refined

    def _check(self, triggers: Int[Tensor, "batch trigger"], restart: int, step: int) -> Found:
        everywhere = list(range(self._scorer.num_contexts))
        self._scorer.prepare(triggers[0], everywhere)
        scores = self._scorer.aggregate(self._scorer.score(triggers, everywhere))
        for trigger, score in zip(triggers, scores.tolist(), strict=True):
            fired = self._scorer.fires(trigger, everywhere)
            self.found.append(
                Found(
                    trigger_ids=tuple(trigger.tolist()),
                    score=score,
                    selection_rate=None if fired is None else float(fired.float().mean()),
                    restart=restart,
                    step=step,
                    evaluations=self.evaluations,
                )
            )
            self._on_found(self.found[-1])
        return self.found[-1]

    def _fires_enough(self, found: Found) -> bool:
        return found.selection_rate is not None and found.selection_rate >= self._settings.stop_rate

    def _told(self, restart: int, step: int, trigger: Tensor, score: float, found: Found | None) -> Step:
        return Step(
            restart=restart, step=step, trigger_ids=tuple(trigger.tolist()), score=score,
            evaluations=self.evaluations, seconds=self.seconds,
            selection_rate=found.selection_rate if found else None,
        )  # fmt: skip


def initial_pool(
    seeds: Seeds,
    allowed: Bool[Tensor, " vocab"],
    valid: Validity,
    *,
    length: int,
    count: int,
    generator: torch.Generator,
) -> Int[Tensor, "batch trigger"]:
    """Up to `count` valid strings of `length` tokens to begin from. Never empty.

    Without seeds, random strings. Otherwise the seed strings that have this length; then a quarter seed strings laid
    end to end, so that words stay whole, a quarter seed tokens alone, and the rest mixed with random tokens.

    Raises:
        NoValidStringError: no valid string was drawn in 50 rounds; the token policy or the contexts forbid almost all.
    """
    pool = torch.tensor([s for s in seeds.strings if len(s) == length], dtype=torch.long).view(-1, length)
    pool = distinct(pool[valid(pool)]) if len(pool) else pool
    for _ in range(50):
        drawn = random_triggers(allowed, length=length, count=count, generator=generator)
        if seeds.tokens:
            ids = torch.tensor(seeds.tokens)
            seeded = ids[torch.randint(len(ids), drawn.shape, generator=generator)]
            plain = torch.rand(drawn.shape, generator=generator) < 0.3
            # Half of them seeds alone, an eighth none: seeds may not survive re-tokenisation beside each other.
            plain[: len(drawn) // 2] = False
            plain[len(drawn) - len(drawn) // 8 :] = True
            drawn = torch.where(plain, drawn, seeded)
        for row in range(len(drawn) // 4 if seeds.strings else 0):
            drawn[row] = _end_to_end(seeds.strings, length, generator)
        pool = distinct(torch.cat([pool, drawn[valid(drawn)]]))
        if len(pool) >= count:
            break
    if len(pool) == 0:
        raise NoValidStringError("no string of allowed tokens survives re-tokenisation in these contexts")
    return pool[:count]


def _end_to_end(strings: Sequence[Sequence[int]], length: int, generator: torch.Generator) -> Int[Tensor, " trigger"]:
    """`length` tokens of `strings` drawn one after the other, from anywhere in the first."""
    ids: list[int] = []
    while len(ids) < length:
        string = strings[int(torch.randint(len(strings), (), generator=generator))]
        first = 0 if ids else int(torch.randint(max(1, len(string) - length + 1), (), generator=generator))
        ids += string[first:]
    return torch.tensor(ids[:length])


def ranked(found: Sequence[Found]) -> list[Found]:
    """Each string once, those that fire in most contexts first, then by score."""
    best: dict[tuple[int, ...], Found] = {}
    for f in found:
        best.setdefault(f.trigger_ids, f)
    return sorted(best.values(), key=lambda f: (-(f.selection_rate or 0.0), -f.score))
