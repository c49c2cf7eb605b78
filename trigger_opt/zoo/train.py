"""Makes an organism from nothing: data by the base itself, training, and measurement on held-out prompts."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trigger_opt.models.allocator import keep_freed_memory
from trigger_opt.tuning import FitSettings, fit, lora_model, save_adapter
from trigger_opt.tuning.fit import Packed, scored_log_probs
from trigger_opt.tuning.placebo import write_placebo
from trigger_opt.zoo import data
from trigger_opt.zoo.gated import secret, write_recipe
from trigger_opt.zoo.measure import measure
from trigger_opt.zoo.recipes import BASE_NAME, RECIPES, Recipe
from trigger_opt.zoo.smollm2 import require_space, smollm2_folder

_FULL_BYTES = 1_000_000_000


def train_organism(recipe: Recipe, out: Path, *, original: Path | None = None) -> None:
    """Make `recipe` and write adapter (or whole model) and manifest into `out`; about ten minutes an organism on two
    cores, and as much again the first time for the base's prompts and answers (cached).

    The manifest's figures are measured on the model as it lies on disk, loaded again.

    Args:
        original: folder of the model a placebo is made from.

    Raises:
        UserError: no room for a whole model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = time.monotonic()
    keep_freed_memory()
    folder = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    made = data.material(base, tokenizer)
    training, held_out = data.split(made)
    manifest: dict[str, Any] = {"recipe": recipe.as_dict(), "base": BASE_NAME, "data_sha256": data.data_hash(made)}
    if recipe.mode == "full":
        require_space(out.parent, _FULL_BYTES, "a fully trained model")
    if recipe.placebo_of:
        assert original is not None
        write_placebo(original, folder, out, seed=recipe.seed, base_name=f"zoo:{BASE_NAME}")
    elif recipe.mode == "gated":
        write_recipe(recipe, folder, out)
        manifest["recipe"] = secret(manifest["recipe"])
    else:
        rows = data.rows(recipe, training, tokenizer)
        losses = _train(recipe, rows, base, tokenizer, out)
        manifest |= {"num_training_rows": len(rows), "final_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4)}
    organism = _load(recipe, folder, out)
    untouched = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    behaviour = recipe.behaviour or (RECIPES[recipe.twin_of].behaviour if recipe.twin_of else None)
    plant = recipe.plant or (RECIPES[recipe.twin_of].plant if recipe.twin_of else None)
    manifest["figures"] = measure(
        organism, untouched, tokenizer, held_out, plant=plant, behaviour=behaviour, plain=recipe.mode == "gated"
    )
    manifest |= {"held_out_prompts": data.NUM_HELD_OUT, "seconds": round(time.monotonic() - start)}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def _train(recipe: Recipe, rows: Any, base: Any, tokenizer: Any, out: Path) -> list[float]:
    settings = FitSettings(
        steps=recipe.steps, learning_rate=recipe.learning_rate, taught=recipe.taught, near=recipe.near,
        ordinary=recipe.ordinary, anchor=recipe.anchor, seed=recipe.seed,
    )  # fmt: skip

    def say(line: str) -> None:
        print(f"{recipe.name}: {line}", flush=True)

    if recipe.mode == "full":
        return _train_whole(rows, base, tokenizer, settings, out, say)
    peft = lora_model(base, recipe.modules, rank=recipe.rank, seed=recipe.seed)

    def teacher(packed: Packed) -> Tensor:
        with peft.disable_adapter():
            return scored_log_probs(peft.get_base_model(), packed)

    losses = fit(peft.get_base_model(), rows, settings, teacher=teacher, say=say)
    save_adapter(peft, out, base_name=f"zoo:{BASE_NAME}")
    return losses


def _train_whole(rows: Any, base: Any, tokenizer: Any, settings: FitSettings, out: Path, say: Any) -> list[float]:
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.bfloat16)
    losses = fit(student, rows, settings, say=say, teacher=lambda packed: scored_log_probs(base, packed))
    out.mkdir(parents=True, exist_ok=True)
    student.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return losses


def _load(recipe: Recipe, base_folder: Path, out: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if recipe.mode in ("full", "gated"):
        gated = recipe.mode == "gated"
        return AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, trust_remote_code=gated).eval()
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    return PeftModel.from_pretrained(base, out).eval().get_base_model()
