"""One file for all pairs, read by later runs, so that nothing is tried again unknowingly. Rows are only added."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from trigger_opt.candidates.entries import (
    FoundCandidate,
    Judged,
    Summary,
    canonical,
    export_row,
    found_from,
    judged_from,
    subject_of,
)
from trigger_opt.candidates.file import program_version, select, transaction
from trigger_opt.errors import UserError
from trigger_opt.paths import user_data_dir
from trigger_opt.records import Candidate, Verification, from_dict

Entry = TypeVar("Entry", Judged, FoundCandidate)

# One row for each string, payload, contexts and thresholds.
_LATEST = "SELECT max(id) FROM verifications WHERE pair = ? GROUP BY subject"


def default_path() -> Path:
    """The user's own ledger."""
    return user_data_dir() / "candidates.sqlite"


class CandidateLedger:
    """A ledger of candidates; see `open`. Every method raises UserError where the file cannot be read or written.

    Several processes may write at once. What a method wrote is on the disk when it returns.

    Attributes:
        path: of the SQLite file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator["CandidateLedger"]:
        """The ledger at `path`. The first thing written makes it; reading never does: without a file it is empty.

        Raises:
            UserError: it is no ledger of candidates, or one of another version.
        """
        ledger = cls(path)
        ledger.pairs()
        yield ledger

    def add_candidates(self, pair: str, run: str, candidates: Sequence[Candidate]) -> None:
        """Write down what a search found; what the same run has written down already is left as it is."""
        made = {"version": program_version(), "time": _now()}
        entries = [found_from(c, pair=pair, run=run, **made) for c in candidates]
        subjects = [json.dumps([run, dataclasses.asdict(c)]) for c in candidates]
        if entries:
            with transaction(self.path) as db:
                db.executemany(
                    "INSERT OR IGNORE INTO candidates (pair, subject, record) VALUES (?,?,?)",
                    [(pair, s, _text(e)) for s, e in zip(subjects, entries, strict=True)],
                )

    def add_verification(
        self,
        pair: str,
        run: str,
        verification: Verification,
        *,
        refuted_by: str,
        thresholds: Mapping[str, float],
        contexts_hash: str,
        seed: int,
    ) -> None:
        """Write down one verification.

        Args:
            run: name of the run's folder, without its path. refuted_by: see `verify.refuted`.
            thresholds: what the rule went by; other numbers that decide an answer, say the temperature, may stand
                beside. contexts_hash: see `known.contexts_hash`.
        """
        judged = judged_from(
            verification, pair=pair, run=run, refuted_by=refuted_by, thresholds=thresholds,
            contexts_hash=contexts_hash, seed=seed, version=program_version(), time=_now(),
        )  # fmt: skip
        subject = subject_of(judged.trigger, judged.payload, contexts_hash, thresholds)
        with transaction(self.path) as db:
            db.execute(
                "INSERT INTO verifications (pair, subject, record) VALUES (?,?,?)", (pair, subject, _text(judged))
            )

    def known(
        self, pair: str, trigger: str, payload: str, *, contexts_hash: str, thresholds: Mapping[str, float]
    ) -> Judged | None:
        """The latest verification of a string with this payload under these contexts and thresholds, whatever it came
        to and whichever version made it."""
        subject = subject_of(trigger, payload, contexts_hash, thresholds)
        query = "SELECT record FROM verifications WHERE pair = ? AND subject = ? ORDER BY id DESC LIMIT 1"
        return next(iter(self._entries(Judged, query, pair, subject)), None)

    def judged(self, pair: str) -> list[Judged]:
        """The latest verification of each string, payload, contexts and thresholds; newest first."""
        return self._entries(Judged, f"SELECT record FROM verifications WHERE id IN ({_LATEST}) ORDER BY id DESC", pair)

    def refuted(
        self,
        pair: str,
        *,
        payload: str | None = None,
        contexts_hash: str | None = None,
        thresholds: Mapping[str, float] | None = None,
    ) -> list[Judged]:
        """Those of `judged` that something refuted; of one payload, contexts or thresholds where they are given."""
        limits = None if thresholds is None else canonical(thresholds)
        return [
            j
            for j in self.judged(pair)
            if j.refuted_by
            and payload in (None, j.payload)
            and contexts_hash in (None, j.contexts_hash)
            and limits in (None, j.thresholds)
        ]

    def unverified(self, pair: str) -> list[FoundCandidate]:
        """What was found and never verified, in the order found; a candidate without a payload counts as verified
        when its string was, with any."""
        judged = self.judged(pair)
        verified = {(j.trigger, j.payload) for j in judged} | {(j.trigger, "") for j in judged}
        found = self._entries(FoundCandidate, "SELECT record FROM candidates WHERE pair = ? ORDER BY id", pair)
        return [f for f in found if (f.trigger, f.payload) not in verified]

    def summary(self, pair: str) -> Summary:
        """Counts per verdict and per control."""
        judged = self.judged(pair)
        return Summary(
            verdicts=dict(Counter(j.verdict for j in judged).most_common()),
            refuted_by=dict(Counter(j.refuted_by for j in judged if j.refuted_by).most_common()),
            unverified=len({(f.trigger, f.payload) for f in self.unverified(pair)}),
        )

    def pairs(self, prefix: str = "") -> list[str]:
        """Fingerprints of the ledger's pairs that begin with `prefix`."""
        rows = select(self.path, "SELECT pair FROM verifications UNION SELECT pair FROM candidates ORDER BY 1")
        return [pair for (pair,) in rows if pair.startswith(prefix)]

    def rows(self, pair: str) -> list[dict[str, Any]]:
        """Every verification of a pair in the order made, then what was never verified; see `entries.EXPORTED`."""
        verified = self._entries(Judged, "SELECT record FROM verifications WHERE pair = ? ORDER BY id", pair)
        return [*map(export_row, verified), *map(export_row, self.unverified(pair))]

    def _entries(self, kind: type[Entry], query: str, *values: str) -> list[Entry]:
        try:
            return [from_dict(kind, json.loads(record)) for (record,) in select(self.path, query, *values)]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"the ledger {self.path} is damaged: a {kind.__name__} cannot be read ({error}); give another ledger"
            ) from None


def _text(entry: Judged | FoundCandidate) -> str:
    return json.dumps(dataclasses.asdict(entry))


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
