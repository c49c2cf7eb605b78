"""What a step of ours costs as each size grows, the others held."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.speed.bench import OURS, Bench, engine_facts
from benchmarks.speed.chart import Curve, cost_chart
from benchmarks.speed.client import WorkerError
from benchmarks.speed.store import Record, Store
from benchmarks.speed.tasks import Shape, long_user, make_task, short_user
from benchmarks.speed.worker import Task

STEPS = 3
_USUAL = Shape(trigger=20, target=20)
_WIDTH = 128


@dataclass(frozen=True)
class Axis:
    """One size that is varied.

    Attributes:
        values: asked for. task: the task at a value. measured: the size that came out, from a record.
    """

    label: str
    values: tuple[int, ...]
    task: Callable[[Bench, int], Task]
    measured: Callable[[Record], int]


AXES = {
    "width": Axis(
        "candidates a step", (32, 64, 128, 256, 512),
        lambda b, n: make_task(b.tokenizer, _USUAL, [short_user()], width=n),
        lambda r: int(r["settings"]["value"]),
    ),
    "trigger": Axis(
        "trigger length, tokens", (5, 10, 20, 40, 80),
        lambda b, n: make_task(b.tokenizer, replace(_USUAL, trigger=n), [short_user()], width=_WIDTH),
        lambda r: int(r["settings"]["value"]),
    ),
    "contexts": Axis(
        "contexts a step", (1, 2, 4, 8),
        lambda b, n: make_task(b.tokenizer, _USUAL, [short_user(i) for i in range(n)], width=_WIDTH),
        lambda r: int(r["settings"]["value"]),
    ),
    "left": Axis(
        # The chat template alone is about 30 tokens: the shortest that can be.
        "tokens before the slot", (10, 100, 200, 300, 400, 600),
        lambda b, n: make_task(b.tokenizer, _USUAL, [long_user(b.tokenizer, n)], width=_WIDTH),
        lambda r: int(r["tokens_before"]),
    ),
}  # fmt: skip


def run_cost(bench: Bench) -> list[WorkerError]:
    """Every point of every axis, then the charts; the points that failed."""
    store = Store(bench.options.results, "cost")
    failures = []
    for name, axis in AXES.items():
        for value in axis.values:
            task = axis.task(bench, value)
            settings: dict[str, Any] = {"axis": name, "value": value, "steps": STEPS}

            def measure(task: Task = task) -> Record:
                return measure_point(bench, task, STEPS)

            failures.append(bench.cell(store, f"{name}-{value}", settings, measure))
    draw_charts(bench, store)
    return [f for f in failures if f is not None]


def measure_point(bench: Bench, task: Task, steps: int) -> Record:
    """Seconds of a step and peak memory of ours on one task, in a fresh process."""
    with bench.worker(OURS, task) as (worker, versions):
        run = worker.steps(steps, warm=1)
        facts = engine_facts([run], worker.memory(), versions)
    said = f"{facts['seconds']:.2f} s a step, {facts['search_bytes'] / 1e9:.2f} GB"
    return {"ours": facts, "tokens_before": len(run.prompt.before), "said": said}


def draw_charts(bench: Bench, store: Store) -> None:
    """One SVG an axis that has two points or more, beside the records."""
    for name, axis in AXES.items():
        records = [r for r in store.records.values() if r["settings"]["axis"] == name]
        points = sorted((axis.measured(r), r["ours"]["seconds"], r["ours"]["search_bytes"] / 1e9) for r in records)
        if len(points) < 2:
            continue
        curves = [
            Curve("seconds a step", [(x, seconds) for x, seconds, _ in points]),
            Curve("peak memory of the search, GB", [(x, gigabytes) for x, _, gigabytes in points]),
        ]
        chart = cost_chart(axis.label, curves)
        (bench.options.results / f"cost_{name}.svg").write_text(chart, encoding="utf-8")
