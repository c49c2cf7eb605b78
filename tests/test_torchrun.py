"""The command line under `torchrun` itself; in two processes that were forked: tests/test_group.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.run_processes import until
from tests.zygote import ROOT
from trigger_opt.records import RunInfo, read_record

SETTINGS = [
    "model=pair", "model.dtype=float32", "hypotheses.num_lens_strings=4", "hypotheses.num_strings=4",
    "hypotheses.num_tokens=20", "hypotheses.num_words=4", "hypotheses.amplify=[]",
    "build.max_tokens=2", "build.pool=8",
    "search.num_steps=3", "search.num_restarts=1", "search.search_width=24", "search.topk=16", "tracking.mode=off",
    "stages=[diff,hypotheses,search]",
]  # fmt: skip
RECORDS = ["candidates.jsonl", "moved.jsonl", "hypotheses.jsonl", "diff.jsonl"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("torchrun")
    base = tiny.save_model(folder / "base", "qwen2", seed=0)
    tiny.save_full(base, folder / "finetuned", seed=3, size=0.3)
    return [f"model.finetuned={folder / 'finetuned'}", f"model.base={folder / 'base'}"]


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


def torchrun(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "trigger_opt"]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(models: list[str], tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    one = run([*torchrun(1), *SETTINGS, *models, f"run_dir={alone}"], tmp_path)
    two = run([*torchrun(2), *SETTINGS, *models, f"run_dir={shared}"], tmp_path)
    assert one.returncode == two.returncode == 0, two.stderr[-2000:]
    for name in RECORDS:
        assert (shared / name).read_bytes() == (alone / name).read_bytes(), name
    assert (alone / "candidates.jsonl").read_text().strip()
    # The first process alone speaks and keeps the folder.
    assert two.stdout.count("search: finished") <= 1
    assert two.stdout.count(str(shared)) == one.stdout.count(str(alone))


@pytest.mark.slow
def test_a_users_mistake_ends_all_processes(tmp_path: Path) -> None:
    made = run(
        [*torchrun(2), "model=pair", "model.finetuned=nowhere", "model.base=nowhere", f"run_dir={tmp_path}/r"], tmp_path
    )
    assert made.returncode != 0
    assert made.stderr.count("error: ") >= 1
    assert "nowhere" in made.stderr


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_processes_go_on_together_after_an_interruption(models: list[str], tmp_path: Path, signum: int) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    settings = [*SETTINGS, *models, "search.num_steps=12", "checkpoint.every_steps=1"]
    one = run([*torchrun(1), *settings, f"run_dir={alone}"], tmp_path)
    assert one.returncode == 0, one.stderr[-2000:]
    command = [sys.executable, *torchrun(2), *settings, f"run_dir={shared}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    history = shared / "history.jsonl"
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log, start_new_session=True) as first,
    ):
        until(lambda: history.is_file() and history.read_text().count("\n") >= 3, seconds=200)
        if signum == signal.SIGKILL:
            # The process that holds the folder; the agent then ends the others.
            holder = (shared / ".lock").read_text().removeprefix("process ").split()[0]
            os.kill(int(holder), signal.SIGKILL)
        else:
            # The agent hands it on to all of them; the first alone decides what it means.
            first.terminate()
        assert first.wait(120) != 0
    assert read_record(shared / "run.json", RunInfo).unfinished == ["search"]
    two = run([*torchrun(2), *settings, f"run_dir={shared}"], tmp_path)
    assert two.returncode == 0, two.stderr[-2000:]
    assert "search: goes on after step" in two.stdout
    for name in RECORDS:
        assert (shared / name).read_bytes() == (alone / name).read_bytes(), name
