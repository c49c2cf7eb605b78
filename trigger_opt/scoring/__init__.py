"""Exact scores of candidate triggers on both models, and divergences between them. Knows nothing of search."""

from trigger_opt.scoring.divergences import js_divergence, kl_divergence, sequence_log_prob, tv_distance
from trigger_opt.scoring.engine import Engine, Gradient, Reduce, Request, Side, Slopes
from trigger_opt.scoring.group import CLOCK, Group, start_group
from trigger_opt.scoring.lanes import beside
from trigger_opt.scoring.likelihood import string_log_likelihoods
from trigger_opt.scoring.meter import Meter, matmul_rate
from trigger_opt.scoring.pass_size import out_of_memory
from trigger_opt.scoring.plain import AnyEngine, PlainEngine, engine_for, may_run_beside

__all__ = [
    "CLOCK",
    "AnyEngine",
    "Engine",
    "Gradient",
    "Group",
    "Meter",
    "PlainEngine",
    "Reduce",
    "Request",
    "Side",
    "Slopes",
    "beside",
    "engine_for",
    "js_divergence",
    "kl_divergence",
    "matmul_rate",
    "may_run_beside",
    "out_of_memory",
    "sequence_log_prob",
    "start_group",
    "string_log_likelihoods",
    "tv_distance",
]
