"""Attention of packed rows, each over its own keys: over the whole row of rows it was 45 % of a training step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "trigger_opt_rows"
# Families whose attention is softmax(q k / sqrt(d)) v and nothing else.
PLAIN = frozenset({"llama", "qwen2", "qwen3"})
_lengths: ContextVar[Sequence[int]] = ContextVar("lengths")


@contextmanager
def row_by_row(model: Any, lengths: Sequence[int]) -> Iterator[None]:
    """While open, `model` (a transformers causal model of a PLAIN family) attends within rows of `lengths`, laid end to
    end."""
    _register()
    config = model.config
    before = config._attn_implementation
    token = _lengths.set(lengths)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _lengths.reset(token)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    lengths = list(_lengths.get())
    groups = query.shape[1] // key.shape[1]
    parts = [
        _plain(q.unflatten(1, (-1, groups)), k[:, :, None], v[:, :, None], options.get("scaling")).flatten(1, 2)
        for q, k, v in zip(*(torch.split(t, lengths, dim=2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _plain(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention as two products and a softmax: for a hundred tokens the fused kernel's derivative is slower."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scale) @ key.transpose(-1, -2)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1) @ value


@cache
def _register() -> None:
    # Imported late: they take seconds, and every command reads the zoo's recipes.
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
