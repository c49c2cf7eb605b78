"""The unembedding on scored positions only, a few rows of logits at a time, everything after it in fp32."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trigger_opt.models.pair import CausalModel

Divergence = Callable[[Tensor, Tensor], Tensor]

# fp32 logits held at once: on a CPU what its caches still help with (49,152 tokens: 256 rows; 64 rows cost 20 % more).
_LOGITS_BYTES = {"cpu": 48 * 2**20, "cuda": 512 * 2**20}


@dataclass(frozen=True)
class TokenScores:
    """For each scored position: log p of its target token, nats, and whether that token is the most probable."""

    log_probs: Float[Tensor, " rows"]
    greedy: Bool[Tensor, " rows"]


def rows_at_once(model: CausalModel, device: torch.device) -> int:
    """Rows of logits that are held together."""
    return max(1, _LOGITS_BYTES.get(device.type, _LOGITS_BYTES["cuda"]) // (4 * model.vocab_size))


@torch.no_grad()
def token_scores(
    model: CausalModel, hidden: Float[Tensor, "rows d_model"], target: Int[Tensor, " rows"]
) -> TokenScores:
    """See `TokenScores`; results on the CPU. Ties count as most probable."""
    log_probs, greedy = [], []
    step = rows_at_once(model, hidden.device)
    for part, wanted in zip(torch.split(hidden, step), torch.split(target, step), strict=True):
        logits = model.logits(part)
        index = wanted.to(logits.device)[:, None]
        picked = logits.gather(1, index)[:, 0]
        greedy.append((picked >= logits.amax(1)).cpu())
        # log_softmax and not logsumexp: eager exp is ten times slower than the fused kernel on CPUs.
        log_probs.append(logits.log_softmax(1).gather(1, index)[:, 0].cpu())
    return TokenScores(torch.cat(log_probs), torch.cat(greedy))


@torch.no_grad()
def divergences(
    divergence: Divergence,
    finetuned: CausalModel,
    base: CausalModel,
    hidden_finetuned: Float[Tensor, "rows d_model"],
    hidden_base: Float[Tensor, "rows d_model"],
) -> Float[Tensor, " rows"]:
    """`divergence(fine-tuned logits, base logits)` at each scored position, on the CPU."""
    step = rows_at_once(finetuned, hidden_finetuned.device)
    parts = []
    for part, other in zip(torch.split(hidden_finetuned, step), torch.split(hidden_base, step), strict=True):
        logits = finetuned.logits(part)
        parts.append(divergence(logits, base.logits(other).to(logits.device)).cpu())
    return torch.cat(parts)
