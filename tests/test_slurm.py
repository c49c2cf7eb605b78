"""Searches on a real Slurm: preempted, killed, warned; all end with what an undisturbed search finds."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests import tiny
from tests.run_processes import run_processes, until
from tests.slurm_cluster import Cluster, missing, running
from trigger_opt.records import RunInfo, read_record

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]
ROOT = Path(__file__).resolve().parent.parent
SETTINGS = [
    "model=pair", "model.dtype=float32", "hypotheses.num_lens_strings=4", "hypotheses.num_strings=4",
    "hypotheses.num_tokens=20", "hypotheses.num_words=4", "hypotheses.amplify=[]",
    "build.max_tokens=2", "build.pool=8",
    "search.num_steps=30", "search.num_restarts=1", "search.search_width=24", "search.topk=16", "tracking.mode=off",
    "stages=[diff,hypotheses,search]",
]  # fmt: skip
ON_ONE_CPU = ["hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1"]
# Imports alone take ten seconds on a busy machine, and a job that was put back waits for its turn.
PATIENCE_S = 240.0
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with running() as cluster:
        cluster.environment.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", WANDB_MODE="offline", PYTHONPATH=str(ROOT))
        yield cluster


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A search over a tiny pair, of seconds."""
    folder = tmp_path_factory.mktemp("pair")
    base = tiny.save_model(folder / "base", "qwen2", seed=0)
    tiny.save_full(base, folder / "finetuned", seed=3, size=0.3)
    return [*SETTINGS, f"model.finetuned={folder / 'finetuned'}", f"model.base={folder / 'base'}"]


@pytest.fixture(scope="module")
def undisturbed(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of seeds 0 to 3, each in a process that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with run_processes() as runs:
        for seed in range(4):
            made = runs.run([*settings, f"seed={seed}", f"run_dir={folder / str(seed)}"], folder / "log")
            assert made == 0, (folder / "log").read_text()
    return folder


def test_a_sweep_with_a_preempted_and_a_killed_job(
    slurm: Cluster, settings: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """Four jobs on two CPUs. Of the first two one has to give way, the process of the other is killed."""
    command = ["-m", *settings, "seed=0,1,2,3", "hydra/launcher=slurm", *ON_ONE_CPU]
    with launched(slurm, command, tmp_path) as launcher:
        wait(slurm, lambda: sum(searching(run) for run in tmp_path.glob("multirun/*/[01]")) == 2)
        # Named by time and chance; jobs that are started again find it all the same.
        (sweep,) = tmp_path.glob("multirun/*")
        with stopped(process_of(sweep / "0")), stopped(process_of(sweep / "1")):
            array = slurm.numbers()[0].split("_")[0]
            urgent = slurm.submit("--partition=high", "--cpus-per-task=1", "--mem=100", "--wrap=true", cwd=tmp_path)
            wait(slurm, lambda: bool(put_back(slurm, array, "01")))
            (preempted,) = put_back(slurm, array, "01")
            killed = "1" if preempted == "0" else "0"
            os.kill(process_of(sweep / killed), signal.SIGKILL)
        wait(slurm, lambda: all(has_ended(slurm, f"{array}_{n}") for n in range(4)))
        assert slurm.job(urgent)["JobState"] == "COMPLETED"
        # The one whose process was killed stays visible, and the others have finished.
        assert launcher.wait(PATIENCE_S) == 1
    told = (tmp_path / "launcher.err").read_text()
    assert re.search(rf"^error: job {array}_{killed} ended without a result \(FAILED\); the others go on", told, re.M)
    assert "Traceback" not in told
    states = {str(n): slurm.job(f"{array}_{n}") for n in range(4)}
    assert {n: s["JobState"] for n, s in states.items()} == {
        n: "FAILED" if n == killed else "COMPLETED" for n in "0123"
    }
    assert states[preempted]["Restarts"] == "1"
    assert info_of(sweep / killed).unfinished == ["search"]

    slurm.run("scontrol", "requeue", f"{array}_{killed}")
    wait(slurm, lambda: has_ended(slurm, f"{array}_{killed}"))
    assert slurm.job(f"{array}_{killed}")["JobState"] == "COMPLETED"
    for n in "0123":
        assert_same(sweep / n, undisturbed / n)
        assert info_of(sweep / n).starts == (2 if n in (preempted, killed) else 1)
        assert info_of(sweep / n).command.endswith(f"seed={n}")
    assert list(tmp_path.glob("multirun/*")) == [sweep]


def test_the_plain_script_with_a_warning(
    slurm: Cluster, settings: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """Two jobs; the last of an array has the array's own number, and must not put the other back too."""
    script = str(ROOT / "experiments" / "slurm.sbatch")
    options = [
        "--array=0-1",
        "--gpus-per-node=0",
        "--cpus-per-task=1",
        "--mem=1G",
        f"--export=ALL,PYTHON={sys.executable}",
    ]
    array = slurm.submit(*options, script, *settings, cwd=tmp_path)
    sweep = tmp_path / "multirun" / f"slurm_{array}"
    wait(slurm, lambda: searching(sweep / "0") and searching(sweep / "1"))
    last = next(n for n in "01" if slurm.job(f"{array}_{n}")["JobId"] == array)
    with stopped(process_of(sweep / last)):
        slurm.run("scancel", "--signal=USR1", f"{array}_{last}")
    wait(slurm, lambda: all(has_ended(slurm, f"{array}_{n}") for n in range(2)))
    log = (tmp_path / f"trigger_opt_{array}_{last}.log").read_text()
    for n in "01":
        assert slurm.job(f"{array}_{n}")["JobState"] == "COMPLETED", log
        assert slurm.job(f"{array}_{n}")["Restarts"] == ("1" if n == last else "0")
        assert info_of(sweep / n).starts == (2 if n == last else 1)
        assert_same(sweep / n, undisturbed / n)
    # One log over both starts.
    assert log.count("goes on with the run in") == 1
    assert log.count("trigger_opt 0.") == 2


def test_a_cancelled_job_does_not_come_back(slurm: Cluster, settings: list[str], tmp_path: Path) -> None:
    script = str(ROOT / "experiments" / "slurm.sbatch")
    options = ["--gpus-per-node=0", "--cpus-per-task=1", "--mem=1G", f"--export=ALL,PYTHON={sys.executable}"]
    job = slurm.submit(*options, script, *settings, "search.num_steps=100000", cwd=tmp_path)
    run = tmp_path / "multirun" / f"slurm_{job}" / "0"
    wait(slurm, lambda: searching(run))
    slurm.run("scancel", job)
    wait(slurm, lambda: has_ended(slurm, job))
    assert slurm.job(job)["JobState"] == "CANCELLED"
    assert slurm.job(job)["Restarts"] == "0"
    assert info_of(run).unfinished == ["search"]
    assert (run / "checkpoint.pt").is_file()


@contextmanager
def launched(slurm: Cluster, arguments: list[str], folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A sweep's own process, which waits for its jobs."""
    command = [sys.executable, "-m", "trigger_opt", *arguments]
    with (folder / "launcher.out").open("wb") as out, (folder / "launcher.err").open("wb") as err:
        process = subprocess.Popen(command, cwd=folder, env=slurm.environment, stdout=out, stderr=err)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@contextmanager
def stopped(process: int) -> Iterator[None]:
    """A process that stands still, so that its search is not over before something happens to it."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        # Gone, where what happened to it was the end.
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)


def wait(slurm: Cluster, happened: Callable[[], bool]) -> None:
    """Until it has."""
    try:
        until(happened, seconds=PATIENCE_S)
    except TimeoutError:
        raise AssertionError(f"it did not happen; {slurm.run('squeue', '--array')}\n{slurm.log()}") from None


def searching(run: Path) -> bool:
    """Whether a first step is written down."""
    history = run / "history.jsonl"
    return history.is_file() and history.read_text().count("\n") > 0


def process_of(run: Path) -> int:
    """Who holds the run folder."""
    found = re.match(r"process (\d+) ", (run / ".lock").read_text())
    assert found is not None
    return int(found[1])


def put_back(slurm: Cluster, array: str, tasks: str) -> list[str]:
    """Those that went back into the queue."""
    return [t for t in tasks if slurm.job(f"{array}_{t}")["Restarts"] != "0"]


def has_ended(slurm: Cluster, job: str) -> bool:
    return slurm.job(job)["JobState"] in ENDED


def info_of(run: Path) -> RunInfo:
    return read_record(run / "run.json", RunInfo)


def assert_same(run: Path, undisturbed: Path) -> None:
    """The same records, byte for byte, and nothing left to do."""
    assert info_of(run).unfinished == []
    for name in ("candidates.jsonl", "hypotheses.jsonl", "diff.jsonl"):
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes(), name
    steps = [re.findall(r'"step": ?(\d+)', (r / "history.jsonl").read_text()) for r in (run, undisturbed)]
    assert steps[0] == steps[1]
