"""An engine's state between two calls, in plain values and tensors.

Scores do not depend on it but for their last bits: a trunk computed in another pass is rounded otherwise. With the
state, a search that goes on after an interruption ends as one that was never interrupted.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from trigger_opt.scoring.forward import Trunk, continued
from trigger_opt.scoring.meter import Meter
from trigger_opt.scoring.pass_size import PassSize

Key = tuple[Any, int]
"""(side, context's number)."""
Left = Callable[[Any, int], Trunk]
"""The trunk of a context's beginning on one side."""


def trunks_state(trunks: Mapping[Key, Trunk], left: Left) -> dict[Key, Trunk]:
    """What each trunk holds beyond its context's beginning, which is computed again in the same way whenever."""
    kept = {}
    for key, trunk in trunks.items():
        begun = left(*key)
        lengths = {n: begun[n][0].shape[1] if begun else 0 for n in trunk}
        # A slice alone would be written with all that it is a slice of.
        kept[key] = {n: (k[:, lengths[n] :].clone(), v[:, lengths[n] :].clone()) for n, (k, v) in trunk.items()}
    return kept


def trunks_from(state: Mapping[Key, Trunk], left: Left, devices: Mapping[Any, torch.device]) -> dict[Key, Trunk]:
    """The trunks that `trunks_state` was given, on the devices of this process; `devices`: each side's, where a context
    has no beginning whose own to take."""
    trunks = {}
    for key, own in state.items():
        begun = left(*key)
        places = {n: begun[n][0].device if begun else devices[key[0]] for n in own}
        moved = {n: (k.to(places[n]), v.to(places[n])) for n, (k, v) in own.items()}
        trunks[key] = continued(begun, moved, slice(None))
    return trunks


def restore_meter(meter: Meter, state: Mapping[str, Any]) -> None:
    """Go on counting from there."""
    for name, value in state.items():
        setattr(meter, name, value)


def sizes_state(sizes: Mapping[Any, PassSize]) -> dict[Any, dict[str, int]]:
    """What is remembered of each side's passes."""
    return {side: asdict(size) for side, size in sizes.items()}


def restore_sizes(sizes: Mapping[Any, PassSize], state: Mapping[Any, Mapping[str, int]]) -> None:
    """Remember what was remembered: other passes would be rounded otherwise."""
    for side, size in sizes.items():
        for name, value in state[side].items():
            setattr(size, name, value)
