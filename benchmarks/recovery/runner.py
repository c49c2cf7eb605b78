"""Runs cells one after another, each in a process of its own, and keeps also those that crashed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.host import ROOT
from benchmarks.recovery.made import made
from benchmarks.recovery.records import Cell, Spec, crashed
from benchmarks.recovery.store import CRASHED, DONE, OTHER, CellStore
from trigger_opt.errors import UserError
from trigger_opt.progress import printable
from trigger_opt.zoo.recipes import recipe

# A method ends by itself; what hangs is ended after so many of its budgets, and an hour for loading and judging.
_BUDGETS, _JUDGING_SECONDS = 4, 3600
_LOG_LINES = 15

Command = Callable[[Path, int], Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Running:
    """How cells are run.

    Attributes:
        retry: crashed ones again. replace: those of another configuration again.
        command: of the process that reads a spec on stdin and puts its cell into a folder with so many threads.
    """

    threads: int
    retry: bool = False
    replace: bool = False
    command: Command = lambda folder, threads: (
        sys.executable, "-m", "benchmarks.recovery.worker", str(folder), str(threads),
    )  # fmt: skip


def run_cells(specs: Sequence[Spec], store: CellStore, running: Running) -> int:
    """Run what is not there yet; how many of `specs` stand there as crashed afterwards.

    An interrupt ends the running cell, which leaves nothing behind, and goes on to the caller.

    Raises:
        UserError: cells of another configuration are there, and are not to be replaced; nothing was run then.
    """
    _require_same_configuration(specs, store, running)
    for number, spec in enumerate(specs, 1):
        state = store.state(spec)
        if state == DONE or (state == CRASHED and not running.retry):
            continue
        cell = _run(spec, store, running)
        print(f"{number} of {len(specs)}: {said(cell)}", file=sys.stderr, flush=True)
    return sum(store.state(s) == CRASHED for s in specs)


def said(cell: Cell) -> str:
    """One line about a finished cell, with nothing of the answer key in it."""
    name = cell.spec.name
    if cell.error:
        return f"{name}: crashed after {cell.seconds:.0f} s: {printable(cell.error)}"
    string = f" {cell.judged[cell.best].found.text!r}" if cell.best is not None else ""
    return f"{name}: {cell.verdict}{string}, score {cell.score:.2f}, {cell.seconds:.0f} s"


def _require_same_configuration(specs: Sequence[Spec], store: CellStore, running: Running) -> None:
    others = [] if running.replace else [s for s in specs if store.state(s) == OTHER]
    if not others:
        return
    there = store.get(others[0])
    assert there is not None
    raise UserError(
        f"{len(others)} cells in {store.folder} are of another configuration ({others[0].name}: "
        f"{others[0].difference(there.spec)}); name another folder with --out, or run them again with --replace"
    )


def _run(spec: Spec, store: CellStore, running: Running) -> Cell:
    start, began = time.monotonic(), made(running.threads)
    error = _in_process(spec, store, running)
    cell = None if error else store.get(spec)
    if cell is None or cell.spec != spec:
        seconds = time.monotonic() - start
        control = recipe(spec.model).control
        cell = crashed(spec, began, error or "it ended without a cell", control=control, seconds=seconds)
        store.put(cell)
    return cell


def _in_process(spec: Spec, store: CellStore, running: Running) -> str:
    """What went wrong, in one line; empty when nothing did."""
    # Idle threads must sleep: another shard may share the cores.
    quiet = {
        "OMP_NUM_THREADS": str(running.threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    limit = _BUDGETS * spec.seconds + _JUDGING_SECONDS
    command = running.command(store.folder, running.threads)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        # A session of its own, or Ctrl-C would reach it too and its traceback the terminal.
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=ROOT, env=os.environ | quiet, text=True,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                process.communicate(json.dumps(asdict(spec)), timeout=limit)
            except subprocess.TimeoutExpired:
                return f"it did not end within {limit:.0f} s"
            finally:
                process.kill()
        log.seek(0)
        return _ending(process.returncode, log.read())


def _ending(code: int, log: str) -> str:
    if code == 0:
        return ""
    if code < 0:
        cause = "; too little memory is the usual cause" if code == -signal.SIGKILL else ""
        return f"killed by signal {-code}{cause}"
    lines = [line.replace(f"{ROOT}/", "") for line in log.splitlines() if line.strip()]
    print("\n".join(printable(line) for line in lines[-_LOG_LINES:]), file=sys.stderr)
    return lines[-1][:500] if lines else f"exit code {code} without a word"
