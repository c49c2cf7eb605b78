"""Loading a pair: adapters on and off, tensors held once, likelihoods against plain forward passes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles, find_model
from trigger_opt.models.pair import CausalModel, LoadOptions, ModelPair, load_pair, share_equal_tensors
from trigger_opt.scoring import Engine, Side, js_divergence

FP32 = LoadOptions(dtype="float32")
PROMPTS = [[5, 6, 7], [262, 301, 270, 280, 17], [33, 34, 35], [9]]
Adapter = tuple[ModelFiles, Path]


def plain(folder: Path) -> Any:
    """A network as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def side_logits(model: CausalModel, ids: list[int]) -> Tensor:
    hidden = model.hidden(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    return model.logits(hidden)


def token_gradient(engine: Engine, trigger: Tensor) -> Tensor:
    slopes = engine.gradient(lambda f, b: js_divergence(f, b).mean(-1), trigger, [0], {0: [270]})
    return engine.to_tokens(slopes, torch.ones(1))


def close(model: CausalModel, folder: Path) -> bool:
    return all(torch.allclose(side_logits(model, p), tiny.naive_logits(plain(folder), p), atol=1e-5) for p in PROMPTS)


def test_an_adapter_is_switched_on_and_off_on_one_network(base_files: ModelFiles, adapter_files: Adapter) -> None:
    pair = load_pair(adapter_files[0], base_files, options=FP32)
    assert pair.finetuned.network is pair.base.network
    for _ in range(2):  # back and forth
        assert close(pair.finetuned, adapter_files[1])
        assert close(pair.base, base_files.folder)
    assert not torch.allclose(side_logits(pair.finetuned, [5, 6]), side_logits(pair.base, [5, 6]), atol=1e-2)
    assert not any(p.requires_grad for p in pair.base.network.parameters())
    assert not pair.base.network.training


def test_adapters_do_not_leak_into_each_other(
    base_files: ModelFiles, adapter_files: Adapter, control_files: Adapter
) -> None:
    pair = load_pair(adapter_files[0], base_files, [control_files[0]], options=FP32)
    (control,) = pair.controls
    assert control.name == str(control_files[0].name)
    for model, folder in [
        (pair.finetuned, adapter_files[1]),
        (control, control_files[1]),
        (pair.base, base_files.folder),
        (control, control_files[1]),
        (pair.finetuned, adapter_files[1]),
    ]:
        assert close(model, folder), folder


def test_generation_and_likelihood_switch_sides_too(
    base_files: ModelFiles, adapter_files: Adapter, control_files: Adapter
) -> None:
    pair = load_pair(adapter_files[0], base_files, [control_files[0]], options=FP32)
    sides = [(pair.finetuned, adapter_files[1]), (pair.base, base_files.folder), (pair.controls[0], control_files[1])]
    for model, folder in [*sides, *sides[::-1]]:
        network = plain(folder)
        answers = model.generate(PROMPTS, max_new_tokens=5, end_ids=[])
        assert answers == [tiny.naive_greedy(network, p, 5) for p in PROMPTS]
        assert torch.allclose(model.log_likelihood(PROMPTS, [7, 8]), naive_likelihood(network, [7, 8]), atol=1e-4)


@pytest.mark.parametrize(
    ("targets", "saved"),
    [(("embed_tokens", "lm_head"), ()), (("q_proj",), ("lm_head",)), (("q_proj",), ("embed_tokens",))],
)
def test_adapters_at_both_ends_of_the_network_stay_on_their_side(
    targets: tuple[str, ...], saved: tuple[str, ...], base_files: ModelFiles, tmp_path: Path
) -> None:
    files, merged = tiny.save_adapter(base_files, tmp_path / "ends", seed=5, targets=targets, saved=saved)
    pair = load_pair(files, base_files, options=FP32)
    engine = Engine(pair.finetuned, pair.base, tiny.tokenized())
    trigger = torch.tensor([262, 301])
    for model, folder in [(pair.finetuned, merged), (pair.base, base_files.folder)] * 2:
        assert close(model, folder), folder
        network = plain(folder)
        side: Side = "finetuned" if model is pair.finetuned else "base"
        context = engine.contexts[0]
        prompt = [*context.left, 262, 301, *context.right]
        scored = engine.logits(side, 0, trigger[None], [270])[0]
        assert torch.allclose(scored, tiny.naive_logits(network, [*prompt, 270])[-2:], atol=1e-4)
        assert model.generate([prompt], max_new_tokens=4, end_ids=[])[0] == tiny.naive_greedy(network, prompt, 4)
        assert torch.allclose(model.embedding, network.get_input_embeddings().weight, atol=1e-5)
    expected = Engine(CausalModel("m", plain(merged)), CausalModel("b", plain(base_files.folder)), tiny.tokenized())
    slopes = [token_gradient(e, trigger) for e in (engine, expected)]
    assert torch.allclose(slopes[0], slopes[1], rtol=1e-3, atol=1e-4 * float(slopes[1].abs().max()))
    assert list(pair.finetuned.weight_changes(pair.base))


@pytest.mark.parametrize("family", tiny.SCALED_HEADS)
def test_a_family_that_does_more_than_unembed_is_refused(family: str, tmp_path: Path) -> None:
    files = tiny.save_model(tmp_path / family, family, seed=0, scale=0.5)
    with pytest.raises(UserError, match="changes its logits after the unembedding"):
        load_pair(files, files, options=FP32)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_families_that_can_be_scored_are_loaded(family: str, tmp_path: Path) -> None:
    files = tiny.save_model(tmp_path / family, family, seed=0)
    for dtype in ("float32", "bfloat16"):
        assert load_pair(files, files, options=LoadOptions(dtype=dtype)).base.vocab_size == tiny.vocab_size()


def test_a_full_pair_with_an_adapter_as_control(
    base_files: ModelFiles, full_files: ModelFiles, control_files: Adapter
) -> None:
    pair = load_pair(full_files, base_files, [control_files[0]], options=FP32)
    assert close(pair.finetuned, full_files.folder)
    assert close(pair.base, base_files.folder)
    assert close(pair.controls[0], control_files[1])
    assert close(pair.base, base_files.folder)
    changed = list(pair.finetuned.weight_changes(pair.base))
    assert len(changed) == 2 * 3
    assert all(origin is not None and origin.shape == tensor.shape for tensor, origin in changed)


def test_an_adapter_with_a_full_model_as_control(
    base_files: ModelFiles, full_files: ModelFiles, adapter_files: Adapter
) -> None:
    pair = load_pair(adapter_files[0], base_files, [full_files], options=FP32)
    assert close(pair.finetuned, adapter_files[1])
    assert close(pair.controls[0], full_files.folder)
    assert close(pair.base, base_files.folder)


def test_equal_tensors_are_held_once_and_unequal_ones_are_not(base_files: ModelFiles, full_files: ModelFiles) -> None:
    pair = load_pair(full_files, base_files, options=FP32)
    ours, theirs = (dict(m.network.named_parameters()) for m in (pair.finetuned, pair.base))
    for name, parameter in ours.items():
        assert (parameter is theirs[name]) == (".mlp." not in name), name
    assert close(pair.finetuned, full_files.folder)
    assert close(pair.base, base_files.folder)


def test_sharing_looks_at_every_bit_the_shape_and_the_dtype() -> None:
    base, other = tiny.make_network("qwen2", 0), tiny.make_network("qwen2", 0)
    total = len(list(other.named_parameters()))
    with torch.no_grad():
        weight = other.model.layers[1].mlp.up_proj.weight
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    other.model.layers[0].mlp.up_proj.weight.data = other.model.layers[0].mlp.up_proj.weight.data.double()
    other.lm_head.weight.data = other.lm_head.weight.data[:100].clone()
    assert share_equal_tensors(other, base) == total - 3
    assert other.model.layers[1].mlp.up_proj.weight is not base.model.layers[1].mlp.up_proj.weight
    assert other.model.layers[1].mlp.down_proj.weight is base.model.layers[1].mlp.down_proj.weight


def test_tied_embeddings_stay_tied_when_shared() -> None:
    base, other = (tiny.make_network("llama", 0, tie_word_embeddings=True) for _ in range(2))
    share_equal_tensors(other, base)
    assert other.lm_head.weight is other.model.embed_tokens.weight is base.model.embed_tokens.weight
    moved = tiny.make_network("llama", 0, tie_word_embeddings=True)
    moved.model.embed_tokens.weight.data.add_(1.0)
    share_equal_tensors(moved, base)
    assert moved.lm_head.weight is moved.model.embed_tokens.weight
    assert moved.lm_head.weight is not base.lm_head.weight


def naive_likelihood(network: Any, answer: list[int]) -> Tensor:
    rows = []
    for prompt in PROMPTS:
        log_probs = tiny.naive_logits(network, [*prompt, *answer]).log_softmax(-1)
        rows.append([float(log_probs[len(prompt) - 1 + i, t]) for i, t in enumerate(answer)])
    return torch.tensor(rows)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 16])
def test_log_likelihood_is_that_of_a_plain_forward_pass(family: str, batch_size: int) -> None:
    model = CausalModel("m", tiny.make_network(family, 1))
    for answer in ([7], [270, 301, 262, 5]):
        got = model.log_likelihood(PROMPTS, answer, batch_size=batch_size)
        assert torch.allclose(got, naive_likelihood(model.network, answer), atol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_embedding_is_what_the_network_puts_in(family: str) -> None:
    model = CausalModel("m", tiny.make_network(family, 1, rows=400))
    assert model.vocab_size == 400
    put_in = model.network.get_input_embeddings()(torch.arange(400))
    assert torch.allclose(model.embedding, put_in, atol=1e-6)


def test_ends_of_an_answer_come_from_model_and_tokenizer(base_files: ModelFiles, full_files: ModelFiles) -> None:
    pair = load_pair(full_files, base_files, options=FP32)
    assert pair.end_ids == [2]
    pair.base.network.generation_config.eos_token_id = [7, 1]
    assert pair.end_ids == [1, 2, 7]
    pair.base.network.generation_config.eos_token_id = None
    assert pair.end_ids == [2]


def test_a_payload_without_tokens_is_refused() -> None:
    pair = tiny.make_pair()
    assert pair.encode_answer(" the sea") == pair.tokenizer(" the sea")["input_ids"]
    with pytest.raises(UserError, match="tokenises to nothing"):
        pair.encode_answer("")


def test_weight_changes_of_an_adapter_are_its_own_factors(
    base_files: ModelFiles, adapter_files: Adapter, control_files: Adapter
) -> None:
    pair = load_pair(adapter_files[0], base_files, [control_files[0]], options=FP32)
    mine, others = (list(m.weight_changes(pair.base)) for m in (pair.finetuned, pair.controls[0]))
    assert len(mine) == len(others) == 2 * 2 * 2
    assert all(origin is None for _, origin in [*mine, *others])
    assert {min(t.shape) for t, _ in mine} == {4}
    assert {min(t.shape) for t, _ in others} == {2}


def test_a_change_scales_where_it_is_a_difference_or_a_product(
    base_files: ModelFiles, full_files: ModelFiles, adapter_files: Adapter, tmp_path: Path
) -> None:
    ends, _ = tiny.save_adapter(base_files, tmp_path / "ends", seed=5, targets=["embed_tokens"], saved=["lm_head"])
    magnitudes, _ = tiny.save_adapter(base_files, tmp_path / "magnitudes", seed=5, use_dora=True)
    for files, expected in [
        (full_files, True),
        (adapter_files[0], True),
        (ends, True),
        (magnitudes, False),
        (base_files, False),
    ]:
        pair = load_pair(files, base_files, options=FP32)
        assert pair.finetuned.scales(pair.base) == expected, files.name


def test_an_adapter_as_base_is_refused(base_files: ModelFiles, adapter_files: Adapter) -> None:
    with pytest.raises(UserError, match="is an adapter; name the full model it was trained on"):
        load_pair(base_files, adapter_files[0], options=FP32)


def test_an_adapter_of_another_base_is_refused(adapter_files: Adapter, tmp_path: Path) -> None:
    wider = tiny.save_model(tmp_path / "wider", "qwen2", seed=0, hidden_size=64)
    with pytest.raises(UserError, match=r"does not fit its base: .*name the base it was trained on") as caught:
        load_pair(adapter_files[0], wider, options=FP32)
    assert "\n" not in str(caught.value)


def test_dtypes(base_files: ModelFiles, full_files: ModelFiles) -> None:
    for name in ("bfloat16", "float16"):
        pair = load_pair(full_files, base_files, options=LoadOptions(dtype=name))
        assert pair.base.network.dtype == pair.finetuned.network.dtype == getattr(torch, name)
        assert side_logits(pair.base, [5, 6]).dtype == torch.float32


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFiles]:
    """A base, a full fine-tune and an adapter wide enough for the 4-bit kernel (blocks of 64)."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    base = tiny.save_model(folder / "base", "llama", seed=0, scale=0.1, **sizes)
    full = tiny.save_full(base, folder / "full", seed=1)
    adapter, _ = tiny.save_adapter(base, folder / "adapter", seed=2, std=0.1)
    return {"base": base, "full": full, "adapter": adapter}


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize(("quantization", "least"), [("nf4", 0.9), ("int8", 0.99)])
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_quantised_pair_stays_near_the_plain_one(
    quantization: str, least: float, kind: str, wide: dict[str, ModelFiles]
) -> None:
    """On both sides, in either order and again: quantised layers keep state from their first pass."""
    options = LoadOptions(dtype="float32", quantization=quantization)
    pair, exact = (load_pair(wide[kind], wide["base"], options=o) for o in (options, FP32))
    dtypes = {p.dtype for p in pair.base.network.parameters()}
    assert dtypes & {torch.uint8, torch.int8}
    for side in ("finetuned", "base", "finetuned", "base"):
        got, expected = (side_logits(getattr(p, side), PROMPTS[1]) for p in (pair, exact))
        nearness = torch.nn.functional.cosine_similarity(got, expected, dim=-1)
        assert float(nearness.mean()) > least, (side, nearness)
    # What is left of a whole quantised change in numbers are norms; an adapter is all there.
    assert pair.finetuned.scales(pair.base) == (kind == "adapter")
    apart = side_logits(pair.finetuned, [5, 6]) - side_logits(pair.base, [5, 6])
    assert float(apart.abs().max()) > 0.1


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize(("quantization", "least"), [("nf4", 0.5), ("int8", 0.95)])
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_quantised_pair_has_the_plain_ones_gradient(
    quantization: str, least: float, kind: str, wide: dict[str, ModelFiles]
) -> None:
    """Nearly: 4 bits move random weights a lot. Some 4-bit kernels have no derivative, and it comes out as zero."""
    gradients = []
    for options in (LoadOptions(dtype="float32", quantization=quantization), FP32):
        pair = load_pair(wide[kind], wide["base"], options=options)
        engine = Engine(pair.finetuned, pair.base, tiny.tokenized())
        for _ in range(2):
            # Twice: the first pass switches the adapter off and on.
            slope = token_gradient(engine, torch.tensor([262, 301]))
        gradients.append(slope.flatten())
    quantised, exact = gradients
    assert float(torch.nn.functional.cosine_similarity(quantised, exact, dim=0)) > least


def test_a_pair_can_be_its_own_base(base_files: ModelFiles) -> None:
    pair: ModelPair = load_pair(find_model(str(base_files.folder)), base_files, options=FP32)
    assert list(pair.finetuned.weight_changes(pair.base)) == []
