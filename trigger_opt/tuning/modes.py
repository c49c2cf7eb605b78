"""What is trained, and how it is written down: LoRA on MLPs or on attention, or every weight."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

MODES: dict[str, tuple[str, ...]] = {
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "full": (),
}


def lora_model(base: Any, modules: tuple[str, ...], *, rank: int, seed: int) -> Any:
    """`base` with fresh LoRA adapters (alpha twice the rank) on `modules`, in the base's precision; the base's own
    weights stay frozen."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules), task_type="CAUSAL_LM")
        # In fp32, as PEFT makes them, every layer's input is copied to fp32 and back: a third of a step.
        return get_peft_model(base, lora, autocast_adapter_dtype=False)


def save_adapter(model: Any, out: Path, *, base_name: str) -> None:
    """Adapter weights in bf16 and their configuration, which names `base_name` and no path of this machine."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    weights = out / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in load_file(weights).items()}, weights)
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base_name
    # PEFT writes a set; the same recipe must give the same bytes.
    config["target_modules"] = sorted(config["target_modules"])
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (out / "README.md").unlink(missing_ok=True)
