"""What a search's arithmetic is said to be, against sums by hand on tiny networks."""

import pytest
import torch

from tests import tiny
from tests.slow_scores import jensen, make_engine, requests
from trigger_opt.models.pair import LoadOptions, load_pair
from trigger_opt.scoring import Meter, Request, js_divergence, matmul_rate
from trigger_opt.scoring.meter import cost_of

# Width 32, 4 heads of 8 (2 of keys), MLPs of 48, two layers.
DENSE = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
HEAD = 390 * 32


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_two_operations_a_weight(family: str, tied: bool) -> None:
    cost = cost_of(tiny.make_network(family, 0, tie_word_embeddings=tied))
    # Norms and biases are no matrices; the embedding is looked up.
    assert cost.per_token == 2 * DENSE
    assert cost.per_position == 2 * HEAD


def test_of_experts_only_those_a_token_visits() -> None:
    network = tiny.make_network("deepseek_v3", 0)
    attention = 32 * 16 + 16 * 4 * 16 + 32 * (16 + 8) + 16 * 4 * (8 + 12) + 4 * 12 * 32
    expert = 3 * 32 * 16
    # One dense layer; in the other two experts of four, the shared one, and the choice.
    body = 2 * attention + 3 * 32 * 48 + 2 * expert + expert + 4 * 32
    assert cost_of(network).per_token == 2 * body


@pytest.mark.parametrize(("quantization", "dtype"), [("nf4", torch.uint8), ("int8", torch.int8)])
def test_quantised_weights_count_as_the_numbers_they_stand_for(
    quantization: str, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    files = tiny.save_model(tmp_path_factory.mktemp("wide") / "base", "llama", seed=0, scale=0.1, **sizes)
    costs = []
    for kind in ("none", quantization):
        network = load_pair(files, files, options=LoadOptions(dtype="float32", quantization=kind)).base.network
        assert (dtype in {p.dtype for p in network.parameters()}) == (kind != "none")
        costs.append(cost_of(network))
    assert costs[0] == costs[1]


def test_passes_are_counted_with_their_padding_and_without() -> None:
    engine = make_engine(tiny.make_pair())
    after = len(engine.contexts[1].right)
    triggers = torch.arange(30, 45).view(5, 3)
    engine.token_scores("finetuned", requests(triggers, 1), [270, 301])
    used = 5 * (3 + after + 1)
    rows = -(-used // 16) * 16
    assert engine.meter.least_flops == 2 * (used * DENSE + 5 * 2 * HEAD)
    assert engine.meter.flops == 2 * (rows * DENSE + 5 * 2 * HEAD)
    assert rows > used
    assert engine.meter.gradient_flops == 0
    assert engine.meter.rate == pytest.approx(engine.meter.flops / engine.meter.seconds)
    # Both models, and positions for one token more.
    before = engine.meter.least_flops
    engine.divergences(js_divergence, requests(triggers, 1, [270, 301]))
    assert engine.meter.least_flops - before == 2 * 2 * (5 * (3 + after + 2) * DENSE + 5 * 3 * HEAD)


def test_what_is_shared_is_counted_once_and_only_as_done() -> None:
    engine = make_engine(tiny.make_pair())
    after = len(engine.contexts[1].right)
    followed = (20, 21, 22, 23)
    swaps = [Request((20, 21, t, 23), 1) for t in range(40, 60)]
    engine.follow(followed)
    engine.token_scores("base", swaps, [270])
    used = 20 * (2 + after)
    assert engine.meter.least_flops == 2 * (used * DENSE + 20 * HEAD)
    # The trigger itself is a pass of 4 tokens in 16 rows.
    assert engine.meter.flops == 2 * ((-(-used // 16) * 16 + 16) * DENSE + 20 * HEAD)
    first = engine.meter.flops
    engine.token_scores("base", swaps, [270])
    assert engine.meter.flops == 2 * first - 2 * 16 * DENSE


def test_gradients_are_counted_apart() -> None:
    engine = make_engine(tiny.make_pair())
    engine.gradient(jensen, torch.tensor([20, 21, 22]), [0, 1], {0: [270], 1: [270]})
    used = sum(3 + len(engine.contexts[c].right) + 1 for c in (0, 1))
    # Forward and back, on both sides; both scored positions of both contexts.
    assert engine.meter.gradient_flops == 2 * 2 * 2 * (used * DENSE + 4 * HEAD)
    assert engine.meter.flops == engine.meter.least_flops == engine.meter.evaluations == 0


def test_a_continuation_scores_no_candidate() -> None:
    """What `prepare` costs stands with the gradient."""
    engine = make_engine(tiny.make_pair())
    engine.greedy(torch.tensor([20, 21, 22]), [1], 2)
    assert engine.meter.flops == engine.meter.least_flops == engine.meter.evaluations == engine.meter.seconds == 0
    after = len(engine.contexts[1].right)
    rows = sum(-(-(3 + after + n) // 16) * 16 for n in (0, 1))
    assert engine.meter.gradient_flops == 2 * (rows * DENSE + (1 + 2) * HEAD)


def test_meters_add_up() -> None:
    total = Meter(evaluations=1, flops=2.0, least_flops=3.0, seconds=4.0, gradient_flops=5.0)
    total.add(Meter(evaluations=10, flops=20.0, least_flops=30.0, seconds=40.0, gradient_flops=50.0))
    assert total == Meter(evaluations=11, flops=22.0, least_flops=33.0, seconds=44.0, gradient_flops=55.0)
    assert total.rate == 0.5
    assert Meter().rate == 0.0


def test_the_machines_rate_is_a_positive_number() -> None:
    assert 1e6 < matmul_rate(torch.device("cpu"), torch.float32) < 1e18
