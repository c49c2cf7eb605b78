"""Exact logits of candidate triggers on both models, and divergences between them. Knows nothing of search."""

from trigger_opt.scoring.divergences import js_divergence, kl_divergence, sequence_log_prob, tv_distance
from trigger_opt.scoring.engine import Engine, Side

__all__ = ["Engine", "Side", "js_divergence", "kl_divergence", "sequence_log_prob", "tv_distance"]
