"""How a cell came about: commit, machine, versions."""

import hashlib
import os

from benchmarks.host import ROOT, git, processor
from benchmarks.recovery.records import Made
from trigger_opt.run_folder import now, versions

# What a cell depends on. The organisms' weights stand in the cell's own digest, and results are written beside the code
# that makes them.
_CODE = ("trigger_opt/**/*.py", "configs/contexts/*.yaml", "benchmarks/recovery/**/*.py")
_PATHSPECS = [f":(glob){pattern}" for pattern in _CODE]


def made(threads: int) -> Made:
    """For a cell that begins now."""
    return Made(
        commit=commit(),
        started=now(),
        cpu=processor(),
        cores=os.cpu_count() or 1,
        threads=threads,
        load=round(os.getloadavg()[0], 1),
        # The commit here would be the head's, which moves as results are committed.
        versions={name: version for name, version in versions().items() if name != "commit"},
    )


def commit() -> str:
    """The last commit that touched what is measured; with "+" and a digest where it was changed since."""
    head = git("log", "-1", "--format=%h", "--", *_PATHSPECS) or "unknown"
    return f"{head}+{_digest()}" if git("status", "--porcelain", "--", *_PATHSPECS) else head


def _digest() -> str:
    files = [f for pattern in _CODE for f in sorted(ROOT.glob(pattern))]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:6]
