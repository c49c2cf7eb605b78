"""Says before anything is loaded how much memory a run will take, and refuses a run that cannot fit."""

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from trigger_opt.errors import UserError
from trigger_opt.models.files import CONFIG, ModelFiles, free_bytes, tensor_index

_DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
# nf4 stores 4 bits a weight and one fp32 scale for every 64 of them (bitsandbytes without double quantisation).
_QUANTISED_BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
# Resident after importing torch, transformers and peft: 0.5 GB measured; allocator slack on top.
_RUNTIME_BYTES = 700_000_000


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What of a model's shape decides its memory.

    Attributes:
        num_parameters: all of them, tied ones once.
        linear_parameters: those of linear layers without the unembedding: what quantisation shrinks.
        d_ff: width of the MLP.
    """

    num_parameters: int
    linear_parameters: int
    num_layers: int
    d_model: int
    d_ff: int
    vocab: int
    num_kv_heads: int
    head_dim: int

    def weight_bytes(self, dtype: str, quantization: str | None = None) -> int:
        """Bytes of one set of weights; when quantised, all but the linear layers stays in 16 bit.

        Raises:
            UserError: an unknown dtype or quantisation.
        """
        plain = _choose(_DTYPE_BYTES, dtype, "dtype")
        if quantization is None:
            return round(self.num_parameters * plain)
        packed = _choose(_QUANTISED_BYTES, quantization, "quantization")
        return round(self.linear_parameters * packed + (self.num_parameters - self.linear_parameters) * 2)

    def kv_bytes(self, dtype: str) -> int:
        """Bytes of keys and values of one token, all layers."""
        return round(2 * self.num_layers * self.num_kv_heads * self.head_dim * _choose(_DTYPE_BYTES, dtype, "dtype"))


@dataclass(frozen=True, kw_only=True)
class WeightLoad:
    """Which weights are loaded.

    Attributes:
        full_sets: whole sets of weights: 1 when the fine-tuned model is an adapter on its base, 2 for two full
            models, and one more for every control that is a full model. Equal tensors of the pair are shared
            after loading, so the peak is two sets all the same.
        adapter_parameters: of all adapters together, controls included.
        dtype: "float32", "bfloat16" or "float16". quantization: "int8", "nf4" or None.
    """

    full_sets: int
    adapter_parameters: int = 0
    dtype: str = "bfloat16"
    quantization: str | None = None


@dataclass(frozen=True, kw_only=True)
class SearchLoad:
    """The largest batch the search runs.

    Attributes:
        search_width: candidates in one forward pass.
        tokens_per_candidate: tokens computed for each: trigger, what follows it, and the target.
        scored_positions: positions of each candidate whose logits are kept, in fp32.
        context_tokens: tokens of all contexts, whose keys and values both models keep.
        gradient_tokens: tokens of the backward pass, all its contexts together.
    """

    search_width: int
    tokens_per_candidate: int
    scored_positions: int
    context_tokens: int = 0
    gradient_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class PlanItem:
    """One line of the plan."""

    what: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How much memory a run needs at its peak, item by item."""

    items: tuple[PlanItem, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes in all."""
        return sum(item.nbytes for item in self.items)

    def lines(self) -> list[str]:
        """The plan for people, one line an item and one for the sum, in GB (10^9 bytes)."""
        rows = [*self.items, PlanItem(what="memory at the peak", nbytes=self.total_bytes)]
        width = max(len(row.what) for row in rows)
        return [f"{row.what:<{width}}  {row.nbytes / 1e9:8.2f} GB" for row in rows]


def model_size(files: ModelFiles, *, allow_code: bool = False) -> ModelSize:
    """The size of the model of `files`, from its config.json alone: built on the meta device, no weights read.

    Raises:
        UserError: an adapter (give its base), or a configuration that transformers cannot build.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if files.adapter or not (files.folder / CONFIG).is_file():
        raise UserError(f"{files.name!r} is an adapter and has no {CONFIG}: plan with its base model")
    try:
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=allow_code, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=allow_code)
    except (ValueError, KeyError, OSError, ImportError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{files.folder / CONFIG} describes no causal language model transformers can build: {reason}"
        ) from None
    return _size_of(model, config.get_text_config())


def adapter_parameters(files: ModelFiles) -> int:
    """Number of parameters stored in an adapter, from its header."""
    return sum(prod(info.shape) for info in tensor_index(files).values())


def plan_memory(size: ModelSize, *, load: WeightLoad, search: SearchLoad) -> MemoryPlan:
    """The memory plan of a run: weights, adapters, caches, activations, logits.

    An estimate from above: models are run one after another, and every buffer is counted at its largest.

    Raises:
        UserError: an unknown dtype or quantisation.
    """
    stored = load.quantization or load.dtype
    weights = size.weight_bytes(load.dtype, load.quantization)
    activation = _choose(_DTYPE_BYTES, load.dtype, "dtype")
    batch = search.search_width * search.tokens_per_candidate
    items = [
        PlanItem(
            what=f"weights: {load.full_sets} x {size.num_parameters / 1e9:.3f} B parameters, {stored}",
            nbytes=load.full_sets * weights,
        ),
        PlanItem(
            what=f"adapters: {load.adapter_parameters / 1e6:.1f} M parameters, {load.dtype}",
            nbytes=round(activation * load.adapter_parameters),
        ),
        PlanItem(
            what=f"keys and values: {batch} candidate tokens, 2 x {search.context_tokens} context tokens",
            nbytes=(batch + 2 * search.context_tokens) * size.kv_bytes(load.dtype),
        ),
        PlanItem(
            what="activations: forward, one layer",
            nbytes=round(batch * (6 * size.d_model + 3 * size.d_ff) * activation),
        ),
        # What a layer keeps for backward: norms' inputs, q, k, v, attention out, residuals; gate, up, act, product.
        PlanItem(
            what=f"activations: backward, {search.gradient_tokens} tokens",
            nbytes=round(search.gradient_tokens * size.num_layers * (10 * size.d_model + 4 * size.d_ff) * activation),
        ),
        # Both models' and one temporary for the softmax.
        PlanItem(
            what=f"logits: {search.search_width} x {search.scored_positions} positions, float32",
            nbytes=3 * 4 * search.search_width * search.scored_positions * size.vocab,
        ),
        PlanItem(what="Python and libraries", nbytes=_RUNTIME_BYTES),
    ]
    return MemoryPlan(items=tuple(item for item in items if item.nbytes))


def plan_from_count(
    *,
    num_parameters: int,
    num_layers: int,
    d_model: int,
    vocab: int,
    num_kv_heads: int,
    head_dim: int,
    load: WeightLoad,
    search: SearchLoad,
    d_ff: int | None = None,
    tied_embeddings: bool = False,
) -> MemoryPlan:
    """The memory plan of a model known by its figures only, for when its config.json is out of reach.

    `d_ff` defaults to 4 d_model. All parameters outside embedding and unembedding count as linear.
    """
    embeddings = vocab * d_model * (1 if tied_embeddings else 2)
    size = ModelSize(
        num_parameters=num_parameters,
        linear_parameters=max(0, num_parameters - embeddings),
        num_layers=num_layers,
        d_model=d_model,
        d_ff=d_ff or 4 * d_model,
        vocab=vocab,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )
    return plan_memory(size, load=load, search=search)


def available_bytes(device: torch.device | str) -> int:
    """Memory free for a run now: of all CUDA devices together, or of the machine's RAM (also for MPS).

    Raises:
        UserError: CUDA was asked for and there is none.
    """
    if torch.device(device).type != "cuda":
        return _available_ram()
    if not torch.cuda.is_available():
        raise UserError(
            "device 'cuda' was asked for and torch finds none: set device=cpu, or install the CUDA build of torch"
        )
    return sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))


def check_memory(plan: MemoryPlan, device: torch.device | str, *, remedy: str) -> None:
    """Stop when `plan` does not fit into the memory that is free now.

    Args:
        remedy: what to do then, the end of the sentence: "run +experiment=…, which fits a laptop".

    Raises:
        UserError: names the bytes needed and found, and the largest item.
    """
    found = available_bytes(device)
    if plan.total_bytes > found:
        largest = max(plan.items, key=lambda item: item.nbytes)
        raise UserError(
            f"not enough memory on {device}: {plan.total_bytes / 1e9:.2f} GB needed "
            f"({largest.what}: {largest.nbytes / 1e9:.2f} GB), {found / 1e9:.2f} GB available; {remedy}"
        )


def missing_weights_error(name: str, needed_bytes: int, *, remedy: str) -> UserError:
    """The error for hub weights that are not on this machine and cannot be fetched, with disk needed and free."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    return UserError(
        f"the weights of {name!r} are not on this machine and the hub cannot be reached; they take "
        f"{needed_bytes / 1e9:.2f} GB in {folder}, where {free_bytes(folder) / 1e9:.2f} GB are free; fetch them "
        f"where there is a network (`hf download {name}`), {remedy}"
    )


def _size_of(model: Any, config: Any) -> ModelSize:
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    heads = config.num_attention_heads
    return ModelSize(
        num_parameters=sum(p.numel() for p in model.parameters()),
        linear_parameters=linear,
        num_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_ff=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocab=config.vocab_size,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def _choose(table: dict[str, float], name: str, what: str) -> float:
    if name not in table:
        raise UserError(f"{what} {name!r} is unknown: use one of {', '.join(table)}")
    return table[name]


def _available_ram() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # macOS and others tell the whole RAM only.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
