"""What the stages call (Tracker), and what shows a run elsewhere (Backend)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable


@runtime_checkable
class Tracker(Protocol):
    """Takes a run's numbers. `finish` is the last call; nothing may be logged after it."""

    def log(self, metrics: Mapping[str, float | int | str]) -> None:
        """Record one row of metrics at the next global step. Names are "stage/metric", units in nats or seconds."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Record a whole table, once, at the next global step; cells are JSON values, model text goes in unchanged."""

    def artifact(self, name: str, kind: str, files: Sequence[Path]) -> None:
        """Attach finished files under `name`; `kind` groups artifacts of one sort, say "candidates"."""

    def summary(self, values: Mapping[str, object]) -> None:
        """Record the run's outcome: JSON values, no step."""

    def finish(self, exit_code: int) -> None:
        """Close the run with the process's exit code: 0 for success."""

    def sync_hint(self) -> str | None:
        """The shell line that uploads this run's offline data; None when there is nothing to upload."""


class NullTracker:
    """Drops everything: for library calls and tests."""

    def log(self, metrics: Mapping[str, float | int | str]) -> None: ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None: ...

    def artifact(self, name: str, kind: str, files: Sequence[Path]) -> None: ...

    def summary(self, values: Mapping[str, object]) -> None: ...

    def finish(self, exit_code: int) -> None: ...

    def sync_hint(self) -> str | None:
        """None: nothing was kept."""
        return None


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When a row was logged: its global step, and Unix seconds."""

    step: int
    time: float


@runtime_checkable
class Backend(Protocol):
    """Shows a run's numbers elsewhere. In a continued folder it first gets all of the earlier ones, as in
    `metrics.jsonl`, with the moments of then; to add a backend is one class and one line in `opening.py`.
    """

    def log(self, at: Moment, metrics: Mapping[str, float | int | str]) -> None:
        """Show one row of metrics."""

    def table(self, at: Moment, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Show a whole table."""

    def artifact(self, name: str, kind: str, files: Sequence[Path]) -> None:
        """Keep or name these files, which are there now and may change later."""

    def summary(self, values: Mapping[str, object]) -> None:
        """Show the outcome; later values replace earlier ones of the same name."""

    def finish(self, exit_code: int) -> None:
        """Close; everything is in its place when this returns."""

    def sync_hint(self) -> str | None:
        """See Tracker."""
