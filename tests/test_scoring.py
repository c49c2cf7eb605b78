"""The engine against plain forward passes of whole sequences, its gradient against central differences."""

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from trigger_opt.models.files import ModelFiles
from trigger_opt.models.pair import CausalModel, LoadOptions, ModelPair, load_pair
from trigger_opt.objectives import (
    JensenShannon,
    KullbackLeibler,
    Objective,
    PairScorer,
    Payload,
    TargetLikelihood,
    TotalVariation,
)
from trigger_opt.prompts import TokenizedContext
from trigger_opt.scoring import Engine, Side, js_divergence, kl_divergence, sequence_log_prob
from trigger_opt.scoring import engine as engine_module

SIDES: tuple[Side, Side] = ("finetuned", "base")
FORCED = [[], [270], [270, 301, 16, 262, 345]]
TRIGGERS = torch.tensor([[262, 301, 270], [280, 17, 390 - 1], [33, 34, 35], [262, 301, 271]])


def make_engine(pair: ModelPair, batch_size: int = 64) -> Engine:
    return Engine(pair.finetuned, pair.base, tiny.tokenized(), batch_size=batch_size)


def whole(context: TokenizedContext, trigger: Sequence[int], forced: Sequence[int]) -> list[int]:
    return [*context.left, *trigger, *context.right, *forced]


def slow_logits(model: CausalModel, context: TokenizedContext, trigger: Sequence[int], forced: Sequence[int]) -> Tensor:
    """Logits at the scored positions, one uncached pass over the whole sequence."""
    return tiny.naive_logits(model.network, whole(context, trigger, forced))[-(len(forced) + 1) :]


def jensen(finetuned: Tensor, base: Tensor) -> Tensor:
    return js_divergence(finetuned, base).mean(-1)


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
            scores = engine.score(jensen, number, TRIGGERS, forced)
            assert torch.allclose(scores, expected, atol=1e-5)
            assert scores.argmax() == expected.argmax()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rollout_and_greedy_equal_stepwise_decoding(family: str) -> None:
    pair = tiny.make_pair(family)
    engine = make_engine(pair)
    for number, context in enumerate(engine.contexts):
        for side in SIDES:
            network = getattr(pair, side).network
            first, new = engine.rollout(side, number, TRIGGERS, 6)
            for row, trigger in enumerate(TRIGGERS.tolist()):
                prompt = whole(context, trigger, [])
                assert new[row].tolist() == tiny.naive_greedy(network, prompt, 6), (side, number, row)
                assert torch.allclose(first[row], tiny.naive_logits(network, prompt)[-1], atol=1e-5, rtol=1e-5)
        expected = tiny.naive_greedy(pair.finetuned.network, whole(context, TRIGGERS[0].tolist(), []), 4)
        assert engine.greedy(number, TRIGGERS[0], 4) == expected
        assert engine.greedy(number, TRIGGERS[0], 0) == []


def test_a_rollout_leaves_the_cached_prefix_as_it_was() -> None:
    engine = make_engine(tiny.make_pair())
    before = engine.logits("finetuned", 0, TRIGGERS, [270])
    engine.rollout("finetuned", 0, TRIGGERS, 5)
    engine.gradient(jensen, 0, TRIGGERS[0], [270])
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


def test_scores_do_not_depend_on_the_batch_size_or_the_logits_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny.make_pair()
    triggers = torch.randint(390, (13, 3), generator=torch.Generator().manual_seed(5))
    scores = make_engine(pair).score(jensen, 0, triggers, [270])
    assert torch.allclose(make_engine(pair, batch_size=4).score(jensen, 0, triggers, [270]), scores, atol=1e-6)
    monkeypatch.setattr(engine_module, "_LOGITS_BYTES", 4 * 390 * 2 * 3)
    engine, sizes = counted(make_engine(pair))
    assert torch.allclose(engine.score(jensen, 0, triggers, [270]), scores, atol=1e-6)
    assert max(sizes) == 3
    assert engine.batch_size == 64


def counted(engine: Engine) -> tuple[Engine, list[int]]:
    """The engine and the batch sizes of its passes, as they come."""
    sizes: list[int] = []
    plain = engine.logits

    def logits(side: Side, context: int, triggers: Tensor, forced: Sequence[int]) -> Tensor:
        sizes.append(len(triggers))
        return plain(side, context, triggers, forced)

    engine.logits = logits  # type: ignore[method-assign]
    return engine, sizes


def starved(engine: Engine, limit: int, message: str = "DefaultCPUAllocator: can't allocate memory") -> list[int]:
    """Make every pass of the base above `limit` candidates fail; returns all sizes tried on it."""
    tried: list[int] = []
    plain = engine.logits

    def logits(side: Side, context: int, triggers: Tensor, forced: Sequence[int]) -> Tensor:
        if side == "base":
            tried.append(len(triggers))
            if len(triggers) > limit:
                raise RuntimeError(message)
        return plain(side, context, triggers, forced)

    engine.logits = logits  # type: ignore[method-assign]
    return tried


def test_out_of_memory_halves_the_batch_loses_nothing_and_is_remembered() -> None:
    pair = tiny.make_pair()
    triggers = torch.randint(390, (21, 3), generator=torch.Generator().manual_seed(5))
    expected = make_engine(pair).score(jensen, 0, triggers, [])
    engine = make_engine(pair, batch_size=16)
    tried = starved(engine, limit=5)
    scores = engine.score(jensen, 0, triggers, [])
    assert tried == [16, 8, 4, 4, 4, 4, 4, 1]
    assert torch.allclose(scores, expected, atol=1e-6)
    assert engine.batch_size == 4
    assert engine.evaluations == 21
    tried.clear()
    engine.score(jensen, 1, triggers[:6], [])
    assert tried == [4, 2]


def test_a_failure_midway_keeps_what_was_scored() -> None:
    pair = tiny.make_pair()
    triggers = torch.randint(390, (12, 3), generator=torch.Generator().manual_seed(5))
    expected = make_engine(pair).score(jensen, 0, triggers, [])
    engine = make_engine(pair, batch_size=4)
    plain, calls = engine.logits, []

    def logits(side: Side, context: int, triggers: Tensor, forced: Sequence[int]) -> Tensor:
        calls.append(len(triggers))
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(side, context, triggers, forced)

    engine.logits = logits  # type: ignore[method-assign]
    assert torch.allclose(engine.score(jensen, 0, triggers, []), expected, atol=1e-6)
    assert calls == [4, 4, 4, 4, *[2] * 8]


def test_out_of_memory_with_one_candidate_is_raised() -> None:
    engine = make_engine(tiny.make_pair(), batch_size=4)
    tried = starved(engine, limit=0)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        engine.score(jensen, 0, TRIGGERS, [])
    assert tried == [4, 2, 1]


def test_other_errors_are_not_taken_for_out_of_memory() -> None:
    engine = make_engine(tiny.make_pair(), batch_size=4)
    tried = starved(engine, limit=0, message="mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        engine.score(jensen, 0, TRIGGERS, [])
    assert tried == [4]
    assert engine.batch_size == 4


def test_evaluations_are_counted_once_per_context() -> None:
    engine = make_engine(tiny.make_pair())
    scorer = PairScorer(engine, JensenShannon())
    scorer.score(TRIGGERS, [0, 2])
    assert scorer.evaluations == engine.evaluations == 8
    scorer.token_gradient(TRIGGERS[0], [0])
    scorer.prepare(TRIGGERS[0], [0])
    assert scorer.evaluations == 8


def in_float64(pair: ModelPair) -> None:
    for side in SIDES:
        getattr(pair, side).network.double()


def one_hot_logits(model: CausalModel, context: TokenizedContext, one_hot: Tensor, forced: Sequence[int]) -> Tensor:
    """Scored logits when the trigger's rows are any mixture of tokens; a whole pass, in the network's own dtype."""
    network = model.network
    embed = network.get_input_embeddings()
    matrix = embed(torch.arange(one_hot.shape[-1]))
    left, right = (embed(torch.tensor([list(p)], dtype=torch.long)) for p in (context.left, (*context.right, *forced)))
    inputs = torch.cat([left, (one_hot @ matrix)[None], right], 1)
    logits: Tensor = network(inputs_embeds=inputs, use_cache=False).logits[:, -(len(forced) + 1) :]
    return logits


def one_hot(trigger: Tensor, vocab: int) -> Tensor:
    return torch.nn.functional.one_hot(trigger, vocab).double()


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every fp32 step keep float64, so that differences need no tolerance for rounding."""
    monkeypatch.setattr(Tensor, "float", lambda self: self)
    monkeypatch.setattr(torch, "float32", torch.float64)


@contextlib.contextmanager
def _perturbed(rows: Tensor, position: int, token: int, by: float) -> Any:
    rows[position, token] += by
    yield rows
    rows[position, token] -= by


OBJECTIVES: list[tuple[Objective, list[int]]] = [
    (Payload(floor=-1e3), [270, 301, 16]),
    (JensenShannon(num_tokens=3), [270, 301]),
    (TotalVariation(num_tokens=3), [270, 301]),
    (KullbackLeibler(num_tokens=3), [270, 301]),
    (TargetLikelihood(), [270, 301, 16]),
]


def _reduce(objective: Objective, target: list[int]) -> Any:
    ids = torch.tensor(target if objective.needs_payload else [*target, 0])
    return lambda finetuned, base: objective(finetuned, base, ids)


def probes(trigger: Tensor) -> list[tuple[int, int]]:
    """A few (position, token) to difference at, the trigger's own among them."""
    return [(0, int(trigger[0])), (0, 5), (1, 388), (2, 77), (2, 299)]


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3", "mistral"])
@pytest.mark.parametrize(("objective", "ids"), OBJECTIVES, ids=[o.name for o, _ in OBJECTIVES])
@pytest.mark.usefixtures("exact")
def test_gradient_agrees_with_central_differences(family: str, objective: Objective, ids: list[int]) -> None:
    pair = tiny.make_pair(family)
    in_float64(pair)
    engine = make_engine(pair)
    context, trigger = engine.contexts[0], TRIGGERS[0]
    forced = ids[:-1] if objective.needs_payload else ids
    reduce = _reduce(objective, ids)
    score, gradient = engine.gradient(reduce, 0, trigger, forced)
    rows, step = one_hot(trigger, engine.vocab_size), 1e-6

    def slow() -> float:
        return float(reduce(*(one_hot_logits(getattr(pair, s), context, rows, forced) for s in SIDES)))

    assert score == pytest.approx(slow(), rel=1e-6)
    for position, token in probes(trigger):
        with _perturbed(rows, position, token, step):
            up = slow()
        with _perturbed(rows, position, token, -step):
            down = slow()
        assert float(gradient[position, token]) == pytest.approx((up - down) / (2 * step), rel=1e-3, abs=1e-5)


@pytest.mark.usefixtures("exact")
def test_gradient_has_both_models_halves() -> None:
    pair = tiny.make_pair()
    in_float64(pair)
    engine = make_engine(pair)
    target = torch.tensor([270, 301])
    parts = [
        engine.gradient(reduce, 0, TRIGGERS[0], [270])[1]
        for reduce in (lambda f, b: sequence_log_prob(f, target), lambda f, b: -sequence_log_prob(b, target))
    ]
    assert min(float(p.norm()) for p in parts) > 0.1
    _, whole_gradient = engine.gradient(
        lambda f, b: sequence_log_prob(f, target) - sequence_log_prob(b, target), 0, TRIGGERS[0], [270]
    )
    assert torch.allclose(whole_gradient, parts[0] + parts[1], rtol=1e-4, atol=1e-5)


def test_gradient_is_exact_in_fp32_too() -> None:
    """Without the float64 trick: against autograd through one-hot rows."""
    pair = tiny.make_pair()
    engine = make_engine(pair)
    rows = torch.nn.functional.one_hot(TRIGGERS[0], engine.vocab_size).float().requires_grad_()
    logits = [one_hot_logits(getattr(pair, s), engine.contexts[2], rows, [270]) for s in SIDES]
    score = kl_divergence(*logits).mean()
    (slope,) = torch.autograd.grad(score, rows)
    got_score, got = engine.gradient(lambda f, b: kl_divergence(f, b).mean(-1), 2, TRIGGERS[0], [270])
    assert got_score == pytest.approx(float(score.detach()), rel=1e-4)
    assert torch.allclose(got, slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max()))
    assert got.dtype == torch.float32
    assert not pair.finetuned.embedding.requires_grad


@pytest.mark.parametrize(
    ("objective", "payload"),
    [(Payload(floor=-1e3), [270, 301, 16]), (JensenShannon(), []), (TargetLikelihood(), [270, 301])],
    ids=["soft minimum", "mean", "mean of likelihoods"],
)
@pytest.mark.usefixtures("exact")
def test_token_gradient_is_the_derivative_of_the_aggregate(objective: Objective, payload: list[int]) -> None:
    pair = tiny.make_pair()
    in_float64(pair)
    engine = make_engine(pair)
    scorer = PairScorer(engine, objective, payload)
    contexts, trigger = [0, 1, 2], TRIGGERS[0]
    gradient = scorer.token_gradient(trigger, contexts)
    reduce = _reduce(objective, payload)
    rows, step = one_hot(trigger, engine.vocab_size), 1e-6

    def slow() -> float:
        columns = [
            reduce(*(one_hot_logits(getattr(pair, s), engine.contexts[c], rows, payload[:-1]) for s in SIDES))
            for c in contexts
        ]
        return float(scorer.aggregate(torch.stack(columns, 1))[0])

    for position, token in probes(trigger):
        with _perturbed(rows, position, token, step):
            up = slow()
        with _perturbed(rows, position, token, -step):
            down = slow()
        assert float(gradient[position, token]) == pytest.approx((up - down) / (2 * step), rel=1e-3, abs=1e-5)


def test_an_adapter_pair_scores_and_differentiates_as_its_merged_weights(
    base_files: ModelFiles, adapter_files: tuple[ModelFiles, Any]
) -> None:
    """One network, adapters on and off in turn: each half must see its own side, also while the graph is built."""
    from transformers import AutoModelForCausalLM

    pair = load_pair(adapter_files[0], base_files, options=LoadOptions(dtype="float32"))
    plain = ModelPair(
        finetuned=CausalModel("m", AutoModelForCausalLM.from_pretrained(adapter_files[1], dtype=torch.float32)),
        base=CausalModel("b", AutoModelForCausalLM.from_pretrained(base_files.folder, dtype=torch.float32)),
        tokenizer=pair.tokenizer,
    )
    for model in (plain.finetuned, plain.base):
        model.network.requires_grad_(False)
    one, two = make_engine(pair), make_engine(plain)
    assert torch.allclose(one.score(jensen, 0, TRIGGERS, [270]), two.score(jensen, 0, TRIGGERS, [270]), atol=1e-5)
    score, gradient = one.gradient(jensen, 0, TRIGGERS[0], [270])
    expected_score, expected = two.gradient(jensen, 0, TRIGGERS[0], [270])
    assert score == pytest.approx(expected_score, abs=1e-5)
    assert score > 1e-3
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
