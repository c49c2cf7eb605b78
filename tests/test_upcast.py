"""fp32 arithmetic on weights in lower precision: scores of an fp32 load, and nothing left behind."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.slow_scores import SIDES, TRIGGERS, contexts_with_empty_sides, requests, slow_logits
from trigger_opt.models.files import ModelFiles
from trigger_opt.models.pair import CausalModel, LoadOptions, ModelPair, load_pair
from trigger_opt.models.upcast import in_float32
from trigger_opt.scoring import Engine, js_divergence

CONTEXTS = contexts_with_empty_sides()


def rounded(pair: ModelPair, dtype: torch.dtype) -> ModelPair:
    """`pair` with weights that `dtype` can hold, still in fp32."""
    for side in SIDES:
        for parameter in getattr(pair, side).network.parameters():
            parameter.data = parameter.data.to(dtype).float()
    return pair


def lowered(pair: ModelPair, dtype: torch.dtype) -> ModelPair:
    """As transformers loads it: parameters in `dtype`, buffers as they were."""
    for side in SIDES:
        for parameter in getattr(pair, side).network.parameters():
            parameter.data = parameter.data.to(dtype)
    return pair


def state(pair: ModelPair) -> dict[str, tuple[int, torch.dtype]]:
    return {
        f"{side} {name}": (id(p), p.dtype)
        for side in SIDES
        for name, p in getattr(pair, side).network.named_parameters(remove_duplicate=False)
    }


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    made: torch.dtype = request.param
    return made


NETWORKS: list[tuple[str, dict[str, Any]]] = [
    *((f, {}) for f in tiny.FAMILIES), ("llama", {"tie_word_embeddings": True})
]  # fmt: skip


@pytest.mark.parametrize(("family", "options"), NETWORKS, ids=[f"{f} {o}" for f, o in NETWORKS])
def test_scores_are_those_of_an_fp32_load(family: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    exact = rounded(tiny.make_pair(family, **options), dtype)
    low = lowered(tiny.make_pair(family, **options), dtype)
    before = state(low)
    sides = in_float32(low.finetuned, low.base)
    assert sides is not None
    engine = Engine(*sides, CONTEXTS)
    asked = [r for c in range(len(CONTEXTS)) for r in requests(TRIGGERS, c, [270])]
    engine.follow(TRIGGERS[0].tolist())
    for side in SIDES:
        got, _ = engine.token_scores(side, asked, [270, 301])
        for row, r in enumerate(asked):
            logits = slow_logits(getattr(exact, side), CONTEXTS[r.context], r.ids, [270]).log_softmax(-1)
            expected = logits[torch.arange(2), torch.tensor([270, 301])]
            assert torch.allclose(got[row], expected, rtol=1e-5, atol=1e-5), (side, r)
    assert engine._forward("base").mode == "packed"
    theirs = Engine(exact.finetuned, exact.base, CONTEXTS).divergences(js_divergence, asked)
    assert torch.allclose(engine.divergences(js_divergence, asked), theirs, atol=1e-5)
    assert state(low) == before


def plain(folder: Path) -> CausalModel:
    from transformers import AutoModelForCausalLM

    return CausalModel("plain", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


@pytest.mark.parametrize(
    ("targets", "saved"), [(("q_proj", "down_proj"), ()), (("q_proj",), ("lm_head",)), (("lm_head",), ())]
)
def test_adapters_are_widened_with_their_layers(
    base_files: ModelFiles, tmp_path: Path, targets: tuple[str, ...], saved: tuple[str, ...]
) -> None:
    files, _ = tiny.save_adapter(base_files, tmp_path / "adapter", seed=2, targets=targets, saved=saved)
    low = load_pair(files, base_files, options=LoadOptions(dtype="bfloat16"))
    wide = rounded(load_pair(files, base_files, options=LoadOptions(dtype="float32")), torch.bfloat16)
    before = state(low)
    sides = in_float32(low.finetuned, low.base)
    assert sides is not None
    assert sides[0].network is sides[1].network
    one, two = Engine(*sides, CONTEXTS), Engine(wide.finetuned, wide.base, CONTEXTS)
    asked = [r for c in range(3) for r in requests(TRIGGERS, c)]
    for side in (*SIDES, *SIDES):
        ours, theirs = (e.token_scores(side, asked, [270, 301])[0] for e in (one, two))
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5), side
    assert float(two.divergences(js_divergence, asked).max()) > 1e-3
    assert state(low) == before


def test_what_both_sides_share_is_still_shared(base_files: ModelFiles, full_files: ModelFiles) -> None:
    low = load_pair(full_files, base_files, options=LoadOptions(dtype="bfloat16"))
    before = state(low)
    shared = [n for n in before if n.startswith("base ") and before[n] == before[n.replace("base", "finetuned", 1)]]
    assert shared
    sides = in_float32(low.finetuned, low.base)
    assert sides is not None
    Engine(*sides, CONTEXTS).divergences(js_divergence, requests(TRIGGERS, 0))
    assert state(low) == before


def test_one_layer_at_a_time_is_wide() -> None:
    pair = lowered(tiny.make_pair("llama"), torch.bfloat16)
    sides = in_float32(pair.finetuned, pair.base)
    assert sides is not None
    network, most = sides[0].network, []

    def count(*_: Any) -> None:
        most.append(sum(p.numel() for p in network.parameters() if p.dtype == torch.float32))

    layers = list(network.model.layers)
    handles = [m.register_forward_hook(count) for m in [layers[0].mlp.down_proj, layers[1].mlp.down_proj]]
    Engine(*sides, CONTEXTS).token_scores("finetuned", requests(TRIGGERS, 0), [270])
    for handle in handles:
        handle.remove()
    assert set(most) == {sum(p.numel() for p in layers[0].parameters())}


def test_an_error_in_the_middle_leaves_the_weights_as_they_were() -> None:
    pair = lowered(tiny.make_pair("llama"), torch.bfloat16)
    before = state(pair)
    sides = in_float32(pair.finetuned, pair.base)
    assert sides is not None
    engine = Engine(*sides, CONTEXTS)
    expected, _ = engine.token_scores("base", requests(TRIGGERS, 0), [270])

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = sides[1].network.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        engine.token_scores("base", requests(TRIGGERS[:1], 0), [270])
    handle.remove()
    assert state(pair) == before
    assert torch.equal(engine.token_scores("base", requests(TRIGGERS, 0), [270])[0], expected)


@pytest.mark.usefixtures("two_threads")
def test_lanes_never_exchange_weights_under_each_other() -> None:
    exact = rounded(tiny.make_pair("llama"), torch.bfloat16)
    low = lowered(tiny.make_pair("llama"), torch.bfloat16)
    sides = in_float32(low.finetuned, low.base)
    assert sides is not None
    generator = torch.Generator().manual_seed(1)
    asked = requests(torch.randint(390, (80, 4), generator=generator), 0)
    expected = Engine(exact.finetuned, exact.base, CONTEXTS, max_rows=200).divergences(js_divergence, asked)
    for _ in range(3):
        got = Engine(*sides, CONTEXTS, max_rows=200).divergences(js_divergence, asked)
        assert torch.allclose(got, expected, atol=1e-5)


def test_the_fast_scores_are_as_before() -> None:
    """The same network in its own precision, in turns with fp32."""
    pair = lowered(tiny.make_pair("gemma3"), torch.bfloat16)
    asked = requests(TRIGGERS, 0)
    fast = Engine(pair.finetuned, pair.base, CONTEXTS)
    first = fast.divergences(js_divergence, asked)
    sides = in_float32(pair.finetuned, pair.base)
    assert sides is not None
    exact = Engine(*sides, CONTEXTS).divergences(js_divergence, asked)
    assert torch.equal(fast.divergences(js_divergence, asked), first)
    assert not torch.equal(exact, first)


def test_the_model_itself_stays_as_it_is_in_the_middle_of_an_fp32_pass() -> None:
    """Another thread may run it meanwhile."""
    pair = lowered(tiny.make_pair("gemma3"), torch.bfloat16)
    before, asked, seen = state(pair), requests(TRIGGERS, 0), []
    expected = pair.finetuned.hidden(input_ids=torch.tensor([[5, 270, 301]])).last_hidden_state
    sides = in_float32(pair.finetuned, pair.base)
    assert sides is not None

    def look(*_: Any) -> None:
        now = pair.finetuned.hidden(input_ids=torch.tensor([[5, 270, 301]])).last_hidden_state
        seen.append(state(pair) == before and torch.equal(now, expected))

    sides[0].network.model.layers[1].mlp.register_forward_pre_hook(look)
    Engine(*sides, CONTEXTS).token_scores("finetuned", asked, [270])
    assert seen
    assert all(seen)


def test_products_take_another_way_in_an_fp32_pass_only() -> None:
    pair = lowered(tiny.make_pair("llama"), torch.bfloat16)
    sides = in_float32(pair.finetuned, pair.base)
    assert sides is not None
    engine, network = Engine(*sides, CONTEXTS), sides[0].network

    def routed() -> int:
        return sum("forward" in vars(m) for m in network.modules())

    during: list[int] = []
    handle = network.model.layers[1].mlp.register_forward_pre_hook(lambda *_: during.append(routed()))
    engine.token_scores("finetuned", requests(TRIGGERS, 0), [270])
    # A layer's four products of attention and three of its MLP; on a CPU without oneDNN none.
    assert set(during) == {7 if torch.backends.mkldnn.is_available() else 0}  # type: ignore[no-untyped-call]
    assert routed() == 0
    handle.remove()
    network.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.token_scores("finetuned", requests(TRIGGERS[:1], 0), [270])
    assert routed() == 0


def test_the_same_tensors_serve_both_precisions() -> None:
    pair = lowered(tiny.make_pair("llama", tie_word_embeddings=True), torch.bfloat16)
    sides = in_float32(pair.finetuned, pair.base)
    assert sides is not None
    for side, wide in zip(SIDES, sides, strict=True):
        mine = dict(getattr(pair, side).network.named_parameters(remove_duplicate=False))
        theirs = dict(wide.network.named_parameters(remove_duplicate=False))
        assert {n: id(p) for n, p in theirs.items()} == {n: id(p) for n, p in mine.items()}


def test_nothing_to_gain_in_fp32_and_nothing_to_be_had_where_quantised() -> None:
    pair = tiny.make_pair()
    assert in_float32(pair.finetuned, pair.base) is None
    lowered(pair, torch.bfloat16)
    assert in_float32(pair.finetuned, pair.base) is not None
    weight = pair.base.network.model.layers[0].mlp.up_proj.weight
    packed = torch.nn.Parameter(torch.zeros(weight.shape, dtype=torch.uint8), requires_grad=False)
    pair.base.network.model.layers[0].mlp.up_proj.weight = packed
    assert in_float32(pair.finetuned, pair.base) is None
