"""The memory plan: counts equal a loaded model's, sums are the sums by hand, and what cannot fit is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles, find_model
from trigger_opt.models.plan import (
    ModelSize,
    SearchLoad,
    WeightLoad,
    adapter_parameters,
    available_bytes,
    check_memory,
    missing_weights_error,
    model_size,
    plan_from_count,
    plan_memory,
)

SEARCH = SearchLoad(search_width=8, tokens_per_candidate=10, scored_positions=4, context_tokens=100, gradient_tokens=30)
QWEN_7B: dict[str, Any] = {
    "num_parameters": 7_615_616_512,
    "num_layers": 28,
    "d_model": 3584,
    "d_ff": 18944,
    "vocab": 152_064,
    "num_kv_heads": 4,
    "head_dim": 128,
}


def saved_config(folder: Path, *, tied: bool) -> ModelFiles:
    """A folder that holds a configuration and no weights."""
    from transformers import Qwen2Config

    Qwen2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder)
    return find_model(str(folder), weights=False)


@pytest.mark.parametrize("tied", [True, False])
def test_counts_equal_a_loaded_model(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    size = model_size(saved_config(tmp_path, tied=tied))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert size.num_parameters == sum(p.numel() for p in model.parameters())
    layers = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert size.linear_parameters == sum(m.weight.numel() for m in layers)
    assert size.weight_bytes("float32") == 4 * size.num_parameters
    cache = model(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 5 * size.kv_bytes("float32") == stored


def test_quantised_bytes_shrink_linear_layers_only(tmp_path: Path) -> None:
    size = model_size(saved_config(tmp_path, tied=False))
    rest = 2 * (size.num_parameters - size.linear_parameters)
    assert size.weight_bytes("float32", "int8") == size.linear_parameters + rest
    assert size.weight_bytes("bfloat16", "nf4") == round(size.linear_parameters * 0.5625) + rest
    with pytest.raises(UserError, match=r"quantization 'int3' is unknown: use one of int8, nf4"):
        size.weight_bytes("bfloat16", "int3")
    with pytest.raises(UserError, match=r"dtype 'float8' is unknown"):
        size.weight_bytes("float8")


def test_adapter_count_is_the_stored_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(4, 64), "b": torch.ones(96, 4)}, tmp_path / "adapter_model.safetensors")
    files = find_model(str(tmp_path))
    assert adapter_parameters(files) == 4 * 64 + 96 * 4
    with pytest.raises(UserError, match="plan with its base model"):
        model_size(files)


def test_unbuildable_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(UserError, match="no causal language model transformers can build"):
        model_size(find_model(str(tmp_path), weights=False))


def test_items_by_hand() -> None:
    size = ModelSize(
        num_parameters=1000,
        linear_parameters=600,
        num_layers=2,
        d_model=8,
        d_ff=16,
        vocab=50,
        num_kv_heads=2,
        head_dim=4,
    )
    load = WeightLoad(full_sets=3, adapter_parameters=70, dtype="float32")
    plan = plan_memory(size, load=load, search=SEARCH)
    kv_token = 2 * 2 * 2 * 4 * 4
    by_hand = [
        3 * 4000,
        4 * 70,
        (80 + 200) * kv_token,
        80 * (6 * 8 + 3 * 16) * 4,
        30 * 2 * (10 * 8 + 4 * 16) * 4,
        3 * 8 * 4 * 50 * 4,
    ]
    assert [item.nbytes for item in plan.items][:6] == by_hand
    libraries = plan.items[6].nbytes
    assert plan.total_bytes == sum(by_hand) + libraries


def test_real_model_from_its_figures() -> None:
    plan = plan_from_count(**QWEN_7B, load=WeightLoad(full_sets=2), search=SEARCH)
    assert plan.items[0].nbytes == 2 * 2 * QWEN_7B["num_parameters"]
    lines = plan.lines()
    assert "2 x 7.616 B parameters, bfloat16" in lines[0]
    assert "30.46 GB" in lines[0]
    assert lines[-1].startswith("memory at the peak")
    assert f"{plan.total_bytes / 1e9:.2f} GB" in lines[-1]
    nf4 = plan_from_count(**QWEN_7B, load=WeightLoad(full_sets=2, quantization="nf4"), search=SEARCH)
    assert nf4.items[0].nbytes < 0.4 * plan.items[0].nbytes


def test_figures_and_config_agree(tmp_path: Path) -> None:
    size = model_size(saved_config(tmp_path, tied=True))
    load = WeightLoad(full_sets=1, adapter_parameters=100, dtype="float32")
    figures = plan_from_count(
        num_parameters=size.num_parameters,
        num_layers=2,
        d_model=64,
        d_ff=96,
        vocab=128,
        num_kv_heads=2,
        head_dim=16,
        tied_embeddings=True,
        load=load,
        search=SEARCH,
    )
    assert figures == plan_memory(size, load=load, search=SEARCH)


def test_refuses_what_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_from_count(**QWEN_7B, load=WeightLoad(full_sets=2), search=SEARCH)
    monkeypatch.setattr("trigger_opt.models.plan._available_ram", lambda: plan.total_bytes)
    check_memory(plan, "cpu", remedy="unused")
    monkeypatch.setattr("trigger_opt.models.plan._available_ram", lambda: 25 * 10**9)
    with pytest.raises(UserError) as caught:
        check_memory(plan, torch.device("cpu"), remedy="run +experiment=gcg_warmup_mini, which fits a laptop")
    message = str(caught.value)
    assert f"{plan.total_bytes / 1e9:.2f} GB needed" in message
    assert "25.00 GB available" in message
    assert message.endswith("run +experiment=gcg_warmup_mini, which fits a laptop")


def test_available_ram_is_plausible() -> None:
    assert 10**8 < available_bytes("cpu") < 10**14


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_missing_cuda_is_refused() -> None:
    with pytest.raises(UserError, match="device 'cuda' was asked for and torch finds none"):
        available_bytes("cuda")


def test_missing_weights_name_disk_needed_and_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    message = str(missing_weights_error("owner/repo", 30_460_000_000, remedy="run the miniature"))
    assert "'owner/repo' are not on this machine" in message
    assert "30.46 GB" in message
    assert "GB are free" in message
    assert message.endswith(", run the miniature")
