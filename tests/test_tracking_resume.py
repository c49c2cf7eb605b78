"""A continued run: W&B gets everything once more, and what is uploaded then has neither gaps nor doubles."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tracking_setup import isolate_wandb, open_run, run_python
from tests.wandb_reader import OfflineArtifact, OfflineRun, read_run, read_table, sessions
from tests.wandb_server import WandbServer, wandb_server
from trigger_opt.checkpoint import cut_back
from trigger_opt.tracking import Tracker, read_metrics

WORDS = "a trigger of some length " * 20
"""Fills the 32 KB that W&B keeps to itself every 60 rows."""


@pytest.fixture(autouse=True)
def _no_wandb_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolate_wandb(monkeypatch, tmp_path)


def log_steps(tracker: Tracker, begin: int, end: int) -> None:
    for step in range(begin, end):
        tracker.log({"search/score": step / 4, "search/step": step, "search/best": f"{step} {WORDS}"})


def run_and_kill(run_dir: Path, checkpoint: int, after: int) -> int:
    """Log in another process, which is killed at once when its row `after` came in; bytes at its row `checkpoint`."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from tests.test_tracking_resume import log_steps\nfrom tests.tracking_setup import open_run\n"
        "run_dir = Path(sys.argv[1])\ntracker = open_run(run_dir)\n"
        f"for step in range(10000):\n    log_steps(tracker, step, step + 1)\n"
        f"    print((run_dir / 'metrics.jsonl').stat().st_size if step == {checkpoint - 1} else 0, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(run_dir)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        sizes = [int(process.stdout.readline()) for _ in range(after)]
        process.kill()
        process.wait(timeout=60)
    assert process.returncode == -signal.SIGKILL
    return sizes[checkpoint - 1]


def newest(run_dir: Path, before: set[Path]) -> tuple[Path, OfflineRun]:
    (session,) = set(sessions(run_dir)) - before
    return session, read_run(session)


def rows_of(run: OfflineRun) -> list[dict[str, Any]]:
    return [row for row in run.history if "search/score" in row]


def test_after_a_kill_and_two_more_starts_the_newest_session_is_the_whole_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    size = run_and_kill(run_dir, checkpoint=90, after=130)
    assert len(read_metrics(run_dir / "metrics.jsonl")) >= 130
    cut_back(run_dir, {"metrics.jsonl": size})
    seen = set(sessions(run_dir))

    tracker = open_run(run_dir)
    log_steps(tracker, 90, 140)
    tracker.table("candidates", ["trigger", "score"], [["planted", 1.5], ["decoy", None]])
    (run_dir / "report.html").write_text("page")
    tracker.artifact("report", "report", [run_dir / "report.html"])
    tracker.summary({"verdict": "backdoor"})
    tracker.finish(75)
    _, second = newest(run_dir, seen)
    assert second.exit_code == 75
    seen = set(sessions(run_dir))

    tracker = open_run(run_dir)
    log_steps(tracker, 140, 150)
    tracker.finish(0)
    session, last = newest(run_dir, seen)
    assert tracker.sync_hint() == f"wandb sync {shlex.quote(str(session))}"
    assert [row["_step"] for row in last.history] == list(range(151))
    assert [row["search/step"] for row in rows_of(last)] == list(range(150))
    assert {key: last.history[149][key] for key in ("search/score", "search/best")} == {
        "search/score": 148 / 4,
        "search/best": f"148 {WORDS}",
    }
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert last.times == pytest.approx([line["time"] for line in lines if "step" in line], abs=1e-3)
    assert read_table(session, "candidates")["data"] == [["planted", 1.5], ["decoy", None]]
    report = OfflineArtifact(name="report", kind="report", files=["report.html"])
    assert [artifact for artifact in last.artifacts if artifact.kind == "report"] == [report]
    assert last.summary["verdict"] == "backdoor"
    assert (last.group, last.job_type, last.config["seed"], last.exit_code) == ("sweep-1", "search", 0, 0)
    assert last.run_id == second.run_id


def upload(server: WandbServer, hint: str | None, cwd: Path) -> None:
    assert hint is not None
    code = f"import sys\nfrom wandb.cli.cli import cli\nsys.argv = {shlex.split(hint)!r}\ncli()"
    done = run_python(code, cwd, WANDB_BASE_URL=server.url, WANDB_API_KEY="k" * 40, WANDB_DIR=str(cwd))
    assert done.returncode == 0, done.stdout + done.stderr


def test_uploaded_before_and_after_a_restart_the_history_has_neither_gaps_nor_doubles(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tracker = open_run(run_dir)
    log_steps(tracker, 0, 3)
    size = (run_dir / "metrics.jsonl").stat().st_size
    log_steps(tracker, 3, 5)
    tracker.finish(75)
    with wandb_server() as server:
        upload(server, tracker.sync_hint(), tmp_path)
        (rows,) = server.histories.values()
        assert [(row["_step"], row["search/step"]) for row in rows] == [(n, n) for n in range(5)]
        cut_back(run_dir, {"metrics.jsonl": size})
        tracker = open_run(run_dir)
        log_steps(tracker, 3, 7)
        tracker.finish(0)
        upload(server, tracker.sync_hint(), tmp_path)
        (rows,) = server.histories.values()
    assert [(row["_step"], row["search/step"]) for row in rows] == [(n, n) for n in range(7)]


@pytest.mark.slow
def test_online_a_continued_run_sends_only_what_the_server_lacks(tmp_path: Path) -> None:
    code = (
        "from tests.test_tracking_resume import log_steps\n"
        "t = open_tracker(run_dir, mode='online', **about)\nlog_steps(t, {begin}, {end}); t.finish(0)"
    )
    run_dir = tmp_path / "run"
    with wandb_server() as server:
        settings = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40, "WANDB_SILENT": "false"}
        done = run_python(code.format(begin=0, end=6), run_dir, **settings)
        assert done.returncode == 0, done.stderr
        ((run_id, rows),) = server.histories.items()
        # What a kill leaves: the server lacks rows 4 and 5, the checkpoint is of row 3.
        del rows[4:]
        lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        cut_back(run_dir, {"metrics.jsonl": len(b"".join(lines[:3]))})
        done = run_python(code.format(begin=3, end=8), run_dir, **settings)
        assert done.returncode == 0, done.stderr
        # W&B warns of each row it was given although the server has it.
        assert "WARNING" not in done.stderr
        assert list(server.histories) == [run_id]
        rows = server.histories[run_id]
    assert [(row["_step"], row["search/step"]) for row in rows] == [(n, n) for n in range(8)]
