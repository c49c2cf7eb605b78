"""Sweeps: nothing is started when one job would be refused, and the launchers that ship say what they lack."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from tests import tiny
from tests.tiny_pair import CommandLine, Outcome
from trigger_opt import pipeline
from trigger_opt.config import RunConfig
from trigger_opt.errors import UserError
from trigger_opt.paths import data_dir
from trigger_opt.records import RunInfo, read_record
from trigger_opt.sweep import launcher_problem

ROOT = Path(__file__).resolve().parent.parent
PAIR = ["model=pair", "model.finetuned=a", "model.base=b"]
SWEEP = "hydra.sweep.dir=sweep"
Ran = list[tuple[Path, RunConfig, str]]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """What would have been run: folder, configuration and command of each."""
    made: Ran = []

    def run(config: RunConfig, *, run_dir: Path, command: str, settings: dict[str, Any], **_: Any) -> None:
        made.append((run_dir, config, command))
        (run_dir / "run.json").touch()

    monkeypatch.setattr(pipeline, "run", run)
    return made


def assert_refused(outcome: Outcome, *words: str) -> None:
    """One line with these words, before a folder is made."""
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("error: ")
    assert all(word in outcome.err for word in words), outcome.err
    assert list(Path().iterdir()) == []


def test_every_job_has_its_own_folder_and_command(cli: CommandLine, ran: Ran) -> None:
    assert cli("-m", *PAIR, "seed=3,4", "contexts.search=['a {trigger}','{trigger} b']").code == 0
    assert [c.seed for _, c, _ in ran] == [3, 4]
    parents = {folder.parent for folder, _, _ in ran}
    assert [folder.name for folder, _, _ in ran] == ["0", "1"]
    assert len(parents) == 1
    for seed, (_, _, command) in zip((3, 4), ran, strict=True):
        assert command.startswith("python -m trigger_opt model=pair ")
        assert command.endswith(
            f" seed={seed} 'contexts.search=['\"'\"'a {{trigger}}'\"'\"','\"'\"'{{trigger}} b'\"'\"']'"
        )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # Hydra lets these through: only the package knows ranges, choices and what `+` may not add.
        (["seed=0,1,-1", "+typo=1"], ["typo: is no setting", "job 2 (seed=-1): seed: ", "nothing was started"]),
        (["search.topk=0,8", "seed=1,2"], ["job 0 (search.topk=0 seed=1), job 1 (search.topk=0 seed=2): search.topk"]),
        (["seed=-1,-2,-3,-4", "run_dir=there"], ["job 0 (seed=-1): seed", "job 2 (seed=-3): seed", "and 1 more"]),
        (["stages=[diff],[report]", "run_dir=there"], ["run_dir", "hydra.sweep.dir"]),
        # This one Hydra refuses itself.
        (["search=gcg,foo"], ["search/foo", "gcg, random"]),
    ],
)
def test_one_bad_job_stops_the_sweep(cli: CommandLine, ran: Ran, overrides: list[str], words: list[str]) -> None:
    assert_refused(cli("-m", *PAIR, *overrides), *words)
    assert ran == []


def test_a_job_that_cannot_run_ends_no_other(cli: CommandLine, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = pipeline.run

    def run(config: RunConfig, **given: Any) -> None:
        if config.seed == 1:
            raise UserError("the base is not there")
        plain(config, **given)

    monkeypatch.setattr(pipeline, "run", run)
    done = cli("-m", *PAIR, "seed=0,1,2", SWEEP)
    assert done.code == 2
    assert [c.seed for _, c, _ in ran] == [0, 2]
    # Hydra then names the job.
    first, second = done.err.splitlines()
    assert first == "error: the base is not there"
    assert "'seed=1'" in second


def test_an_interrupted_sweep_says_how_all_of_it_goes_on(
    cli: CommandLine, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(pipeline, "run", run)
    done = cli("-m", *PAIR, "seed=0,1,2", SWEEP)
    assert done.code == 130
    assert done.err.splitlines() == [
        "error: interrupted; to go on, give the same command and hydra.sweep.dir=sweep"
    ]  # fmt: skip


def test_a_folder_takes_the_same_sweep_and_more_but_no_other(cli: CommandLine, ran: Ran) -> None:
    assert cli("-m", *PAIR, "seed=3,4", SWEEP).code == 0
    assert cli("-m", *PAIR, "seed=3,4,5", "tracking.mode=off", SWEEP).code == 0
    assert [(f.name, c.seed) for f, c, _ in ran] == [("0", 3), ("1", 4), ("0", 3), ("1", 4), ("2", 5)]
    before = Path("sweep/multirun.yaml").read_bytes()
    other = cli("-m", *PAIR, "seed=4,5", SWEEP)
    fewer = cli("-m", *PAIR, "seed=3,4", SWEEP)
    assert other.code == fewer.code == 2
    assert "sweep/multirun.yaml is of another sweep: job 0 differs in seed=3, seed=4" in other.err
    assert "of a sweep of 3 jobs, and 2 are given" in fewer.err
    assert Path("sweep/multirun.yaml").read_bytes() == before
    assert len(ran) == 5


def test_a_launcher_without_its_extra(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = ConfigStore.instance().repo["hydra"]["launcher"]
    for name in [n for n in shipped if n.startswith("submitit")]:
        monkeypatch.delitem(shipped, name)
    for launcher in ("slurm", "local_jobs"):
        assert_refused(
            cli("-m", *PAIR, "seed=0,1", f"hydra/launcher={launcher}"),
            f"hydra/launcher={launcher}",
            "pip install 'trigger-opt[cluster]'",
        )


def test_slurm_where_there_is_none(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert_refused(cli("-m", *PAIR, "seed=0,1", "hydra/launcher=slurm"), "no sbatch", "hydra/launcher=local_jobs")


def test_launchers_know_every_setting() -> None:
    known = pytest.importorskip("hydra_plugins.hydra_submitit_launcher.config")
    for name, schema in (("slurm", known.SlurmQueueConf), ("local_jobs", known.LocalQueueConf)):
        file = data_dir("configs") / "hydra" / "launcher" / f"{name}.yaml"
        given = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        assert isinstance(given, dict)
        del given["defaults"]
        OmegaConf.merge(OmegaConf.structured(schema), given)


def test_slurm_jobs_are_put_back() -> None:
    launcher = OmegaConf.load(data_dir("configs") / "hydra" / "launcher" / "slurm.yaml")
    assert isinstance(launcher, DictConfig)
    assert launcher.additional_parameters.requeue is True
    # submitit takes every signal for the end of a job's time when less than 10 minutes are left.
    assert launcher.max_num_timeout > 0
    assert launcher.timeout_min > 20
    assert 60 <= launcher.signal_delay_s < 600


def test_what_the_launcher_says_is_one_line() -> None:
    errors = pytest.importorskip("submitit.core.utils")
    gone = errors.UncompletedJobError(
        "Job 7_1 (task: 0) with path /x/7_1_0_result.pkl\nhas not produced any output (state: OUT_OF_MEMORY)\n"
        "Error stream produced:\n----\nstate: nothing"
    )
    told = launcher_problem(gone)
    assert told is not None
    assert told.startswith("job 7_1 ended without a result (OUT_OF_MEMORY); the others go on; ")
    late = launcher_problem(errors.UncompletedJobError("Job not requeued because: timed-out too many times."))
    assert late is not None
    assert late.startswith("a job ended: Job not requeued because: timed-out too many times.; ")
    refused = errors.FailedJobError("sbatch: error: invalid partition\nsbatch: error: Batch job submission failed")
    refused.__cause__ = subprocess.CalledProcessError(1, "sbatch")
    assert launcher_problem(refused) == (
        "Slurm did not take the jobs: sbatch: error: invalid partition; sbatch: error: Batch job submission failed"
    )
    # What a job raised is told with where it was raised.
    assert launcher_problem(errors.FailedJobError("Job (task=0) failed during processing with trace:\n…")) is None
    assert launcher_problem(ValueError("x")) is None


def test_a_warning_while_python_still_imports_ends_nothing() -> None:
    """Batch systems warn whenever they like; by default the signal would be the end."""
    code = (
        "import os, signal, sys\n"
        "class Warned:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            [os.kill(os.getpid(), s) for s in (signal.SIGUSR1, signal.SIGUSR2)]\n"
        "            sys.exit(3)\n"
        "sys.meta_path.insert(0, Warned)\n"
        "import trigger_opt.entry"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert made.returncode == 3, made.stderr


@pytest.mark.slow
def test_jobs_of_this_machine(tmp_path: Path) -> None:
    """Two side by side; one fails for want of a model, and the other finishes."""
    pytest.importorskip("submitit")
    base = tiny.save_model(tmp_path / "base", "qwen2", seed=0)
    tiny.save_full(base, tmp_path / "finetuned", seed=3, size=0.3)
    settings = [
        "model=pair", f"model.finetuned={tmp_path / 'finetuned'},nowhere", f"model.base={tmp_path / 'base'}",
        "model.dtype=float32", "stages=[diff]", "tracking.mode=off", "hydra/launcher=local_jobs", SWEEP,
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "trigger_opt", "-m", *settings]
    made = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert made.returncode == 1
    assert "ended without a result" in made.stderr
    assert "Traceback" not in made.stderr
    info = read_record(tmp_path / "sweep" / "0" / "run.json", RunInfo)
    assert [s.stage for s in info.stages] == ["diff"]
    assert info.unfinished == []
    logs = [log.read_text() for log in (tmp_path / "sweep" / ".submitit").glob("*/*_log.err")]
    assert sum("nowhere" in log for log in logs) == 1
