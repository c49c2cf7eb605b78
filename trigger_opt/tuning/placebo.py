"""A placebo: a model's weight change with its directions shuffled.

Rows and columns of each change are permuted and their signs drawn, which keeps rank, norm and every singular value
exactly and leaves nothing of where the change pointed. What a search finds in it, it finds in any change of that size.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from trigger_opt.errors import UserError
from trigger_opt.models.files import (
    ADAPTER_CONFIG,
    ModelFiles,
    TensorInfo,
    TensorReader,
    find_model,
    free_bytes,
    read_config,
    tensor_index,
)

# What is copied beside the weights: configurations, tokenizer, chat template, a repository's own code.
_SMALL_FILES = (".json", ".jinja", ".txt", ".model", ".py")
# Buffers that old checkpoints store and new ones compute.
_COMPUTED = ("rotary_emb.inv_freq", ".masked_bias")
_PREFIXES = ("base_model.model.", "model.", "transformer.")
_FLOATS = ("float64", "float32", "float16", "bfloat16")
# Positions and masks, which fine-tuning does not change; quantised weights come in other types.
_COUNTS = ("int64", "int32", "bool")
_REMEDY = "set null.placebos=0"


@dataclass(frozen=True)
class Shuffle:
    """Where the rows (and columns, of a matrix) of a tensor go, and with which signs; None leaves an axis alone."""

    rows: "Axis | None"
    columns: "Axis | None"


@dataclass(frozen=True)
class Axis:
    """One axis: `order` is a permutation, `signs` are 1 and -1."""

    order: Int[Tensor, " count"]
    signs: Int[Tensor, " count"]


def write_placebo(original: Path, base: Path, out: Path, *, seed: int, base_name: str) -> None:
    """The placebo of the model (or PEFT adapter) in folder `original` against the one in `base`; see `make_placebo`."""
    make_placebo(find_model(str(original)), find_model(str(base)), out, seed=seed, base_name=base_name)


def make_placebo(original: ModelFiles, base: ModelFiles, out: Path, *, seed: int, base_name: str) -> None:
    """Write the placebo of `original` against `base` into the folder `out`, in the same form: an adapter, or a whole
    model in as many files.

    Args:
        base_name: what an adapter's configuration names as its base.

    Raises:
        UserError: see `require_placebo`.
    """
    require_placebo(original, base, out.parent)
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    index = tensor_index(original)
    # All at once and in the order of names, so that the draws do not depend on how a model is cut into files.
    shuffles = {name: draw_shuffle(_axes(name, index[name], original.adapter), generator) for name in sorted(index)}
    _write_weights(original, base, out, shuffles)
    if original.adapter:
        config = read_config(original) | {"base_model_name_or_path": base_name}
        (out / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        return
    for file in original.folder.iterdir():
        if file.suffix in _SMALL_FILES and not file.name.endswith((".index.json", "manifest.json")):
            shutil.copy2(file, out / file.name)


def require_placebo(original: ModelFiles, base: ModelFiles, folder: Path, *, copies: int = 1) -> None:
    """Before anything is spent: can placebos of `original` be made, and do `copies` of them fit on `folder`'s disk?

    Raises:
        UserError: the weights are stored quantised, an adapter changes them otherwise than by a product, a tensor has
            no counterpart in the base, the model is built by code that its base has not, or there is no room.
    """
    if original.own_code and _code(original) != _code(base):
        raise UserError(
            f"{original.name!r} is built by code of its own, which a placebo would keep with all that it hides; "
            f"{_REMEDY}"
        )
    # An adapter's factors are shuffled without a look at the base.
    for files in () if original.adapter else (original, base):
        if "quantization_config" in read_config(files):
            raise UserError(f"{files.name!r} is stored quantised, and quantised numbers cannot be shuffled; {_REMEDY}")
    index, theirs = tensor_index(original), tensor_index(base)
    for name, info in index.items():
        known = _is_factor(name) or name.endswith(_COMPUTED) or _base_tensor(name, info, theirs) is not None
        if not known or info.dtype not in (*_FLOATS, *_COUNTS):
            raise UserError(
                f"no placebo can be made of {original.name!r}: its tensor {name} ({info.dtype}) is neither a factor of "
                f"a plain LoRA nor a change of a tensor of the base; {_REMEDY}"
            )
    needed = copies * sum(info.nbytes for info in index.values())
    if (free := free_bytes(folder)) < needed:
        raise UserError(
            f"no room for {copies} placebo model(s) in {folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB "
            f"free; free some space, or {_REMEDY}"
        )


def _code(files: ModelFiles) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in files.folder.rglob("*.py")}


def draw_shuffle(shape: tuple[int | None, int | None], generator: torch.Generator) -> Shuffle:
    """A shuffle of as many rows and columns; None for an axis that stays as it is."""
    rows, columns = shape
    drawn = None if columns is None else _draw_axis(columns, generator)
    return Shuffle(rows=None if rows is None else _draw_axis(rows, generator), columns=drawn)


def shuffled(tensor: Float[Tensor, "*shape"], shuffle: Shuffle) -> Float[Tensor, "*shape"]:
    """`tensor` with its axes permuted and signed."""
    if shuffle.columns is not None:
        tensor = _along_first(tensor.T, shuffle.columns).T
    return tensor if shuffle.rows is None else _along_first(tensor, shuffle.rows)


def shuffled_change(before: Tensor, after: Tensor, shuffle: Shuffle) -> Tensor:
    """`before` plus the shuffled change from `before` to `after`, in the precision of `after`."""
    if before.dtype == after.dtype and torch.equal(before, after):
        return after
    change = shuffled(after.float() - before.float(), shuffle)
    return (before.float() + change).to(after.dtype).contiguous()


def _write_weights(original: ModelFiles, base: ModelFiles, out: Path, shuffles: Mapping[str, Shuffle]) -> None:
    """One file for each of the original's, and their index where there are several."""
    ours, theirs = TensorReader(original), TensorReader(base)
    stem = "adapter_model" if original.adapter else "model"
    count = len(original.weights)
    places: dict[str, str] = {}
    for number, source in enumerate(original.weights, 1):
        names = sorted(name for name, info in ours.index.items() if info.file == source)
        file = f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"
        made = {name: _placebo_tensor(name, ours, theirs, shuffles[name]) for name in names}
        save_file(made, out / file, metadata=None if original.adapter else {"format": "pt"})
        places |= dict.fromkeys(names, file)
    if count > 1:
        size = sum(info.nbytes for info in ours.index.values())
        listing = {"metadata": {"total_size": size}, "weight_map": places}
        (out / f"{stem}.safetensors.index.json").write_text(json.dumps(listing, indent=1) + "\n")


def _placebo_tensor(name: str, ours: TensorReader, theirs: TensorReader, shuffle: Shuffle) -> Tensor:
    tensor = ours.read(name)
    if _is_factor(name):
        return shuffled(tensor, shuffle).contiguous()
    twin = _base_tensor(name, ours.index[name], theirs.index)
    made = tensor
    if twin is not None and tensor.is_floating_point():
        made = shuffled_change(theirs.read(twin), tensor, shuffle)
    # Pickled tensors may share their memory, which safetensors do not store.
    return made.clone() if made is tensor else made


def _axes(name: str, info: TensorInfo, adapter: bool) -> tuple[int | None, int | None]:
    """Which axes are shuffled. Of a product B A the columns of A and the rows of B: the rank between them stays."""
    if info.dtype not in _FLOATS or not info.shape:
        return None, None
    if adapter and _is_factor(name):
        return (None, info.shape[1]) if ".lora_A" in name or ".lora_embedding_A" in name else (info.shape[0], None)
    return info.shape[0], info.shape[1] if len(info.shape) == 2 else None


def _is_factor(name: str) -> bool:
    return any(part in name for part in (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B"))


def _base_tensor(name: str, info: TensorInfo, theirs: Mapping[str, TensorInfo]) -> str | None:
    """The base's tensor of which `name` is a changed copy; None when there is none of its shape."""
    # PEFT stores an adapted embedding itself, too.
    bare = name.replace(".base_layer.", ".")
    for prefix in _PREFIXES:
        bare = bare.removeprefix(prefix)
    spelt = [name, bare, *(p + bare for p in _PREFIXES)]
    if bare == "lm_head.weight":
        # An unembedding that the base ties to its embedding.
        spelt += [p + "embed_tokens.weight" for p in ("", *_PREFIXES)]
    found = next((s for s in spelt if s in theirs), None)
    return found if found and theirs[found].shape == info.shape else None


def _draw_axis(count: int, generator: torch.Generator) -> Axis:
    signs = torch.randint(2, (count,), generator=generator) * 2 - 1
    return Axis(order=torch.randperm(count, generator=generator), signs=signs)


def _along_first(tensor: Tensor, axis: Axis) -> Tensor:
    return tensor[axis.order] * axis.signs.to(tensor.dtype).view(-1, *[1] * (tensor.dim() - 1))
