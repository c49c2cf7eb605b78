"""What a pair scorer leaves out: never one of the best. On scores given as tables, and on tiny pairs."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import tiny
from tests.slow_scores import contexts_with_empty_sides
from trigger_opt import pair_scorer as module
from trigger_opt.models.pair import ModelPair
from trigger_opt.objectives import JensenShannon, KullbackLeibler, Objective, Payload, TargetLikelihood, TotalVariation
from trigger_opt.pair_scorer import PairScorer
from trigger_opt.scoring import Engine, Group, Meter, Request, Side

BOUNDED: list[Objective] = [
    Payload(), Payload(soft_minimum=False), TargetLikelihood(), TargetLikelihood(soft_minimum=True), JensenShannon(),
    TotalVariation(),
]  # fmt: skip
NAMES = [f"{o.name}, {'soft minimum' if o.soft_minimum else 'mean'}" for o in BOUNDED]
PAYLOAD = (270, 301)


class Table(Engine):
    """An engine whose scores are looked up: string (n,) has row n.

    Attributes:
        asked: how many scores of each kind were asked for. most: the largest divergence.
    """

    def __init__(self, finetuned: Tensor, base: Tensor) -> None:
        self._log_probs: dict[Side, Tensor] = {"finetuned": finetuned, "base": base}
        self.contexts = tuple(tiny.tokenized()[:1]) * finetuned.shape[1]
        self.meter = Meter()
        self._group = Group()
        self.most = 0.69
        self.asked = dict.fromkeys(("finetuned", "base", "divergence"), 0)

    def _rows(self, table: Tensor, requests: Sequence[Request]) -> Tensor:
        return table[[r.ids[0] for r in requests], [r.context for r in requests]]

    def token_scores(self, side: Side, requests: Sequence[Request], target: Sequence[int]) -> tuple[Tensor, Tensor]:
        self.asked[side] += len(requests)
        rows = self._rows(self._log_probs[side], requests)[:, None].expand(-1, len(target)) / len(target)
        return rows, rows > -0.1

    def divergences(self, divergence: Any, requests: Sequence[Request]) -> Tensor:
        self.asked["divergence"] += len(requests)
        return self._rows(self._log_probs["finetuned"], requests)[:, None].exp() * self.most


def of_table(engine: Table, objective: Objective) -> PairScorer:
    engine.most = 0.999 * min(1.0, objective.upper_bound)
    return PairScorer(engine, objective, PAYLOAD if objective.needs_payload else ())


@st.composite
def tables(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Log probabilities (string, context) on both models, many of them alike."""
    strings, contexts = draw(st.integers(1, 25)), draw(st.integers(1, 4))
    seed, spread = draw(st.integers(0, 2**20)), draw(st.sampled_from([0.01, 1.0, 5.0, 20.0]))
    generator = torch.Generator().manual_seed(seed)
    finetuned, base = (-(torch.randn(strings, contexts, generator=generator) * spread).abs() for _ in range(2))
    if draw(st.booleans()):
        finetuned, base = finetuned.round(), base.round()
    return finetuned, base


def is_pruned_well(got: Tensor, full: Tensor, scorer: PairScorer, keep: int, incumbents: int) -> None:
    """The best are all there, with their scores; what is left out is none of them."""
    wholes = scorer.aggregate(full)
    bar = float(wholes.sort(descending=True).values[:keep][-1])
    if incumbents:
        bar = max(bar, float(wholes[:incumbents].min()))
        assert torch.equal(got[:incumbents], full[:incumbents])
    assert bool(((got == full) | (got == -torch.inf)).all())
    left_out = (got == -torch.inf).any(1)
    assert bool((wholes[left_out] < bar).all())
    assert not bool(left_out[wholes >= bar].any())
    aggregated = scorer.aggregate(got)
    assert not bool(aggregated.isnan().any())
    reaching = int((wholes >= bar).sum())
    order = aggregated.argsort(descending=True, stable=True)[: min(keep, reaching)]
    assert wholes[order].tolist() == wholes.sort(descending=True).values[: len(order)].tolist()


@pytest.mark.parametrize("objective", [*BOUNDED, KullbackLeibler()], ids=[*NAMES, "kl"])
@given(table=tables(), keep=st.integers(1, 6), incumbents=st.integers(0, 4), known=st.integers(1, 10))
@settings(max_examples=15, deadline=None)
def test_the_best_are_the_best_of_all(
    objective: Objective, table: tuple[Tensor, Tensor], keep: int, incumbents: int, known: int
) -> None:
    strings, contexts = torch.arange(len(table[0]))[:, None], list(range(table[0].shape[1]))
    incumbents = min(incumbents, len(strings))
    full_engine, engine = Table(*table), Table(*table)
    full = of_table(full_engine, objective).score(strings, contexts)
    scorer = of_table(engine, objective)
    # What an earlier step left in memory, in part.
    scorer.score(strings[:known].flip(0), contexts[:2], keep=1)
    is_pruned_well(scorer.score(strings, contexts, keep=keep, incumbents=incumbents), full, scorer, keep, incumbents)
    assert all(engine.asked[k] <= full_engine.asked[k] for k in engine.asked)
    if objective.upper_bound == torch.inf:
        assert engine.asked == full_engine.asked


def table_of(first: float = -0.05, strings: int = 100, contexts: int = 4) -> Table:
    """Log probabilities of -10 to -15, but of the first two strings."""
    generator = torch.Generator().manual_seed(3)
    finetuned, base = (-10 - 5 * torch.rand(strings, contexts, generator=generator) for _ in range(2))
    finetuned[:2] = first
    return Table(finetuned, base)


@pytest.mark.parametrize("objective", BOUNDED, ids=NAMES)
def test_hopeless_strings_cost_one_look(objective: Objective) -> None:
    engine = table_of()
    scorer, strings = of_table(engine, objective), torch.arange(100)[:, None]
    scores = scorer.aggregate(scorer.score(strings, range(4), keep=2, incumbents=2))
    assert set(scores.topk(2).indices.tolist()) == {0, 1}
    # The incumbents everywhere, their rivals in one context; on the base nothing but the incumbents.
    looks = 2 * 4 + 98
    if objective.needs_payload:
        assert engine.asked == {"finetuned": looks, "base": 2 * 4 * (objective.name == "payload"), "divergence": 0}
    else:
        assert engine.asked == {"finetuned": 0, "base": 0, "divergence": looks}
    assert engine.meter.evaluations == looks


def test_without_a_bound_all_are_scored_to_the_end() -> None:
    engine = table_of()
    scores = of_table(engine, KullbackLeibler()).score(torch.arange(100)[:, None], range(4), keep=2, incumbents=1)
    assert bool(scores.isfinite().all())
    assert engine.asked["divergence"] == 400


@pytest.mark.parametrize("objective", [*BOUNDED, KullbackLeibler()], ids=[*NAMES, "kl"])
def test_what_was_scored_is_remembered(objective: Objective) -> None:
    engine = table_of()
    scorer, strings = of_table(engine, objective), torch.arange(30)[:, None]
    first = scorer.score(strings, [0, 2])
    asked = dict(engine.asked)
    assert torch.equal(scorer.score(strings.flip(0), [2, 0]).flip(0).flip(1), first)
    assert torch.equal(scorer.score(strings, [0, 2], keep=2, incumbents=1), first)
    assert engine.asked == asked
    scorer.score(strings[:5], [0, 1])
    assert sum(engine.asked.values()) - sum(asked.values()) == 5 * (2 if objective.name == "payload" else 1)


@pytest.mark.parametrize("objective", [*BOUNDED, KullbackLeibler()], ids=[*NAMES, "kl"])
def test_a_left_out_string_is_scored_when_it_is_asked_for(objective: Objective) -> None:
    engine = table_of()
    scorer, strings = of_table(engine, objective), torch.arange(100)[:, None]
    scorer.score(strings, range(4), keep=2)
    full = of_table(table_of(), objective).score(strings, range(4))
    assert torch.equal(scorer.score(strings, range(4)), full)
    assert max(engine.asked.values()) == 400


@pytest.mark.parametrize("first", [-0.05, -15.0], ids=["best", "worst"])
@pytest.mark.parametrize("objective", [*BOUNDED, KullbackLeibler()], ids=[*NAMES, "kl"])
def test_forgetting_old_scores_loses_none_of_the_best(
    objective: Objective, first: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_REMEMBERED", 60)
    strings = torch.arange(100)[:, None]
    full = of_table(table_of(first), objective).score(strings, range(4))
    scorer = of_table(table_of(first), objective)
    # The incumbents' scores are the oldest.
    scorer.score(strings[:2], range(4))
    for start in range(2, 100, 14):
        rows = [0, 1, *range(start, start + 14)]
        got = scorer.score(strings[rows], range(4), keep=2, incumbents=2)
        is_pruned_well(got, full[rows], scorer, 2, 2)
        is_pruned_well(scorer.score(strings[rows], range(4)), full[rows], scorer, 16, 0)
    assert len(scorer._known) < 60 + 16 * 4 + 1


REAL: list[Objective] = [
    Payload(), Payload(soft_minimum=False), TargetLikelihood(), JensenShannon(num_tokens=2), TotalVariation(),
    KullbackLeibler(num_tokens=2),
]  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
@pytest.mark.parametrize("objective", REAL, ids=lambda o: f"{o.name} {o.soft_minimum}")
def test_pruning_on_a_pair_of_models(objective: Objective, family: str) -> None:
    pair, contexts = tiny.make_pair(family), contexts_with_empty_sides()
    generator = torch.Generator().manual_seed(7)
    incumbent = torch.randint(390, (5,), generator=generator)
    strings = incumbent.repeat(40, 1)
    strings[torch.arange(2, 40), torch.randint(5, (38,), generator=generator)] = torch.randint(
        390, (38,), generator=generator
    )
    strings[1] = torch.randint(390, (5,), generator=generator)
    numbers = [0, 3, 4, 1]
    full_scorer, scorer = (make_scorer(pair, contexts, objective) for _ in range(2))
    for s in (full_scorer, scorer):
        s.prepare(incumbent, numbers)
    full = full_scorer.score(strings, numbers)
    got = scorer.score(strings, numbers, keep=3, incumbents=2)
    wholes = full_scorer.aggregate(full)
    bar = max(float(wholes.topk(3).values[-1]), float(wholes[:2].min()))
    exact = got > -torch.inf
    assert torch.allclose(got[exact], full[exact], rtol=1e-5, atol=1e-5)
    assert bool(exact[:2].all())
    assert bool(exact[wholes > bar + 1e-4].all())
    assert bool((wholes[~exact.all(1)] <= bar + 1e-4).all())
    assert scorer.evaluations <= full_scorer.evaluations == 40 * 4
    if objective.name == "kl":
        assert scorer.evaluations == 40 * 4
    if objective.name == "payload":
        assert bool((~exact).any())


def make_scorer(pair: ModelPair, contexts: Any, objective: Objective) -> PairScorer:
    return PairScorer(
        Engine(pair.finetuned, pair.base, contexts), objective, (270, 301, 16) if objective.needs_payload else ()
    )
