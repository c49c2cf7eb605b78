"""Which tensor families fine-tuning changed, by how much, and at what rank above the rounding noise."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor

from trigger_opt.models.files import ModelFiles
from trigger_opt.records import TensorFamilyDiff
from trigger_opt.weight_diff.adapter import AdapterContents, LoraTarget, base_name, read_adapter
from trigger_opt.weight_diff.identity import aligned_names
from trigger_opt.weight_diff.tensors import (
    NamedTensors,
    at_common_precision,
    change_square_sum,
    family_name,
    identical,
    layer_number,
    read_pair,
    spread,
    square_sum,
)

# Singular values are computed for so many changed matrices of a family, evenly spaced over its layers: at
# 18944 x 3584 one costs half a minute on two cores.
RANKED_PER_FAMILY = 8
_CHUNK_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class _Change:
    """What happened to one tensor: sums of squares of the change and of the base."""

    name: str
    changed: bool
    matrix: bool
    change_sq: float
    base_sq: float


def diff_weights(finetuned: ModelFiles, base: ModelFiles) -> list[TensorFamilyDiff]:
    """What fine-tuning did, one record a tensor family, the largest relative change first.

    A full pair is compared from its files, tensor by tensor, at the lower precision of the two; an adapter's
    change is scaling * B @ A. The effective rank is a median over at most 8 changed matrices a family, evenly
    spaced over the layers (0 for a family of matrices that did not change; None unless the tensors have two
    dimensions); everything else is over all tensors. See `effective_rank` for the noise floor.

    Raises:
        UserError: shapes that differ, or an adapter that is no plain LoRA or does not fit the base.
    """
    pair = _AdapterPair(finetuned, base) if finetuned.adapter else _FullPair(finetuned, base)
    changes = sorted(pair.changes(), key=lambda c: family_name(c.name))
    families = [
        _family(family, list(members), pair) for family, members in groupby(changes, lambda c: family_name(c.name))
    ]
    return sorted(families, key=lambda f: -f.relative_norm)


def effective_rank(finetuned: Float[Tensor, "rows cols"], base: Float[Tensor, "rows cols"]) -> int:
    """Number of singular values of `finetuned - base` above what storing both at their precision makes by itself.

    A stored number is off by at most half a unit in its last place, ulp = eps * 2^floor(log2 |w|), uniformly, so
    with variance ulp^2 / 12; the difference of two stored numbers has s_ij^2 = (ulp_finetuned^2 + ulp_base^2) / 12.
    The floor is the edge of such a noise matrix, max_i sqrt(sum_j s_ij^2) + max_j sqrt(sum_i s_ij^2): for equal
    variances s (sqrt(rows) + sqrt(cols)), Marchenko-Pastur's, and for unequal ones the leading term of
    Bandeira & van Handel 2016 (Ann. Probab. 44), theorem 3.1. eps is 2^-7 for bfloat16; float32 tensors
    whose entries are all bfloat16 or float16 numbers count as those.

    Noise that is not one rounding to nearest a side (stochastic rounding, many optimiser steps on bf16 weights)
    lies above the floor and counts as rank; a change well below ulp / 2 was rounded away and is not seen.
    """
    if finetuned.shape[0] < finetuned.shape[1]:
        finetuned, base = finetuned.T, base.T
    eps = _stored_eps(finetuned), _stored_eps(base)
    cols = finetuned.shape[1]
    gram, column_noise = torch.zeros(cols, cols, dtype=torch.float64), torch.zeros(cols, dtype=torch.float64)
    row_noise = 0.0
    for one, other in zip(torch.split(finetuned, _CHUNK_ROWS), torch.split(base, _CHUNK_ROWS), strict=True):
        # float64: the Gram matrix squares the condition, and fp32 would bury everything below 3e-4 of the largest.
        a, b = one.double(), other.double()
        gram.addmm_((a - b).T, a - b)
        noise = (_ulp(a, eps[0]).square() + _ulp(b, eps[1]).square()) / 12
        row_noise = max(row_noise, float(noise.sum(1).max()))
        column_noise += noise.sum(0)
    floor = math.sqrt(row_noise) + math.sqrt(float(column_noise.max()))
    return int((torch.linalg.eigvalsh(gram) > floor**2).sum())


def product_singular_values(
    a: Float[Tensor, "rank inputs"], b: Float[Tensor, "outputs rank"]
) -> Float[Tensor, " values"]:
    """Singular values of B @ A, largest first, in float64, without forming the product: of R_B R_A^T, both by QR."""
    r_a = torch.linalg.qr(a.double().T, mode="r").R
    r_b = torch.linalg.qr(b.double(), mode="r").R
    values: Tensor = torch.linalg.svdvals(r_b @ r_a.T)
    return values


class _FullPair:
    """Two whole models."""

    def __init__(self, finetuned: ModelFiles, base: ModelFiles) -> None:
        self._ours, self._theirs = NamedTensors(finetuned), NamedTensors(base)
        self._names = aligned_names(finetuned, base, self._ours, self._theirs)

    def changes(self) -> Iterator[_Change]:
        for name in self._names:
            yield _change(name, *read_pair(self._ours, self._theirs, name))

    def rank(self, name: str) -> int:
        return effective_rank(*read_pair(self._ours, self._theirs, name))


class _AdapterPair:
    """An adapter on its base: low-rank products, and whole tensors saved beside them."""

    def __init__(self, adapter: ModelFiles, base: ModelFiles) -> None:
        self._ours, self._theirs = NamedTensors(adapter), NamedTensors(base)
        contents: AdapterContents = read_adapter(adapter, base, self._ours, self._theirs)
        self._targets = {target.name: target for target in contents.targets}
        self._whole = {base_name(name): name for name in contents.whole}

    def changes(self) -> Iterator[_Change]:
        names = self._theirs.names()
        for name in names + [extra for extra in (*self._targets, *self._whole) if extra not in names]:
            base = self._theirs.read(name)
            if name in self._whole:
                yield _change(name, *at_common_precision(self._ours.read(self._whole[name]), base))
                continue
            square = 0.0
            if name in self._targets:
                square = float(self._values(self._targets[name]).square().sum())
            base_sq = square_sum(base)
            yield _Change(name=name, changed=square > 0, matrix=base.ndim == 2, change_sq=square, base_sq=base_sq)

    def rank(self, name: str) -> int:
        if name in self._whole:
            return effective_rank(*at_common_precision(self._ours.read(self._whole[name]), self._theirs.read(name)))
        # The factors are exact, so only the arithmetic's own error is noise.
        values = self._values(self._targets[name])
        info = self._theirs.info(name)
        longest = max(info.shape) if info else 1
        return int((values > torch.finfo(torch.float32).eps * longest * values[0]).sum())

    def _values(self, target: LoraTarget) -> Tensor:
        return target.scaling * product_singular_values(self._ours.read(target.a), self._ours.read(target.b))


def _change(name: str, finetuned: Tensor, base: Tensor) -> _Change:
    changed = not identical(finetuned, base)
    square = change_square_sum(finetuned, base) if changed else 0.0
    return _Change(name=name, changed=changed, matrix=base.ndim == 2, change_sq=square, base_sq=square_sum(base))


def _family(family: str, members: list[_Change], pair: _FullPair | _AdapterPair) -> TensorFamilyDiff:
    members.sort(key=lambda c: layer_number(c.name) or 0)
    changed = [c for c in members if c.changed]
    layers = sorted({layer for c in changed if (layer := layer_number(c.name)) is not None})
    rank = None
    if all(c.matrix for c in members):
        rank = float(median([pair.rank(c.name) for c in spread(changed, RANKED_PER_FAMILY)] or [0]))
    return TensorFamilyDiff(
        family=family,
        tensors=len(members),
        changed=len(changed),
        relative_norm=_relative_norm(members),
        effective_rank=rank,
        layers=layers,
        largest_layer=max(
            layers, key=lambda n: _relative_norm([c for c in members if layer_number(c.name) == n]), default=None
        ),
    )


def _relative_norm(changes: list[_Change]) -> float:
    """Norm of the change over the base's, pooled; over 1 where the base is all zeros (fresh biases)."""
    base_sq = sum(c.base_sq for c in changes)
    return math.sqrt(sum(c.change_sq for c in changes) / (base_sq or 1.0))


def _ulp(w: Float[Tensor, "rows cols"], eps: float) -> Float[Tensor, "rows cols"]:
    """The spacing of the stored numbers at |w|; 0 at 0."""
    exponent = torch.frexp(w).exponent - 1
    return torch.where(w == 0, 0.0, torch.ldexp(torch.full_like(w, eps), exponent))


def _stored_eps(w: Tensor) -> float:
    if w.dtype == torch.float32:
        for narrow in (torch.bfloat16, torch.float16):
            if torch.equal(w, w.to(narrow).float()):
                return torch.finfo(narrow).eps
    return torch.finfo(w.dtype).eps
