"""Divergences between two next-token distributions given as logits. Pure, in fp32, in nats.

All take logits (…, vocab) and reduce the last axis. KL is unbounded; JS is at most ln 2, TV at most 1, so a
few absurdly unlikely tokens cannot carry them.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def js_divergence(
    finetuned: Float[Tensor, "*batch vocab"], base: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence, within [0, ln 2] (Lin 1991, IEEE Trans. Inf. Theory 37)."""
    p, q = finetuned.float().log_softmax(-1), base.float().log_softmax(-1)
    middle = torch.logaddexp(p, q) - math.log(2)
    halves = p.exp() * (p - middle) + q.exp() * (q - middle)
    return 0.5 * halves.sum(-1)


def tv_distance(
    finetuned: Float[Tensor, "*batch vocab"], base: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """Total variation, within [0, 1]: half the absolute difference of the probabilities."""
    return 0.5 * (finetuned.float().softmax(-1) - base.float().softmax(-1)).abs().sum(-1)


def kl_divergence(
    finetuned: Float[Tensor, "*batch vocab"], base: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(finetuned || base), unbounded: for comparison with published searches, not for use."""
    p, q = finetuned.float().log_softmax(-1), base.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def sequence_log_prob(
    logits: Float[Tensor, "batch scored vocab"], target_ids: Int[Tensor, " scored"]
) -> Float[Tensor, " batch"]:
    """log p of the whole target sequence, teacher-forced: logits[:, t] predict target_ids[t]."""
    log_probs = logits.float().log_softmax(-1)
    index = target_ids.view(1, -1, 1).expand(len(logits), -1, 1)
    return log_probs.gather(-1, index)[..., 0].sum(-1)
