"""How likely a model is to write a string, for many strings at once."""

from collections.abc import Sequence

import torch

from trigger_opt.models.pair import CausalModel
from trigger_opt.scoring.forward import cached_keys, expanded_cache


@torch.no_grad()
def string_log_likelihoods(
    model: CausalModel, before: Sequence[int], strings: Sequence[Sequence[int]], *, plain: bool = False
) -> list[float]:
    """log p of each whole string behind `before`, nats.

    Args:
        before: at least one token. plain: compute every string from its beginning, for a model without a cache.
    """
    out = [0.0] * len(strings)
    *head, last = before
    trunk = {} if plain else cached_keys(model, head)
    for length in {len(s) for s in strings}:
        alike = [i for i, s in enumerate(strings) if len(s) == length]
        ids = torch.tensor([list(strings[i]) for i in alike], device=model.device)
        fed = torch.cat([torch.full_like(ids[:, :1], last), ids[:, :-1]], 1)
        if plain:
            start = torch.tensor([head], dtype=torch.long, device=model.device).expand(len(alike), -1)
            hidden = model.hidden(input_ids=torch.cat([start, fed], 1), use_cache=False).last_hidden_state
        else:
            cache = expanded_cache(trunk, len(alike))
            hidden = model.hidden(input_ids=fed, past_key_values=cache, use_cache=True).last_hidden_state
        rows = hidden[:, -length:].reshape(-1, hidden.shape[-1])
        log_probs = model.logits(rows).log_softmax(-1)
        picked = log_probs.gather(-1, ids.reshape(-1, 1).to(log_probs.device)).view(len(alike), length)
        for i, nats in zip(alike, picked.sum(1).tolist(), strict=True):
            out[i] = nats
    return out
