"""The engine's gradient against central differences and against itself, and the trunks it leaves behind."""

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.slow_scores import SIDES, TRIGGERS, contexts_with_empty_sides, jensen, make_engine, requests, slow_logits
from trigger_opt.models.files import ModelFiles
from trigger_opt.models.pair import CausalModel, LoadOptions, ModelPair, load_pair
from trigger_opt.objectives import (
    JensenShannon,
    KullbackLeibler,
    Objective,
    Payload,
    TargetLikelihood,
    TotalVariation,
    score_logits,
)
from trigger_opt.pair_scorer import PairScorer
from trigger_opt.prompts import TokenizedContext
from trigger_opt.scoring import Engine, kl_divergence, sequence_log_prob
from trigger_opt.scoring import engine as engine_module
from trigger_opt.scoring.forward import Forward
from trigger_opt.scoring.packing import Pack


def one_gradient(
    engine: Engine, reduce: Any, context: int, trigger: Tensor, forced: Sequence[int]
) -> tuple[float, Tensor]:
    """Score in one context and its derivative to each one-hot token."""
    slopes = engine.gradient(reduce, trigger, [context], {context: forced})
    return float(slopes.scores[0]), engine.to_tokens(slopes, torch.ones(1))


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
    return lambda finetuned, base: score_logits(objective, finetuned, base, ids.to(finetuned.device))


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
    score, gradient = one_gradient(engine, reduce, 0, trigger, forced)
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
        one_gradient(engine, reduce, 0, TRIGGERS[0], [270])[1]
        for reduce in (lambda f, b: sequence_log_prob(f, target), lambda f, b: -sequence_log_prob(b, target))
    ]
    assert min(float(p.norm()) for p in parts) > 0.1
    _, whole_gradient = one_gradient(
        engine, lambda f, b: sequence_log_prob(f, target) - sequence_log_prob(b, target), 0, TRIGGERS[0], [270]
    )
    assert torch.allclose(whole_gradient, parts[0] + parts[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradient_is_exact_in_fp32_too(family: str) -> None:
    """Without the float64 trick: against autograd through one-hot rows."""
    pair = tiny.make_pair(family)
    engine = make_engine(pair)
    rows = torch.nn.functional.one_hot(TRIGGERS[0], engine.vocab_size).float().requires_grad_()
    logits = [one_hot_logits(getattr(pair, s), engine.contexts[2], rows, [270]) for s in SIDES]
    score = kl_divergence(*logits).mean()
    (slope,) = torch.autograd.grad(score, rows)
    got_score, got = one_gradient(engine, lambda f, b: kl_divergence(f, b).mean(-1), 2, TRIGGERS[0], [270])
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


def test_an_adapter_pair_differentiates_as_its_merged_weights(
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
    score, gradient = one_gradient(one, jensen, 0, TRIGGERS[0], [270])
    expected_score, expected = one_gradient(two, jensen, 0, TRIGGERS[0], [270])
    assert score == pytest.approx(expected_score, abs=1e-5)
    assert score > 1e-3
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


FORCED = {0: (270, 301), 1: (5, 6), 2: (301, 9), 3: (16, 16), 4: (7, 262)}


def close(one: Tensor, two: Tensor) -> bool:
    return torch.allclose(one, two, rtol=1e-3, atol=1e-4 * float(two.abs().max()))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_several_contexts_at_once_are_each_context_alone(family: str) -> None:
    pair, contexts = tiny.make_pair(family), contexts_with_empty_sides()
    numbers = [3, 0, 4, 2, 1]
    together = Engine(pair.finetuned, pair.base, contexts).gradient(jensen, TRIGGERS[0], numbers, FORCED)
    for row, number in enumerate(numbers):
        engine = Engine(pair.finetuned, pair.base, contexts)
        alone = engine.gradient(jensen, TRIGGERS[0], [number], FORCED)
        assert float(together.scores[row]) == pytest.approx(float(alone.scores[0]), abs=1e-5)
        for side in SIDES:
            assert alone.by_side[side].shape == (1, 3, 32)
            assert float(alone.by_side[side].abs().max()) > 1e-5
            assert close(together.by_side[side][row], alone.by_side[side][0])
        (expected,) = slow_slopes(pair, contexts[number], FORCED[number])
        assert close(engine.to_tokens(alone, torch.ones(1)), expected)


def slow_slopes(pair: ModelPair, context: TokenizedContext, forced: Sequence[int]) -> tuple[Tensor, ...]:
    """Derivative of `jensen` to the one-hot rows of the first trigger, by autograd on whole sequences."""
    rows = torch.nn.functional.one_hot(TRIGGERS[0], tiny.vocab_size()).float().requires_grad_()
    logits = [one_hot_logits(getattr(pair, s), context, rows, forced) for s in SIDES]
    return torch.autograd.grad(jensen(*logits).sum(), rows)


def test_weights_join_the_contexts() -> None:
    pair = tiny.make_pair()
    engine = make_engine(pair)
    slopes = engine.gradient(jensen, TRIGGERS[0], [0, 1, 2], FORCED)
    parts = [slow_slopes(pair, engine.contexts[c], FORCED[c])[0] for c in range(3)]
    weights = torch.tensor([0.5, 0.0, -2.0])
    got = engine.to_tokens(slopes, weights)
    assert close(got, weights[0] * parts[0] + weights[2] * parts[2])
    assert got.dtype == torch.float32


def test_one_matrix_for_both_sides_gives_what_two_equal_ones_give() -> None:
    networks = [tiny.make_network("qwen2", s) for s in (1, 0)]
    networks[0].get_input_embeddings().weight = networks[1].get_input_embeddings().weight
    finetuned, base = (CausalModel("m", n) for n in networks)
    engine = Engine(finetuned, base, tiny.tokenized())
    slopes = engine.gradient(jensen, TRIGGERS[0], [0], FORCED)
    got = engine.to_tokens(slopes, torch.ones(1))
    networks[0].get_input_embeddings().weight = torch.nn.Parameter(
        networks[1].get_input_embeddings().weight.clone(), requires_grad=False
    )
    assert torch.allclose(engine.to_tokens(slopes, torch.ones(1)), got, rtol=1e-4, atol=1e-6)
    assert float(got.abs().max()) > 1e-3


def test_contexts_taken_in_turns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny.make_pair()
    whole = make_engine(pair).gradient(jensen, TRIGGERS[0], [2, 0, 1], FORCED)
    # Logits of two contexts, and not of three.
    monkeypatch.setattr(engine_module, "_GRADIENT_BYTES", 2 * 3 * 4 * tiny.vocab_size())
    engine = make_engine(pair)
    engine.gradient(jensen, TRIGGERS[1], [2, 0, 1], FORCED)
    passes = counted(monkeypatch)
    turns = engine.gradient(jensen, TRIGGERS[0], [2, 0, 1], FORCED)
    assert [len(p.jobs) for p in passes] == [2, 2, 1, 1]
    assert torch.allclose(turns.scores, whole.scores, atol=1e-6)
    for side in SIDES:
        assert close(turns.by_side[side], whole.by_side[side])
    monkeypatch.setattr(engine_module, "_GRADIENT_BYTES", 1)
    alone = make_engine(pair).gradient(jensen, TRIGGERS[0], [2, 0, 1], FORCED)
    assert torch.allclose(alone.scores, whole.scores, atol=1e-6)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Pack]:
    """Every pass from now on."""
    passes: list[Pack] = []
    plain = Forward.hidden

    def hidden(forward: Forward, pack: Pack, *arguments: Any, **options: Any) -> Any:
        passes.append(pack)
        return plain(forward, pack, *arguments, **options)

    monkeypatch.setattr(Forward, "hidden", hidden)
    return passes


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_trunks_a_gradient_leaves_behind_are_used_and_right(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, contexts = tiny.make_pair(family), contexts_with_empty_sides()
    engine = Engine(pair.finetuned, pair.base, contexts)
    engine.gradient(jensen, TRIGGERS[0], [0, 3, 4], FORCED)
    passes = counted(monkeypatch)
    rivals = torch.tensor([[262, 301, 9], [262, 9, 270], [9, 301, 270], [262, 301, 270]])
    asked = [r for c in (3, 0, 4) for r in requests(rivals, c, [270])]
    for side in SIDES:
        log_probs, _ = engine.token_scores(side, asked, [270, 301])
        for row, r in enumerate(asked):
            logits = slow_logits(getattr(pair, side), contexts[r.context], r.ids, [270]).log_softmax(-1)
            expected = logits[torch.arange(2), torch.tensor([270, 301])]
            assert torch.allclose(log_probs[row], expected, rtol=1e-5, atol=1e-5), (side, r)
    # One pass a side, of the candidates: none for a trunk.
    assert [len(p.jobs) for p in passes] == [len(asked)] * 2
    starts = {j.start - len(contexts[asked[j.owner].context].left) for p in passes for j in p.jobs}
    assert starts == {0, 1, 2, 3}
    # In another context: what is before the slot, the trigger, and the candidates.
    engine.token_scores("base", requests(rivals.repeat(4, 1), 1), [270])
    assert len(passes) == 5
    # No trunk outlives its trigger.
    engine.follow((9, 9, 9))
    engine.token_scores("base", requests(rivals[:1], 0), [270])
    assert passes[-1].jobs[0].start == len(contexts[0].left)


def test_a_side_left_out_is_handed_the_others_logits() -> None:
    pair = tiny.make_pair()
    target = torch.tensor([270, 301])
    seen = []

    def reduce(finetuned: Tensor, base: Tensor) -> Tensor:
        seen.append(torch.equal(finetuned, base))
        return sequence_log_prob(finetuned, target)

    engine = make_engine(pair)
    slopes = engine.gradient(reduce, TRIGGERS[0], [0, 1], {0: [270], 1: [270]}, sides=["finetuned"])
    both = make_engine(pair).gradient(reduce, TRIGGERS[0], [0, 1], {0: [270], 1: [270]})
    assert seen == [True, False]
    assert list(slopes.by_side) == ["finetuned"]
    assert torch.allclose(slopes.scores, both.scores, atol=1e-6)
    assert close(slopes.by_side["finetuned"], both.by_side["finetuned"])
    assert float(both.by_side["base"].abs().max()) == 0.0
    assert close(engine.to_tokens(slopes, torch.ones(2)), make_engine(pair).to_tokens(both, torch.ones(2)))
    swapped = engine.gradient(reduce, TRIGGERS[0], [0], {0: [270]}, sides=["base"])
    assert list(swapped.by_side) == ["base"]
    assert float(swapped.scores[0]) != pytest.approx(float(slopes.scores[0]), abs=1e-3)


@pytest.mark.usefixtures("two_threads")
def test_a_gradient_leaves_the_threads_as_they_were() -> None:
    during = []

    def reduce(finetuned: Tensor, base: Tensor) -> Tensor:
        during.append(torch.get_num_threads())
        return jensen(finetuned, base)

    make_engine(tiny.make_pair()).gradient(reduce, TRIGGERS[0], [0], FORCED)
    # So few numbers are not worth two.
    assert during == [1]
    assert torch.get_num_threads() == 2
