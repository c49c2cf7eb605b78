"""Attention for packed candidates: every job sees its trunk, which is held once, and its own tokens.

Registered with transformers' attention interface, so that any model family that uses it can be scored; what a
family asks of attention and is not known here (attention sinks, position biases) is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trigger_opt.scoring.packing import Pack

NAME = "trigger_opt_packed"

# What models hand every attention function and what does not change the result here.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "is_causal", "output_attentions", "output_hidden_states"}


class UnsupportedAttentionError(ValueError):
    """The model asks something of attention that is not known here."""


LayerKeys = tuple[Tensor, Tensor]
"""Keys (heads, tokens, head_dim) and values (heads, tokens, value_dim) of one layer."""


@dataclass
class PackedPass:
    """What attention needs in a pass: the layout, the trunks by layer, and where to keep new keys and values.

    Attributes:
        trunks: for every trunk of the pass its keys and values by layer.
        captured: by layer the pass's own keys and values, where `capture` asks for them.
    """

    pack: Pack
    trunks: list[dict[int, LayerKeys]]
    capture: bool = False
    captured: dict[int, LayerKeys] = field(default_factory=dict)
    layers_seen: int = 0


_current: ContextVar[PackedPass] = ContextVar("packed_pass")
# A network's attention is chosen in its configuration, which all lanes share: the last one out restores it. By the
# configuration's identity: how many passes run, and what was chosen before.
_switching = Lock()
_in_use: dict[int, tuple[int, str | None]] = {}


@contextmanager
def packed_attention(network: Any, state: PackedPass) -> Iterator[None]:
    """Run `network` on packed jobs inside."""
    _register()
    config = network.config.get_text_config()
    token = _current.set(state)
    with _switching:
        users, before = _in_use.get(id(config), (0, config._attn_implementation))
        _in_use[id(config)] = (users + 1, before)
        config._attn_implementation = NAME
    try:
        yield
    finally:
        _current.reset(token)
        with _switching:
            users, before = _in_use.pop(id(config))
            if users > 1:
                _in_use[id(config)] = (users - 1, before)
            else:
                config._attn_implementation = before


def attend(
    module: torch.nn.Module,
    query: Float[Tensor, "one heads rows head_dim"],
    key: Float[Tensor, "one kv_heads rows head_dim"],
    value: Float[Tensor, "one kv_heads rows value_dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "one rows heads value_dim"], None]:
    """Softmax attention of every packed token over its job's trunk and own tokens, by plain products.

    The trunk's keys meet all jobs' queries in one product; they are never copied for a candidate.

    Raises:
        UnsupportedAttentionError: the model asks for something else.
    """
    state = _current.get()
    if unknown := [n for n, v in options.items() if v is not None and n not in _HARMLESS]:
        raise UnsupportedAttentionError(f"attention with {', '.join(sorted(unknown))}")
    if len(query) != 1 or attention_mask is not None:
        raise UnsupportedAttentionError("attention over a batch or with a mask of its own")
    state.layers_seen += 1
    layer: int = module.layer_idx  # type: ignore[assignment]
    if state.capture:
        state.captured[layer] = (key[0].detach(), value[0].detach())
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _attend(state, layer, query[0], key[0], value[0], scale, sliding_window, softcap)
    return out[None], None


def _attend(
    state: PackedPass,
    layer: int,
    query: Float[Tensor, "heads rows head_dim"],
    key: Float[Tensor, "kv_heads rows head_dim"],
    value: Float[Tensor, "kv_heads rows value_dim"],
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Float[Tensor, "rows heads value_dim"]:
    pack, device = state.pack, query.device
    heads, kv_heads, jobs, window = len(query), len(key), len(pack.jobs), pack.window
    groups = heads // kv_heads
    nothing = (key[:, :0], value[:, :0])
    trunks = [_first(state.trunks[s.trunk].get(layer, nothing), s.limit) for s in pack.segments]
    # (kv head, job · group · window, dim): one product with a trunk's keys, and a view per job for its own. The scale
    # goes into the queries, of which there are fewer than scores.
    cells = groups * window
    aligned = (query * scale).reshape(kv_heads, groups * pack.rows, -1).index_select(1, pack.aligned(groups, device))
    own = pack.aligned(1, device)
    own_keys = key.index_select(1, own).view(kv_heads * jobs, window, -1)
    own_values = value.index_select(1, own).view(kv_heads * jobs, window, -1)
    to_own = torch.bmm(aligned.view(kv_heads * jobs, cells, -1), own_keys.transpose(1, 2))
    to_trunk = _joined(
        [
            _pad(torch.bmm(aligned[:, s.first * cells : s.last * cells], keys.transpose(1, 2)), pack.trunk_length)
            for s, (keys, _) in zip(pack.segments, trunks, strict=True)
        ]
    )
    unseen = to_own.new_zeros(kv_heads, jobs * cells, pack.padding)
    scores = torch.cat([to_trunk, to_own.view(kv_heads, jobs * cells, window), unseen], 2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    bias = pack.bias(sliding_window, scores.dtype, device)
    scores.view(kv_heads, jobs, groups, window, -1)[..., scores.shape[2] - bias.shape[3] :] += bias
    weights = scores.softmax(-1)
    own_weights = weights[..., pack.trunk_length : pack.trunk_length + window].reshape(kv_heads * jobs, cells, window)
    out = torch.bmm(own_weights, own_values).view(kv_heads, jobs * cells, -1)
    if pack.trunk_length:
        parts = [
            torch.bmm(weights[:, s.first * cells : s.last * cells, : s.limit], values)
            for s, (_, values) in zip(pack.segments, trunks, strict=True)
        ]
        out = out + _joined(parts)
    # Back to packed rows: (kv head, job, group, window, dim) -> (row, head, dim).
    by_cell = out.view(kv_heads, jobs, groups, window, -1).permute(1, 3, 0, 2, 4).reshape(jobs * window, heads, -1)
    return by_cell.index_select(0, pack.home(device))


def _first(keys: LayerKeys, count: int) -> LayerKeys:
    return keys[0][:, :count], keys[1][:, :count]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _pad(scores: Float[Tensor, "heads cells keys"], length: int) -> Float[Tensor, "heads cells length"]:
    return scores if scores.shape[2] == length else torch.nn.functional.pad(scores, (0, length - scores.shape[2]))


@cache
def _register() -> None:
    # Imported late: it takes seconds, and every command imports this package.
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
