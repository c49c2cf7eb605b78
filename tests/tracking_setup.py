"""A run folder's tracker, set up for tests: nothing of the machine's own W&B settings is seen or touched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trigger_opt.tracking import Tracker, open_tracker

TEXT = 'a\u2028b\u202e\x1b[31m "q" 漢字 \ud800'
"""What a model may say: line separators, escapes and a lone surrogate."""


def isolate_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Take the environment's W&B settings away, and put W&B's own folders below `tmp_path`."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def open_run(run_dir: Path, mode: str = "offline", project: str = "backdoors") -> Tracker:
    """The tracker of a small run."""
    config = {"search": {"num_steps": 3}, "seed": 0}
    return open_tracker(
        run_dir,
        mode=mode,
        project=project,
        group="sweep-1",
        job_type="search",
        name="gcg seed=0",
        tags=["gcg", "cpu"],
        config=config,
    )


def run_python(code: str, run_dir: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` after opening lines that define `run_dir` and `start(mode)`; for what must not touch this process."""
    head = (
        "import sys\nfrom pathlib import Path\nfrom trigger_opt.tracking import WandbBackend, open_tracker\n"
        f"run_dir = Path({str(run_dir)!r})\n"
        "about = dict(project='p', group='g', name='n', tags=[], config={})\n"
    )
    return subprocess.run(
        [sys.executable, "-c", head + code],
        env=dict(os.environ) | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
