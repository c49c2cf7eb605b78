"""What every kind of measurement needs: the options, the model, the store, and two engines on one task."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed.client import Worker, WorkerError
from benchmarks.speed.peers import interpreter
from benchmarks.speed.ratios import close_losses
from benchmarks.speed.store import Record, Store
from benchmarks.speed.tasks import Shape
from benchmarks.speed.worker import Run, Task

OURS = "ours"


class DisagreementError(WorkerError):
    """Two engines did not work on the same thing; their times say nothing about each other."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line.

    Attributes:
        pairs: times each engine is measured in a cell, in turns. again: measure finished cells anew.
        peers: folder with the peers' environments; None has them made.
        attention: of the peers and the naive loop, "default" or "eager". results: folder of the JSON files.
    """

    pairs: int = 5
    widths: Sequence[int] = (128, 512)
    shapes: Sequence[Shape] = (Shape(trigger=20, target=20), Shape(trigger=20, target=1), Shape(trigger=64, target=8))
    contexts: Sequence[str] = ("short", "long")
    engines: Sequence[str] = ("nanogcg", "tropt", "naive")
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    peers: Path | None = None
    threads: int = 2
    attention: str = "default"
    again: bool = False
    results: Path = field(default_factory=lambda: Path(__file__).resolve().parent / "results")


@dataclass(frozen=True)
class Bench:
    """Options, the model's folder and tokenizer, and what is known of the machine and the code."""

    options: Options
    folder: Path
    tokenizer: Any
    about: dict[str, Any]

    @contextmanager
    def worker(self, engine: str, task: Task, folder: Path | None = None) -> Iterator[tuple[Worker, dict[str, str]]]:
        """A fresh process of `engine`, loaded and prepared, and the versions it runs on."""
        attention = "default" if engine == OURS else self.options.attention
        with Worker(engine, interpreter(engine, self.options.peers)) as worker:
            versions = worker.load(folder or self.folder, attention=attention, threads=self.options.threads)
            worker.prepare(task)
            yield worker, versions

    def cell(
        self, store: Store, key: str, settings: dict[str, Any], measure: Callable[[], Record]
    ) -> WorkerError | None:
        """Measure one cell and keep it, unless it is finished; what went wrong, if anything."""
        if not self.options.again and store.has(key, commit=self.about["commit"], settings=settings):
            print(f"{key}: finished before", file=sys.stderr)
            return None
        try:
            record = measure()
        except WorkerError as error:
            print(f"{key}: {error}", file=sys.stderr)
            return error
        store.put(key, {"about": self.about, "settings": settings, **record})
        print(f"{key}: {record.get('said', 'done')}", file=sys.stderr)
        return None


def require_same(name: str, peer: Run, ours: Run) -> None:
    """Both engines saw the same tokens, and the same loss for the initial trigger.

    Raises:
        DisagreementError: says what differs.
    """
    theirs, mine = asdict(peer.prompt), asdict(ours.prompt)
    if wrong := [part for part in mine if theirs[part] != mine[part]]:
        part = wrong[0]
        raise DisagreementError(
            f"{name} sees other tokens than we do in {part!r}: {len(theirs[part])} {theirs[part][:8]}…, "
            f"ours {len(mine[part])} {mine[part][:8]}…"
        )
    if not close_losses(peer.first_loss, ours.first_loss):
        raise DisagreementError(
            f"{name}'s loss of the initial trigger is {peer.first_loss:.4f}, ours {ours.first_loss:.4f}: "
            "more than bf16's rounding"
        )


def require_all_scored(name: str, run: Run, width: int) -> None:
    """Each counted step scored the candidates it was given; a few may be drawn twice.

    Raises:
        DisagreementError: a step was cheaper than it should be, say because scores were remembered.
    """
    if (fewest := min(run.candidates)) < 0.9 * width:
        raise DisagreementError(f"{name} scored {fewest} strings in a step of {width}: its time says nothing")


def engine_facts(runs: Sequence[Run], memory: dict[str, int], versions: dict[str, str]) -> dict[str, Any]:
    """What is kept of one engine: median seconds of a step, candidates a second, bytes, versions."""
    seconds = median(s for run in runs for s in run.seconds)
    scored = median(c for run in runs for c in run.candidates)
    return {
        "seconds": seconds,
        "candidates": scored,
        "candidates_per_second": scored / seconds,
        "first_loss": runs[0].first_loss,
        "loss": runs[-1].losses[-1],
        "peak_bytes": memory["peak"],
        "search_bytes": memory["peak"] - memory["resident"],
        "peak_is_of_search": memory["peak_is_of_search"],
        "versions": versions,
    }
