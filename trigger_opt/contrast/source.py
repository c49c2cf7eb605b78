"""Which local model or pair is asked: found, checked against the machine, loaded; imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trigger_opt import api
from trigger_opt.contrast.ask import ROWS_AT_ONCE, Asking
from trigger_opt.contrast.records import Prompt
from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles, read_config, validate_weights
from trigger_opt.models.pair import LoadOptions, ModelPair, load_pair
from trigger_opt.models.plan import (
    SearchLoad,
    WeightLoad,
    adapter_parameters,
    check_memory,
    model_size,
    plan_memory,
)
from trigger_opt.weight_diff.identity import tokenizer_mismatch

# Of a conversation, for the memory plan, before there is a tokenizer.
_CHARACTERS_A_TOKEN, _TEMPLATE_TOKENS = 3, 40


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which model, or pair, and how it is held; `base` None asks the model alone. `device` is cpu, cuda, cuda:0 … or
    auto (all GPUs; the CPU where there is none)."""

    model: str
    base: str | None
    device: str
    dtype: str
    quantization: str
    allow_pickle: bool
    allow_code: bool


def load(source: Source, prompts: Sequence[Prompt], asking: Asking) -> ModelPair:
    """Find, check and load the models; of one alone both sides are that one, or its adapter and what it adapts.

    Raises:
        UserError: a model is missing or refused; an adapter names no base; base and model have other tokenizers; the
            device is not there, or the memory too small.
    """
    finetuned = api.model_files(source.model, allow_pickle=source.allow_pickle, allow_code=source.allow_code)
    named = source.base or (_adapted(finetuned) if finetuned.adapter else source.model)
    base = api.model_files(named, allow_pickle=source.allow_pickle, allow_code=source.allow_code)
    if base.adapter:
        raise UserError(f"--base {named} is an adapter; name the full model it was trained on")
    for files in (finetuned, base):
        validate_weights(files)
    if mismatch := tokenizer_mismatch(finetuned, base):
        raise UserError(f"{source.model!r} and {named!r} have different tokenizers ({mismatch}); name its own base")
    device = _device(source.device)
    _check_memory(finetuned, base, source, device=device, tokens=_tokens(prompts, asking))
    several = source.device == "auto" and device == "cuda" and torch.cuda.device_count() > 1
    options = LoadOptions(
        dtype=source.dtype,
        quantization=source.quantization,
        device_map="auto" if several else device,
        allow_code=source.allow_code,
    )
    return load_pair(finetuned, base, options=options)


def _adapted(adapter: ModelFiles) -> str:
    named = read_config(adapter).get("base_model_name_or_path")
    if not named:
        raise UserError(f"the adapter {adapter.name!r} names no model that it adapts; give that in --base")
    return str(named)


def _device(asked: str) -> str:
    there = torch.cuda.is_available()
    if asked.startswith("cuda") and not there:
        raise UserError(f"--device {asked}: torch finds no CUDA device; choose --device cpu or auto")
    if asked == "auto":
        return "cuda" if there else "cpu"
    return asked


def _tokens(prompts: Sequence[Prompt], asking: Asking) -> int:
    """Tokens of the longest conversation, about."""
    longest = max(len(p.text) + len(p.system or "") for p in prompts)
    return longest // _CHARACTERS_A_TOKEN + _TEMPLATE_TOKENS + asking.max_new_tokens


def _check_memory(finetuned: ModelFiles, base: ModelFiles, source: Source, *, device: str, tokens: int) -> None:
    size = model_size(base, allow_code=source.allow_code)
    load = WeightLoad(
        full_sets=1 if finetuned.adapter else 2,
        adapter_parameters=adapter_parameters(finetuned) if finetuned.adapter else 0,
        dtype=source.dtype,
        quantization=None if source.quantization == "none" else source.quantization,
    )
    search = SearchLoad(search_width=ROWS_AT_ONCE, tokens_per_candidate=tokens, scored_positions=1)
    check_memory(
        plan_memory(size, load=load, search=search),
        device,
        remedy="choose --quantization nf4, shorter prompts, or bring answers made elsewhere (--answers-a, --answers-b)",
    )
