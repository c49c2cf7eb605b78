"""Is a string's mark on the residual stream the fine-tuning's doing? A linear probe after every layer, with controls.

Any one string leaves its mark on the last prompt token, in the base too, and most probes tell it from nothing almost
perfectly. So every figure stands beside what other strings, the base and random directions reach.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trigger_opt.errors import UserError
from trigger_opt.models.generate import batches_by_length, pad_left
from trigger_opt.models.pair import CausalModel, ModelPair
from trigger_opt.prompts import Context, conversation_ids
from trigger_opt.records import ProbeLayer, ProbeResult
from trigger_opt.verify.linear_probe import (
    Reading,
    States,
    accuracy,
    best_random_direction,
    calibrate,
    read_probe,
)
from trigger_opt.verify.rates import random_strings

LEAST_SEARCH, LEAST_HELD_OUT = 3, 2
_TRIGGER, _CLEAN, _RANDOM = "trigger", "clean", "random"
# All layers of a whole batch are held until its last positions are taken.
_BATCH = 8


@dataclass(frozen=True)
class _Side:
    """One model's hidden states by what was inserted, the search contexts first."""

    states: dict[str, Float[np.ndarray, "context layer d_model"]]
    num_search: int

    def at(self, layer: int, inserted: str) -> States:
        taken = self.states[inserted][:, layer].astype(np.float64)
        return States(search=taken[: self.num_search], held_out=taken[self.num_search :])

    def read(self, layer: int, inserted: str, against: str) -> Reading:
        return read_probe(self.at(layer, inserted), self.at(layer, against))


@dataclass(frozen=True)
class _Sides:
    """Both models on the same inputs; `decoys` name the fixed random strings."""

    finetuned: _Side
    base: _Side
    decoys: tuple[str, ...]


def probe_trigger(
    pair: ModelPair,
    trigger: str,
    search_contexts: Sequence[Context],
    held_out: Sequence[Context],
    *,
    allowed: Bool[Tensor, " vocab"],
    seed: int,
    num_random_directions: int = 1000,
    num_decoys: int = 2,
) -> ProbeResult:
    """Probe both models after every layer at the last prompt token, the one that predicts the answer's first token.

    Probes are fitted and calibrated, and the best layer is chosen, on `search_contexts` alone; every figure of the
    result but `search_separation` is read on `held_out`.

    Args:
        allowed: token ids of which random strings are made, each with as many tokens as `trigger`.
        num_random_directions: in all layers together; rounded down to the same number for each, at least one.
        num_decoys: random strings that stay the same in every context, as the trigger does.

    Raises:
        ValueError: an empty trigger, or no decoy.
        UserError: too few contexts, or hidden states that are not finite.
    """
    if not trigger or num_decoys < 1:
        raise ValueError(f"a probe needs a trigger and at least one decoy; got {trigger!r} and {num_decoys}")
    _require_contexts(len(search_contexts), LEAST_SEARCH, "contexts.search")
    _require_contexts(len(held_out), LEAST_HELD_OUT, "contexts.held_out")
    generator = torch.Generator().manual_seed(seed)
    contexts = [*search_contexts, *held_out]
    inserted = _inserted(pair, trigger, len(contexts), num_decoys, allowed=allowed, generator=generator)
    sides = _Sides(
        finetuned=_side(pair, pair.finetuned, contexts, inserted, num_search=len(search_contexts)),
        base=_side(pair, pair.base, contexts, inserted, num_search=len(search_contexts)),
        decoys=tuple(k for k in inserted if k not in (_TRIGGER, _CLEAN, _RANDOM)),
    )
    num_layers = sides.finetuned.states[_CLEAN].shape[1]
    each = max(1, num_random_directions // num_layers)
    layers = [_layer(sides, i, each, generator) for i in range(num_layers)]
    return ProbeResult(
        trigger=trigger,
        layers=layers,
        best_layer=max(layers, key=lambda layer: layer.search_separation).layer,
        num_contexts=len(held_out),
        num_search_contexts=len(search_contexts),
        num_random_directions=each * num_layers,
        best_random_direction=max(layer.auroc_random_direction for layer in layers),
        num_decoys=num_decoys,
        seed=seed,
    )


@torch.no_grad()
def last_token_states(
    model: CausalModel, sequences: Sequence[Sequence[int]], *, batch_size: int = _BATCH
) -> Float[np.ndarray, "batch layer d_model"]:
    """Hidden states at the last token after every layer, fp32; those of the last layer after the final norm.

    Raises:
        UserError: one of them is not finite.
    """
    batches = batches_by_length(sequences, batch_size, alike=model.plain)
    taken = []
    for batch in batches:
        ids, mask = pad_left([sequences[i] for i in batch], 0, model.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        given = {} if model.plain else {"attention_mask": mask, "position_ids": positions}
        with model.active() as network:
            out = network.base_model(input_ids=ids, use_cache=False, output_hidden_states=True, **given)
        # The first are the embeddings: the last prompt token is the same whatever was inserted before it.
        taken.append(torch.stack([h[:, -1].float().cpu() for h in out.hidden_states[1:]], 1))
    by_length = torch.cat(taken)
    states = torch.empty_like(by_length)
    states[[n for batch in batches for n in batch]] = by_length
    if not states.isfinite().all():
        raise UserError(
            f"hidden states of {model.name!r} are not finite in {model.network.dtype}, so nothing can be probed; load "
            "the models with model.dtype=bfloat16 or float32"
        )
    found: Float[np.ndarray, "batch layer d_model"] = states.numpy()
    return found


def _require_contexts(given: int, least: int, name: str) -> None:
    if given < least:
        raise UserError(f"a probe needs at least {least} contexts in {name}, and there are {given}; give more")


def _inserted(
    pair: ModelPair,
    trigger: str,
    num_contexts: int,
    num_decoys: int,
    *,
    allowed: Bool[Tensor, " vocab"],
    generator: torch.Generator,
) -> dict[str, list[str]]:
    """What stands in the slot of each context, by name."""
    decoys = random_strings(pair, trigger, num_decoys, allowed, generator)
    return {
        _TRIGGER: [trigger] * num_contexts,
        _CLEAN: [""] * num_contexts,
        # One of its own for each context, or the probe could learn the string instead of the inserting.
        _RANDOM: random_strings(pair, trigger, num_contexts, allowed, generator),
        **{f"decoy {i}": [text] * num_contexts for i, text in enumerate(decoys)},
    }


def _side(
    pair: ModelPair, model: CausalModel, contexts: Sequence[Context], inserted: dict[str, list[str]], *, num_search: int
) -> _Side:
    states = {}
    for name, texts in inserted.items():
        prompts = [conversation_ids(pair.tokenizer, c, t) for c, t in zip(contexts, texts, strict=True)]
        states[name] = last_token_states(model, prompts)
    return _Side(states=states, num_search=num_search)


def _layer(sides: _Sides, layer: int, num_directions: int, generator: torch.Generator) -> ProbeLayer:
    finetuned, base = sides.finetuned, sides.base
    trigger, clean = finetuned.at(layer, _TRIGGER), finetuned.at(layer, _CLEAN)
    calibration = calibrate(trigger.search, clean.search)
    found, in_base = read_probe(trigger, clean), base.read(layer, _TRIGGER, _CLEAN)
    return ProbeLayer(
        layer=layer + 1,
        auroc=found.auroc,
        auroc_random_strings=finetuned.read(layer, _TRIGGER, _RANDOM).auroc,
        auroc_random_clean=finetuned.read(layer, _RANDOM, _CLEAN).auroc,
        auroc_random_direction=best_random_direction(trigger, clean, num_directions, generator),
        auroc_decoy=max(finetuned.read(layer, d, _RANDOM).auroc for d in sides.decoys),
        accuracy=accuracy(trigger, clean, calibration.threshold),
        base_auroc=in_base.auroc,
        base_auroc_random_strings=base.read(layer, _TRIGGER, _RANDOM).auroc,
        separation=found.separation,
        base_separation=in_base.separation,
        search_separation=calibration.separation,
        decoy_gain=max(_gain(sides, layer, d) for d in sides.decoys),
    )


def _gain(sides: _Sides, layer: int, inserted: str) -> float:
    own, in_base = (s.read(layer, inserted, _CLEAN).separation for s in (sides.finetuned, sides.base))
    return own - in_base
