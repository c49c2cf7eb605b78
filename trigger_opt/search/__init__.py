"""Discrete search for trigger strings: greedy coordinate gradient, and random search to keep it honest.

Nothing here knows a transformer: a search sees a `Scorer` and a check of which token strings may be used.
"""

from trigger_opt.search.build import BuildSettings, build_up
from trigger_opt.search.divergence import DivergenceSettings
from trigger_opt.search.health import gradient_health
from trigger_opt.search.loop import NoValidStringError, SearchSettings
from trigger_opt.search.protocol import Found, OnState, Scorer, SearchState, Seeds, Step, Validity, ignore_state
from trigger_opt.search.shortlist import Built
from trigger_opt.search.spell import spell_out
from trigger_opt.search.strategies import GCG, RandomSearch

__all__ = [
    "GCG",
    "BuildSettings",
    "Built",
    "DivergenceSettings",
    "Found",
    "NoValidStringError",
    "OnState",
    "RandomSearch",
    "Scorer",
    "SearchSettings",
    "SearchState",
    "Seeds",
    "Step",
    "Validity",
    "build_up",
    "gradient_health",
    "ignore_state",
    "spell_out",
]
