"""Step against step: each peer beside ours on the same task, in turns, as ratios."""

from dataclasses import asdict
from typing import Any

from benchmarks.speed.bench import OURS, Bench, engine_facts, require_all_scored, require_same
from benchmarks.speed.client import Worker, WorkerError
from benchmarks.speed.ratios import Pair, spread
from benchmarks.speed.store import Record, Store
from benchmarks.speed.tasks import LONG_TOKENS, Shape, long_user, make_task, short_user
from benchmarks.speed.worker import Run, Task

NAIVE = "naive"
# Candidates the naive loop is given; more would take minutes and say nothing else.
NAIVE_WIDTH = 128


def run_cells(bench: Bench) -> list[WorkerError]:
    """Every cell of the options; those that failed."""
    store = Store(bench.options.results, "cells")
    failures = []
    for shape in bench.options.shapes:
        for context in bench.options.contexts:
            for width in bench.options.widths:
                failures += [_cell(bench, store, peer, shape, context, width) for peer in _engines(bench, width)]
    return [f for f in failures if f is not None]


def _engines(bench: Bench, width: int) -> list[str]:
    return [e for e in bench.options.engines if e != NAIVE or width == NAIVE_WIDTH]


def _cell(bench: Bench, store: Store, peer: str, shape: Shape, context: str, width: int) -> WorkerError | None:
    user = short_user() if context == "short" else long_user(bench.tokenizer, LONG_TOKENS)
    task = make_task(bench.tokenizer, shape, [user], width=width)
    once = peer == NAIVE
    settings: dict[str, Any] = {
        "engine": peer,
        "trigger": shape.trigger,
        "target": shape.target,
        "context": context,
        "width": width,
        "pairs": 1 if once else bench.options.pairs,
        "steps": 1 if once or width > NAIVE_WIDTH else 2,
        "attention": bench.options.attention,
    }
    return bench.cell(
        store, f"{shape}-{context}-{width}-{peer}", settings, lambda: measure_cell(bench, peer, task, settings)
    )


def measure_cell(bench: Bench, peer: str, task: Task, settings: dict[str, Any]) -> Record:
    """Both engines in fresh processes, measured in turns.

    Raises:
        WorkerError: one of them failed, or they do not work on the same thing.
    """
    runs: list[tuple[Run, Run]] = []
    with bench.worker(peer, task) as (their, their_versions), bench.worker(OURS, task) as (our, our_versions):
        for number in range(settings["pairs"]):
            runs.append(_in_turns(their, our, settings["steps"], peer_first=number % 2 == 0))
            require_same(peer, *runs[-1])
            for name, run in zip((peer, OURS), runs[-1], strict=True):
                require_all_scored(name, run, task.width)
        their_memory, our_memory = their.memory(), our.memory()
    pairs = [Pair(peer=t.seconds, ours=o.seconds, peer_first=n % 2 == 0) for n, (t, o) in enumerate(runs)]
    ratio = spread([p.ratio for p in pairs])
    prompt = runs[0][1].prompt
    return {
        "tokens": {k: len(v) for k, v in asdict(prompt).items()},
        "pairs": [asdict(p) for p in pairs],
        "ratio": asdict(ratio),
        "peer": engine_facts([t for t, _ in runs], their_memory, their_versions),
        "ours": engine_facts([o for _, o in runs], our_memory, our_versions),
        "said": f"{peer} takes {ratio.median:.2f} times as long as ours ({ratio.low:.2f} to {ratio.high:.2f})",
    }


def _in_turns(their: Worker, our: Worker, steps: int, *, peer_first: bool) -> tuple[Run, Run]:
    # A naive step has no set-up to leave out, and takes long.
    warm = 0 if their.engine == NAIVE else 1
    if peer_first:
        theirs = their.steps(steps, warm=warm)
        return theirs, our.steps(steps, warm=1)
    ours = our.steps(steps, warm=1)
    return their.steps(steps, warm=warm), ours
