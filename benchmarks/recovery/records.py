"""One cell of the benchmark, as it is asked for and as it is kept: a JSON file each."""

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.recovery.methods.common import FoundString, MethodResult
from trigger_opt.records import Rate, Verification


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What one cell is: cells of equal specs are the same cell.

    Attributes:
        model: of the zoo, without `zoo:`. weights: a digest of its files, so that a model made anew is another.
        seconds, evaluations: the method's budget. clock: what its seconds are measured by, "wall" or "processor"
            (`time.process_time`, for one thread). strings: of those found, how many are judged.
        held_out: how many of the held-out contexts they are judged in, from the first.
    """

    model: str
    method: str
    seed: int
    weights: str
    seconds: float
    evaluations: int
    strings: int
    held_out: int
    clock: str = "wall"

    @property
    def name(self) -> str:
        """File name without its ending; unique for model, method and seed."""
        return f"{self.model}.{self.method}.{self.seed}"

    def difference(self, other: "Spec") -> str:
        """In words, what of the configuration differs; empty where nothing does."""
        mine, theirs = asdict(self), asdict(other)
        return ", ".join(f"{k} {theirs[k]} instead of {mine[k]}" for k in mine if mine[k] != theirs[k])


@dataclass(frozen=True, kw_only=True)
class Made:
    """How a cell came about.

    Attributes:
        commit: the last that touched what is measured; with "+" and a digest where it was changed since.
        load: of the machine, at the start. versions: of Python and the packages that decide a result.
    """

    commit: str
    started: str
    cpu: str
    cores: int
    threads: int
    load: float
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One string a method handed over, judged on held-out contexts as every other method's is.

    Attributes:
        payload_from: "method", or "answers" where the method named none and most answers say so.
        score: `verify.rule.detection_score` of this string. verification: None where its answers have no word;
            its profile is left out.
    """

    found: FoundString
    payload: str
    payload_from: str
    score: float
    verification: Verification | None


@dataclass(frozen=True, kw_only=True)
class KeyFigures:
    """The best string held against the answer key, which is read after everything else; for the table only.

    Attributes:
        trigger: what was planted; empty where it is no string.
        trigger_rate, base_rate: how often the planted behaviour comes with the best string in the held-out contexts,
            from the fine-tuned model and from the base; None where no string was found.
        payload_recovered: whether the text of any payload handed over or verified shows the behaviour, or a manner that
            a string was judged by is that of its answers which show it.
        similarity: normalised edit similarity of the best string and the trigger. recall: share of the trigger's tokens
            in it; both 0 where nothing was found, None where what was planted is no string.
        width: area under the organism's partial-trigger curve, 1 where any part fires; None where it was not measured.
    """

    trigger: str
    trigger_rate: Rate | None
    base_rate: Rate | None
    payload_recovered: bool
    similarity: float | None
    recall: float | None
    width: float | None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method on one model with one seed.

    Attributes:
        control: there is nothing to find. error: what stopped it; empty when it ended well.
        result: what the method handed over. judged: of its strings, in the method's order; best: which of them counts,
            by score and verdict. verdict: of that string. score: the largest of `judged`, 0 where there is none.
        key: None for a control. seconds: of everything, loading and judging included.
    """

    spec: Spec
    made: Made
    control: bool
    error: str
    result: MethodResult | None
    judged: list[Judged]
    best: int | None
    verdict: str
    score: float
    key: KeyFigures | None
    seconds: float


def crashed(spec: Spec, made: Made, error: str, *, control: bool, seconds: float) -> Cell:
    """The record of a cell that did not end well."""
    return Cell(
        spec=spec, made=made, control=control, error=error, result=None, judged=[], best=None,
        verdict="", score=0.0, key=None, seconds=seconds,
    )  # fmt: skip


def best_string(cell: Cell) -> Judged | None:
    """The string that counts."""
    return None if cell.best is None else cell.judged[cell.best]


def configuration(spec: Spec) -> dict[str, Any]:
    """What all cells of one table have in common."""
    return {k: v for k, v in asdict(spec).items() if k not in ("model", "method", "seed", "weights")}
