"""The command line: what is measured, where results go; one line for each finished cell."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.speed.bench import Bench, Options
from benchmarks.speed.cells import run_cells
from benchmarks.speed.client import WorkerError
from benchmarks.speed.cost import AXES, run_cost
from benchmarks.speed.machine import about
from benchmarks.speed.memory import run_memory
from benchmarks.speed.peers import interpreter
from benchmarks.speed.rate import run_rate
from benchmarks.speed.store import Store
from benchmarks.speed.table import results_page
from benchmarks.speed.tasks import load_tokenizer, parse_shape
from benchmarks.speed.time_to_loss import run_time_to_loss
from trigger_opt import zoo
from trigger_opt.errors import UserError
from trigger_opt.zoo.recipes import BASE_NAME

KINDS: dict[str, Callable[[Bench], list[WorkerError]]] = {
    "cells": run_cells,
    "memory": run_memory,
    "time-to-loss": run_time_to_loss,
    "cost": run_cost,
    "rate": run_rate,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when every cell asked for is there, 1 when some failed, 2 for a mistake of the user."""
    given = _parser().parse_args(arguments)
    what, options = given.what, _options(given)
    failures: list[WorkerError] = []
    try:
        if what != "table":
            bench = _bench(options, what)
            for kind in KINDS if what == "all" else [what]:
                failures += KINDS[kind](bench)
                # After each kind: a run that is stopped leaves a table of what it has.
                write_table(options.results)
        print(write_table(options.results))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished cells are kept", file=sys.stderr)
        return 130
    return 1 if failures else 0


def write_table(results: Path) -> Path:
    """RESULTS.md beside the folder of results, from what lies there."""
    kinds = ("cells", "memory", "time_to_loss", "rate", "cost")
    records = {kind: Store(results, kind).records for kind in kinds}
    charts = [
        f"{results.name}/{file.name}" for file in (results / f"cost_{axis}.svg" for axis in AXES) if file.is_file()
    ]
    page = results.parent / "RESULTS.md"
    page.write_text(results_page(charts=charts, **records), encoding="utf-8")
    return page


def _bench(options: Options, what: str) -> Bench:
    needed = ["nanogcg"] if what == "time-to-loss" else [] if what in ("cost", "rate") else options.engines
    for engine in needed:
        # Made before anything is measured, or the last cell would find out that it cannot be.
        interpreter(engine, options.peers)
    folder = zoo.folder(f"{zoo.PREFIX}{BASE_NAME}")
    return Bench(options, folder, load_tokenizer(folder), about(options.threads))


def _options(given: argparse.Namespace) -> Options:
    return Options(**{k: v for k, v in vars(given).items() if k != "what"})


def _parser() -> argparse.ArgumentParser:
    usual = Options()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("what", nargs="?", default="all", choices=[*KINDS, "table", "all"])
    parser.add_argument("--pairs", type=_positive, default=usual.pairs, help="measurements of each engine in a cell")
    parser.add_argument("--widths", type=_positive, nargs="+", default=usual.widths, help="candidates; naive: 128 only")
    parser.add_argument("--shapes", type=parse_shape, nargs="+", default=usual.shapes, metavar="TRIGGERxTARGET")
    parser.add_argument("--contexts", nargs="+", choices=usual.contexts, default=usual.contexts)
    parser.add_argument("--engines", nargs="+", choices=usual.engines, default=usual.engines)
    parser.add_argument("--seeds", type=int, nargs="+", default=usual.seeds, help="of time-to-loss")
    parser.add_argument("--peers", type=Path, help="folder with NAME/bin/python for each peer; made when not given")
    parser.add_argument("--threads", type=_positive, default=min(usual.threads, os.cpu_count() or 1))
    parser.add_argument("--attention", choices=["default", "eager"], default=usual.attention, help="of the peers")
    parser.add_argument("--again", action="store_true", help="measure finished cells anew")
    parser.add_argument("--results", type=Path, default=usual.results, help="folder of the JSON files")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(f"{text} is below 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
