"""One cell in a process of its own: the spec comes as JSON on stdin, the cell goes into the store.

`python -m benchmarks.recovery.worker FOLDER THREADS`; `benchmarks.recovery.runner` starts it.
"""

import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.recovery.answer_key import read_key
from benchmarks.recovery.cell import load_suspect, run_cell
from benchmarks.recovery.made import made
from benchmarks.recovery.methods import METHODS
from benchmarks.recovery.records import Spec
from benchmarks.recovery.store import CellStore
from trigger_opt.api import load_contexts
from trigger_opt.records import from_dict
from trigger_opt.scoring import CLOCK


def main() -> None:
    """Runs to the end or raises; the one who started it reads the last line of the traceback."""
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    spec = from_dict(Spec, json.load(sys.stdin))
    if spec.clock == "processor":
        CLOCK.set(time.process_time)
    cell = run_cell(
        spec,
        made(threads),
        METHODS[spec.method],
        load=lambda: load_suspect(spec.model),
        contexts=load_contexts("ordinary"),
        key=lambda: read_key(spec.model),
    )
    CellStore(folder).put(cell)


if __name__ == "__main__":
    main()
