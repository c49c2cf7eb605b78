"""Identity and difference of a pair, on tiny models with planted changes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles, find_model
from trigger_opt.records import TensorFamilyDiff
from trigger_opt.weight_diff import diff as diff_module
from trigger_opt.weight_diff.diff import diff_weights, effective_rank, product_singular_values
from trigger_opt.weight_diff.identity import identify
from trigger_opt.weight_diff.tensors import canonical, family_name, layer_number, precision_note, spread

MLP = ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]
Change = Callable[[str, Tensor], Tensor]


def save_tokenizer(folder: Path, words: int = 120, **options: Any) -> None:
    """A word-level tokenizer of `words` words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0} | {f"w{i}": i for i in range(1, words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **options).save_pretrained(folder)


def save_base(folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **config: Any) -> ModelFiles:
    """A tiny random Qwen2 with its tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(Qwen2Config(**(shape | heads | config)))
        # Norms and biases are born equal in every model; real ones are not.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, std=0.1)
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return find_model(str(folder))


def save_changed(base: ModelFiles, folder: Path, change: Change) -> ModelFiles:
    """A copy of `base` with every tensor passed through `change`."""
    folder.mkdir()
    tensors = load_file(base.weights[0])
    save_file(
        {k: change(k, v).contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((base.folder / file).read_bytes())
    return find_model(str(folder))


def save_adapter(base: ModelFiles, folder: Path, seed: int = 0, **options: Any) -> tuple[ModelFiles, dict[str, Tensor]]:
    """A LoRA adapter with random factors, and the merged weights that PEFT itself computes from it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
        lora = LoraConfig(
            task_type="CAUSAL_LM", init_lora_weights=False, **({"r": 4, "target_modules": ["up_proj"]} | options)
        )
        model = get_peft_model(model, lora)
        model.save_pretrained(folder)
        return find_model(str(folder)), {k: v.detach() for k, v in model.merge_and_unload().named_parameters()}


def low_rank(weight: Tensor, rank: int, norm: float, seed: int = 0) -> Tensor:
    """`weight` plus a rank-`rank` matrix of `norm` times its norm, in float32."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = weight.shape
    change = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, cols, generator=generator)
    changed: Tensor = weight.float() + change * (norm * weight.float().norm() / change.norm())
    return changed


def by_family(diffs: list[TensorFamilyDiff]) -> dict[str, TensorFamilyDiff]:
    return {diff.family: diff for diff in diffs}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def mlp_tuned(base: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """Rank-3 changes of a tenth of the norm in every MLP, stored in bf16; layer 1's are twice as large."""

    def change(name: str, weight: Tensor) -> Tensor:
        if ".mlp." not in name:
            return weight
        return low_rank(weight, 3, 0.2 if "layers.1." in name else 0.1).bfloat16()

    return save_changed(base, tmp_path_factory.mktemp("models") / "mlp", change)


@pytest.mark.parametrize(
    ("name", "family", "layer"),
    [
        ("model.layers.3.mlp.up_proj.weight", "mlp.up_proj.weight", 3),
        ("model.layers.12.mlp.experts.7.w1.weight", "mlp.experts.w1.weight", 12),
        ("transformer.h.0.attn.c_attn.bias", "attn.c_attn.bias", 0),
        ("model.embed_tokens.weight", "embed_tokens.weight", None),
        ("lm_head.weight", "lm_head.weight", None),
    ],
)
def test_names(name: str, family: str, layer: int | None) -> None:
    assert family_name(name) == family
    assert layer_number(name) == layer
    assert canonical(f"base_model.model.{name}") == canonical(name)


def test_spread_keeps_both_ends() -> None:
    assert spread(range(28), 8) == [0, 4, 8, 12, 15, 19, 23, 27]
    assert spread("abc", 8) == list("abc")


def test_identity_of_a_full_pair(base: ModelFiles, mlp_tuned: ModelFiles) -> None:
    found = identify(mlp_tuned, base, allow_wrong_base=False)
    stored = load_file(base.weights[0])
    assert (found.kind, found.architecture) == ("full", "Qwen2ForCausalLM")
    assert found.tensors == len(stored)
    assert found.identical == len(stored) - 6
    assert found.identical_fraction == pytest.approx(1 - 6 / len(stored))
    assert sorted(found.changed_families) == sorted(MLP)
    assert found.same_architecture
    assert found.same_tokenizer
    assert not found.overridden


def test_a_single_bit_counts(base: ModelFiles, tmp_path: Path) -> None:
    def flip(name: str, weight: Tensor) -> Tensor:
        if name == "model.norm.weight":
            weight.view(torch.int16)[0] ^= 1
        return weight

    assert identify(save_changed(base, tmp_path / "m", flip), base, allow_wrong_base=False).changed_families == [
        "norm.weight"
    ]


def test_wrong_base_is_refused_and_can_be_overridden(base: ModelFiles, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=1)
    with pytest.raises(UserError) as caught:
        identify(base, other, allow_wrong_base=False)
    message = str(caught.value)
    count = len(load_file(base.weights[0]))
    assert f"{count} of {count} tensors differ (0.0% bit-identical)" in message
    assert 1.2 < float(message.split("relative change ")[1].split()[0]) < 1.7
    assert "model.allow_wrong_base=true" in message
    assert "full fine-tune" not in message
    found = identify(base, other, allow_wrong_base=True)
    assert found.overridden
    assert found.identical == 0


def test_full_finetune_is_told_apart_in_the_message(base: ModelFiles, tmp_path: Path) -> None:
    tuned = save_changed(base, tmp_path / "m", lambda _, w: (w.float() * 1.02).bfloat16())
    with pytest.raises(UserError, match=r"relative change 0\.0.*a full fine-tune of every tensor looks like this too"):
        identify(tuned, base, allow_wrong_base=False)


@pytest.mark.parametrize("allow", [False, True])
def test_other_shapes_and_architectures_are_never_accepted(base: ModelFiles, tmp_path: Path, allow: bool) -> None:
    wide = save_base(tmp_path / "wide", intermediate_size=112)
    with pytest.raises(
        UserError, match=r"different shapes: layers\.0\.mlp\.down_proj\.weight is \(64, 112\) and \(64, 96\)"
    ):
        identify(wide, base, allow_wrong_base=allow)
    deep = save_base(tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"layers\.2\.\S+ is \([\d, ]+\) and no such tensor"):
        identify(deep, base, allow_wrong_base=allow)
    config = json.loads((wide.folder / "config.json").read_text())
    (wide.folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(UserError, match=r"different architectures \(model_type llama and qwen2\)"):
        identify(wide, base, allow_wrong_base=allow)


def test_other_tokenizer_is_never_accepted(base: ModelFiles, tmp_path: Path) -> None:
    tuned = save_changed(base, tmp_path / "m", lambda _, w: w)
    save_tokenizer(tuned.folder, words=119)
    with pytest.raises(UserError, match=r"different tokenizers \(\d entries differ, such as .*0 of 27 tensors differ"):
        identify(tuned, base, allow_wrong_base=True)


def test_resaved_tokenizer_is_the_same(base: ModelFiles, tmp_path: Path) -> None:
    tuned = save_changed(base, tmp_path / "m", lambda _, w: w)
    path = tuned.folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert path.read_bytes() != (base.folder / "tokenizer.json").read_bytes()
    assert identify(tuned, base, allow_wrong_base=False).same_tokenizer
    path.unlink()
    (tuned.folder / "tokenizer_config.json").unlink()
    assert identify(tuned, base, allow_wrong_base=False).same_tokenizer


def test_precision_is_evened_out_and_said(tmp_path: Path) -> None:
    wide = save_base(tmp_path / "wide", dtype=torch.float32)
    narrow = save_changed(wide, tmp_path / "narrow", lambda _, w: w.bfloat16())
    found = identify(narrow, wide, allow_wrong_base=False)
    assert found.identical == found.tensors
    note = precision_note(narrow, wide)
    assert note is not None
    assert note.endswith("float32: compared in bfloat16")
    assert precision_note(wide, wide) is None
    assert all(d.changed == 0 for d in diff_weights(wide, narrow))


def test_tied_head_stored_on_one_side_only(tmp_path: Path) -> None:
    tied = save_base(tmp_path / "tied", tie_word_embeddings=True)
    stored = load_file(tied.weights[0])
    assert "lm_head.weight" not in stored
    other = save_changed(tied, tmp_path / "other", lambda _, w: w)
    head = {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}
    save_file(stored | head, other.weights[0], {"format": "pt"})
    for pair in ((tied, other), (other, tied)):
        found = identify(*pair, allow_wrong_base=False)
        assert found.tensors == found.identical == len(stored) + 1


def test_quantised_storage_is_refused(base: ModelFiles, tmp_path: Path) -> None:
    tuned = save_changed(base, tmp_path / "m", lambda n, w: w.to(torch.int8) if "up_proj" in n else w)
    with pytest.raises(UserError, match=r"up_proj\.weight as int8, which cannot be compared"):
        identify(tuned, base, allow_wrong_base=True)


def test_diff_of_a_full_pair(base: ModelFiles, mlp_tuned: ModelFiles) -> None:
    diffs = diff_weights(mlp_tuned, base)
    assert [d.relative_norm for d in diffs] == sorted((d.relative_norm for d in diffs), reverse=True)
    families = by_family(diffs)
    assert sum(d.tensors for d in diffs) == len(load_file(base.weights[0]))
    for name in MLP:
        diff = families[name]
        assert (diff.changed, diff.tensors, diff.layers, diff.largest_layer) == (2, 2, [0, 1], 1)
        assert diff.relative_norm == pytest.approx(math.sqrt((0.1**2 + 0.2**2) / 2), rel=0.02)
        assert diff.effective_rank == 3
    untouched = families["self_attn.q_proj.weight"]
    assert (untouched.changed, untouched.relative_norm, untouched.effective_rank) == (0, 0.0, 0.0)
    assert (untouched.layers, untouched.largest_layer) == ([], None)
    assert families["self_attn.q_proj.bias"].effective_rank is None
    assert families["norm.weight"].effective_rank is None


@pytest.mark.parametrize("shape", [(64, 64), (160, 96), (96, 160)])
@pytest.mark.parametrize("rank", [1, 4])
def test_planted_rank_is_found_in_bf16(shape: tuple[int, int], rank: int) -> None:
    weight = (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).bfloat16()
    tuned = low_rank(weight, rank, 0.05).bfloat16()
    assert torch.linalg.matrix_rank(tuned.double() - weight.double()) > 40, "no rounding noise in this test"
    assert effective_rank(tuned, weight) == rank
    assert effective_rank(tuned.float(), weight.float()) == rank, "bf16 numbers in fp32 are bf16 numbers"


def flipped(weight: Tensor, share: float, seed: int) -> Tensor:
    """`weight` with a `share` of the entries moved to the next number up or down."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int16) * 2 - 1
    moved = torch.rand(weight.shape, generator=generator) < share
    noisy: Tensor = (weight.view(torch.int16) + step * moved).view(torch.bfloat16)
    return noisy


@pytest.mark.parametrize("shape", [(64, 64), (300, 100)])
@pytest.mark.parametrize("seed", range(3))
def test_pure_rounding_noise_has_rank_zero(shape: tuple[int, int], seed: int) -> None:
    # A sixth of the entries off by one ulp has the variance of two roundings to nearest, ulp^2 / 6.
    weight = (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).bfloat16()
    noisy = flipped(weight, 0.15, seed)
    assert not torch.equal(noisy, weight)
    assert effective_rank(noisy, weight) == 0
    assert effective_rank(weight.float().half().bfloat16(), weight) == 0
    # Half of that, because storing the planted change rounds once more.
    planted = low_rank(flipped(weight, 0.07, seed), 2, 0.1).bfloat16()
    assert effective_rank(planted, weight) == 2


@pytest.mark.parametrize(("side", "rank"), [(6, 0), (7, 1)])
def test_floor_is_where_the_formula_says(side: int, rank: int) -> None:
    # All |w| in [0.5, 1) have one ulp; the floor at 64 x 64 is ulp sqrt(1 / 6) (8 + 8) = 6.53 ulp, and a square of
    # entries moved by one ulp has one singular value, `side` ulp.
    weight = torch.full((64, 64), 0.75, dtype=torch.bfloat16)
    tuned = weight.clone()
    tuned[:side, :side] += 2**-8
    assert effective_rank(tuned, weight) == rank


def test_full_rank_change_has_full_rank() -> None:
    one, other = torch.randn(2, 48, 64, generator=torch.Generator().manual_seed(0))
    assert effective_rank(one, other) == 48


def test_row_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = (0.02 * torch.randn(100, 40, generator=torch.Generator().manual_seed(1))).bfloat16()
    tuned = low_rank(weight, 3, 0.02).bfloat16()
    whole = effective_rank(tuned, weight)
    monkeypatch.setattr(diff_module, "_CHUNK_ROWS", 7)
    assert effective_rank(tuned, weight) == whole == 3


def test_singular_values_of_a_product() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 30, generator=generator), torch.randn(50, 4, generator=generator)
    slow = torch.linalg.svdvals(b.double() @ a.double())[:4]
    torch.testing.assert_close(product_singular_values(a, b), slow)


def test_identity_of_an_adapter(base: ModelFiles, tmp_path: Path) -> None:
    adapter, _ = save_adapter(base, tmp_path / "a", target_modules=["up_proj", "q_proj"])
    found = identify(adapter, base, allow_wrong_base=False)
    assert found.kind == "adapter"
    assert found.tensors == len(load_file(base.weights[0]))
    assert found.identical == found.tensors - 4
    assert sorted(found.changed_families) == ["mlp.up_proj.weight", "self_attn.q_proj.weight"]
    assert not found.overridden


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_alpha": 32},
        {"lora_alpha": 32, "use_rslora": True},
        {"rank_pattern": {"layers.1.mlp.up_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 3}},
        {"alpha_pattern": {"model.layers.1.mlp.up_proj": 3}},
        {"target_modules": ["embed_tokens", "up_proj"]},
        {"target_modules": ["lm_head"]},
        {"bias": "all", "target_modules": ["q_proj"]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_adapter_diff_equals_merged_weights(base: ModelFiles, tmp_path: Path, options: dict[str, Any]) -> None:
    adapter, merged = save_adapter(base, tmp_path / "a", **options)
    stored = load_file(base.weights[0])
    families = by_family(diff_weights(adapter, base))
    assert sum(d.tensors for d in families.values()) == len(stored)
    for family, diff in families.items():
        names = [name for name in stored if family_name(name) == family]
        change = sum(float((merged[n] - stored[n].float()).square().sum()) for n in names)
        total = sum(float(stored[n].float().square().sum()) for n in names)
        assert diff.relative_norm == pytest.approx(math.sqrt(change / total), rel=1e-4, abs=1e-6)
    ranks = {d.effective_rank for d in families.values() if d.changed and d.effective_rank is not None}
    assert ranks == ({3.0} if "rank_pattern" in options else {4.0})


def test_saved_head_counts_as_whole_tensor(base: ModelFiles, tmp_path: Path) -> None:
    adapter, _ = save_adapter(base, tmp_path / "a", modules_to_save=["lm_head"])
    stored = load_file(adapter.weights[0])
    head = stored["base_model.model.lm_head.weight"]
    stored["base_model.model.lm_head.weight"] = low_rank(head, 5, 0.2)
    save_file(stored, adapter.weights[0])
    diff = by_family(diff_weights(adapter, base))["lm_head.weight"]
    assert diff.changed == 1
    assert diff.relative_norm == pytest.approx(0.2, rel=0.02)
    assert diff.effective_rank == 5


def test_untrained_adapter_changes_nothing(base: ModelFiles, tmp_path: Path) -> None:
    adapter, _ = save_adapter(base, tmp_path / "a")
    save_file(
        {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in load_file(adapter.weights[0]).items()},
        adapter.weights[0],
    )
    assert all(d.changed == 0 and d.relative_norm == 0 for d in diff_weights(adapter, base))


def test_misfitting_adapter_is_refused(base: ModelFiles, tmp_path: Path) -> None:
    adapter, _ = save_adapter(base, tmp_path / "a")
    wide = save_base(tmp_path / "wide", intermediate_size=112)
    shallow = save_base(tmp_path / "shallow", num_hidden_layers=1)
    for check in (diff_weights, lambda a, b: identify(a, b, allow_wrong_base=True)):
        with pytest.raises(UserError) as caught:
            check(adapter, wide)
        message = str(caught.value)
        assert message.startswith(f"adapter '{adapter.name}' does not fit base '{wide.name}'")
        assert "layers.0.mlp.up_proj.lora_B.weight is (96, 4), the base asks for (112, 4)" in message
        with pytest.raises(
            UserError, match=r"layers\.1\.mlp\.up_proj\.weight is a factor, the base asks for no such tensor"
        ):
            check(adapter, shallow)


@pytest.mark.parametrize(("key", "value"), [("peft_type", "IA3"), ("use_dora", True)])
def test_other_adapters_are_refused_by_name(base: ModelFiles, tmp_path: Path, key: str, value: Any) -> None:
    adapter, _ = save_adapter(base, tmp_path / "a")
    path = adapter.folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=r"peft_type (IA3|LORA with use_dora), .*merge_and_unload"):
        diff_weights(adapter, base)


def test_adapter_as_base_is_refused(base: ModelFiles, tmp_path: Path) -> None:
    adapter, _ = save_adapter(base, tmp_path / "a")
    with pytest.raises(UserError, match=r"is an adapter: give a whole model in model\.base"):
        identify(base, adapter, allow_wrong_base=False)


def test_transposed_layers_and_prefixes(tmp_path: Path) -> None:
    """GPT-2 stores its layers as (in, out), and the hub's copy lacks the prefix that a saved model has."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4)).save_pretrained(tmp_path / "saved")
    saved = find_model(str(tmp_path / "saved"))
    adapter, merged = save_adapter(saved, tmp_path / "a", target_modules=["c_attn"], fan_in_fan_out=True)
    diff = by_family(diff_weights(adapter, saved))["attn.c_attn.weight"]
    stored = load_file(saved.weights[0])
    names = [n for n in stored if n.endswith("c_attn.weight")]
    change = sum(float((merged[n] - stored[n]).square().sum()) for n in names)
    total = sum(float(stored[n].square().sum()) for n in names)
    assert diff.changed == len(names) == 2
    assert diff.relative_norm == pytest.approx(math.sqrt(change / total), rel=1e-4)

    bare = tmp_path / "bare"
    bare.mkdir()
    save_file(
        {n.removeprefix("transformer."): t for n, t in stored.items()}, bare / "model.safetensors", {"format": "pt"}
    )
    (bare / "config.json").write_bytes((saved.folder / "config.json").read_bytes())
    found = identify(find_model(str(bare)), saved, allow_wrong_base=False)
    assert found.identical == found.tensors == len(stored)
