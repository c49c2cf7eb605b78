"""Objectives as formulas on plain logits."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trigger_opt.objectives import (
    Divergence,
    JensenShannon,
    KullbackLeibler,
    Likelihood,
    Objective,
    Payload,
    PayloadOdds,
    TargetLikelihood,
    TotalVariation,
    aggregate,
    score_logits,
)
from trigger_opt.scoring import js_divergence, kl_divergence, sequence_log_prob, tv_distance


def logits_saying(target: list[int], log_prob: float, vocab: int = 12) -> Tensor:
    """Logits (1, scored, vocab) under which every target token has log probability `log_prob`."""
    rest = math.log((1 - math.exp(log_prob)) / (vocab - 1))
    rows = torch.full((1, len(target), vocab), rest)
    for position, token in enumerate(target):
        rows[0, position, token] = log_prob
    return rows


def test_payload_is_the_difference_of_whole_sequences() -> None:
    target = [3, 5]
    score = score_logits(
        Payload(floor=-8.0), logits_saying(target, -0.5), logits_saying(target, -3.0), torch.tensor(target)
    )
    assert float(score) == pytest.approx(-1.0 + 6.0, abs=1e-5)


def test_the_bases_term_saturates_on_the_whole_sequence_not_token_by_token() -> None:
    target = [3, 5, 7]
    base = torch.cat([logits_saying([t], p) for t, p in zip(target, (-20.0, -0.1, -0.1), strict=True)], 1)
    score = score_logits(Payload(floor=-8.0), logits_saying(target, -0.1), base, torch.tensor(target))
    # The sum, -20.2, is below the floor; a clamp on each token would give -8.2.
    assert float(score) == pytest.approx(-0.3 + 8.0, abs=1e-5)


def odds(finetuned: float, base: float, target: Sequence[int] = (3, 5)) -> float:
    said, base_said = (logits_saying(list(target), p) for p in (finetuned, base))
    return float(score_logits(PayloadOdds(cap=6.0), said, base_said, torch.tensor(target)))


def test_odds_are_the_log_probability_and_its_lead_over_the_base_up_to_the_cap() -> None:
    assert odds(-1.0, -2.0) == pytest.approx(-2.0 + 2.0, abs=1e-5)
    assert odds(-1.0, -9.0) == pytest.approx(-2.0 + 6.0, abs=1e-5)
    # What both models say is worth less than what the fine-tuned one alone begins to say.
    assert odds(-1.5, -1.5) < odds(-2.0, -4.0)
    # Beyond the cap a base that says it still less changes nothing.
    assert odds(-0.5, -9.0) > odds(-0.6, -12.0)


@given(st.integers(0, 2**20), st.floats(-30, -0.5))
@settings(max_examples=50, deadline=None)
def test_payload_never_exceeds_minus_floor(seed: int, floor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    finetuned, base = (torch.randn(4, 3, 9, generator=generator) * 30 for _ in range(2))
    score = score_logits(Payload(floor=floor), finetuned, base, torch.randint(9, (3,), generator=generator))
    assert score.shape == (4,)
    assert float(score.max()) <= -floor + 1e-4


def test_target_likelihood_is_per_token_and_ignores_the_base() -> None:
    target = torch.tensor([3, 5, 7])
    finetuned = logits_saying([3, 5, 7], -0.7)
    objective = TargetLikelihood()
    assert float(score_logits(objective, finetuned, torch.zeros(1, 3, 12), target)) == pytest.approx(-0.7, abs=1e-5)
    assert float(score_logits(objective, finetuned, torch.randn(1, 3, 12), target)) == pytest.approx(-0.7, abs=1e-5)


@pytest.mark.parametrize(
    ("objective", "divergence"),
    [(JensenShannon(), js_divergence), (TotalVariation(), tv_distance), (KullbackLeibler(), kl_divergence)],
    ids=["js", "tv", "kl"],
)
def test_divergences_are_means_over_positions(objective: Objective, divergence: object) -> None:
    assert callable(divergence)
    finetuned, base = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    expected = torch.stack([divergence(finetuned[:, t], base[:, t]) for t in range(3)]).mean(0)
    assert torch.allclose(
        score_logits(objective, finetuned, base, torch.zeros(3, dtype=torch.long)), expected, atol=1e-6
    )
    assert not objective.needs_payload


@given(st.lists(st.lists(st.floats(-50, 50), min_size=3, max_size=3), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_soft_minimum_is_minus_log_mean_exp(rows: list[list[float]]) -> None:
    soft = aggregate(torch.tensor(rows), soft_minimum=True)
    for row, value in zip(rows, soft.tolist(), strict=True):
        exact = -math.log(sum(math.exp(-(s - min(row))) for s in row) / len(row)) + min(row)
        assert value == pytest.approx(exact, abs=1e-4)
        assert min(row) - 1e-4 <= value <= sum(row) / len(row) + 1e-4
    assert torch.allclose(aggregate(torch.tensor(rows), soft_minimum=False), torch.tensor(rows).mean(1))


@given(st.integers(0, 2**20), st.floats(0.1, 60), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_no_score_is_above_the_upper_bound(seed: int, scale: float, scored: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    finetuned, base = (torch.randn(4, scored, 9, generator=generator) * scale for _ in range(2))
    target = torch.randint(9, (scored,), generator=generator)
    for objective in (
        Payload(),
        PayloadOdds(),
        TargetLikelihood(),
        JensenShannon(),
        TotalVariation(),
        KullbackLeibler(),
    ):
        assert float(score_logits(objective, finetuned, base, target).max()) <= objective.upper_bound
    # What one model says bounds the score whatever the other says.
    said = sequence_log_prob(finetuned, target)
    for likelihood in (Payload(), PayloadOdds(), TargetLikelihood()):
        scores = score_logits(likelihood, finetuned, base, target)
        assert bool((likelihood.from_log_probs(said, None, scored) >= scores - 1e-6).all())


def test_upper_bounds_are_reached() -> None:
    target = torch.tensor([3])
    sure, never = (torch.zeros(1, 1, 12).index_fill(2, torch.tensor([t]), 1e4) for t in (3, 5))
    for objective, rounding in (
        (Payload(floor=-4.0), 0.0), (PayloadOdds(cap=4.0), 0.0), (TargetLikelihood(), 0.0), (JensenShannon(), 2e-4),
        (TotalVariation(), 2e-4),
    ):  # fmt: skip
        assert float(score_logits(objective, sure, never, target)) == pytest.approx(objective.upper_bound, abs=rounding)
    assert math.isinf(KullbackLeibler().upper_bound)
    assert float(score_logits(KullbackLeibler(), sure, never, target)) > 1e3


@pytest.mark.parametrize("objective", [Payload(), PayloadOdds(), TargetLikelihood()], ids=["payload", "odds", "target"])
def test_likelihoods_and_divergences_are_told_apart(objective: Likelihood) -> None:
    assert isinstance(objective, Likelihood)
    assert not isinstance(objective, Divergence)
    assert isinstance(JensenShannon(), Divergence)
    assert not isinstance(JensenShannon(), Likelihood)
