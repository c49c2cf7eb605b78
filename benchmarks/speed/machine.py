"""What was measured, on what, when."""

import hashlib
import os
import platform
import time
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch
import transformers

from benchmarks.host import ROOT, git, processor

# What a number depends on. Results are written beside the code that makes them.
_MEASURED = ["trigger_opt", "benchmarks/speed/*.py"]


def about(threads: int) -> dict[str, Any]:
    """Commit, date, processor, measured speed of a matrix product, versions; kept in every record."""
    torch.set_num_threads(threads)
    return {
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "gflops": {"bf16": _gflops(torch.bfloat16), "fp32": _gflops(torch.float32)},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def commit() -> str:
    """The last commit that touched what is measured; with "+" and a digest where it was changed since.

    The head would be another commit as soon as results are committed, and every cell stale.
    """
    if not (head := git("log", "-1", "--format=%h", "--", *_MEASURED)):
        return "unknown"
    return f"{head}+{_digest()}" if git("status", "--porcelain", "--", *_MEASURED) else head


def _digest() -> str:
    files = [f for pattern in ("trigger_opt/**/*.py", "benchmarks/speed/*.py") for f in sorted(ROOT.glob(pattern))]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:6]


def _gflops(dtype: torch.dtype, size: int = 2048) -> float:
    """10^9 operations a second of a square matrix product, median of five."""
    matrix = torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return round(2 * size**3 / median(seconds[1:]) / 1e9, 1)
