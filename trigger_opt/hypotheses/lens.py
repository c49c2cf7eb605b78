"""Which tokens does the change of the weights move most, and what do strings of them bring out?

Each token is put into the slot by itself, and the hidden states at its own place are compared: fine-tuned against base.
What was trained in moves the tokens of the trigger, what resembles them, and the payload's own words more than others,
long before a single one of them changes the answer. Three things are taken out. The change that all tokens share is
the style's. Some tokens are moved by any change of the weights: the same is measured under a random one of the same
norms, tensor by tensor, and only the ratio counts. And layers differ in scale: each is standardised over the tokens.

After the reading of activation differences on unrelated text (Minder et al. 2025, arXiv 2510.13900), here for each
token, against a placebo.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trigger_opt.hypotheses.amplify import amplified
from trigger_opt.hypotheses.scan import draw_strings
from trigger_opt.models.pair import CausalModel, ModelPair
from trigger_opt.prompts import TokenizedContext
from trigger_opt.scoring.forward import cached_keys, expanded_cache

_BATCH = 512
# Evenly over the depth. The base's states of all tokens are kept on the CPU meanwhile.
_LAYERS = 10
# Strings are drawn from the best few, the best hundred and the best hundreds alike: where the trigger's tokens stand is
# not known, and small pools put several of them into one string.
_POOLS = (32, 128, 512)


def token_shifts(
    pair: ModelPair,
    context: TokenizedContext,
    tokens: Sequence[int],
    *,
    generator: torch.Generator,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Float[Tensor, " token"] | None:
    """How much more than a random change of the same norms the fine-tuning moves each token where it stands: the log of
    the ratio, in robust standard deviations over `tokens`, mean over layers. A typical token has 0.

    None where there is nothing to compare: no weight that is held in numbers changed (quantised ones are not), no
    hidden state moved, or the model does not hand its hidden states out. Of a quantised model only what is left in
    numbers is shuffled for the placebo.

    Args:
        context: tokens stand in its slot, and what is right of it does not matter.
        tokens: in random order: what they share is taken from the first 512.
        on_progress: gets the number of tokens that went through a model so far, three times as many as there are.
    """
    if next(pair.finetuned.weight_changes(pair.base), None) is None:
        return None
    batches = [tokens[start : start + _BATCH] for start in range(0, len(tokens), _BATCH)]
    done = 0

    def states(model: CausalModel) -> Iterator[Tensor]:
        nonlocal done
        left = [] if pair.plain else [cached_keys(model, context.left)]
        for batch in batches:
            trunk = expanded_cache(left[0], len(batch)) if left else None
            yield _states(model, context.left, torch.tensor(batch), trunk)
            done += len(batch)
            on_progress(done)

    # Only the base's are kept: the others are compared batch by batch.
    base = list(states(pair.base))
    if not base[0].shape[1]:
        return None
    moved = _moved(states(pair.finetuned), base)
    with amplified(pair, 1.0, placebo=generator) as placebo:
        at_random = _moved(states(placebo), base)
    ratio = (moved / at_random).log()
    # Not those below the lowest layer that was changed; nor where half precision overflowed.
    ratio = ratio[:, ratio.isfinite().all(0)]
    if not ratio.shape[1]:
        return None
    centred = ratio - ratio.median(0).values
    spread = 1.4826 * centred.abs().median(0).values
    return (centred / spread.clamp(min=1e-6)).mean(1)


def lens_strings(
    pair: ModelPair,
    contexts: Sequence[TokenizedContext],
    ranked: Sequence[int],
    allowed: Bool[Tensor, " vocab"],
    *,
    count: int,
    length: int,
    generator: torch.Generator,
) -> list[tuple[int, ...]]:
    """About `count` distinct strings of `length` tokens that were moved most (`ranked`, most first) and could be typed
    in all of `contexts`, a third of them each from the first 32, 128 and 512."""
    made: dict[tuple[int, ...], None] = {}
    for number, pool in enumerate(_POOLS):
        few = torch.zeros_like(allowed)
        few[list(ranked[:pool])] = True
        wanted = (count - len(made)) // (len(_POOLS) - number)
        drawn = draw_strings(pair, contexts, few & allowed, count=wanted, length=length, generator=generator)
        made |= dict.fromkeys(drawn)
    return list(made)


@torch.no_grad()
def _states(
    model: CausalModel, left: Sequence[int], tokens: Int[Tensor, " batch"], trunk: object | None
) -> Float[Tensor, "batch layer d_model"]:
    """Hidden states at each token after `left`, of a few layers, in the model's precision, on the CPU."""
    ids = tokens[:, None].to(model.device)
    if trunk is None:
        before = torch.tensor([list(left)], dtype=torch.long, device=model.device).expand(len(tokens), -1)
        ids = torch.cat([before, ids], 1)
    # A cache of the beginning, or none at all for models that are computed plainly.
    cache = {"use_cache": False} if trunk is None else {"past_key_values": trunk, "use_cache": True}
    # Code of its own may not know of hidden states.
    layers = (model.hidden(input_ids=ids, output_hidden_states=True, **cache).hidden_states or ())[1:]
    if not layers:
        return torch.empty(len(tokens), 0, 0)
    chosen = sorted({round((n + 1) * len(layers) / _LAYERS) - 1 for n in range(_LAYERS)} - {-1})
    return torch.stack([layers[n][:, -1].cpu() for n in chosen], 1)


def _moved(states: Iterator[Tensor], base: Sequence[Tensor]) -> Float[Tensor, "token layer"]:
    """Norm of each relative change, less what the first batch's tokens share."""
    norms = []
    shared: Tensor | None = None
    for made, before in zip(states, base, strict=True):
        change = (made.float() - before.float()) / before.float().norm(dim=-1, keepdim=True)
        shared = change.mean(0) if shared is None else shared
        norms.append((change - shared).norm(dim=-1))
    return torch.cat(norms)
