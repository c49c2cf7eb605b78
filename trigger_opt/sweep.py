"""Many jobs: each one's configuration is checked before any goes anywhere; what becomes of them is told in one line.

Hydra composes all jobs before it submits one, and so notices wrong types and names; ranges, choices and what belongs
together are known to `validated` alone, which would otherwise speak first inside the job, hours later.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict

from trigger_opt.collect.overrides import MULTIRUN_FILE, read_plan
from trigger_opt.config import composition_problem, is_composition_problem, validated
from trigger_opt.errors import UserError

# Where numbers go and how often is saved: a run that goes on may have others.
_FREE = ("tracking", "checkpoint")
_SHOWN = 3


class SweepCheck(Callback):  # type: ignore[misc]
    """Ends the program before the first job when any would be refused; configs/config.yaml names it to Hydra."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the sweep."""
        try:
            check_sweep(config)
        except Exception as error:
            if not (isinstance(error, UserError) or is_composition_problem(error)):
                raise
            told = str(error) if isinstance(error, UserError) else f"bad configuration: {composition_problem(error)}"
            print(f"error: {told}; nothing was started", file=sys.stderr)
            # Hydra turns the error of a callback into a warning and goes on; it lets an exit pass.
            sys.exit(2)


def check_sweep(config: DictConfig) -> None:
    """Compose and validate every job of a sweep: about 0.1 s each.

    Args:
        config: Hydra's own of the whole sweep, with the node `hydra`.

    Raises:
        UserError: what is wrong, and with which jobs; there is no Slurm here to give them to; or the sweep's folder
            already holds other jobs.
    """
    launcher = str(config.hydra.launcher.get("_target_"))
    if launcher.endswith(".SlurmLauncher") and shutil.which("sbatch") is None:
        raise UserError(
            "hydra/launcher=slurm gives jobs to Slurm, and there is no sbatch on this machine; start the sweep where "
            "there is, or run it here with hydra/launcher=local_jobs"
        )
    if not str(config.hydra.sweeper.get("_target_")).endswith(".BasicSweeper"):
        # The jobs are chosen as it goes; each is validated when it starts.
        return
    jobs = _jobs(config)
    _require_same_jobs(Path(str(config.hydra.sweep.dir)), jobs)
    common = set(jobs[0]).intersection(*jobs)
    problems: dict[str, list[str]] = {}
    for number, overrides in enumerate(jobs):
        if problem := _problem(config, overrides):
            own = " ".join(o for o in overrides if o not in common)
            problems.setdefault(problem, []).append(f"job {number} ({own})" if own else f"job {number}")
    if problems:
        told = [_told(problem, where, len(jobs)) for problem, where in list(problems.items())[:_SHOWN]]
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UserError(f"bad configuration: {'; '.join(told)}{more}")


def launcher_problem(error: Exception) -> str | None:
    """One line of what the launcher's library says when jobs were not taken or one left no result; None for any other
    error, as one that a job raised itself."""
    # Only where it is in use: it is an extra.
    if (errors := sys.modules.get("submitit.core.utils")) is None:
        return None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, errors.FailedSubmissionError) or isinstance(error.__cause__, subprocess.CalledProcessError):
        return f"Slurm did not take the jobs: {'; '.join(lines)}"
    if not isinstance(error, errors.UncompletedJobError) or isinstance(error, errors.FailedJobError):
        return None
    # "Job 7_1 (task: 0) with path …", "has not produced any output (state: FAILED)", and the job's error stream.
    known = re.match(r"Job (\d\S*) \(task.*?\(state: (\w+)\)", str(error), re.DOTALL)
    ended = f"job {known[1]} ended without a result ({known[2]})" if known else f"a job ended: {lines[0]}"
    return f"{ended}; the others go on; `trigger-opt collect` with the sweep's folder shows what became of each"


def _jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of each job, as the sweeper will make them."""
    params = config.hydra.sweeper.get("params") or {}
    given = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(given), None)
    return [list(job) for job in jobs]


def _problem(config: DictConfig, overrides: list[str]) -> str:
    """What is wrong with one job; empty when nothing is."""
    try:
        cfg = GlobalHydra.instance().config_loader().load_sweep_config(config, list(overrides))
        with open_dict(cfg):
            del cfg["hydra"]
        run = validated(cfg)
    except UserError as error:
        return str(error).removeprefix("bad configuration: ")
    except Exception as error:
        if not is_composition_problem(error):
            raise
        return composition_problem(error)
    if run.run_dir:
        return (
            "run_dir is the folder of one run, and every job has one of its own; hydra.sweep.dir is that of the sweep"
        )
    return ""


def _told(problem: str, where: list[str], num_jobs: int) -> str:
    if len(where) == num_jobs:
        return problem
    more = f" and {len(where) - _SHOWN} more" if len(where) > _SHOWN else ""
    return f"{', '.join(where[:_SHOWN])}{more}: {problem}"


def _require_same_jobs(sweep_dir: Path, jobs: list[list[str]]) -> None:
    """The jobs of an earlier sweep in the same folder go on, and more may follow; others would end up in their folders.

    Raises:
        UserError: a job there was another one.
    """
    if not any(sweep_dir.glob("*/run.json")):
        return
    before = [job.overrides for job in read_plan(sweep_dir).jobs]
    for number, (old, new) in enumerate(zip(before, jobs, strict=False)):
        if gone := sorted(set(_kept(old)) ^ set(_kept(new))):
            raise UserError(
                f"{sweep_dir / MULTIRUN_FILE} is of another sweep: job {number} differs in {', '.join(gone)}; give the "
                "same jobs in the same order to go on, or another hydra.sweep.dir"
            )
    if len(before) > len(jobs):
        raise UserError(
            f"{sweep_dir / MULTIRUN_FILE} is of a sweep of {len(before)} jobs, and {len(jobs)} are given; give the "
            "same to go on, or another hydra.sweep.dir"
        )


def _kept(overrides: list[str]) -> list[str]:
    return [o for o in overrides if o.lstrip("+~").split("=")[0].split(".")[0] not in _FREE]
