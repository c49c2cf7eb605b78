"""Strings built up token by token: on a toy whose planted string is known, and on a pair with a wired trigger."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tests.test_search import Toy, always
from tests.wired_pair import PAYLOAD, SEARCH, TRIGGER, wired_pair
from trigger_opt import api
from trigger_opt.errors import UserError
from trigger_opt.objectives import JensenShannon, PayloadOdds, TotalVariation
from trigger_opt.prompts import encode
from trigger_opt.records import Hypothesis
from trigger_opt.scoring import Meter
from trigger_opt.search import GCG, BuildSettings, Built, build_up

PLANTED = (3, 7, 5)
TOKENS = tuple(range(1, 21))


def in_order(string: Sequence[int], planted: Sequence[int]) -> int:
    """Length of the longest common subsequence."""
    if not string or not planted:
        return 0
    if string[0] == planted[0]:
        return 1 + in_order(string[1:], planted[1:])
    return max(in_order(string[1:], planted), in_order(string, planted[1:]))


@dataclass
class Parts(Toy):
    """A string scores the planted tokens it has in their order, and a hundredth less for each other token.

    `apart`: what token 9 gains in context 0, and loses in the others.
    """

    planted_ids: tuple[int, ...] = PLANTED
    apart: float = 0.0
    spent: float = 0.0
    strings: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    def score(
        self, candidates: Tensor, contexts: Sequence[int], *, keep: int | None = None, incumbents: int = 0
    ) -> Tensor:
        self.evaluations += len(candidates) * len(contexts)
        self.strings += [(tuple(c), tuple(contexts)) for c in candidates.tolist()]
        return torch.tensor([[self.worth(tuple(c), context) for context in contexts] for c in candidates.tolist()])

    def worth(self, string: tuple[int, ...], context: int) -> float:
        matched = in_order(string, self.planted_ids)
        value = matched - 0.01 * (len(string) - matched)
        return value + (self.apart if context == 0 else -self.apart) * (9 in string)

    def seconds(self) -> float:
        # A clock of its own: a second for each thousand evaluations.
        return self.evaluations / 1000


def built(
    toy: Toy,
    *,
    tokens: Sequence[int] = TOKENS,
    valid: Callable[[Tensor], Tensor] = always,
    seed: int = 0,
    max_seconds: float | None = None,
    max_evaluations: int | None = None,
    **settings: int,
) -> list[Built]:
    plain = {"max_tokens": 4, "pool": 20, "singles": 0, "beam": 2, "contexts": 2, "keep": 1}
    return build_up(
        toy,
        tokens,
        settings=BuildSettings(**(plain | settings)),
        valid=valid,
        generator=torch.Generator().manual_seed(seed),
        max_seconds=max_seconds,
        max_evaluations=max_evaluations,
    )


def test_the_planted_string_comes_out_word_for_word() -> None:
    found = built(Parts())
    assert found[2].trigger_ids == PLANTED
    assert [len(b.trigger_ids) for b in found] == [1, 2, 3, 4]
    assert max(found, key=lambda b: b.score) == found[2]
    # Built of it, in order, from one token on.
    assert all(in_order(b.trigger_ids, PLANTED) == len(b.trigger_ids) for b in found[:3])


def test_each_string_is_scored_once_in_the_first_context() -> None:
    toy = Parts()
    built(toy)
    assert len(set(toy.strings)) == len(toy.strings)


def test_tokens_beyond_the_pool_take_part_where_they_are_best_alone() -> None:
    kept = Parts()
    assert built(kept, pool=4, singles=3)[2].trigger_ids == PLANTED
    assert built(Parts(), pool=4, singles=0)[2].trigger_ids != PLANTED


def test_the_best_are_looked_at_in_all_contexts_drawn() -> None:
    """Token 9 is a favourite of context 0 alone."""
    toy = Parts(apart=5.0)
    seed = next(s for s in range(20) if int(torch.randperm(3, generator=torch.Generator().manual_seed(s))[0]) == 0)
    assert built(toy, contexts=1, seed=seed)[0].trigger_ids == (9,)
    fair = built(toy, contexts=3, seed=seed)
    assert fair[2].trigger_ids == PLANTED
    expected = sum(toy.worth(fair[0].trigger_ids, c) for c in range(3)) / 3
    assert fair[0].score == pytest.approx(expected, abs=1e-5)


def test_strings_that_cannot_be_typed_are_not_scored() -> None:
    toy = Parts()

    def without_seven_first(candidates: Tensor) -> Tensor:
        return candidates[:, 0] != 7

    found = built(toy, valid=without_seven_first)
    assert found[2].trigger_ids == PLANTED
    assert all(string[0] != 7 for string, _ in toy.strings)


def test_nothing_that_can_be_typed_is_nothing_built() -> None:
    assert built(Parts(), valid=lambda c: torch.zeros(len(c), dtype=torch.bool)) == []
    assert built(Parts(), tokens=()) == []
    assert built(Parts(), max_tokens=0) == []


@pytest.mark.parametrize("bound", ["max_seconds", "max_evaluations"])
def test_a_budget_that_ends_keeps_what_was_scored_until_then(bound: str) -> None:
    whole, toy = Parts(), Parts()
    everything = built(whole)
    # The likeliest first, which have the highest ids.
    tokens = (*PLANTED, *range(500, 1, -1))
    limit = {"max_seconds": 0.9, "max_evaluations": 900}[bound]
    cut = built(toy, tokens=tokens, pool=500, **{bound: limit})  # type: ignore[arg-type]
    # In seconds a batch and a final may run over.
    assert 900 <= toy.evaluations <= 900 + (256 + 64 if bound == "max_seconds" else 2)
    assert [len(b.trigger_ids) for b in cut] == [1, 2]
    assert [b.score for b in cut] == [b.score for b in everything[:2]]
    # Cut off were the least likely.
    assert all(set(s) <= {*PLANTED, *range(370, 501)} for s, _ in toy.strings if len(s) == 2)


def test_a_budget_that_ended_before_it_began_is_no_string() -> None:
    assert built(Parts(), max_evaluations=0) == []


def test_a_score_that_is_no_number_does_not_come_first() -> None:
    class Broken(Parts):
        def worth(self, string: tuple[int, ...], context: int) -> float:
            return float("nan") if 9 in string else super().worth(string, context)

    found = built(Broken())
    assert found[2].trigger_ids == PLANTED
    assert all(9 not in b.trigger_ids for b in found)


def test_where_no_score_is_a_number_nothing_is_built() -> None:
    class Broken(Parts):
        def worth(self, string: tuple[int, ...], context: int) -> float:
            return float("nan")

    assert built(Broken()) == []


def test_a_divergence_is_scored_along_one_string_at_each_length() -> None:
    """More strings than are scored at once: all along the same, or their scores could not be compared."""
    toy = Parts(num_contexts=1)
    built(toy, tokens=tuple(range(1, 700)), pool=700, max_tokens=2, contexts=1)
    assert len(toy.strings) > 2 * 256
    assert [len(string) for string, _ in toy.prepared] == [1, 2]


@pytest.mark.parametrize("name", ["beam", "singles", "keep"])
def test_finalists_are_enough_to_choose_from(name: str) -> None:
    with pytest.raises(ValueError, match=r"finalists=8 is less than beam, singles or keep \(9\).*raise finalists to 9"):
        BuildSettings(**({"beam": 1, "singles": 1, "keep": 1, "finalists": 8} | {name: 9}))


def test_a_string_to_begin_from_that_cannot_be_typed_is_refused() -> None:
    pair = wired_pair()
    pieces = encode(pair.tokenizer, ["river"])[0] + encode(pair.tokenizer, ["s"])[0]
    joined = encode(pair.tokenizer, ["rivers"])[0]
    for ids in ((), tuple(pieces) if pieces != joined else ()):
        with pytest.raises(UserError, match="to begin from cannot be typed in these contexts"):
            api.find_triggers(pair, SEARCH, hypothesis=hypothesis([]), strings=[ids])


def hypothesis(inputs: list[str]) -> Hypothesis:
    return Hypothesis(payload=PAYLOAD, score=16.0, source="given", evidence="", inputs=inputs, rivals=[])


@pytest.mark.parametrize("given", ["tokens", "inputs"])
def test_the_trigger_of_a_wired_pair_is_built_and_ends_the_search(given: str) -> None:
    """From tokens that the lens would name, or from what raised the payload."""
    pair = wired_pair()
    (trigger,) = encode(pair.tokenizer, [TRIGGER])[0]
    words = [t for t in encode(pair.tokenizer, [" lazy fox river poem sea"])[0] if t != trigger]
    meters: list[Meter] = []
    told: list[tuple[int, str, float]] = []
    strings = api.build_triggers(
        pair,
        SEARCH,
        hypothesis=hypothesis([" lazy" + TRIGGER] if given == "inputs" else []),
        tokens=[*words, trigger] if given == "tokens" else words,
        settings=BuildSettings(max_tokens=2),
        on_progress=lambda *what: told.append(what),
        on_cost=lambda meter, rescoring: meters.append(meter),
    )
    assert strings[0] == (trigger,)
    assert meters[0].evaluations > 0
    assert told[0][1]
    assert told[0][2] <= PayloadOdds().cap
    # All of the budget would be steps; there is none.
    steps: list[object] = []
    found = api.find_triggers(
        pair, SEARCH, hypothesis=hypothesis([]), strings=strings, strategy=GCG(num_steps=5), on_step=steps.append
    )
    assert trigger in found[0].trigger_ids
    assert found[0].selection_rate == 1.0
    assert steps == []


def test_without_a_payload_strings_are_built_on_divergence() -> None:
    pair = wired_pair()
    tokens = encode(pair.tokenizer, [" lazy fox river poem sea" + TRIGGER])[0]
    (trigger,) = encode(pair.tokenizer, [TRIGGER])[0]
    told: list[float] = []
    for divergence in (None, TotalVariation()):
        told.clear()
        strings = api.build_triggers(
            pair,
            SEARCH,
            tokens=tokens,
            divergence=divergence,
            settings=BuildSettings(max_tokens=1),
            on_progress=lambda done, best, score: told.append(score),
        )
        assert strings[0] == (trigger,)
        assert 0 < max(told) <= (divergence or JensenShannon()).upper_bound


def test_building_takes_no_longer_than_it_may() -> None:
    pair = wired_pair()
    (trigger,) = encode(pair.tokenizer, [TRIGGER])[0]
    made = api.build_triggers(
        pair, SEARCH, hypothesis=hypothesis([]), tokens=[trigger], max_seconds=1e-9, max_evaluations=10**6
    )
    assert made == []
    assert api.build_triggers(pair, SEARCH, hypothesis=hypothesis([]), tokens=[trigger], max_seconds=600.0)
