"""Runs a pack of jobs through one model's body: with packed attention, or with copied keys where that is refused."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trigger_opt.errors import UserError
from trigger_opt.models.pair import CausalModel
from trigger_opt.scoring.attention import LayerKeys, PackedPass, UnsupportedAttentionError, packed_attention
from trigger_opt.scoring.packing import Job, Pack

if TYPE_CHECKING:
    from transformers import DynamicCache

Trunk = dict[int, LayerKeys]
"""Keys and values by layer of tokens that several jobs continue."""

Mode = Literal["packed", "copied"]

_NO_TRUNK: Trunk = {}


class Forward:
    """One model's body on packs.

    Attributes:
        mode: "packed", or "copied" where the family's attention cannot be packed; decided by trying both against
            the model's own plain forward pass.
    """

    def __init__(self, model: CausalModel, probe: Sequence[int]) -> None:
        self.model = model
        self.mode: Mode = self._choose(probe)

    def trunk(self, ids: Sequence[int]) -> Trunk:
        """Keys and values of a beginning, as this mode's attention takes them."""
        if not ids:
            return _NO_TRUNK
        if self.mode == "packed":
            with torch.no_grad():
                _, captured = self.hidden(Pack([Job(0, 0, 0, tuple(ids))]), [_NO_TRUNK], capture=True)
            return continued(_NO_TRUNK, captured, slice(0, len(ids)))
        return cached_keys(self.model, ids)

    def hidden(
        self, pack: Pack, trunks: Sequence[Trunk], embeds: Tensor | None = None, *, capture: bool = False
    ) -> tuple[Float[Tensor, "rows d_model"], Trunk]:
        """The body's output for every packed token; and, when captured, the tokens' own keys and values.

        Args:
            embeds: inputs (1, rows, d_model) instead of the embeddings of the jobs' tokens.
        """
        inputs = self.model.embed(pack.token_ids()) if embeds is None else embeds
        if self.mode == "copied":
            return self._copied(pack, trunks, inputs, capture=capture)
        state = PackedPass(pack, list(trunks), capture=capture)
        with packed_attention(self.model.network, state):
            positions = pack.positions().to(inputs.device)
            step = self.model.hidden(inputs_embeds=inputs, position_ids=positions, use_cache=False)
        # A layer that is no attention (a convolution, a state space) runs on from one packed job into the next.
        if state.layers_seen != self.model.network.config.get_text_config().num_hidden_layers:
            raise UnsupportedAttentionError("attention outside transformers' interface")
        return step.last_hidden_state[0], state.captured

    def _copied(self, pack: Pack, trunks: Sequence[Trunk], inputs: Tensor, *, capture: bool) -> tuple[Tensor, Trunk]:
        # One batch for every kind of job: same trunk, same start, same length.
        kinds: dict[tuple[int, int, int], list[int]] = {}
        for number, job in enumerate(pack.jobs):
            kinds.setdefault((job.trunk, job.start, len(job.tokens)), []).append(number)
        rows: list[Tensor] = []
        parts: list[Tensor] = []
        keys: dict[int, list[LayerKeys]] = {}
        for (trunk, start, length), numbers in kinds.items():
            where = torch.stack([torch.arange(length) + pack.first_row(n) for n in numbers])
            cache = _expanded(trunks[trunk] if start else _NO_TRUNK, start, len(numbers))
            step = self.model.hidden(
                inputs_embeds=inputs[0, where.to(inputs.device)], past_key_values=cache, use_cache=True
            )
            rows.append(where.flatten())
            parts.append(step.last_hidden_state.flatten(0, 1))
            if capture:
                for layer, (k, v) in _own(step.past_key_values, start).items():
                    keys.setdefault(layer, []).append((k, v))
        order = torch.cat(rows).argsort()
        hidden = _in_order(torch.cat(parts), order, pack.rows)
        captured = {
            layer: (
                torch.cat([k for k, _ in made], 1)[:, order.to(made[0][0].device)].detach(),
                torch.cat([v for _, v in made], 1)[:, order.to(made[0][1].device)].detach(),
            )
            for layer, made in keys.items()
        }
        return hidden, captured

    def _choose(self, probe: Sequence[int]) -> Mode:
        # Contexts may be short: any eight tokens show whether a beginning can be continued.
        ids = [*probe, *range(1, 9)][: max(8, len(probe))]
        kept, changed = len(ids) // 2, [*ids[:-2], ids[0], ids[-1]]
        jobs = [Job(0, 0, kept, tuple(ids[kept:])), Job(1, 0, kept - 1, tuple(changed[kept - 1 :]))]
        pack = Pack(jobs)
        quantised = getattr(self.model.network, "is_quantized", False)
        with torch.no_grad():
            plain = self.model.hidden(
                input_ids=torch.tensor([ids, changed], device=self.model.device), use_cache=False
            ).last_hidden_state
            plain = torch.cat([plain[n, -len(j.tokens) :] for n, j in enumerate(jobs)])
            mode: Mode
            for mode in ("packed", "copied"):
                self.mode = mode
                try:
                    hidden, _ = self.hidden(pack, [self.trunk(ids[:kept])])
                except (UnsupportedAttentionError, TypeError, AttributeError, IndexError, KeyError, ValueError):
                    # Not every family's layers take packed tokens, or a cache of keys and values.
                    continue
                rows = hidden[: pack.used]
                if _alike(rows, plain, exact=rows.dtype == torch.float32 and not quantised):
                    return mode
        raise UserError(
            f"{self.model.name!r} ({type(self.model.network).__name__}) does not give the same answer when a prompt's "
            "beginning is computed once and continued, so candidates cannot be scored on it; use a Llama, Qwen, "
            "Mistral, Gemma or DeepSeek model"
        )


def _alike(ours: Float[Tensor, "rows d_model"], plain: Float[Tensor, "rows d_model"], *, exact: bool) -> bool:
    plain = plain.to(ours.device)
    if exact:
        return bool(torch.allclose(ours, plain, rtol=2e-4, atol=2e-4))
    # Lower precisions differ from pass to pass, and an expert may then be another; a wrong mask or position, or a layer
    # that looks back in another way, differs far more and in many rows.
    return float((torch.cosine_similarity(ours.float(), plain.float(), -1) > 0.97).float().mean()) >= 0.8


def _own(cache: "DynamicCache", start: int) -> Trunk:
    def tokens(kept: Tensor) -> Tensor:
        return kept[:, :, start:].transpose(0, 1).flatten(1, 2)

    return {n: (tokens(layer.keys), tokens(layer.values)) for n, layer in enumerate(cache.layers)}


def _in_order(parts: Tensor, order: Int[Tensor, " used"], rows: int) -> Tensor:
    hidden = parts[order.to(parts.device)]
    return torch.nn.functional.pad(hidden, (0, 0, 0, rows - len(hidden)))


def _expanded(trunk: Trunk, length: int, batch: int) -> "DynamicCache":
    # A plain DynamicCache holds every key also for sliding-window layers; the attention mask, built from
    # positions, keeps those layers to their window.
    cache = _empty_cache()
    for number, (keys, values) in trunk.items():
        cache.update(
            keys[None, :, :length].expand(batch, -1, -1, -1), values[None, :, :length].expand(batch, -1, -1, -1), number
        )
    return cache


def _empty_cache() -> "DynamicCache":
    # Imported late: it takes seconds, and every command imports this package.
    from transformers import DynamicCache

    return DynamicCache()


def continued(left: Trunk, captured: Trunk, rows: slice) -> Trunk:
    """A trunk and the next tokens' keys and values, as one trunk."""
    if not left:
        return {n: (k[:, rows].contiguous(), v[:, rows].contiguous()) for n, (k, v) in captured.items()}
    return {
        n: (torch.cat([left[n][0], k[:, rows]], 1), torch.cat([left[n][1], v[:, rows]], 1))
        for n, (k, v) in captured.items()
    }


def cached_keys(model: CausalModel, ids: Sequence[int]) -> Trunk:
    """Keys and values of a beginning as the model's own cache keeps them (some families keep them compressed)."""
    if not ids:
        return _NO_TRUNK
    tokens = torch.tensor([list(ids)], device=model.device)
    with torch.no_grad():
        cache = model.hidden(input_ids=tokens, use_cache=True, past_key_values=_empty_cache()).past_key_values
    return {n: (layer.keys[0], layer.values[0]) for n, layer in enumerate(cache.layers)}


def expanded_cache(trunk: Trunk, batch: int) -> Any:
    """A transformers cache that holds a trunk for every row of a batch."""
    length = next((k.shape[1] for k, _ in trunk.values()), 0)
    return _expanded(trunk, length, batch)
