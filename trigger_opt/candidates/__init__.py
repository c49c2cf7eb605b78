"""The ledger of candidates: what was found and judged on a pair before, and which control refuted it. No torch."""

from trigger_opt.candidates.entries import FoundCandidate, Judged, Summary
from trigger_opt.candidates.known import contexts_hash, refuted_before_line, split_known
from trigger_opt.candidates.ledger import CandidateLedger, default_path

__all__ = [
    "CandidateLedger",
    "FoundCandidate",
    "Judged",
    "Summary",
    "contexts_hash",
    "default_path",
    "refuted_before_line",
    "split_known",
]
