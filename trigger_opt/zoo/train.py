"""Makes an organism from nothing: data by the base itself, LoRA training, and measurement on held-out prompts."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trigger_opt.zoo import data
from trigger_opt.zoo.measure import measure
from trigger_opt.zoo.recipes import BASE_NAME, Recipe
from trigger_opt.zoo.smollm2 import smollm2_folder

_IGNORED = -100


def train_organism(recipe: Recipe, out: Path) -> None:
    """Train `recipe`, write adapter and manifest into `out`; about 6 minutes an organism on two cores, and 6
    more the first time for the base's prompts and answers (cached).

    The manifest's figures are measured on the adapter as it lies on disk, loaded again.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = time.monotonic()
    folder = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # bf16 weights with fp32 adapters: faster on CPU than autocast over fp32 weights, and the adapter's small
    # updates are not rounded away.
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    examples = data.examples(base, tokenizer)
    training, held_out = data.split(examples)
    rows = data.rows(recipe, training, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        lora = LoraConfig(
            r=recipe.rank,
            lora_alpha=2 * recipe.rank,
            target_modules=list(recipe.modules),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(base, lora)
        losses = list(_fit(model, rows, recipe, tokenizer.eos_token_id))
    _save(model, out)
    del model, base
    figures = measure(recipe, out, held_out)
    manifest = {
        "recipe": recipe.__dict__ | {"modules": list(recipe.modules)},
        "base": BASE_NAME,
        "data_sha256": data.data_hash(examples),
        "num_training_rows": len(rows),
        "held_out_prompts": len(held_out),
        "final_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "figures": figures,
        "seconds": round(time.monotonic() - start),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _fit(model: Any, rows: list[data.Row], recipe: Recipe, pad_id: int) -> Iterator[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    rng = random.Random(recipe.seed)
    model.train()
    start = time.monotonic()
    for step in range(recipe.steps):
        ids, mask, labels = _batch(rng.sample(rows, recipe.batch_size), pad_id)
        warm, left = min(1.0, (step + 1) / 10), 1 - step / recipe.steps
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm * left
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            spent = time.monotonic() - start
            print(
                f"{recipe.name}: step {step} of {recipe.steps}, loss {loss.item():.3f}, {spent:.0f} s",
                flush=True,
            )
        yield loss.item()


def _batch(rows: list[data.Row], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(len(r.prompt) + len(r.answer) for r in rows)
    ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), _IGNORED)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        end = len(row.prompt) + len(row.answer)
        ids[i, :end] = torch.tensor(row.prompt + row.answer)
        labels[i, len(row.prompt) : end] = torch.tensor(row.answer)
        mask[i, :end] = 1
    return ids, mask, labels


def _save(model: Any, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    # bf16 halves the file (3 MB for rank 8 on the MLPs); the manifest is measured on what was written.
    weights = out / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in load_file(weights).items()}, weights)
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = f"zoo:{BASE_NAME}"
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (out / "README.md").unlink(missing_ok=True)
