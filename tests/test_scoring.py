"""The engine on fixed strings: logits, scores, continuations, and what they must not depend on."""

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.slow_scores import SIDES, TRIGGERS, jensen, make_engine, requests, slow_logits, whole
from trigger_opt.models.pair import CausalModel, ModelPair
from trigger_opt.objectives import JensenShannon
from trigger_opt.pair_scorer import PairScorer
from trigger_opt.scoring import Side, heads, js_divergence

FORCED = [[], [270], [270, 301, 16, 262, 345]]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_and_scores_equal_a_whole_forward_pass(family: str) -> None:
    pair = tiny.make_pair(family)
    engine = make_engine(pair)
    for number, context in enumerate(engine.contexts):
        for forced in FORCED:
            slow: dict[Side, Tensor] = {}
            for side in SIDES:
                model = getattr(pair, side)
                slow[side] = torch.stack([slow_logits(model, context, t, forced) for t in TRIGGERS.tolist()])
                got = engine.logits(side, number, TRIGGERS, forced)
                assert got.dtype == torch.float32
                assert got.shape == (len(TRIGGERS), len(forced) + 1, engine.vocab_size)
                assert torch.allclose(got, slow[side], atol=1e-5, rtol=1e-5), (side, number, len(forced))
            expected = jensen(slow["finetuned"], slow["base"])
            assert expected.std() > 1e-4  # the candidates differ, or the next line means nothing
            scores = engine.divergences(js_divergence, requests(TRIGGERS, number, forced)).mean(1)
            assert torch.allclose(scores, expected, atol=1e-5)
            assert scores.argmax() == expected.argmax()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rollout_and_greedy_equal_stepwise_decoding(family: str) -> None:
    pair = tiny.make_pair(family)
    engine = make_engine(pair)
    numbers = range(len(engine.contexts))
    for number, context in enumerate(engine.contexts):
        for side in SIDES:
            network = getattr(pair, side).network
            first, new = engine.rollout(side, number, TRIGGERS, 6)
            for row, trigger in enumerate(TRIGGERS.tolist()):
                prompt = whole(context, trigger, [])
                assert new[row].tolist() == tiny.naive_greedy(network, prompt, 6), (side, number, row)
                assert torch.allclose(first[row], tiny.naive_logits(network, prompt)[-1], atol=1e-5, rtol=1e-5)
    prompts = [whole(c, TRIGGERS[0].tolist(), []) for c in engine.contexts]
    expected = [tiny.naive_greedy(pair.finetuned.network, p, 4) for p in prompts]
    assert engine.greedy(TRIGGERS[0], numbers, 4) == expected
    assert engine.greedy(TRIGGERS[0], [2, 0], 2) == [expected[2][:2], expected[0][:2]]
    assert engine.greedy(TRIGGERS[0], numbers, 0) == [[], [], []]


def test_a_rollout_leaves_the_cached_prefix_as_it_was() -> None:
    engine = make_engine(tiny.make_pair())
    before = engine.logits("finetuned", 0, TRIGGERS, [270])
    engine.rollout("finetuned", 0, TRIGGERS, 5)
    engine.gradient(jensen, TRIGGERS[0], [0], {0: [270]})
    engine.follow(())
    assert torch.equal(engine.logits("finetuned", 0, TRIGGERS, [270]), before)


def test_triggers_of_several_lengths_and_padded_vocabularies() -> None:
    pair = tiny.make_pair(rows=tiny.vocab_size() + 10)
    engine = make_engine(pair)
    assert engine.vocab_size == tiny.vocab_size() + 10
    for trigger in ([5], [5, 6], list(range(20, 40))):
        got = engine.logits("base", 2, torch.tensor([trigger]), [270])[0]
        assert torch.allclose(got, slow_logits(pair.base, engine.contexts[2], trigger, [270]), atol=1e-5, rtol=1e-5)


def test_each_side_uses_its_own_embedding() -> None:
    base = CausalModel("base", tiny.make_network("qwen2", 0))
    network = tiny.make_network("qwen2", 0)
    network.get_input_embeddings().weight.data.mul_(-1.5)
    pair = ModelPair(finetuned=CausalModel("tuned", network), base=base, tokenizer=None)
    engine = make_engine(pair)
    for side in SIDES:
        expected = slow_logits(getattr(pair, side), engine.contexts[0], TRIGGERS[0].tolist(), [270])
        assert torch.allclose(engine.logits(side, 0, TRIGGERS[:1], [270])[0], expected, atol=1e-5, rtol=1e-5)


def test_scores_do_not_depend_on_the_logits_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny.make_pair()
    triggers = torch.randint(390, (13, 3), generator=torch.Generator().manual_seed(5))
    asked = requests(triggers, 0, [270])
    divergences = make_engine(pair).divergences(js_divergence, asked)
    log_probs, greedy = make_engine(pair).token_scores("base", asked, [270, 301])
    monkeypatch.setattr(heads, "_LOGITS_BYTES", {"cpu": 4 * 390 * 3, "cuda": 0})
    held: list[int] = []
    plain = CausalModel.logits

    def logits(model: CausalModel, hidden: Tensor) -> Tensor:
        held.append(len(hidden))
        return plain(model, hidden)

    monkeypatch.setattr(CausalModel, "logits", logits)
    assert torch.allclose(make_engine(pair).divergences(js_divergence, asked), divergences, atol=1e-6)
    again = make_engine(pair).token_scores("base", asked, [270, 301])
    assert torch.allclose(again[0], log_probs, atol=1e-5)
    assert torch.equal(again[1], greedy)
    assert max(held) == 3


def test_requests_that_force_unequally_many_tokens_are_refused() -> None:
    """Their scored positions would be mixed up."""
    engine = make_engine(tiny.make_pair())
    unequal = [*requests(TRIGGERS, 0, [270, 301]), *requests(TRIGGERS, 1)]
    for asked in (unequal, unequal[::-1]):
        with pytest.raises(ValueError, match="force"):
            engine.divergences(js_divergence, asked)
    with pytest.raises(ValueError, match="force"):
        engine.gradient(jensen, TRIGGERS[0], [0, 1], {0: [270], 1: []})


def test_evaluations_are_counted_once_per_context() -> None:
    engine = make_engine(tiny.make_pair())
    scorer = PairScorer(engine, JensenShannon())
    scorer.score(TRIGGERS, [0, 2])
    assert scorer.evaluations == engine.meter.evaluations == 8
    scorer.token_gradient(TRIGGERS[0], [0])
    scorer.prepare(TRIGGERS[0], [0])
    assert scorer.evaluations == 8
