"""Before anything is loaded: which files, how much memory, does it fit, is the device there."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from trigger_opt import api
from trigger_opt.config import ModelConfig, RunConfig
from trigger_opt.errors import UserError
from trigger_opt.models.files import HubUnreachableError, ModelFiles, validate_weights
from trigger_opt.models.pair import LoadOptions
from trigger_opt.models.plan import (
    MemoryPlan,
    SearchLoad,
    WeightLoad,
    adapter_parameters,
    check_memory,
    missing_weights_error,
    model_size,
    plan_from_count,
    plan_memory,
)
from trigger_opt.objectives import DIVERGENCES, Likelihood, Objective
from trigger_opt.search import SearchSettings
from trigger_opt.weight_diff import precision_note

# What stands after the slot in a chat template before the answer begins, and before it; measured on five families.
TOKENS_AFTER_SLOT = 12
_CONTEXT_TOKENS = 60
# Candidate tokens of the passes that run at once, to begin with: two of 2,048 on a CPU, one of 4,096 on a GPU. On a GPU
# passes then grow into what memory is left.
_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Plan:
    """Files of fine-tuned model, base and controls, and the plan in lines."""

    files: list[ModelFiles]
    lines: list[str]


def plan_run(config: RunConfig) -> Plan:
    """Find the models and check that they fit, from their configurations alone.

    Raises:
        UserError: a context cannot be used; a model is missing, damaged or refused; the memory or the device is
            not there.
    """
    _check_texts(config)
    model: ModelConfig = config.model
    device = _device(model.device)
    remedy = f"or run +experiment={model.smaller_experiment}, which fits a laptop"
    published = _published_plan(config)
    if published:
        smaller = "free some memory" if model.quantization == "nf4" else "choose model.quantization=nf4"
        check_memory(published, device, remedy=f"{smaller}, {remedy}")
    files = _find(model, remedy)
    for each in files:
        validate_weights(each)
    plan = memory_plan(config, files)
    without = "null.distilled=false, " if _distils(config) else ""
    check_memory(plan, device, remedy=f"choose a smaller search.search_width or model.quantization, {without}{remedy}")
    head = [
        f"fine-tuned {model.finetuned}, base {model.base}, controls {', '.join(model.controls) or 'none'}; "
        f"{model.dtype if model.quantization == 'none' else model.quantization} on {device}",
        f"stages {' > '.join(config.stages)}; objective {config.objective.name}, search {config.search.name}"
        f"{_building(config)}, at most {_bound(config)}",
    ]
    note = precision_note(files[0], base=files[1])
    return Plan(files, head + plan.lines() + _null_lines(config) + ([note] if note else []))


def load_options(config: RunConfig) -> LoadOptions:
    """How the models are to be held."""
    model: ModelConfig = config.model
    device = _device(model.device)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    several = model.device == "auto" and device == "cuda" and torch.cuda.device_count() > 1 and processes == 1
    if device == "cuda" and processes > 1:
        # Under torchrun each process of a machine has the GPU of its number.
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return LoadOptions(
        dtype=model.dtype,
        quantization=model.quantization,
        device_map="auto" if several else device,
        allow_code=model.allow_code,
        plain=model.scoring == "plain",
    )


def _check_texts(config: RunConfig) -> None:
    api.context_sets(config.contexts.search, config.contexts.held_out)
    api.contexts_from(config.hypotheses.contexts, "hypotheses")


def _device(asked: str) -> str:
    there = torch.cuda.is_available()
    if asked.startswith("cuda") and not there:
        raise UserError(f"model.device={asked}: torch finds no CUDA device; choose model.device=cpu or auto")
    if asked == "auto":
        return "cuda" if there else "cpu"
    return asked


def _find(model: ModelConfig, remedy: str) -> list[ModelFiles]:
    found = []
    for name in (model.finetuned, model.base, *model.controls):
        try:
            found.append(api.model_files(name, allow_pickle=model.allow_pickle, allow_code=model.allow_code))
        except HubUnreachableError:
            if model.num_parameters is None:
                raise
            raise missing_weights_error(name, 2 * model.num_parameters, remedy=remedy) from None
    return found


def search_loads(config: RunConfig) -> list[SearchLoad]:
    """What this run's search holds at once: towards a payload, and on divergence where none may be known."""
    objective: Objective = config.objective
    loads = [_load(config, objective, config.search)]
    if objective.needs_payload and not config.payload:
        loads.append(_load(config, DIVERGENCES[config.divergence.objective](), config.divergence.of(config.search)))
    return loads


def largest(plans: Iterable[MemoryPlan]) -> MemoryPlan:
    """The plan that takes most."""
    return max(plans, key=lambda plan: plan.total_bytes)


def _load(config: RunConfig, objective: Objective, search: SearchSettings) -> SearchLoad:
    scored = objective.target_tokens if isinstance(objective, Likelihood) else objective.num_tokens
    tokens = search.trigger_length + TOKENS_AFTER_SLOT + scored
    num_contexts = len(config.contexts.search)
    contexts = min(search.contexts_per_step, num_contexts)
    return SearchLoad(
        search_width=min(search.search_width * contexts, max(1, _TOKENS_AT_ONCE // tokens)),
        tokens_per_candidate=tokens,
        scored_positions=scored,
        context_tokens=num_contexts * (_CONTEXT_TOKENS + search.trigger_length),
        gradient_tokens=contexts * tokens,
    )


def _published_plan(config: RunConfig) -> MemoryPlan | None:
    m: ModelConfig = config.model
    if None in (m.num_parameters, m.num_layers, m.d_model, m.vocab_size, m.num_kv_heads, m.head_dim):
        return None
    load = WeightLoad(full_sets=2, dtype=m.dtype, quantization=None if m.quantization == "none" else m.quantization)
    return largest(
        plan_from_count(
            num_parameters=m.num_parameters or 0,
            num_layers=m.num_layers or 0,
            d_model=m.d_model or 0,
            vocab=m.vocab_size or 0,
            num_kv_heads=m.num_kv_heads or 0,
            head_dim=m.head_dim or 0,
            load=load,
            search=search,
        )
        for search in search_loads(config)
    )


def memory_plan(config: RunConfig, files: Sequence[ModelFiles]) -> MemoryPlan:
    """What a run of these models takes: fine-tuned, base, controls.

    Raises:
        UserError: the base is an adapter.
    """
    m: ModelConfig = config.model
    base = files[1]
    if base.adapter:
        raise UserError(f"model.base={m.base} is an adapter; name the full model it was trained on")
    load = WeightLoad(
        full_sets=1 + sum(not f.adapter for f in [files[0], *files[2:]]) + _distils(config),
        adapter_parameters=sum(adapter_parameters(f) for f in files if f.adapter),
        dtype=m.dtype,
        quantization=None if m.quantization == "none" else m.quantization,
    )
    size = model_size(base, allow_code=m.allow_code)
    return largest(plan_memory(size, load=load, search=search) for search in search_loads(config))


def _distils(config: RunConfig) -> bool:
    """Whether the base is held once more, to be trained."""
    return "null" in config.stages and bool(config.null.distilled)


def _null_lines(config: RunConfig) -> list[str]:
    """How many searches the stage null repeats, and how long they may take."""
    if "null" not in config.stages:
        return []
    kinds = {
        "given": len(config.model.controls),
        "placebo": config.null.placebos,
        "distilled reference": int(config.null.distilled),
    }
    named = ", ".join(f"{n} {kind}" for kind, n in kinds.items() if n)
    count, seconds = sum(kinds.values()), config.search.max_seconds
    bound = f"at most {count} x {seconds:g} s in searches" if seconds is not None else "without a bound in time"
    return [
        f"null: {count} control(s) ({named}), each with the suspect's hypotheses, search and verification: {bound}; "
        f"the smallest p they can give is {1 / (1 + count):.2g}"
    ]


def _building(config: RunConfig) -> str:
    parts = []
    if characters := config.build.max_characters:
        parts.append(f"to {characters} characters where there is a payload")
    if length := config.build.max_tokens:
        parts.append(f"to {length} tokens where some are ranked")
    return f" from strings built up {' and '.join(parts)}" if parts else ""


def _bound(config: RunConfig) -> str:
    s = config.search
    parts = [f"{s.num_restarts} x {s.num_steps} steps of {s.search_width} candidates"]
    if s.max_seconds is not None:
        parts.append(f"{s.max_seconds:g} s")
    if s.max_evaluations is not None:
        parts.append(f"{s.max_evaluations} evaluations")
    if config.objective.needs_payload and not config.payload:
        d = config.divergence
        parts.append(f"where no payload is known steps of {d.search_width} candidates on {d.objective}")
    return ", ".join(parts)
