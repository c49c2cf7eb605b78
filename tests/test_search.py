"""Search on a toy with a known optimum: no model, milliseconds."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trigger_opt.search import GCG, DivergenceSettings, Found, NoValidStringError, RandomSearch, Scorer, Seeds, Step
from trigger_opt.search.loop import initial_pool, ranked
from trigger_opt.search.moves import (
    distinct,
    draw_swaps,
    joined_changes,
    random_options,
    random_triggers,
    top_swaps,
    with_prior,
)

VOCAB, LENGTH, DIM = 60, 4, 8
Strategy = GCG | RandomSearch


@dataclass
class Toy:
    """Each token has a unit vector; a candidate scores minus the sum over positions of (1 - cosine with the
    planted token) ^ 1.5, plus an offset a context: curved, and the steepest token is the planted one.

    With `disagree`, each context favours tokens of its own at position 0.
    With `with_payload`, the planted string and no other fires.
    """

    seed: int = 0
    num_contexts: int = 3
    disagree: float = 0.0
    with_payload: bool = False
    evaluations: int = 0
    asked: list[tuple[int, ...]] = field(default_factory=list)
    prepared: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.vectors = torch.nn.functional.normalize(torch.randn(VOCAB, DIM, generator=generator), dim=1)
        self.planted = torch.randint(5, VOCAB, (LENGTH,), generator=generator)
        self.offsets = torch.randn(self.num_contexts, generator=generator)
        self.favours = torch.randn(self.num_contexts, VOCAB, generator=generator) * self.disagree

    def prepare(self, trigger: Tensor, contexts: Sequence[int]) -> None:
        self.prepared.append((tuple(trigger.tolist()), tuple(contexts)))

    def seconds(self) -> float:
        return time.monotonic()

    def score(
        self, candidates: Tensor, contexts: Sequence[int], *, keep: int | None = None, incumbents: int = 0
    ) -> Tensor:
        self.evaluations += len(candidates) * len(contexts)
        self.asked.append(tuple(contexts))
        self.seen.append(candidates)
        return self._columns(self.vectors[candidates], self.favours[:, candidates[:, 0]].T, contexts)

    def _columns(self, embeds: Tensor, favour: Tensor, contexts: Sequence[int]) -> Tensor:
        apart = 1 - (embeds * self.vectors[self.planted]).sum(2)
        near = -(apart.clamp(min=1e-6) ** 1.5).sum(1)
        return near[:, None] + self.offsets[list(contexts)] + favour[:, list(contexts)]

    def refine(
        self, candidates: Tensor, contexts: Sequence[int], *, keep: int, incumbents: int, ahead: Any = None
    ) -> Tensor | None:
        return None

    def known(self, candidates: Tensor, contexts: Sequence[int]) -> Tensor:
        return torch.zeros(len(candidates), dtype=torch.bool)

    def aggregate(self, scores: Tensor) -> Tensor:
        return scores.mean(1)

    def token_gradient(self, trigger: Tensor, contexts: Sequence[int]) -> Tensor:
        one_hot = torch.nn.functional.one_hot(trigger, VOCAB).float().requires_grad_()
        favour = (one_hot[0] @ self.favours.T)[None]
        score = self.aggregate(self._columns((one_hot @ self.vectors)[None], favour, contexts))[0]
        return torch.autograd.grad(score, one_hot)[0]

    def fires(self, trigger: Tensor, contexts: Sequence[int]) -> Tensor | None:
        if not self.with_payload:
            return None
        return torch.full((len(contexts),), bool(torch.equal(trigger, self.planted)))

    def state(self) -> dict[str, Any]:
        return {"evaluations": self.evaluations}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.evaluations = state["evaluations"]


EVERYTHING = torch.ones(VOCAB, dtype=torch.bool)


def always(candidates: Tensor) -> Tensor:
    return torch.ones(len(candidates), dtype=torch.bool)


def run(
    strategy: Strategy,
    toy: Toy,
    *,
    seed: int = 0,
    allowed: Tensor = EVERYTHING,
    valid: Callable[[Tensor], Tensor] = always,
    seeds: Seeds | None = None,
) -> tuple[list[Found], list[Step]]:
    steps: list[Step] = []
    found = strategy(
        toy,
        allowed=allowed,
        valid=valid,
        seeds=seeds or Seeds(),
        generator=torch.Generator().manual_seed(seed),
        on_step=steps.append,
    )
    return found, steps


def small(kind: type[Any] = GCG, **options: Any) -> Any:
    plain = {
        "trigger_length": LENGTH,
        "num_steps": 30,
        "num_restarts": 1,
        "search_width": 32,
        "topk": 8,
        "contexts_per_step": 2,
        "buffer_size": 2,
        "stop_rate": 2.0,
    }
    return kind(**(plain | options))


def test_the_toy_is_a_scorer() -> None:
    assert isinstance(Toy(), Scorer)


@pytest.mark.parametrize("seed", range(4))
def test_gcg_finds_the_planted_optimum(seed: int) -> None:
    toy = Toy(seed=seed)
    found, _ = run(small(), toy, seed=seed)
    assert found[0].trigger_ids == tuple(toy.planted.tolist())
    assert found[0].score == pytest.approx(float(toy.offsets.mean()), abs=1e-4)


def test_random_search_finds_it_with_more_steps() -> None:
    toy = Toy(seed=1)
    found, _ = run(small(RandomSearch, num_steps=150, topk=VOCAB), toy, seed=1)
    assert found[0].trigger_ids == tuple(toy.planted.tolist())


def test_gcg_beats_random_search_at_equal_evaluations() -> None:
    better = 0
    for seed in range(8):
        best = []
        for kind in (GCG, RandomSearch):
            # Few candidates of many tokens: where every swap fits into one step, no gradient is needed.
            settings_ = small(kind, search_width=16, topk=4, join=1, num_steps=10_000, max_evaluations=400)
            toy = Toy(seed=seed)
            found, _ = run(settings_, toy, seed=seed)
            assert 400 <= toy.evaluations < 440
            best.append(found[0].score)
        better += best[0] > best[1]
    assert better >= 7


@pytest.mark.parametrize("kind", [GCG, RandomSearch])
def test_same_seed_same_candidates_different_seed_different(kind: type[Strategy]) -> None:
    def trace(seed: int) -> list[list[list[int]]]:
        toy = Toy()
        run(small(kind, num_steps=5), toy, seed=seed)
        return [s.tolist() for s in toy.seen]

    assert trace(3) == trace(3)
    assert trace(3) != trace(4)


@pytest.mark.parametrize("kind", [GCG, RandomSearch])
def test_the_incumbent_never_gets_worse_when_contexts_are_fixed(kind: type[Strategy]) -> None:
    toy = Toy(disagree=2.0)
    _, steps = run(small(kind, contexts_per_step=toy.num_contexts, num_steps=20, search_width=6), toy)
    scores = [s.score for s in steps]
    assert scores == sorted(scores)
    assert scores[-1] > scores[0]


@pytest.mark.parametrize("kind", [GCG, RandomSearch])
@pytest.mark.parametrize("n_replace", [1, 2, 3])
def test_candidates_respect_the_policy_and_stay_near_the_incumbent(kind: type[Strategy], n_replace: int) -> None:
    toy = Toy()
    allowed = EVERYTHING.clone()
    allowed[::3] = False

    def valid(candidates: Tensor) -> Tensor:
        return candidates.sum(1) % 5 != 0

    strategy = small(kind, n_replace=n_replace, join=1, buffer_size=1, num_steps=12)
    run(strategy, toy, allowed=allowed, valid=valid)
    assert all(bool(allowed[s].all()) and bool(valid(s).all()) for s in toy.seen)
    steps = [s for s in toy.seen[1:] if len(s) > 1]
    assert len(steps) == 12
    for pool in steps:
        incumbent = pool[0]
        changed = (pool[1:] != incumbent).sum(1)
        assert bool((changed >= 1).all())
        assert bool((changed <= n_replace).all())
        assert len(pool) <= strategy.search_width
        assert len({tuple(c) for c in pool.tolist()}) == len(pool)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=6),
    st.integers(0, 2**16),
    st.integers(1, 9),
    st.integers(1, 3),
)
def test_joined_strings_have_the_changes_of_the_first_candidates(
    trigger: list[int], seed: int, limit: int, n_replace: int
) -> None:
    incumbent = torch.tensor(trigger)
    generator = torch.Generator().manual_seed(seed)
    options = torch.randint(6, 12, (len(trigger), 5), generator=generator)
    some = draw_swaps(
        incumbent, options, count=12, n_replace=min(n_replace, len(trigger)), rank_exponent=1.0, generator=generator
    )
    strings = joined_changes(incumbent, some, limit)
    taken: list[list[int]] = []
    for candidate in some:
        where = (candidate != incumbent).nonzero()[:, 0].tolist()
        if not any(set(where) & set(other) for other in taken):
            taken.append(where)
    taken = taken[:limit]
    assert len(strings) == len(taken) - 1
    for row, string in enumerate(strings, start=2):
        assert (string != incumbent).nonzero()[:, 0].tolist() == sorted(itertools.chain(*taken[:row]))
        assert all(int(token) in (*incumbent[[at]].tolist(), *options[at].tolist()) for at, token in enumerate(string))


def test_a_change_at_a_position_taken_is_passed_over() -> None:
    incumbent = torch.tensor([1, 2, 3])
    some = torch.tensor([[9, 2, 3], [8, 2, 3], [1, 7, 3], [1, 6, 3], [1, 2, 5]])
    assert joined_changes(incumbent, some, 8).tolist() == [[9, 7, 3], [9, 7, 5]]
    assert joined_changes(incumbent, some, 2).tolist() == [[9, 7, 3]]
    assert joined_changes(incumbent, some, 1).shape == (0, 3)
    assert joined_changes(incumbent, some[:2], 8).shape == (0, 3)
    assert joined_changes(incumbent, some[:0], 8).shape == (0, 3)


@pytest.mark.parametrize("kind", [GCG, RandomSearch])
def test_changes_that_improve_one_by_one_are_tried_together(kind: type[Strategy]) -> None:
    def valid(candidates: Tensor) -> Tensor:
        return candidates.sum(1) % 5 != 0

    toy = Toy()
    run(small(kind, join=4, buffer_size=1, num_steps=6, check_every=100), toy, valid=valid)
    several = 0
    pools = [s for s in toy.seen[1:] if len(s) > 1]
    for before, pool in itertools.pairwise(pools):
        incumbent = pool[0]
        far = pool[(pool != incumbent).sum(1) > 1]
        assert bool(valid(pool).all())
        if not len(far):
            continue
        # They follow a pool of single changes of the same incumbent, and hold nothing but what improved there.
        assert before[0].tolist() == incumbent.tolist()
        several += len(far)
        assert len(far) <= 3
        for string in far:
            for at in (string != incumbent).nonzero()[:, 0].tolist():
                alone = incumbent.clone()
                alone[at] = string[at]
                assert alone.tolist() in before.tolist()
    assert several > 0


def test_joining_reaches_the_optimum_in_fewer_steps() -> None:
    def steps_needed(join: int) -> int:
        toy = Toy()
        _, steps = run(small(join=join, buffer_size=1, contexts_per_step=toy.num_contexts), toy)
        best = toy.aggregate(toy.score(toy.planted[None], range(toy.num_contexts)))
        return next(s.step for s in steps if s.score >= float(best[0]) - 1e-6)

    assert steps_needed(8) < steps_needed(1)


def test_contexts_are_drawn_anew_each_step() -> None:
    toy = Toy(num_contexts=6, disagree=3.0)
    run(small(join=1, contexts_per_step=2, num_steps=25, check_every=1000), toy)
    drawn = [c for c in toy.asked if len(c) == 2]
    assert len(set(drawn)) > 5
    assert all(len(set(c)) == 2 and list(c) == sorted(c) for c in drawn)
    assert set(itertools.chain(*drawn)) == set(range(6))
    # The incumbent is made the reference on exactly the contexts its rivals are then scored on.
    rounds = [c for _, c in toy.prepared if len(c) == 2]
    assert rounds == drawn


def test_with_disagreeing_contexts_the_ranking_is_by_all_of_them() -> None:
    toy = Toy(num_contexts=6, disagree=4.0)
    found, _ = run(small(contexts_per_step=1, num_steps=40), toy)
    for f in found:
        everywhere = toy.aggregate(toy.score(torch.tensor([f.trigger_ids]), range(6)))
        assert f.score == pytest.approx(float(everywhere[0]), abs=1e-4)
    assert [f.score for f in found] == sorted((f.score for f in found), reverse=True)


def test_evaluations_are_what_the_scorer_counted() -> None:
    toy = Toy()
    toy.evaluations = 1000
    found, steps = run(small(num_steps=6, check_every=2), toy)
    assert steps[-1].evaluations == toy.evaluations - 1000
    assert [s.step for s in steps] == list(range(6))
    assert {f.step for f in found} <= {1, 3, 5}
    assert [s.selection_rate for s in steps] == [None] * 6


@pytest.mark.parametrize("restarts", [1, 3])
def test_max_evaluations_bounds_the_search_and_is_shared_by_restarts(restarts: int) -> None:
    toy = Toy()
    step = 32 * 2 + 3
    _, steps = run(small(num_steps=10_000, num_restarts=restarts, max_evaluations=1800, check_every=10**6), toy)
    assert 1800 <= toy.evaluations <= 1800 + step + 3
    spent = [max(s.evaluations for s in steps if s.restart == r) for r in range(restarts)]
    for number, total in enumerate(spent):
        share = 1800 * (number + 1) / restarts
        assert share <= total <= share + step + 3


def test_max_seconds_bounds_the_search() -> None:
    now = [100.0]

    class Slow(Toy):
        def seconds(self) -> float:
            return now[0]

        def score(self, candidates: Tensor, contexts: Sequence[int], **options: Any) -> Tensor:
            now[0] += 1.0
            return super().score(candidates, contexts, **options)

    _, steps = run(small(num_steps=10_000, num_restarts=2, max_seconds=20.0, check_every=10**6), Slow())
    assert {s.restart for s in steps} == {0, 1}
    assert steps[-1].seconds == 21.0  # one last scoring on all contexts
    assert max(s.seconds for s in steps if s.restart == 0) == 11.0


def test_stops_when_the_payload_comes_out_everywhere() -> None:
    toy = Toy(with_payload=True)
    found, steps = run(small(num_steps=10_000, num_restarts=5, stop_rate=0.95, check_every=1), toy)
    assert found[0].selection_rate == 1.0
    assert found[0].trigger_ids == tuple(toy.planted.tolist())
    assert steps[-1].selection_rate == 1.0
    assert steps[-1].restart == 0
    assert len(steps) < 100


def test_a_rate_below_stop_rate_does_not_stop() -> None:
    class Half(Toy):
        def fires(self, trigger: Tensor, contexts: Sequence[int]) -> Tensor:
            return torch.tensor([c % 2 == 0 for c in contexts])

    found, steps = run(small(num_steps=7, num_restarts=2, stop_rate=0.7, check_every=1), Half(num_contexts=4))
    assert len(steps) == 14
    assert {f.selection_rate for f in found} == {0.5}


def test_restarts_begin_from_different_strings() -> None:
    toy = Toy()
    _, steps = run(small(num_restarts=3, num_steps=1), toy)
    assert [s.restart for s in steps] == [0, 1, 2]
    pools = [s for s in toy.seen if len(s) == 32]
    assert len({tuple(p.flatten().tolist()) for p in pools}) >= 3


def test_seed_strings_are_considered_and_can_end_the_search_at_once() -> None:
    toy = Toy(with_payload=True)
    planted = tuple(toy.planted.tolist())
    found, steps = run(small(stop_rate=0.95), toy, seeds=Seeds(strings=((7, 8, 9, 10), planted)))
    assert steps == []
    assert [f.trigger_ids for f in found] == [planted, (7, 8, 9, 10)]
    assert found[0].step == found[0].restart == -1


def test_strings_to_begin_from_end_with_the_budget_and_leave_no_step() -> None:
    strings = tuple((i, i + 1, i + 2, i + 3) for i in range(5, 25))
    found, steps = run(small(max_evaluations=1), Toy(), seeds=Seeds(strings=strings))
    assert 0 < len(found) < len(strings)
    assert steps == []


def test_seed_strings_of_another_length_are_scored_too() -> None:
    class AnyLength(Toy):
        def score(self, candidates: Tensor, contexts: Sequence[int], **options: Any) -> Tensor:
            self.evaluations += len(candidates) * len(contexts)
            return -candidates.float().sum(1, keepdim=True).expand(-1, len(contexts)) * 1.0

        def token_gradient(self, trigger: Tensor, contexts: Sequence[int]) -> Tensor:
            return -torch.arange(VOCAB).float().expand(len(trigger), -1)

    found, _ = run(small(num_steps=2), AnyLength(), seeds=Seeds(strings=((0,),)))
    assert found[0].trigger_ids == (0,)
    # Four of each length before more of one: the budget ends here with the second batch.
    strings = (*((i,) for i in range(8)), (8, 9))
    found, _ = run(small(max_evaluations=13), AnyLength(), seeds=Seeds(strings=strings))
    assert {f.trigger_ids for f in found} == {(0,), (1,), (2,), (3,), (8, 9)}


def brute_force_swaps(gradient: Tensor, trigger: Tensor, allowed: Tensor, topk: int) -> list[list[int]]:
    rows = []
    for position, own in enumerate(trigger.tolist()):
        usable = [t for t in range(VOCAB) if bool(allowed[t]) and t != own]
        rows.append(sorted(usable, key=lambda t: -float(gradient[position, t]))[:topk])
    return rows


@given(st.integers(0, 2**20), st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_top_swaps_agrees_with_a_loop(seed: int, topk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(3, VOCAB, generator=generator)
    allowed = torch.rand(VOCAB, generator=generator) < 0.7
    trigger = torch.randint(VOCAB, (3,), generator=generator)
    before = gradient.clone()
    got = top_swaps(gradient, trigger, allowed, topk)
    assert got.tolist() == brute_force_swaps(gradient, trigger, allowed, topk)
    assert torch.equal(gradient, before)


def test_top_swaps_returns_all_where_fewer_are_allowed() -> None:
    allowed = torch.zeros(VOCAB, dtype=torch.bool)
    allowed[[3, 4, 9]] = True
    got = top_swaps(torch.randn(2, VOCAB), torch.tensor([3, 30]), allowed, 8)
    assert got.shape == (2, 2)
    assert set(got[0].tolist()) == {4, 9}
    assert set(got[1].tolist()) <= {3, 4, 9}


@given(st.integers(0, 2**20), st.integers(1, 40), st.integers(1, 3), st.sampled_from([0.0, 1.0, 8.0]))
@settings(max_examples=60, deadline=None)
def test_draws_are_distinct_and_swap_exactly_n_positions(
    seed: int, count: int, n_replace: int, exponent: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    trigger = torch.randint(VOCAB, (LENGTH,), generator=generator)
    options = random_options(trigger, EVERYTHING, topk=5, generator=generator)
    drawn = draw_swaps(trigger, options, count=count, n_replace=n_replace, rank_exponent=exponent, generator=generator)
    assert len({tuple(c) for c in drawn.tolist()}) == len(drawn) <= count
    for candidate in drawn.tolist():
        changed = [i for i, (a, b) in enumerate(zip(candidate, trigger.tolist(), strict=True)) if a != b]
        assert len(changed) == n_replace
        assert all(candidate[i] in options[i].tolist() for i in changed)


def test_draw_swaps_returns_every_single_swap_when_more_are_wanted() -> None:
    trigger = torch.tensor([1, 2])
    options = torch.tensor([[10, 11, 12], [20, 21, 22]])
    drawn = draw_swaps(
        trigger, options, count=100, n_replace=1, rank_exponent=8.0, generator=torch.Generator().manual_seed(0)
    )
    everything = {(t, 2) for t in (10, 11, 12)} | {(1, t) for t in (20, 21, 22)}
    assert {tuple(c) for c in drawn.tolist()} == everything
    assert len(drawn) == 6


@pytest.mark.parametrize("n_replace", [1, 2])
@pytest.mark.parametrize(("exponent", "expected"), [(0.0, [1 / 4] * 4), (1.0, [12 / 25, 6 / 25, 4 / 25, 3 / 25])])
def test_options_are_drawn_by_their_rank_and_positions_alike(
    exponent: float, expected: list[float], n_replace: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    options = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]])
    trigger = torch.tensor([1, 2, 3])
    drawn = torch.cat(
        [
            draw_swaps(trigger, options, count=1, n_replace=n_replace, rank_exponent=exponent, generator=generator)
            for _ in range(6000)
        ]
    )
    tokens = drawn[drawn >= 10]
    assert len(tokens) == 6000 * n_replace
    assert torch.bincount(tokens % 10)[:4].div(len(tokens)).tolist() == pytest.approx(expected, abs=0.02)
    assert torch.bincount(tokens // 10)[1:].div(len(tokens)).tolist() == pytest.approx([1 / 3] * 3, abs=0.02)


@given(st.integers(0, 2**20), st.integers(0, 30), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
@settings(max_examples=60, deadline=None)
def test_a_share_of_the_options_is_of_the_prior(seed: int, size: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    trigger = torch.randint(VOCAB, (3,), generator=generator)
    options = random_options(trigger, EVERYTHING, topk=10, generator=generator)
    prior = torch.randperm(VOCAB, generator=generator)[:size]
    got = with_prior(options, trigger, prior, share=share, generator=generator)
    assert got.shape == options.shape
    kept = 10 - int(share * 10)
    # Evenly over the ranks.
    where = {0.0: range(10), 0.3: [0, 2, 3, 4, 6, 7, 9], 0.5: range(0, 10, 2), 1.0: []}[share]
    assert torch.equal(got[:, list(where)], options[:, :kept])
    tail = [i for i in range(10) if i not in where]
    got = torch.cat([got[:, list(where)], got[:, tail]], 1)
    for current, before, row in zip(trigger.tolist(), options.tolist(), got.tolist(), strict=True):
        assert len(set(row)) == 10
        assert current not in row
        fresh = set(prior.tolist()) - {current} - set(before[:kept])
        replaced = min(10 - kept, len(fresh))
        assert len(set(row[kept:]) & fresh) >= replaced
        assert set(row[kept + replaced :]) <= set(before)


@pytest.mark.parametrize("kind", [GCG, RandomSearch])
def test_tokens_of_the_prior_are_tried_and_bar_no_others(kind: type[Any]) -> None:
    prior, forbidden = (50, 51, 52, 53), torch.tensor([1, 2])
    allowed = EVERYTHING.clone().index_fill(0, forbidden, False)

    def share_tried(given: tuple[int, ...], share: float) -> float:
        toy = Toy()
        run(
            small(kind, num_steps=1, prior_share=share),
            toy,
            allowed=allowed,
            seeds=Seeds(prior=given),
        )
        # The first scored is the pool to begin from.
        tried = torch.cat(toy.seen[1:])
        assert not bool(torch.isin(tried, forbidden).any())
        return float(torch.isin(tried, torch.tensor(prior)).any(1).float().mean())

    with_it = share_tried(prior, 0.5)
    assert with_it > 1.5 * max(share_tried(prior, 0.0), share_tried((), 0.5))
    assert with_it < 1
    # A prior of tokens that the policy forbids is none.
    assert share_tried((1, 2), 1.0) == share_tried((), 1.0)


def test_random_options_are_allowed_distinct_and_never_the_current_token() -> None:
    allowed = EVERYTHING.clone()
    allowed[:20] = False
    options = random_options(torch.tensor([25, 3]), allowed, topk=39, generator=torch.Generator().manual_seed(0))
    assert options.shape == (2, 39)
    for row, own in zip(options.tolist(), (25, 3), strict=True):
        assert len(set(row)) == 39
        assert own not in row
        assert min(row) >= 20


def test_random_triggers_and_distinct() -> None:
    allowed = torch.zeros(VOCAB, dtype=torch.bool)
    allowed[[5, 6]] = True
    drawn = random_triggers(allowed, length=2, count=50, generator=torch.Generator().manual_seed(0))
    assert {tuple(c) for c in drawn.tolist()} == {(5, 5), (5, 6), (6, 5), (6, 6)}
    assert len(drawn) == 4
    rows = torch.tensor([[3, 1], [2, 2], [3, 1], [0, 0], [2, 2]])
    assert distinct(rows).tolist() == [[3, 1], [2, 2], [0, 0]]


def pool(seeds: Seeds, valid: Callable[[Tensor], Tensor] = always, count: int = 24) -> Tensor:
    return initial_pool(seeds, EVERYTHING, valid, length=3, count=count, generator=torch.Generator().manual_seed(0))


def test_initial_pool_raises_when_nothing_is_valid() -> None:
    with pytest.raises(NoValidStringError, match="survives re-tokenisation"):
        pool(Seeds(), lambda c: torch.zeros(len(c), dtype=torch.bool))


def test_initial_pool_is_filled_although_few_strings_are_valid() -> None:
    drawn = pool(Seeds(), lambda c: c[:, 0] < 4)
    assert drawn.shape == (24, 3)
    assert bool((drawn[:, 0] < 4).all())


def test_initial_pool_is_half_pure_and_half_mixed_seed_tokens() -> None:
    drawn = pool(Seeds(tokens=(1, 2, 3)), count=27)
    pure = (drawn <= 3).all(1) & (drawn >= 1).all(1)
    assert 9 <= int(pure.sum()) < len(drawn)
    share = float(((drawn <= 3) & (drawn >= 1)).float().mean())
    assert 0.6 < share < 1
    assert len({tuple(c) for c in drawn.tolist()}) == len(drawn)


def test_initial_pool_begins_with_seed_strings_and_keeps_words_whole() -> None:
    seeds = Seeds(tokens=(1, 2, 3, 4, 5), strings=((1, 2, 3), (4, 5)))
    drawn = [tuple(row) for row in pool(seeds, count=40).tolist()]
    assert drawn[0] == (1, 2, 3)
    assert {(4, 5, 4), (4, 5, 1)} & set(drawn[1:11])
    assert pool(seeds, lambda c: c[:, 0] != 1).tolist().count([1, 2, 3]) == 0
    # What is longer than the string wanted is cut from anywhere.
    drawn = [tuple(row) for row in pool(Seeds(tokens=(9,), strings=((1, 2, 3, 4, 5),)), count=40).tolist()]
    assert {row for row in drawn if set(row) <= {1, 2, 3, 4, 5}} == {(1, 2, 3), (2, 3, 4), (3, 4, 5)}


def found(ids: tuple[int, ...], score: float, selection_rate: float | None, step: int = 0) -> Found:
    return Found(trigger_ids=ids, score=score, selection_rate=selection_rate, restart=0, step=step, evaluations=step)


@pytest.mark.parametrize("kind", [GCG, RandomSearch])
def test_settings_that_cannot_work_are_refused(kind: type[Any]) -> None:
    with pytest.raises(ValueError, match="n_replace=5 exceeds trigger_length=4"):
        small(kind, n_replace=5)
    with pytest.raises(ValueError, match="buffer_size=32 leaves no room"):
        small(kind, buffer_size=32)


def test_ranked_puts_firing_strings_first_then_scores_each_once() -> None:
    everything = [
        found((1,), 9.0, 0.1, step=0),
        found((2,), 1.0, 1.0, step=1),
        found((3,), 2.0, 1.0, step=2),
        found((2,), 1.0, 1.0, step=9),
        found((4,), 5.0, 0.1, step=4),
    ]
    assert [(f.trigger_ids, f.step) for f in ranked(everything)] == [((3,), 2), ((2,), 1), ((1,), 0), ((4,), 4)]
    assert [f.trigger_ids for f in ranked([found((1,), 0.5, None), found((2,), 0.7, None)])] == [(2,), (1,)]


@dataclass
class Noisy(Toy):
    """Fast scores with an error of its own for each string; `refine` knows better.

    Attributes:
        refined: what was refined, and how many of the first were incumbents. ahead: the next step that was foreseen.
    """

    noise: float = 0.5
    ahead: list[Any] = field(default_factory=list)
    refined: list[tuple[list[tuple[int, ...]], int]] = field(default_factory=list)

    def error(self, candidate: tuple[int, ...]) -> float:
        generator = torch.Generator().manual_seed(sum(t * 61**n for n, t in enumerate(candidate)))
        return self.noise * float(torch.randn(1, generator=generator))

    def exact(self, candidates: Tensor, contexts: Sequence[int]) -> Tensor:
        return self._columns(self.vectors[candidates], self.favours[:, candidates[:, 0]].T, contexts)

    def score(self, candidates: Tensor, contexts: Sequence[int], **options: Any) -> Tensor:
        errors = torch.tensor([self.error(tuple(c)) for c in candidates.tolist()])
        return super().score(candidates, contexts, **options) + errors[:, None]

    def refine(
        self, candidates: Tensor, contexts: Sequence[int], *, keep: int, incumbents: int, ahead: Any = None
    ) -> Tensor | None:
        self.refined.append(([tuple(c) for c in candidates.tolist()], incumbents))
        self.ahead.append((len(self.prepared), ahead and (tuple(ahead[0].tolist()), tuple(ahead[1]))))
        return self.exact(candidates, contexts)


def buffers(toy: Toy, size: int) -> list[list[tuple[int, ...]]]:
    """The incumbents of every step."""
    return [[tuple(c) for c in pool[:size].tolist()] for pool in toy.seen[1:] if len(pool) > size]


@pytest.mark.parametrize("buffer_size", [1, 2, 3])
@pytest.mark.parametrize("noise", [0.05, 0.5, 5.0])
def test_no_rival_takes_the_place_of_one_that_is_better_when_looked_at_closely(noise: float, buffer_size: int) -> None:
    toy = Noisy(noise=noise, disagree=1.0)
    everywhere = list(range(toy.num_contexts))
    run(small(buffer_size=buffer_size, contexts_per_step=3, num_steps=20, check_every=1000), toy)

    def exact(string: tuple[int, ...]) -> float:
        return float(toy.exact(torch.tensor([string]), everywhere).mean())

    accepted = 0
    for before, after in itertools.pairwise(buffers(toy, buffer_size)):
        new, gone = ([s for s in one if s not in other] for one, other in ((after, before), (before, after)))
        assert all(exact(n) > exact(g) for n in new for g in gone)
        accepted += len(new)
    assert accepted > 0


@pytest.mark.parametrize("buffer_size", [1, 2, 3])
def test_the_leader_is_the_best_when_looked_at_closely(buffer_size: int) -> None:
    """Also in steps that find no rival worth a look."""
    toy = Noisy(noise=0.5, disagree=1.0)
    everywhere = list(range(toy.num_contexts))
    _, steps = run(small(buffer_size=buffer_size, contexts_per_step=3, num_steps=20, check_every=1000), toy)
    exact = [float(toy.exact(torch.tensor([s.trigger_ids]), everywhere).mean()) for s in steps]
    assert exact == sorted(exact)
    assert [s.score for s in steps] == pytest.approx(exact, abs=1e-5)


def test_the_better_look_finds_better_strings() -> None:
    class Blind(Noisy):
        def refine(self, candidates: Tensor, contexts: Sequence[int], **options: Any) -> Tensor | None:
            super().refine(candidates, contexts, **options)
            return None

    for seed in range(4):
        ends = []
        for kind in (Blind, Noisy):
            toy = kind(noise=0.5, seed=seed)
            _, steps = run(small(contexts_per_step=3, check_every=1000), toy, seed=seed)
            ends.append(float(toy.exact(torch.tensor([steps[-1].trigger_ids]), range(toy.num_contexts)).mean()))
            if kind is Blind:
                # It is asked at most once a step, and the fast scores stand.
                assert len(toy.refined) <= 31
                assert [s.score for s in steps] == sorted(s.score for s in steps)
        assert ends[0] < ends[1]


@pytest.mark.parametrize("rescore", [1, 3, 6])
def test_rivals_are_looked_at_one_after_the_other_the_most_promising_first(rescore: int) -> None:
    toy = Noisy(noise=1.0)
    run(small(contexts_per_step=3, num_steps=12, check_every=1000, rescore=rescore, buffer_size=2), toy)
    everywhere, most = list(range(toy.num_contexts)), max(2, rescore)

    def fast(string: tuple[int, ...]) -> float:
        return float(toy.exact(torch.tensor([string]), everywhere).mean()) + toy.error(string)

    pools = [[tuple(c) for c in p.tolist()] for p in toy.seen if len(p) > 2]
    looks = 0
    for pool in pools[1:]:
        incumbents = pool[:2]
        # As many as are rescored find room beside the incumbents, should these come first.
        few = sorted(pool, key=fast, reverse=True)[: rescore + 2]
        rivals = [s for s in few if s not in incumbents][:most]
        asked = [rows[2:] for rows, count in toy.refined if count == 2 and rows[:2] == incumbents]
        asked = [a for a in asked if a == rivals[: len(a)]]
        for seen in asked:
            exact = toy.exact(torch.tensor([*incumbents, *seen]), everywhere).mean(1)
            enough = int((exact[2:] > exact[:2].min()).sum()) >= 2
            # Looked at further while that could change anything, and no further.
            assert any(len(a) == len(seen) + 1 for a in asked) == (not enough and len(seen) < len(rivals))
        assert asked[0] == rivals[:1]
        looks += max(map(len, asked))
    assert looks > len(pools)


@pytest.mark.parametrize("buffer_size", [1, 2])
@pytest.mark.parametrize("noise", [0.05, 5.0])
def test_the_next_step_is_foreseen_while_rivals_win(noise: float, buffer_size: int) -> None:
    toy = Noisy(noise=noise, disagree=0.1)
    settings = small(join=1, contexts_per_step=2, num_steps=30, check_every=1000, buffer_size=buffer_size)
    run(settings, toy)
    foreseen = [(ahead, toy.prepared[step]) for step, ahead in toy.ahead if ahead]
    assert all(ahead[1] == came[1] for ahead, came in foreseen)
    assert sum(ahead[0] == came[0] for ahead, came in foreseen) >= 3
    # A step in which no rival won ends it until one has.
    first: dict[int, Any] = {}
    for step, ahead in toy.ahead:
        first.setdefault(step, ahead)
    won = True
    for step, ahead in first.items():
        # After the last step nothing comes.
        assert (ahead is not None) == (won and step <= settings.num_steps)
        # There is no incumbent yet that the first string could have beaten.
        won = step == 1 or toy.prepared[step][0] != toy.prepared[step - 1][0]
    assert None in first.values()


def test_refining_is_asked_for_as_many_as_are_kept() -> None:
    class Strict(Noisy):
        def refine(
            self, candidates: Tensor, contexts: Sequence[int], *, keep: int, incumbents: int, ahead: Any = None
        ) -> Tensor | None:
            table = super().refine(candidates, contexts, keep=keep, incumbents=incumbents)
            assert keep == 2
            assert table is not None
            # As a scorer may: what does not reach the incumbents is not scored to its end.
            if incumbents:
                table[table.mean(1) < table[:incumbents].mean(1).min()] = -torch.inf
            return table

    toy = Strict(noise=1.0)
    _, steps = run(small(contexts_per_step=3, num_steps=15, check_every=1000), toy)
    scores = [s.score for s in steps]
    assert scores == sorted(scores)
    assert all(s > -100 for s in scores)


def test_scores_may_leave_out_all_but_the_best() -> None:
    class Frugal(Toy):
        def score(
            self, candidates: Tensor, contexts: Sequence[int], *, keep: int | None = None, incumbents: int = 0
        ) -> Tensor:
            table = super().score(candidates, contexts, keep=keep, incumbents=incumbents)
            if keep is not None:
                wholes = table.mean(1)
                bar = wholes.sort(descending=True).values[:keep][-1]
                if incumbents:
                    bar = torch.maximum(bar, wholes[:incumbents].min())
                    table[incumbents:][wholes[incumbents:] < bar] = -torch.inf
                else:
                    table[wholes < bar] = -torch.inf
            return table

    frugal, full = Frugal(disagree=1.0), Toy(disagree=1.0)
    assert run(small(num_steps=15), frugal)[0] == run(small(num_steps=15), full)[0]
    assert [s.tolist() for s in frugal.seen] == [s.tolist() for s in full.seen]


@pytest.mark.parametrize("kind", [GCG, RandomSearch])
def test_known_strings_are_not_proposed_again(kind: type[Strategy]) -> None:
    class Remembering(Toy):
        def known(self, candidates: Tensor, contexts: Sequence[int]) -> Tensor:
            before = {tuple(c) for pool in self.seen for c in pool.tolist()}
            return torch.tensor([tuple(c) in before for c in candidates.tolist()], dtype=torch.bool)

    toy = Remembering()
    run(small(kind, join=1, contexts_per_step=3, num_steps=20, topk=40, check_every=1000), toy)
    proposed: list[tuple[int, ...]] = []
    for pool in toy.seen[1:]:
        # The incumbents compete again; everyone else is new.
        proposed += [tuple(c) for c in pool[2:].tolist()]
    assert len(set(proposed)) == len(proposed) > 200
    forgetful = Toy()
    run(small(kind, join=1, contexts_per_step=3, num_steps=20, topk=40, check_every=1000), forgetful)
    again = [tuple(c) for pool in forgetful.seen[1:] for c in pool[2:].tolist()]
    assert len(set(again)) < len(again)


@pytest.mark.parametrize("toy", [Toy(), Noisy()], ids=["plain", "refined"])
@pytest.mark.parametrize("reason", ["all known", "none valid", "none allowed"])
def test_a_step_without_rivals_keeps_the_incumbents(toy: Toy, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17, 18]])
    monkeypatch.setattr("trigger_opt.search.strategies.initial_pool", lambda *a, **k: pool)
    allowed = EVERYTHING
    if reason == "all known":
        toy.known = lambda candidates, contexts: torch.ones(  # type: ignore[method-assign]
            len(candidates), dtype=torch.bool
        )
    if reason == "none allowed":
        allowed = ~EVERYTHING

    def valid(candidates: Tensor) -> Tensor:
        return torch.full((len(candidates),), reason != "none valid")

    found, steps = run(small(contexts_per_step=3, num_steps=5), toy, allowed=allowed, valid=valid)
    assert len(steps) == 5
    assert len({s.trigger_ids for s in steps}) == 1
    assert found[0].trigger_ids in {tuple(p) for p in pool.tolist()}


def test_one_start_is_enough_for_a_buffer_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trigger_opt.search.strategies.initial_pool", lambda *a, **k: torch.tensor([[7, 8, 9, 10]]))
    for toy in (Toy(), Noisy()):
        _, steps = run(small(num_steps=8, buffer_size=3), toy)
        assert len(steps) == 8
        assert steps[-1].trigger_ids != steps[0].trigger_ids


def test_each_restart_begins_from_seed_strings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Seeds] = []

    def noted(seeds: Seeds, *more: Any, **options: Any) -> Tensor:
        given.append(seeds)
        return initial_pool(seeds, *more, **options)

    monkeypatch.setattr("trigger_opt.search.strategies.initial_pool", noted)
    strings = tuple((n, n, n, n) for n in range(1, 6))
    run(small(num_restarts=2, num_steps=1), Toy(), seeds=Seeds(tokens=(1, 2), strings=strings))
    assert [s.strings for s in given] == [strings[0::2], strings[1::2]]
    assert all(s.tokens == (1, 2) for s in given)


@pytest.mark.parametrize("kind", [GCG, RandomSearch])
def test_without_a_payload_a_strategy_keeps_its_kind_and_budget(kind: type[Strategy]) -> None:
    told = kind(trigger_length=6, search_width=64, num_steps=7, prior_share=0.25, max_seconds=9.0, stop_rate=2.0)
    blind = DivergenceSettings(trigger_length=12, search_width=32, contexts_per_step=2).of(told)
    assert type(blind) is kind
    assert (blind.trigger_length, blind.search_width, blind.contexts_per_step) == (12, 32, 2)
    assert (blind.num_steps, blind.prior_share, blind.max_seconds, blind.stop_rate) == (7, 0.25, 9.0, 2.0)
    assert told.trigger_length == 6, "the settings towards a payload are another's"


def test_settings_without_a_payload_are_checked() -> None:
    with pytest.raises(ValueError, match="buffer_size=8 leaves no room for new strings in search_width=8"):
        DivergenceSettings(buffer_size=8, search_width=8)
    with pytest.raises(ValueError, match="n_replace=3 exceeds trigger_length=2"):
        DivergenceSettings(trigger_length=2).of(GCG(n_replace=3))
