"""How likely a model is to write a string, for many strings at once."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trigger_opt.models.pair import CausalModel
from trigger_opt.scoring.forward import Trunk, cached_keys, expanded_cache
from trigger_opt.scoring.pass_size import out_of_memory

# Strings in one pass: each may stand behind a trunk of its own copy.
_AT_ONCE = 16


@torch.no_grad()
def string_log_likelihoods(
    model: CausalModel, before: Sequence[int], strings: Sequence[Sequence[int]], *, plain: bool = False
) -> list[float]:
    """log p of each whole string behind `before`, nats; where that is empty, of all but its first token.

    Args:
        plain: compute every string from its beginning, for a model without a cache.
    """
    out = [0.0] * len(strings)
    head = list(before[:-1])
    trunk = {} if plain else cached_keys(model, head)
    for length in {len(s) for s in strings}:
        alike = [i for i, s in enumerate(strings) if len(s) == length]
        rows, at_once = [[*before[-1:], *strings[i]] for i in alike], _AT_ONCE
        done = 0
        while done < len(rows) and len(rows[0]) > 1:
            part = rows[done : done + at_once]
            try:
                nats = _summed(model, head, part, trunk)
            except RuntimeError as error:
                if not out_of_memory(error) or at_once == 1:
                    raise
                at_once //= 2
                continue
            for i, value in zip(alike[done : done + at_once], nats.tolist(), strict=True):
                out[i] = value
            done += len(part)
    return out


def _summed(
    model: CausalModel, head: Sequence[int], rows: Sequence[Sequence[int]], trunk: Trunk
) -> Float[Tensor, " rows"]:
    """log p of each row but for its first token, behind `head`, of which `trunk` holds the keys if it holds any."""
    ids = torch.tensor(rows, device=model.device)
    inputs, said = ids[:, :-1], ids[:, 1:]
    if trunk:
        cache = expanded_cache(trunk, len(rows))
        hidden = model.hidden(input_ids=inputs, past_key_values=cache, use_cache=True).last_hidden_state
    else:
        start = torch.tensor([head], dtype=torch.long, device=model.device).expand(len(rows), -1)
        hidden = model.hidden(input_ids=torch.cat([start, inputs], 1), use_cache=False).last_hidden_state
    width = said.shape[1]
    logits = model.logits(hidden[:, -width:].reshape(-1, hidden.shape[-1]))
    said = said.reshape(-1, 1).to(logits.device)
    return (logits.gather(-1, said)[:, 0] - logits.logsumexp(-1)).view(len(rows), width).sum(1)
