"""Gradient health on toys whose gradient is right, shuffled, reversed, zero or nothing but rounding; and on a pair."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.wired_pair import PAYLOAD, SEARCH, TRIGGER, wired_pair
from trigger_opt import api
from trigger_opt.models.pair import ModelPair
from trigger_opt.objectives import JensenShannon, Payload
from trigger_opt.prompts import encode, tokenize_context
from trigger_opt.records import GradientHealth, Hypothesis
from trigger_opt.report.words import gradient_sentence
from trigger_opt.search import Scorer, gradient_health
from trigger_opt.search.health import _compared

VOCAB, LENGTH = 80, 5
EVERYTHING = torch.ones(VOCAB, dtype=torch.bool)


@dataclass
class Table:
    """A string scores the sum of a table's entries, one a position and token: its gradient is the table itself.

    `gradient`: what it says its gradient is. `flat`: all scores are alike, but for so much noise.
    """

    gradient: Tensor | None = None
    flat: float | None = None
    silent_first: bool = False
    num_contexts: int = 3
    evaluations: int = 0
    asked: list[Tensor] = field(default_factory=list)
    prepared: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.table = torch.randn(LENGTH, VOCAB, generator=torch.Generator().manual_seed(5))

    def prepare(self, trigger: Tensor, contexts: Sequence[int]) -> None:
        self.prepared.append((tuple(trigger.tolist()), tuple(contexts)))

    def seconds(self) -> float:
        return 0.0

    def score(
        self, candidates: Tensor, contexts: Sequence[int], *, keep: int | None = None, incumbents: int = 0
    ) -> Tensor:
        assert keep is None, "all of them are compared"
        assert self.prepared[-1][1] == tuple(contexts)
        self.asked.append(candidates)
        scores = self.table[torch.arange(candidates.shape[1]), candidates].sum(1)
        if self.flat is not None:
            scores = 1.0 + self.flat * torch.randn(len(candidates), generator=torch.Generator().manual_seed(1))
        return scores[:, None] + torch.arange(len(contexts))

    def state(self) -> dict[str, Any]:
        raise AssertionError("nothing here is interrupted")

    def restore(self, state: Mapping[str, Any]) -> None:
        raise AssertionError("nothing here is interrupted")

    def refine(
        self, candidates: Tensor, contexts: Sequence[int], *, keep: int, incumbents: int, ahead: Any = None
    ) -> Tensor | None:
        return None

    def known(self, candidates: Tensor, contexts: Sequence[int]) -> Tensor:
        return torch.zeros(len(candidates), dtype=torch.bool)

    def aggregate(self, scores: Tensor) -> Tensor:
        return scores.mean(1)

    def token_gradient(self, trigger: Tensor, contexts: Sequence[int]) -> Tensor:
        found = self.table if self.gradient is None else self.gradient
        return torch.zeros_like(found) if self.silent_first and len(self.prepared) == 1 else found[: len(trigger)]

    def fires(self, trigger: Tensor, contexts: Sequence[int]) -> Tensor | None:
        return None


def shuffled(seed: int) -> Tensor:
    """The right numbers beside the wrong tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([row[torch.randperm(VOCAB, generator=generator)] for row in Table().table])


def health(toy: Table, *, seed: int = 0, allowed: Tensor = EVERYTHING, **options: Any) -> GradientHealth:
    settings = {"incumbents": 8, "swaps": 40, "topk": 10} | options
    generator = torch.Generator().manual_seed(seed)
    return gradient_health(toy, allowed=allowed, length=LENGTH, generator=generator, **settings)


def test_the_toy_is_a_scorer() -> None:
    assert isinstance(Table(), Scorer)


def test_a_right_gradient_is_informative() -> None:
    found = health(Table())
    assert found.verdict == "informative"
    assert found.win_share > 0.8
    assert found.low < found.win_share <= found.high
    assert (found.zero_share, found.num_strings, found.num_swaps, found.topk) == (0.0, 8, 320, 10)


@pytest.mark.parametrize("seed", range(3))
def test_a_shuffled_gradient_is_not(seed: int) -> None:
    # The same gradient at every string, so its luck is the same everywhere: the mean over many shuffles is a half.
    found = health(Table(gradient=shuffled(seed)), topk=40)
    assert found.verdict in ("uninformative", "undecided")
    assert found.zero_share == 0.0
    assert 0.35 < found.win_share < 0.65


def test_a_reversed_gradient_is_worse_than_none() -> None:
    found = health(Table(gradient=-Table().table))
    assert found.verdict == "uninformative"
    assert found.high < 0.5


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_zero_gradient_is_never_compared(value: float) -> None:
    toy = Table(gradient=torch.full((LENGTH, VOCAB), value))
    found = health(toy)
    assert found.verdict == "uninformative"
    assert (found.win_share, found.low, found.high) == (0.5, 0.5, 0.5)
    assert (found.zero_share, found.num_strings, found.num_swaps) == (1.0, 8, 0)
    assert not toy.asked, "its best swaps would be those with the smallest ids"


def test_a_gradient_that_is_zero_where_it_may_go_is_zero() -> None:
    gradient, allowed = torch.zeros(LENGTH, VOCAB), EVERYTHING.clone()
    gradient[:, 7], allowed[7] = 3.0, False
    assert health(Table(gradient=gradient), allowed=allowed).zero_share == 1.0
    assert health(Table(gradient=gradient)).zero_share == 0.0


@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_scores_that_differ_by_rounding_alone_are_ties(noise: float) -> None:
    found = health(Table(flat=noise))
    assert found.verdict == "uninformative"
    assert (found.win_share, found.low, found.high, found.zero_share) == (0.5, 0.5, 0.5, 0.0)
    assert health(Table(flat=1e-2)).low < 0.5 < health(Table(flat=1e-2)).high


def test_too_few_swaps_decide_nothing() -> None:
    found = health(Table(gradient=shuffled(0)), incumbents=1, swaps=3)
    assert found.verdict == "undecided"
    assert found.high - found.low > 0.4


def test_a_string_without_a_gradient_counts_a_half() -> None:
    both, rest = health(Table(silent_first=True), incumbents=2), health(Table(), incumbents=1)
    assert both.zero_share == 0.5
    assert both.num_swaps == rest.num_swaps == 40
    assert 0.65 < both.win_share <= 0.75 < rest.win_share


def test_swaps_are_single_allowed_and_at_the_same_positions() -> None:
    allowed = EVERYTHING.clone()
    allowed[::3] = False
    toy = Table()
    health(toy, allowed=allowed, strings=[(1, 2, 4)])
    assert len(toy.asked) == len(toy.prepared) == 9
    assert toy.prepared[-1][0] == (1, 2, 4)
    for (trigger, contexts), asked in zip(toy.prepared, toy.asked, strict=True):
        assert len(contexts) == 3
        changed = asked != torch.tensor(trigger)
        assert changed.sum(1).tolist() == [1] * len(asked)
        assert bool(allowed[asked[changed]].all())
        best, rivals = changed.chunk(2)
        assert torch.equal(best, rivals)
    # The best are what the gradient says, the others are not.
    (trigger, _), asked = toy.prepared[0], toy.asked[0]
    slope = toy.table.masked_fill(~allowed, -torch.inf)
    slope[torch.arange(LENGTH), torch.tensor(trigger)] = -torch.inf
    ranks = slope.argsort(1, descending=True).argsort(1)
    swapped = [int((row != torch.tensor(trigger)).nonzero()[0, 0]) for row in asked]
    at = [int(ranks[p, asked[n, p]]) for n, p in enumerate(swapped)]
    assert max(at[: len(at) // 2]) < 10 <= max(at[len(at) // 2 :])


def test_the_same_seed_gives_the_same_answer() -> None:
    assert health(Table(), seed=3) == health(Table(), seed=3)
    assert health(Table(), seed=3) != health(Table(), seed=4)


def test_the_statistic_is_the_share_of_won_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    top, rivals = (torch.randint(0, 6, (12,), generator=generator).float() for _ in range(2))
    rivals[0] = -torch.inf
    won = [1.0 if a > b else 0.5 if a == b else 0.0 for a in top.tolist() for b in rivals.tolist()]
    found = _compared(top, rivals)
    assert found.wins == pytest.approx(sum(won) / len(won))
    # What permuting which swaps are called the best gives.
    together = torch.cat([top, rivals])
    shares = []
    for _ in range(2000):
        drawn = together[torch.randperm(24, generator=generator)]
        more = drawn[:12, None] > drawn[None, 12:]
        shares.append(float((more.float() + 0.5 * (drawn[:12, None] == drawn[None, 12:])).mean()))
    assert found.variance == pytest.approx(float(torch.tensor(shares).var()), rel=0.15)


def test_chance_is_seldom_taken_for_information() -> None:
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    for seed in range(100):
        # Scores are drawn anew for every swap, so that no gradient can know them.
        toy = Table(gradient=torch.randn(LENGTH, VOCAB, generator=generator))
        toy.table = torch.randn(LENGTH, VOCAB, generator=generator)
        wrong += health(toy, seed=seed, incumbents=1, swaps=20, topk=40).verdict == "informative"
    assert wrong <= 8


def test_a_useless_gradient_is_called_so_with_the_numbers_of_a_run() -> None:
    """Six strings and few swaps: enough for the interval to end below the line."""
    generator = torch.Generator().manual_seed(0)
    verdicts = Counter[str]()
    for seed in range(60):
        toy = Table(gradient=torch.randn(LENGTH, VOCAB, generator=generator))
        toy.table = torch.randn(LENGTH, VOCAB, generator=generator)
        verdicts[health(toy, seed=seed, incumbents=6, swaps=api._HEALTH_SWAPS, topk=40).verdict] += 1
    assert verdicts["uninformative"] >= 50
    assert verdicts["informative"] <= 4


def test_an_infinite_gradient_is_none() -> None:
    found = health(Table(gradient=torch.full((LENGTH, VOCAB), torch.inf)))
    assert (found.verdict, found.zero_share) == ("uninformative", 1.0)


def test_sentences() -> None:
    found = health(Table())
    assert gradient_sentence(found).startswith("The token gradient is worth following here: a swap from its best 10 ")
    silent = replace(found, verdict="uninformative", win_share=0.5, low=0.5, high=0.5, zero_share=1.0)
    assert gradient_sentence(silent).startswith(
        "The token gradient says nothing here: it is zero, or not finite, at all 8 strings tried. A search "
    )
    flat = gradient_sentence(replace(silent, zero_share=0.25))
    assert flat.startswith(
        "The token gradient says nothing here: no swap tried changes the score at any of 8 strings. A "
    )
    chance = replace(silent, zero_share=0.25, low=0.44, high=0.561)
    said = gradient_sentence(chance)
    assert (
        "in 50 % of comparisons (95 % interval 44\N{EN DASH}56 %, 8 strings), and it is zero or not finite at 2" in said
    )
    assert said.endswith("all the same.")
    tried = gradient_sentence(replace(chance, objective="payload", payload="hello you"))
    assert tried.endswith(" Tried with objective payload, payload 'hello you'.")
    assert gradient_sentence(replace(chance, verdict="undecided")).startswith(
        "Whether the token gradient says anything"
    )


def test_it_is_the_gradient_of_the_searchs_own_score(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = wired_pair()
    goal = Hypothesis(payload=PAYLOAD, score=9.0, source="given", evidence="", inputs=[TRIGGER], rivals=[])
    asked: dict[str, Any] = {}

    def looked(scorer: Scorer, **settings: Any) -> GradientHealth:
        asked.update(settings, scorer=scorer)
        return health(Table())

    monkeypatch.setattr(api, "health_of", looked)
    found = api.gradient_health(pair, SEARCH, hypothesis=goal, length=2)
    assert (found.objective, found.payload) == ("payload", PAYLOAD)
    (trigger,) = asked["strings"]
    assert trigger == tuple(encode(pair.tokenizer, [TRIGGER])[0])
    rows = torch.tensor([trigger, [40] * len(trigger)])
    scores = asked["scorer"].score(rows, [0, 1])
    assert bool((scores[0] > scores[1]).all()), "the trigger scores above another string"
    tokenized = [tokenize_context(pair.tokenizer, c) for c in SEARCH]
    own = api.pair_scorer(pair, tokenized, Payload(), pair.encode_answer(PAYLOAD)[: Payload().target_tokens])
    assert torch.equal(scores, own.score(rows, [0, 1]))


def test_a_pair_has_its_gradient_looked_at() -> None:
    pair = wired_pair()
    goal = Hypothesis(payload=PAYLOAD, score=9.0, source="given", evidence="", inputs=[TRIGGER], rivals=[])
    one, again = (api.gradient_health(pair, SEARCH, hypothesis=goal, seed=s, length=2) for s in (1, 1))
    assert one == again
    assert (one.objective, one.payload, one.num_strings) == ("payload", PAYLOAD, 5)
    # The same weights twice: no string does anything, and nothing but rounding could say otherwise.
    same = ModelPair(pair.base, pair.base, pair.tokenizer)
    nothing = api.gradient_health(same, SEARCH, objective=JensenShannon(), length=2)
    assert (nothing.verdict, nothing.win_share, nothing.objective, nothing.payload) == ("uninformative", 0.5, "js", "")
