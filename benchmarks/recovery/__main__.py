"""The command line: `python -m benchmarks.recovery run|table|list`."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.recovery.methods import METHODS
from benchmarks.recovery.pictures import clouds_chart, recovery_chart
from benchmarks.recovery.plan import MODELS, SUBSETS, Options, Plan, of_subset, parse_shard, plan
from benchmarks.recovery.runner import Running, run_cells
from benchmarks.recovery.store import CellStore
from benchmarks.recovery.table import results_page, short_page
from trigger_opt.errors import UserError
from trigger_opt.records import write_text
from trigger_opt.zoo.recipes import RECIPES


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 when some cells asked for have crashed, 2 for a mistake of the user, 130 when stopped."""
    given = vars(_parser().parse_args(arguments))
    what = given.pop("what")
    # A cluster that takes its machine back says so with this signal; the running cell must not live on.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        options = of_subset(given.pop("subset"), **given)
        return {"run": _run, "table": _table, "list": _list}[what](options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished cells are kept, the same command goes on from them", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def write_pages(out: Path) -> Path:
    """RESULTS.md, README_SHORT.md and the pictures in `out`, from the cells in its folder results.

    Raises:
        UserError: a file there is no cell, or the cells are of different configurations.
    """
    order = list(METHODS)
    cells = sorted(CellStore(out / "results").all(), key=lambda c: order.index(c.spec.method))
    names = {name: RECIPES[name].control for name in MODELS}
    out.mkdir(parents=True, exist_ok=True)
    drawn = {"recovery.svg": recovery_chart(cells), "clouds.svg": clouds_chart(cells, names)}
    charts = {name: chart for name, chart in drawn.items() if chart is not None}
    page = results_page(cells, names, charts=list(charts))
    for name, content in (charts | {"RESULTS.md": page, "README_SHORT.md": short_page(cells, names)}).items():
        write_text(out / name, content)
    return out / "RESULTS.md"


def _run(options: Options) -> int:
    planned = _planned(options)
    running = Running(threads=options.threads, retry=options.retry, replace=options.replace)
    crashed = run_cells(planned.specs, CellStore(options.out / "results"), running)
    print(write_pages(options.out))
    return 1 if crashed else 0


def _table(options: Options) -> int:
    print(write_pages(options.out))
    return 0


def _list(options: Options) -> int:
    store = CellStore(options.out / "results")
    for spec in _planned(options).specs:
        print(f"{spec.name}: {store.state(spec)}")
    return 0


def _planned(options: Options) -> Plan:
    planned = plan(options)
    for model, why in planned.left_out.items():
        print(f"{model} is left out: {why}", file=sys.stderr)
    return planned


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    usual = Options()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__)
    parser.add_argument("what", choices=["run", "table", "list"])
    parser.add_argument("--subset", choices=list(SUBSETS), default="full", help="what is not given otherwise")
    parser.add_argument("--models", type=_names, metavar="A,B", help="of the zoo (default: all)")
    parser.add_argument("--methods", type=_names, metavar="A,B", help=f"of {', '.join(usual.methods)} (default: all)")
    parser.add_argument("--seeds", type=_numbers, metavar="0,1", help="default: 0,1")
    parser.add_argument("--seconds", type=_positive, help=f"of each method on each model (default: {usual.seconds:g})")
    parser.add_argument("--evaluations", type=_whole, help=f"likewise (default: {usual.evaluations:,})")
    parser.add_argument("--strings", type=_whole, help=f"judged of each method's (default: {usual.strings})")
    parser.add_argument("--held-out", type=_whole, help=f"contexts they are judged in (default: {usual.held_out})")
    parser.add_argument("--threads", type=_whole, help=f"of a cell (default: {usual.threads})")
    parser.add_argument("--clock", choices=["wall", "processor"], help="what seconds are measured by (default: wall)")
    parser.add_argument("--shard", type=parse_shard, metavar="I/N", help="the I-th of N parts of the cells, from 1")
    parser.add_argument("--retry", action="store_true", default=None, help="run crashed cells again")
    parser.add_argument("--replace", action="store_true", default=None, help="run cells of another configuration again")
    parser.add_argument("--out", type=Path, help="folder of RESULTS.md, pictures and results/")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(n.strip() for n in text.split(",") if n.strip()))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(n) for n in text.split(",")))


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(f"{text} is not above 0")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(f"{text} is below 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
