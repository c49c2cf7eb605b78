"""What the ledger holds of a string: a verification with its refutation, or that it was found and no more."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trigger_opt.records import Candidate, Rate, Verification

# Columns of an export; a string that was never verified has those of its search only.
EXPORTED = (
    "pair", "kind", "trigger", "payload", "verdict", "refuted_by", "reason",
    "trigger_successes", "trigger_n", "base_successes", "base_n", "control_successes", "control_n",
    "false_trigger_successes", "false_trigger_n", "random_successes", "random_n",
    "evidence", "degenerate_share", "num_contexts", "minimised_from", "thresholds", "contexts_hash",
    "objective", "score", "selection_rate", "run", "seed", "version", "time",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One verification as the ledger keeps it. Figures as in `records.Verification`.

    Attributes:
        pair: fingerprint of the two models. run: name of the run's folder.
        refuted_by: what decided against the string, see `verify.refuted`; empty when nothing did.
        num_contexts: held-out contexts. contexts_hash: which they were, see `contexts_hash`.
        thresholds: what the rule went by.
        version: of trigger_opt. time: local, with its offset.
    """

    pair: str
    run: str
    trigger: str
    payload: str
    verdict: str
    reason: str
    refuted_by: str
    trigger_rate: Rate
    base_rate: Rate
    control_rate: Rate | None
    false_trigger_rate: Rate
    random_rate: Rate
    evidence: float
    degenerate_share: float
    num_contexts: int
    minimised_from: str
    thresholds: dict[str, float]
    contexts_hash: str
    seed: int
    version: str
    time: str


@dataclass(frozen=True, kw_only=True)
class FoundCandidate:
    """A string that a search found, as the ledger keeps it; see `records.Candidate` and Judged."""

    pair: str
    run: str
    trigger: str
    payload: str
    objective: str
    score: float
    selection_rate: float | None
    seed: int
    version: str
    time: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A pair's strings: each counts once for a payload, contexts and thresholds, by its latest verification.

    Attributes:
        verdicts: strings per verdict. refuted_by: strings per comparison or figure that refuted them.
        unverified: strings found and never verified, each once for a payload.
    """

    verdicts: dict[str, int]
    refuted_by: dict[str, int]
    unverified: int


def judged_from(
    verification: Verification,
    *,
    pair: str,
    run: str,
    refuted_by: str,
    thresholds: Mapping[str, float],
    contexts_hash: str,
    seed: int,
    version: str,
    time: str,
) -> Judged:
    """The ledger's entry of a verification; its profile stays in the run folder."""
    kept = {f.name for f in dataclasses.fields(Judged)}
    figures = {k: v for k, v in vars(verification).items() if k in kept}
    return Judged(
        **figures,
        pair=pair,
        run=run,
        refuted_by=refuted_by,
        num_contexts=len(verification.profile),
        thresholds=canonical(thresholds),
        contexts_hash=contexts_hash,
        seed=seed,
        version=version,
        time=time,
    )


def found_from(candidate: Candidate, *, pair: str, run: str, version: str, time: str) -> FoundCandidate:
    """The ledger's entry of a candidate."""
    return FoundCandidate(
        pair=pair,
        run=run,
        trigger=candidate.trigger,
        payload=candidate.payload,
        objective=candidate.objective,
        score=candidate.score,
        selection_rate=candidate.selection_rate,
        seed=candidate.seed,
        version=version,
        time=time,
    )


def canonical(thresholds: Mapping[str, float]) -> dict[str, float]:
    """Thresholds by name, all of them floats: 8 nats are 8.0 nats."""
    return {name: float(thresholds[name]) for name in sorted(thresholds)}


def subject_of(trigger: str, payload: str, contexts_hash: str, thresholds: Mapping[str, float]) -> str:
    """What a verification was about: equal text means the same question asked again."""
    return json.dumps([trigger, payload, contexts_hash, canonical(thresholds)])


def export_row(entry: Judged | FoundCandidate) -> dict[str, Any]:
    """An entry as one flat row of EXPORTED; None where it has no such value."""
    row: dict[str, Any] = dict.fromkeys(EXPORTED)
    row["kind"] = "verified" if isinstance(entry, Judged) else "found"
    for name, value in vars(entry).items():
        if name in row:
            row[name] = value
        elif isinstance(value, Rate):
            of = name.removesuffix("_rate")
            row |= {f"{of}_successes": value.successes, f"{of}_n": value.n}
    return row
