"""The candidates of many jobs as one list: each string once, with who found it."""

import dataclasses
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trigger_opt.errors import UserError
from trigger_opt.records import Candidate, from_dict
from trigger_opt.report.jobs import Finding, Provenance

_FIELDS = {f.name for f in dataclasses.fields(Candidate)}
_NEEDED = {f.name for f in dataclasses.fields(Candidate) if f.default is f.default_factory is dataclasses.MISSING}


@dataclass(frozen=True, kw_only=True)
class Tally:
    """One job's candidates: how many, and the best's score and selection rate; None of none."""

    count: int
    best_score: float | None
    selection_rate: float | None


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A string once, as its best finding has it, and who found it."""

    candidate: Candidate
    provenance: Provenance


@dataclass(slots=True)
class _String:
    """One string of one payload.

    Attributes:
        jobs, lines: who found it, and its record there as it stands in the file: a third of the memory of what is read
            from it. best: number of the best of them.
        rate, score: of the best. scale: under which of several objectives that score was measured.
    """

    jobs: tuple[str, ...]
    lines: tuple[bytes, ...]
    rate: float
    score: float
    scale: str
    best: int = 0


class Merge:
    """Takes the candidates of one job after another. Holds each string once, in about 1.3 kB.

    Attributes:
        strings: taken, of all jobs together.
    """

    def __init__(self) -> None:
        self.strings = 0
        self._strings: dict[tuple[str, str], _String] = {}
        self._payloads: dict[str, str] = {}
        self._preferred: set[str] = set()

    @property
    def different(self) -> int:
        """Pairs of string and payload, each counted once."""
        return len(self._strings)

    @property
    def preferred(self) -> int:
        """How many strings go first because of `prefer`."""
        return sum(trigger in self._preferred for trigger, _ in self._strings)

    def prefer(self, trigger: str) -> None:
        """Put this string first, whatever its score: a job's own verdict names it."""
        self._preferred.add(trigger)

    def add(self, path: Path, *, job: str, scale: str) -> Tally:
        """Take the candidates of one job; all of them, or none where the file is damaged.

        Args:
            job: its name. scale: names the objective with its settings: scores are compared within one alone.

        Raises:
            UserError: the file is damaged; says where.
        """
        with path.open("rb") as file:
            # The last line may be torn.
            found = [(line, _parsed(line, n)) for n, line in enumerate(file, 1) if line.endswith(b"\n")]
        for line, data in found:
            self._add(line, data, job, scale)
        self.strings += len(found)
        best = max((data for _, data in found), key=lambda d: _order(d["selection_rate"], d["score"]), default=None)
        if best is None:
            return Tally(count=0, best_score=None, selection_rate=None)
        return Tally(count=len(found), best_score=best["score"], selection_rate=best["selection_rate"])

    def best(self, count: int) -> list[Merged]:
        """The best `count`: preferred strings first, then the best of each payload, then by selection rate, and by
        place among the strings of the same payload and scale."""
        ordered = self._ordered()
        first: dict[str, tuple[str, str]] = {}
        for key in ordered:
            first.setdefault(key[1], key)
        preferred = [key for key in ordered if key[0] in self._preferred]
        kept = list(dict.fromkeys([*preferred, *first.values(), *ordered]))[:count]
        return [self._merged(key) for key in kept]

    def _ordered(self) -> list[tuple[str, str]]:
        found = list(self._strings.items())
        by_score = sorted(range(len(found)), key=lambda i: (-found[i][1].rate, -found[i][1].score))
        seen: Counter[tuple[str, str]] = Counter()
        place = [0] * len(found)
        for i in by_score:
            (_, payload), s = found[i]
            place[i] = seen[payload, s.scale]
            seen[payload, s.scale] += 1
        # Equal places of several scales: the earlier job's first.
        return [found[i][0] for i in sorted(by_score, key=lambda i: (-found[i][1].rate, place[i], i))]

    def _add(self, line: bytes, data: dict[str, Any], job: str, scale: str) -> None:
        payload = self._payloads.setdefault(data["payload"], data["payload"])
        rate, score = _order(data["selection_rate"], data["score"])
        known = self._strings.get((data["trigger"], payload))
        if known is None:
            self._strings[data["trigger"], payload] = _String((job,), (line,), rate, score, scale)
            return
        if rate > known.rate or (rate == known.rate and scale == known.scale and score > known.score):
            known.rate, known.score, known.scale, known.best = rate, score, scale, len(known.lines)
        known.jobs, known.lines = (*known.jobs, job), (*known.lines, line)

    def _merged(self, key: tuple[str, str]) -> Merged:
        trigger, payload = key
        s = self._strings[key]
        found = [from_dict(Candidate, json.loads(line)) for line in s.lines]
        provenance = Provenance(
            trigger=trigger, payload=payload, findings=[_finding(job, c) for job, c in zip(s.jobs, found, strict=True)]
        )
        return Merged(candidate=found[s.best], provenance=provenance)


def _finding(job: str, c: Candidate) -> Finding:
    return Finding(job=job, restart=c.restart, step=c.step, seed=c.seed, score=c.score, selection_rate=c.selection_rate)


def _order(rate: float | None, score: float) -> tuple[float, float]:
    return rate or 0.0, -math.inf if math.isnan(score) else score


def _parsed(line: bytes, number: int) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except ValueError:
        data = None
    if not isinstance(data, dict) or not _NEEDED <= data.keys() <= _FIELDS or not _typed(data):
        raise UserError(f"line {number} is no Candidate record")
    return data


def _typed(data: dict[str, Any]) -> bool:
    rate = data["selection_rate"]
    return (
        isinstance(data["trigger"], str)
        and isinstance(data["payload"], str)
        and isinstance(data["score"], int | float)
        and (rate is None or isinstance(rate, int | float))
        and all(isinstance(data[name], int) for name in ("restart", "step", "seed"))
    )
