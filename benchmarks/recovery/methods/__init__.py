"""The methods compared, one small module each. They get a pair, contexts and a budget, and must not know the zoo: a
test looks at what they import."""

from benchmarks.recovery.methods import gcg_kl, leak, ours, random_search, single_token
from benchmarks.recovery.methods.common import Budget, FoundString, Method, MethodResult

METHODS: dict[str, Method] = {
    "trigger_opt": ours.run,
    "gcg_kl": gcg_kl.run,
    "random": random_search.run,
    "single_token": single_token.run,
    "leak": leak.run,
}

__all__ = ["METHODS", "Budget", "FoundString", "Method", "MethodResult"]
