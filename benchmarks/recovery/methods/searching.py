"""One search of the package within what an account has left."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.recovery.methods.common import Account, FoundString, most_scored
from trigger_opt import api
from trigger_opt.models.pair import ModelPair
from trigger_opt.prompts import Context
from trigger_opt.records import Candidate, Hypothesis
from trigger_opt.scoring import Meter
from trigger_opt.search import GCG, BuildSettings, Step

# A search that begins at all shall score its first strings.
_LEAST_SECONDS = 1.0
# What four characters took on one processor (experiments/LOG.md); with less the search does better without.
_LEAST_SPELLING = 60.0


def searched(
    pair: ModelPair,
    contexts: Sequence[Context],
    account: Account,
    *,
    strategy: api.Strategy,
    seed: int,
    hypothesis: Hypothesis | None = None,
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
        pair, contexts, hypothesis=hypothesis, strategy=limited, prior=prior, strings=strings, seed=seed,
        on_step=steps.append, on_cost=on_cost,
    )  # fmt: skip


def built(
    pair: ModelPair,
    contexts: Sequence[Context],
    account: Account,
    *,
    hypothesis: Hypothesis | None,
    tokens: Sequence[int],
    seed: int,
    until: float,
    share: float,
) -> list[tuple[int, ...]]:
    """`api.spell_triggers` and `api.build_triggers` with a run's settings, charged to `account`; `until`, `share`: as
    of `searched`, of which they get the part that a run gives them."""
    settings = BuildSettings()
    part = share * settings.share

    def on_cost(meter: Meter, rescoring: Meter) -> None:
        account.charge_search(meter, rescoring, 0)

    outset = account.seconds, account.evaluations
    # Each string is scored on both models.
    whole = part * account.seconds_until(until), part * account.evaluations_until(until)

    def left(share: float) -> dict[str, Any]:
        return {
            "max_seconds": max(_LEAST_SECONDS, share * whole[0] - (account.seconds - outset[0])),
            "max_evaluations": max(1, int((share * whole[1] - (account.evaluations - outset[1])) / 2)),
        }

    found: list[tuple[int, ...]] = []
    spelling = 0.5 if tokens else 1.0
    if hypothesis is not None and spelling * whole[0] >= _LEAST_SPELLING:
        found += api.spell_triggers(
            pair, contexts, hypothesis=hypothesis, settings=settings, seed=seed, on_cost=on_cost,
            **left(spelling),
        )  # fmt: skip
    if tokens:
        found += api.build_triggers(
            pair, contexts, hypothesis=hypothesis, tokens=tokens, settings=settings, seed=seed, on_cost=on_cost,
            **left(1.0),
        )  # fmt: skip
    return list(dict.fromkeys(found))


def as_strings(candidates: Sequence[Candidate]) -> list[FoundString]:
    """Candidates as a method hands them back, in their order."""
    return [FoundString(text=c.trigger, payload=c.payload, score=c.score) for c in candidates]
