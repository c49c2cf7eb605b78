"""What a stage shows while it works: a bar on a terminal, plain lines in a log; and how model text is shown safely.

Bars, lines and notes go to stderr, results to stdout through `say`. Text a model wrote is hostile: an escape sequence
in it could clear the screen or forge a verdict. Everything printed here passes through `printable` or its weaker
sibling for our own lines, so one call prints exactly one line and no control character.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LINE_EVERY = 10.0
"""Seconds between two plain lines of one stage."""

BAR_EVERY = 0.1
"""Seconds between two drawings of the bar."""

_BEST_WIDTH = 60


def printable(text: str) -> str:
    r"""`text` on one line, as in a Python string without its quotes: spaces stay, what one could not see is escaped.

    Control, format, private and lone surrogate characters and every other space become \n, \x1b, \u202e and so on; a
    backslash becomes two, so the result is unambiguous.
    """
    return _harmless(text.replace("\\", "\\\\"))


def say(*lines: str) -> None:
    """Print each of `lines` as one line on stdout, flushed, control characters escaped.

    A newline inside a line is escaped too: model text cannot forge a line of ours.
    """
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        print(_harmless(line).encode(encoding, "backslashreplace").decode(encoding), flush=True)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One moment of a stage.

    Attributes:
        total: how many `unit`s there are; None when unknown.
        best: best string so far, raw. score: nats.
        evaluations_per_second: since the stage began here.
        elapsed, seconds_left: seconds; seconds_left is None while nothing tells.
    """

    stage: str
    unit: str
    done: int
    total: int | None
    best: str
    score: float | None
    evaluations_per_second: float | None
    elapsed: float
    seconds_left: float | None


class Progress:
    """The progress of one stage, as a context manager; see `stage_progress`.

    Leaving it, by whatever exception, restores the terminal; the exception goes on.
    """

    def __init__(
        self,
        stage: str,
        *,
        total: int | None,
        unit: str,
        seconds: float | None,
        done: int,
        evaluations: int,
        console: Console,
        clock: Callable[[], float],
    ) -> None:
        self._stage, self._unit, self._total, self._seconds = stage, unit, total, seconds
        self._first_done, self._first_evaluations = done, evaluations
        self._done, self._evaluations = done, evaluations
        self._best = ""
        self._score: float | None = None
        self._clock = clock
        self._began = clock()
        fancy = console.is_terminal and not console.is_dumb_terminal
        self._display: _Display = _Bar(console, clock) if fancy else _Lines(console, clock)

    def __enter__(self) -> "Progress":
        self._began = self._clock()
        self._display.open(self.snapshot())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.close(self.snapshot(), interrupted=kind is not None)

    def update(
        self,
        done: int,
        *,
        best: str = "",
        score: float | None = None,
        evaluations: int | None = None,
        total: int | None = None,
    ) -> None:
        """Show that `done` units are done.

        Args:
            total: how many there are, where that is known only now; None keeps what was known.
            best: best string so far, raw model text; empty keeps the one shown.
            score: its score, nats; None keeps the one shown.
            evaluations: candidate evaluations so far, counted like the `evaluations` the stage was opened with.
        """
        self._done = done
        self._total = self._total if total is None else total
        self._best = best or self._best
        self._score = self._score if score is None else score
        self._evaluations = self._evaluations if evaluations is None else evaluations
        self._display.show(self.snapshot())

    def note(self, text: str) -> None:
        """Print one line above the bar, or into the log; control characters are escaped."""
        self._display.note(f"{self._stage}: {_harmless(text)}")

    def snapshot(self) -> Snapshot:
        """The stage as it stands now."""
        elapsed = max(self._clock() - self._began, 0.0)
        evaluated = self._evaluations - self._first_evaluations
        return Snapshot(
            stage=self._stage,
            unit=self._unit,
            done=self._done,
            total=self._total,
            best=self._best,
            score=self._score,
            evaluations_per_second=evaluated / elapsed if evaluated and elapsed else None,
            elapsed=elapsed,
            seconds_left=self._seconds_left(elapsed),
        )

    def _seconds_left(self, elapsed: float) -> float | None:
        """By whichever will end the stage first, its count or its time budget."""
        estimates = []
        if self._seconds is not None:
            estimates.append(max(self._seconds - elapsed, 0.0))
        if self._total is not None and self._done > self._first_done:
            per_unit = elapsed / (self._done - self._first_done)
            estimates.append(max(self._total - self._done, 0) * per_unit)
        return min(estimates, default=None)


def stage_progress(
    stage: str,
    *,
    total: int | None = None,
    unit: str = "",
    seconds: float | None = None,
    done: int = 0,
    evaluations: int = 0,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """The progress of one stage: a bar if `console` is a terminal, else a line every 10 s and at both ends.

    Args:
        total: how many `unit`s ("step", "context") the stage has; None when unknown.
        seconds: wall time the stage may still take, when it has such a budget.
        done, evaluations: where a resumed stage takes up; speed and time left count from there.
        console: stderr by default.
        clock: seconds from any origin, never backwards.
    """
    return Progress(
        stage,
        total=total,
        unit=unit,
        seconds=seconds,
        done=done,
        evaluations=evaluations,
        console=console or Console(stderr=True),
        clock=clock,
    )


class _Display(Protocol):
    def open(self, now: Snapshot) -> None: ...

    def show(self, now: Snapshot) -> None: ...

    def note(self, line: str) -> None: ...

    def close(self, now: Snapshot, *, interrupted: bool) -> None: ...


class _Lines:
    """Plain lines for logs, pipes and batch systems."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console, self._clock = console, clock
        self._shown = clock()

    def open(self, now: Snapshot) -> None:
        self._shown = self._clock()
        self.note(f"{now.stage}: started" + (f", {_count(now)}" if now.total is not None else ""))

    def show(self, now: Snapshot) -> None:
        if self._clock() - self._shown < LINE_EVERY:
            return
        self._shown = self._clock()
        left = "" if now.seconds_left is None else f"{_duration(now.seconds_left)} left"
        self._write(now, _count(now), left)

    def note(self, line: str) -> None:
        # Not console.print: it would wrap at 80 columns.
        print(line, file=self._console.file, flush=True)

    def close(self, now: Snapshot, *, interrupted: bool) -> None:
        word = "interrupted" if interrupted else "finished"
        self._write(now, f"{word} after {_duration(now.elapsed)}", _count(now))

    def _write(self, now: Snapshot, *parts: str) -> None:
        facts = [*parts, _score(now), _speed(now), _cut(now.best)]
        self.note(f"{now.stage}: " + ", ".join(fact for fact in facts if fact))


class _Bar:
    """One line redrawn in place. No drawing thread: the model's thread keeps the machine to itself."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._clock, self._drawn = clock, clock()
        # stdout stays as it is: results may be piped while the bar is on the terminal.
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=False)

    def open(self, now: Snapshot) -> None:
        self._live.start()
        self._draw(now)

    def show(self, now: Snapshot) -> None:
        if self._clock() - self._drawn >= BAR_EVERY:
            self._draw(now)

    def note(self, line: str) -> None:
        self._live.console.print(Text(line), soft_wrap=True)

    def close(self, now: Snapshot, *, interrupted: bool) -> None:
        try:
            self._draw(now)
        finally:
            self._live.stop()

    def _draw(self, now: Snapshot) -> None:
        self._drawn = self._clock()
        self._live.update(_bar_line(now), refresh=True)


def _bar_line(now: Snapshot) -> Table:
    # Text, never str: rich would read "[red]" in a model's string as markup.
    line = Table.grid(expand=True, padding=(0, 1))
    left = "" if now.seconds_left is None else f"{_duration(now.seconds_left)} left"
    best = Text(f'"{printable(now.best)}"' if now.best else "", style="bold")
    bar = ProgressBar(total=now.total, completed=now.done, width=12)
    for _ in range(3):
        line.add_column(no_wrap=True)
    line.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for _ in range(3):
        line.add_column(no_wrap=True, justify="right")
    facts = [Text(fact) for fact in (_score(now), _speed(now), left)]
    line.add_row(Text(now.stage), bar, Text(_count(now)), best, *facts)
    return line


def _harmless(text: str) -> str:
    """`text` with everything but printable characters and the plain space escaped; leaves backslashes alone."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _cut(best: str) -> str:
    shown = printable(best)
    shown = shown if len(shown) <= _BEST_WIDTH else shown[: _BEST_WIDTH - 1] + "…"
    return f'best "{shown}"' if shown else ""


def _count(now: Snapshot) -> str:
    count = f"{now.done}" if now.total is None else f"{now.done}/{now.total}"
    return f"{count} {now.unit}".rstrip()


def _score(now: Snapshot) -> str:
    return "" if now.score is None else f"{now.score:.2f} nats"


def _speed(now: Snapshot) -> str:
    speed = now.evaluations_per_second
    return "" if speed is None else f"{speed:,.0f} evaluations/s" if speed >= 10 else f"{speed:.1f} evaluations/s"


def _duration(seconds: float) -> str:
    """4 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
