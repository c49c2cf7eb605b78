"""What earlier runs on the same pair found out: asked before strings are verified, told after each."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from trigger_opt.candidates import CandidateLedger, contexts_hash, default_path, split_known
from trigger_opt.models.fingerprint import pair_fingerprint
from trigger_opt.progress import say
from trigger_opt.records import Candidate, Completion, Verification, write_records
from trigger_opt.run_folder import run_name
from trigger_opt.session import Session
from trigger_opt.verify.refuted import refuted_by

KNOWN = "known.jsonl"


def open_ledger(session: Session) -> CandidateLedger | None:
    """The ledger of a run; None for a control's, whose search has to be the suspect's, whatever was tried before on
    either, and where none is to be kept.

    Raises:
        UserError: the file is no ledger of candidates.
    """
    candidates = session.config.candidates
    if not candidates.keep or session.within:
        return None
    with CandidateLedger.open(default_path() if candidates.ledger is None else Path(candidates.ledger)) as ledger:
        return ledger


class Earlier:
    """The ledger of candidates as one run sees it."""

    def __init__(self, session: Session) -> None:
        """
        Raises:
            UserError: see `open_ledger`.
        """
        self._session = session
        model = session.config.model
        self._ledger = open_ledger(session)
        if self._ledger is None:
            return
        # Held otherwise, a model may answer otherwise.
        fingerprint = pair_fingerprint(session.files[0], session.files[1])
        self._pair = f"{fingerprint}:{model.dtype}:{model.quantization}"
        self._run = run_name(session.folder.path.resolve())
        self._contexts = contexts_hash(session.held_out)
        settings = session.config.verify
        self._thresholds: dict[str, float] = asdict(settings.thresholds)
        self._question = self._thresholds | {
            "temperature": settings.temperature,
            "repeats": settings.repeats,
            "random_strings": settings.random_strings,
            "max_new_tokens": settings.max_new_tokens,
        }

    def fresh(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates that no earlier run refuted under the same contexts and rule; all of them where none is left.
        Those left out are written into the run folder, and said."""
        if self._ledger is None or not candidates:
            return list(candidates)
        self._ledger.add_candidates(self._pair, self._run, candidates)
        if not self._session.config.candidates.skip:
            return list(candidates)
        fresh, before = split_known(
            self._ledger, self._pair, candidates, contexts_hash=self._contexts, thresholds=self._question
        )
        if not before:
            return fresh
        write_records(self._session.folder.file(KNOWN), [judged for _, judged in before])
        runs = ", ".join(sorted({judged.run for _, judged in before})[:3])
        what = "none is left, so they are verified again" if not fresh else "others are verified instead"
        say(f"{len(before)} of {len(candidates)} strings were refuted before, in {runs}; {what}")
        return fresh or list(candidates)

    def note(self, verification: Verification, completions: Sequence[Completion]) -> None:
        """Write down what became of a string."""
        if self._ledger is None:
            return
        self._ledger.add_verification(
            self._pair,
            self._run,
            verification,
            refuted_by=refuted_by(verification, self._thresholds, completions=completions),
            thresholds=self._question,
            contexts_hash=self._contexts,
            seed=self._session.config.seed,
        )
