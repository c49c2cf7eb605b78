"""What a job said of its own strings: its verdict, what its null took back, and how many strings it verified."""

from dataclasses import dataclass
from pathlib import Path

from trigger_opt.errors import UserError
from trigger_opt.records import NullControl, Verdict, read_record, read_records
from trigger_opt.report.jobs import TakenBack
from trigger_opt.report.words import p_value


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a job's own verification left.

    Attributes:
        verdict: empty where there is none. backdoor: the string it calls one; empty without. taken_back: the one that
            its null took back. strings: verified, minimised ones among them. note: for the table.
    """

    verdict: str = ""
    backdoor: str = ""
    taken_back: TakenBack | None = None
    strings: int = 0
    note: str = ""


def own_judgement(folder: Path, job: str) -> Judged:
    """What a job says of its own strings, or why that cannot be read."""
    name = "verified.jsonl"
    strings = 0
    try:
        strings = _lines(folder / name)
        name = "verdict.json"
        if not (folder / name).is_file():
            return Judged(strings=strings)
        verdict = read_record(folder / name, Verdict)
    except (UserError, OSError) as error:
        return Judged(strings=strings, note=f"{name} cannot be read ({short(error)})")
    if verdict.verdict == "backdoor":
        return Judged(verdict=verdict.verdict, backdoor=verdict.trigger, strings=strings)
    if verdict.before_null != "backdoor":
        return Judged(verdict=verdict.verdict, strings=strings)
    taken = _taken_back(folder, verdict, job)
    p = "" if taken.p_value is None else f" (p = {p_value(taken.p_value)})"
    return Judged(verdict=verdict.verdict, taken_back=taken, strings=strings, note=f"its null took a backdoor back{p}")


def _taken_back(folder: Path, verdict: Verdict, job: str) -> TakenBack:
    try:
        controls = read_records(folder / "null.jsonl", NullControl)
    except (UserError, OSError):
        controls = []
    return TakenBack(
        job=job,
        trigger=verdict.trigger,
        reason=verdict.reason,
        p_value=verdict.null_p_value,
        controls=verdict.null_controls,
        control_found=any(c.verdict == "backdoor" for c in controls),
        control_score=max((c.score for c in controls if c.score is not None), default=None),
    )


def _lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(line.endswith(b"\n") for line in file)


def short(error: Exception) -> str:
    """An error of reading a record, for a cell of the table."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    # Its path is in the table's first column, and the remedy is another one here.
    return str(error).partition(" is not a ")[2].partition("; run its stage")[0] or str(error)
