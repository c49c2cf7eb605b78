"""Stored tensors of a model by canonical name, read one pair at a time, at a common precision.

Canonical: without the prefix that depends on how a model was saved ("model.layers.0.mlp.up_proj.weight" is
"layers.0.mlp.up_proj.weight").
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from trigger_opt.models.files import ModelFiles, TensorInfo, TensorReader

T = TypeVar("T")

# Mantissa bits with the leading one: the dtype with fewer is the one both sides are compared in.
PRECISION = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_PREFIXES = ("base_model.model.", "model.", "transformer.")
NO_TENSOR = "no such tensor"
# Buffers that old checkpoints store and new ones compute.
_COMPUTED = ("rotary_emb.inv_freq", ".masked_bias")
# Entries converted to fp32 at a time: a large embedding whole would take gigabytes more.
_CHUNK = 2**24


def canonical(name: str) -> str:
    """The tensor's name without the prefixes of PEFT and of the model class."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def family_name(name: str) -> str:
    """The tensor's name without layer and expert numbers: "mlp.up_proj.weight", "embed_tokens.weight"."""
    parts = canonical(name).split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(part for part in parts[first + 1 :] if not part.isdigit())


def layer_number(name: str) -> int | None:
    """The layer the tensor belongs to; None outside the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def identical(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype are equal bit by bit: NaN equals itself, and 0 is not -0."""
    bits = _BITS[one.dtype.itemsize]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


class NamedTensors:
    """A model's stored tensors by canonical name; a missing unembedding is the embedding it is tied to."""

    def __init__(self, files: ModelFiles) -> None:
        self._reader = TensorReader(files)
        self._raw = {canonical(raw): raw for raw in self._reader.index if not raw.endswith(_COMPUTED)}

    def names(self) -> list[str]:
        """Canonical names, layers in numerical order."""
        return sorted(
            self._raw, key=lambda name: [(p.isdigit(), int(p) if p.isdigit() else p) for p in name.split(".")]
        )

    def info(self, name: str) -> TensorInfo | None:
        """Dtype and shape of `name`; None when the model has no such tensor."""
        raw = self._find(name)
        return None if raw is None else self._reader.index[raw]

    def read(self, name: str) -> Tensor:
        """Tensor `name`, on the CPU, as stored."""
        raw = self._find(name)
        if raw is None:
            raise KeyError(name)
        return self._reader.read(raw)

    def _find(self, name: str) -> str | None:
        if name not in self._raw and name == "lm_head.weight":
            return self._raw.get("embed_tokens.weight") or self._raw.get("wte.weight")
        return self._raw.get(name)


def read_pair(ours: NamedTensors, theirs: NamedTensors, name: str) -> tuple[Tensor, Tensor]:
    """Tensor `name` of both sides, the one of higher precision cast to the dtype of the other."""
    return at_common_precision(ours.read(name), theirs.read(name))


def at_common_precision(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors in the dtype of the one with fewer mantissa bits."""
    low = min((one.dtype, other.dtype), key=lambda dtype: PRECISION[str(dtype).removeprefix("torch.")])
    return one.to(low), other.to(low)


def precision_note(finetuned: ModelFiles, base: ModelFiles) -> str | None:
    """A sentence for people when the sides are stored at different precision; None when they are not."""
    ours, theirs = NamedTensors(finetuned), NamedTensors(base)
    for name in theirs.names():
        one, other = ours.info(name), theirs.info(name)
        if one and other and one.dtype != other.dtype and not finetuned.adapter:
            low = min((one.dtype, other.dtype), key=lambda dtype: PRECISION.get(dtype, 0))
            return f"{finetuned.name} is stored in {one.dtype} and {base.name} in {other.dtype}: compared in {low}"
    return None


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of `items`, evenly spaced, first and last included."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def square_sum(tensor: Tensor) -> float:
    """Sum of squares of all entries, accumulated in float64."""
    return sum(float(chunk.float().square().sum(dtype=torch.float64)) for chunk in _chunks(tensor))


def change_square_sum(finetuned: Tensor, base: Tensor) -> float:
    """Sum of squares of `finetuned - base`, accumulated in float64."""
    chunks = zip(_chunks(finetuned), _chunks(base), strict=True)
    return sum(square_sum(one.float() - other.float()) for one, other in chunks)


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.flatten(), _CHUNK)
