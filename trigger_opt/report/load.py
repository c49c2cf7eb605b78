"""Everything a report is made from, read once from one run folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trigger_opt.candidates import Judged
from trigger_opt.errors import UserError
from trigger_opt.records import (
    TRANSFER_VERDICTS,
    VERDICTS,
    Ablation,
    BuiltTrigger,
    Candidate,
    Completion,
    GradientHealth,
    Hypothesis,
    MovedToken,
    NullControl,
    NullResult,
    PairIdentity,
    ProbeResult,
    Rescored,
    RunInfo,
    SearchCost,
    SearchStep,
    TensorFamilyDiff,
    TransferAnswer,
    TransferOutcome,
    Verdict,
    Verification,
    as_held,
    read_record,
    read_records,
)
from trigger_opt.report.jobs import Collection, Provenance, SweepJob

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """The records of one run.

    None means the file is missing, so its stage was not run; an empty list means the stage ran and found nothing.
    """

    folder: str
    verdict: Verdict
    info: RunInfo | None
    identity: PairIdentity | None
    diff: list[TensorFamilyDiff] | None
    hypotheses: list[Hypothesis] | None
    candidates: list[Candidate] | None
    history: list[SearchStep] | None
    verified: list[Verification] | None
    completions: list[Completion] | None
    moved: list[MovedToken] | None = None
    built: list[BuiltTrigger] | None = None
    cost: SearchCost | None = None
    gradient: GradientHealth | None = None
    rescored: list[Rescored] | None = None
    transfer: list[TransferOutcome] | None = None
    transfer_answers: list[TransferAnswer] | None = None
    null: list[NullControl] | None = None
    null_result: NullResult | None = None
    probe: ProbeResult | None = None
    ablation: Ablation | None = None
    known: list[Judged] | None = None
    jobs: list[SweepJob] | None = None
    provenance: list[Provenance] | None = None
    collection: Collection | None = None

    @property
    def built_and_scored(self) -> list[tuple[BuiltTrigger, Candidate]]:
        """The strings that were built up, shortest first for each payload, with what the search made of them."""
        known = {(c.payload, c.trigger): c for c in reversed(self.candidates or [])}
        scored = ((b, known.get((b.payload, b.trigger))) for b in self.built or [])
        return [(b, c) for b, c in scored if c is not None]

    @property
    def name(self) -> str:
        """The experiment's name, or the folder's when `run.json` is missing."""
        return self.info.name if self.info and self.info.name else self.folder

    @property
    def judged(self) -> Verification | None:
        """The verification of the string the verdict names; None when there is none."""
        return self._verification_of(self.verdict.trigger)

    @property
    def others(self) -> list[Verification]:
        """Verified strings the verdict does not name, best first."""
        named = (self.judged, self._verification_of(self.verdict.minimised_trigger))
        return [v for v in self.verified or [] if not any(v is n for n in named)]

    @property
    def unverified(self) -> list[Candidate]:
        """Candidates the search found and verification never judged, best first."""
        judged = {v.trigger for v in self.verified or []} | {v.minimised_from for v in self.verified or []}
        return [c for c in self.candidates or [] if c.trigger not in judged]

    @property
    def one_payload(self) -> bool:
        """Whether every string was tried for the payload the verdict names."""
        return {v.payload for v in self.others} | {c.payload for c in self.unverified} <= {self.verdict.payload}

    def candidate_of(self, verification: Verification) -> Candidate | None:
        """The candidate a verified string was; None when the search did not propose it."""
        same = [c for c in self.candidates or [] if c.trigger == verification.trigger]
        return next((c for c in same if c.payload == verification.payload), next(iter(same), None))

    def _verification_of(self, trigger: str) -> Verification | None:
        if not trigger:
            return None
        same = [v for v in self.verified or [] if v.trigger == trigger]
        return next((v for v in same if v.payload == self.verdict.payload), next(iter(same), None))


def load_run(run_dir: Path) -> RunRecords:
    """All records in `run_dir`.

    Raises:
        UserError: `verdict.json` is missing, it or `transfer.jsonl` names an unknown verdict, or any file present is
            malformed.
    """
    verdict = _verdict(run_dir / "verdict.json")
    verified = _all(run_dir / "verified.jsonl", Verification)
    return RunRecords(
        folder=run_dir.resolve().name,
        verdict=verdict,
        info=_one(run_dir / "run.json", RunInfo),
        identity=_one(run_dir / "identity.json", PairIdentity),
        diff=_all(run_dir / "diff.jsonl", TensorFamilyDiff),
        hypotheses=_hypotheses(run_dir),
        candidates=_all(run_dir / "candidates.jsonl", Candidate),
        history=_all(run_dir / "history.jsonl", SearchStep),
        verified=None if verified is None else as_held(verified, verdict),
        completions=_all(run_dir / "completions.jsonl", Completion),
        cost=_one(run_dir / "cost.json", SearchCost),
        moved=_all(run_dir / "moved.jsonl", MovedToken),
        built=_all(run_dir / "built.jsonl", BuiltTrigger),
        gradient=_one(run_dir / "gradient.json", GradientHealth),
        rescored=_all(run_dir / "rescored.jsonl", Rescored),
        transfer=_transfer(run_dir / "transfer.jsonl"),
        transfer_answers=_all(run_dir / "transfer_answers.jsonl", TransferAnswer),
        null=_all(run_dir / "null.jsonl", NullControl),
        null_result=_one(run_dir / "null.json", NullResult),
        probe=_one(run_dir / "probe.json", ProbeResult),
        ablation=_one(run_dir / "ablation.json", Ablation),
        known=_all(run_dir / "known.jsonl", Judged),
        jobs=_all(run_dir / "jobs.jsonl", SweepJob),
        provenance=_all(run_dir / "provenance.jsonl", Provenance),
        collection=_one(run_dir / "collection.json", Collection),
    )


def _hypotheses(run_dir: Path) -> list[Hypothesis] | None:
    """Those of their own stage, then those that a search on divergence brought out; None where neither ran."""
    found = [_all(run_dir / name, Hypothesis) for name in ("hypotheses.jsonl", "read_off.jsonl")]
    return None if found == [None, None] else [h for part in found for h in part or []]


def _verdict(path: Path) -> Verdict:
    if not path.is_file():
        raise UserError(f"{path} is missing, so there is nothing to report: run the stage verify first")
    verdict = read_record(path, Verdict)
    if verdict.verdict not in VERDICTS:
        allowed = ", ".join(VERDICTS)
        raise UserError(f"{path} says {verdict.verdict!r}; allowed are {allowed}: run the stage verify again")
    return verdict


def _transfer(path: Path) -> list[TransferOutcome] | None:
    outcomes = _all(path, TransferOutcome)
    for outcome in outcomes or []:
        if outcome.verdict not in TRANSFER_VERDICTS:
            allowed = ", ".join(TRANSFER_VERDICTS)
            raise UserError(f"{path} says {outcome.verdict!r}; allowed are {allowed}: run the stage transfer again")
    return outcomes


def _one(path: Path, kind: type[R]) -> R | None:
    return read_record(path, kind) if path.is_file() else None


def _all(path: Path, kind: type[R]) -> list[R] | None:
    return read_records(path, kind) if path.is_file() else None
