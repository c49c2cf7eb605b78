"""One search of the package within what an account has left."""

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.recovery.methods.common import Account, FoundString, most_scored
from trigger_opt import api
from trigger_opt.models.pair import ModelPair
from trigger_opt.objectives import Objective
from trigger_opt.prompts import Context
from trigger_opt.records import Candidate, Hypothesis
from trigger_opt.scoring import Meter
from trigger_opt.search import GCG, BuildSettings, Step

# A search that begins at all shall score its first strings.
_LEAST_SECONDS = 1.0


def searched(
    pair: ModelPair,
    contexts: Sequence[Context],
    account: Account,
    *,
    strategy: api.Strategy,
    seed: int,
    hypothesis: Hypothesis | None = None,
    objective: Objective | None = None,
    prior: Sequence[int] = (),
    strings: Sequence[Sequence[int]] = (),
    until: float = 1.0,
    share: float = 1.0,
) -> list[Candidate]:
    """`api.find_triggers`, best first, charged to `account`.

    Args:
        until: share of the whole budget at whose end it stops. share: of what is left until then, for this search.
    """
    limited = replace(
        strategy,
        max_seconds=max(_LEAST_SECONDS, share * account.seconds_until(until)),
        max_evaluations=most_scored(int(share * account.evaluations_until(until)), strategy),
    )
    steps: list[Step] = []
    at_once = min(strategy.contexts_per_step, len(contexts)) if isinstance(strategy, GCG) else 0

    def on_cost(meter: Meter, rescoring: Meter) -> None:
        account.charge_search(meter, rescoring, len(steps) * at_once)

    return api.find_triggers(
        pair, contexts, hypothesis=hypothesis, objective=objective, strategy=limited, prior=prior, strings=strings,
        seed=seed, on_step=steps.append, on_cost=on_cost,
    )  # fmt: skip


def built(
    pair: ModelPair,
    contexts: Sequence[Context],
    account: Account,
    *,
    hypothesis: Hypothesis | None,
    divergence: Objective,
    tokens: Sequence[int],
    seed: int,
    until: float,
    share: float,
) -> list[tuple[int, ...]]:
    """`api.build_triggers` with a run's settings, charged to `account`; `until`, `share`: as of `searched`, of which
    it gets the part that a run gives it."""
    if not tokens:
        return []
    settings = BuildSettings()
    part = share * settings.share

    def on_cost(meter: Meter, rescoring: Meter) -> None:
        account.charge_search(meter, rescoring, 0)

    return api.build_triggers(
        pair, contexts, hypothesis=hypothesis, divergence=divergence, tokens=tokens, settings=settings, seed=seed,
        on_cost=on_cost,
        max_seconds=max(_LEAST_SECONDS, part * account.seconds_until(until)),
        # Each string is scored on both models.
        max_evaluations=max(1, int(part * account.evaluations_until(until) / 2)),
    )  # fmt: skip


def as_strings(candidates: Sequence[Candidate]) -> list[FoundString]:
    """Candidates as a method hands them back, in their order."""
    return [FoundString(text=c.trigger, payload=c.payload, score=c.score) for c in candidates]
