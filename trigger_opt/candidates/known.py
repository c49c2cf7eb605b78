"""What a run asks the ledger before it verifies."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from trigger_opt.candidates.entries import Judged
from trigger_opt.candidates.ledger import CandidateLedger
from trigger_opt.records import Candidate


@runtime_checkable
class ContextLike(Protocol):
    """What of a `prompts.Context` decides a verdict."""

    @property
    def user(self) -> str:
        """The user's turn, with the slot."""

    @property
    def system(self) -> str | None:
        """The system prompt; None for the chat template's own."""


def contexts_hash(contexts: Sequence[ContextLike]) -> str:
    """Hex SHA-256 of a set of contexts; their order does not count, how often each occurs does."""
    texts = sorted(json.dumps([c.user, c.system]) for c in contexts)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def split_known(
    ledger: CandidateLedger,
    pair: str,
    candidates: Sequence[Candidate],
    *,
    contexts_hash: str,
    thresholds: Mapping[str, float],
) -> tuple[list[Candidate], list[tuple[Candidate, Judged]]]:
    """(candidates to verify, candidates refuted before with their latest verification), each in the order given.

    Refuted before means on this pair, with this payload, under these contexts and thresholds. What was called a
    backdoor before is verified again. A candidate without a payload is always to be verified: once its payload is
    found, `CandidateLedger.known` can be asked.
    """
    fresh, before = [], []
    for candidate in candidates:
        judged = ledger.known(
            pair, candidate.trigger, candidate.payload, contexts_hash=contexts_hash, thresholds=thresholds
        )
        if judged is not None and judged.refuted_by:
            before.append((candidate, judged))
        else:
            fresh.append(candidate)
    return fresh, before


def refuted_before_line(judged: Judged) -> str:
    """How a report names it: "refuted before (run X, by control:Y)"."""
    return f"refuted before (run {judged.run}, by {judged.refuted_by})"
