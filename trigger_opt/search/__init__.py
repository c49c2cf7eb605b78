"""Discrete search for trigger strings: greedy coordinate gradient, and random search to keep it honest.

Nothing here knows a transformer: a search sees a `Scorer` and a check of which token strings may be used.
"""

from trigger_opt.search.health import gradient_health
from trigger_opt.search.loop import Found, NoValidStringError, Scorer, SearchSettings, Seeds, Step, Validity
from trigger_opt.search.strategies import GCG, RandomSearch

__all__ = [
    "GCG",
    "Found",
    "NoValidStringError",
    "RandomSearch",
    "Scorer",
    "SearchSettings",
    "Seeds",
    "Step",
    "Validity",
    "gradient_health",
]
