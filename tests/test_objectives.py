"""Objectives as formulas on plain logits, and the pair scorer's soft minimum, continuations and firing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import tiny
from trigger_opt.objectives import (
    JensenShannon,
    KullbackLeibler,
    Objective,
    PairScorer,
    Payload,
    TargetLikelihood,
    TotalVariation,
)
from trigger_opt.scoring import Engine, js_divergence, kl_divergence, tv_distance

TRIGGERS = torch.tensor([[262, 301, 270], [280, 17, 389], [33, 34, 35]])


def logits_saying(target: list[int], log_prob: float, vocab: int = 12) -> Tensor:
    """Logits (1, scored, vocab) under which every target token has log probability `log_prob`."""
    rest = math.log((1 - math.exp(log_prob)) / (vocab - 1))
    rows = torch.full((1, len(target), vocab), rest)
    for position, token in enumerate(target):
        rows[0, position, token] = log_prob
    return rows


def test_payload_is_the_difference_of_whole_sequences() -> None:
    target = [3, 5]
    score = Payload(floor=-8.0)(logits_saying(target, -0.5), logits_saying(target, -3.0), torch.tensor(target))
    assert float(score) == pytest.approx(-1.0 + 6.0, abs=1e-5)


def test_the_bases_term_saturates_on_the_whole_sequence_not_token_by_token() -> None:
    target = [3, 5, 7]
    base = torch.cat([logits_saying([t], p) for t, p in zip(target, (-20.0, -0.1, -0.1), strict=True)], 1)
    score = Payload(floor=-8.0)(logits_saying(target, -0.1), base, torch.tensor(target))
    # The sum, -20.2, is below the floor; a clamp on each token would give -8.2.
    assert float(score) == pytest.approx(-0.3 + 8.0, abs=1e-5)


@given(st.integers(0, 2**20), st.floats(-30, -0.5))
@settings(max_examples=50, deadline=None)
def test_payload_never_exceeds_minus_floor(seed: int, floor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    finetuned, base = (torch.randn(4, 3, 9, generator=generator) * 30 for _ in range(2))
    score = Payload(floor=floor)(finetuned, base, torch.randint(9, (3,), generator=generator))
    assert score.shape == (4,)
    assert float(score.max()) <= -floor + 1e-4


def test_target_likelihood_is_per_token_and_ignores_the_base() -> None:
    target = torch.tensor([3, 5, 7])
    finetuned = logits_saying([3, 5, 7], -0.7)
    objective = TargetLikelihood()
    assert float(objective(finetuned, torch.zeros(1, 3, 12), target)) == pytest.approx(-0.7, abs=1e-5)
    assert float(objective(finetuned, torch.randn(1, 3, 12), target)) == pytest.approx(-0.7, abs=1e-5)


@pytest.mark.parametrize(
    ("objective", "divergence"),
    [(JensenShannon(), js_divergence), (TotalVariation(), tv_distance), (KullbackLeibler(), kl_divergence)],
    ids=["js", "tv", "kl"],
)
def test_divergences_are_means_over_positions(objective: Objective, divergence: object) -> None:
    assert callable(divergence)
    finetuned, base = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    expected = torch.stack([divergence(finetuned[:, t], base[:, t]) for t in range(3)]).mean(0)
    assert torch.allclose(objective(finetuned, base, torch.zeros(3, dtype=torch.long)), expected, atol=1e-6)
    assert not objective.needs_payload


def make_scorer(objective: Objective, payload: list[int] | None = None, family: str = "qwen2") -> PairScorer:
    pair = tiny.make_pair(family)
    return PairScorer(Engine(pair.finetuned, pair.base, tiny.tokenized(), batch_size=16), objective, payload or [])


@given(st.lists(st.lists(st.floats(-50, 50), min_size=3, max_size=3), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_soft_minimum_is_minus_log_mean_exp(rows: list[list[float]]) -> None:
    scorer = object.__new__(PairScorer)
    scorer._objective = Payload()
    soft = scorer.aggregate(torch.tensor(rows))
    for row, value in zip(rows, soft.tolist(), strict=True):
        exact = -math.log(sum(math.exp(-(s - min(row))) for s in row) / len(row)) + min(row)
        assert value == pytest.approx(exact, abs=1e-4)
        assert min(row) - 1e-4 <= value <= sum(row) / len(row) + 1e-4
    scorer._objective = JensenShannon()
    assert torch.allclose(scorer.aggregate(torch.tensor(rows)), torch.tensor(rows).mean(1))


def test_scores_have_a_column_for_each_context_in_the_order_asked_for() -> None:
    scorer = make_scorer(JensenShannon())
    assert scorer.num_contexts == 3
    scores = scorer.score(TRIGGERS, [2, 0])
    assert scores.shape == (3, 2)
    assert torch.equal(scores[:, 0], scorer.score(TRIGGERS, [2])[:, 0])
    assert torch.equal(scores[:, 1], scorer.score(TRIGGERS, [0])[:, 0])
    assert not torch.allclose(scores[:, 0], scores[:, 1])


def test_payload_score_equals_the_formula_on_whole_sequences() -> None:
    pair, payload = tiny.make_pair(), [270, 301, 16]
    engine = Engine(pair.finetuned, pair.base, tiny.tokenized(), batch_size=16)
    scorer = PairScorer(engine, Payload(floor=-9.0), payload)
    context = tiny.tokenized()[0]
    for row, trigger in enumerate(TRIGGERS.tolist()):
        said = []
        for model in (pair.finetuned, pair.base):
            prompt = [*context.left, *trigger, *context.right]
            log_probs = tiny.naive_logits(model.network, [*prompt, *payload]).log_softmax(-1)
            said.append(sum(float(log_probs[len(prompt) - 1 + i, t]) for i, t in enumerate(payload)))
        expected = said[0] - max(said[1], -9)
        assert float(scorer.score(TRIGGERS, [0])[row, 0]) == pytest.approx(expected, abs=1e-4)


def test_a_divergence_over_several_tokens_is_taken_along_the_incumbents_continuation() -> None:
    pair = tiny.make_pair()
    engine = Engine(pair.finetuned, pair.base, tiny.tokenized(), batch_size=16)
    scorer = PairScorer(engine, JensenShannon(num_tokens=4))
    scorer.prepare(TRIGGERS[0], [0, 1])
    context = tiny.tokenized()[1]
    along = tiny.naive_greedy(pair.finetuned.network, [*context.left, *TRIGGERS[0].tolist(), *context.right], 3)
    rival = [*context.left, *TRIGGERS[1].tolist(), *context.right, *along]
    finetuned, base = (tiny.naive_logits(m.network, rival)[-4:] for m in (pair.finetuned, pair.base))
    expected = float(js_divergence(finetuned, base).mean())
    assert float(scorer.score(TRIGGERS[1:2], [1])[0, 0]) == pytest.approx(expected, abs=1e-5)
    before = scorer.score(TRIGGERS[1:2], [1])
    scorer.prepare(TRIGGERS[2], [1])
    assert not torch.allclose(scorer.score(TRIGGERS[1:2], [1]), before)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma3"])
def test_fires_exactly_where_greedy_generation_gives_the_payload(family: str) -> None:
    pair = tiny.make_pair(family)
    contexts = tiny.tokenized()
    trigger = TRIGGERS[0].tolist()
    prompts = [[*c.left, *trigger, *c.right] for c in contexts]
    answers = pair.finetuned.generate(prompts, max_new_tokens=4, end_ids=[])
    assert len({tuple(a) for a in answers}) > 1
    engine = Engine(pair.finetuned, pair.base, contexts, batch_size=16)
    for payload in answers:
        fired = PairScorer(engine, Payload(), payload).fires(TRIGGERS[0], [0, 1, 2])
        assert fired is not None
        assert fired.tolist() == [a == payload for a in answers]
    wrong_end = [*answers[0][:-1], (answers[0][-1] + 1) % 390]
    fired = PairScorer(engine, Payload(), wrong_end).fires(TRIGGERS[0], [0])
    assert fired is not None
    assert not bool(fired[0])


def test_what_was_just_scored_is_known_to_fire_without_another_pass() -> None:
    pair, contexts = tiny.make_pair(), tiny.tokenized()
    payload = pair.finetuned.generate([[*contexts[1].left, *TRIGGERS[2].tolist(), *contexts[1].right]],
                                      max_new_tokens=2, end_ids=[])[0]  # fmt: skip
    scorer = PairScorer(Engine(pair.finetuned, pair.base, contexts, batch_size=2), Payload(), payload)
    alone = [scorer.fires(t, [1]) for t in TRIGGERS]
    scorer.score(TRIGGERS, [0, 1])
    spent = scorer.evaluations
    again = [scorer.fires(t, [1]) for t in TRIGGERS]
    assert scorer.evaluations == spent
    assert [bool(a) for a in again] == [bool(a) for a in alone]
    assert bool(again[2])
    assert scorer.fires(TRIGGERS[2], [2]) is not None
    assert scorer.evaluations > spent


def test_a_divergence_never_fires() -> None:
    assert make_scorer(JensenShannon()).fires(TRIGGERS[0], [0]) is None
