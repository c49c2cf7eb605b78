"""Random swaps on what ours falls back to: Jensen-Shannon divergence at the first response token, on contexts drawn
anew each step. What a gradient is worth shows against it."""

from collections.abc import Sequence

from benchmarks.recovery.methods.common import Account, Budget, MethodResult
from benchmarks.recovery.methods.searching import as_strings, searched
from trigger_opt.models.pair import ModelPair
from trigger_opt.prompts import Context
from trigger_opt.search import RandomSearch

# More than any budget lasts for.
_STEPS = 1_000_000
_KEPT = 10


def run(pair: ModelPair, contexts: Sequence[Context], *, budget: Budget, seed: int) -> MethodResult:
    """Six tokens, two restarts, as in a run. Its statistic is the best divergence over all contexts, nats.

    Evaluations: candidates scored, times two models, fp32 rescoring included.
    """
    account = Account(budget)
    found = searched(pair, contexts, account, strategy=RandomSearch(num_steps=_STEPS, join=1), seed=seed)
    return account.result(as_strings(found[:_KEPT]), found[0].score if found else 0.0)
