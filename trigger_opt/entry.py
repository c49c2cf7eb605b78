"""A run from the command line: Hydra in, typed configuration out, one line for a user's mistake."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Before torch is imported: with the default, a busy neighbour makes every small product 60 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
for _warning in (signal.SIGUSR1, signal.SIGUSR2):
    # Imports take seconds; until a run listens, a batch system's warning must not end the process, as it would.
    if signal.getsignal(_warning) == signal.SIG_DFL:
        signal.signal(_warning, signal.SIG_IGN)

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from trigger_opt import interrupts, pipeline
from trigger_opt.collect.overrides import quoted_folder
from trigger_opt.config import (
    RunConfig,
    composition_problem,
    is_composition_problem,
    register,
    register_resolvers,
    validated,
    without_keys,
    without_secrets,
)
from trigger_opt.errors import UserError
from trigger_opt.models.quiet import quieten_libraries
from trigger_opt.paths import data_dir
from trigger_opt.scoring import Group, start_group
from trigger_opt.sweep import launcher_problem

register_resolvers()
register()


# What a disk answers to a run folder that cannot be there; any other OSError is a defect and shows its traceback.
_NO_FOLDER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)

# Slurm may send SIGTERM twice within a moment; one that comes so many seconds later is of somebody who means it, or to
# a job that is back in the queue already.
_SIGTERM_AGAIN = 5.0

_KEY_IN_SIGHT = (
    "transfer.api_key on the command line would end in logs and process lists; put the key into the environment "
    "variable JSINFER_API_KEY or OPENAI_API_KEY (transfer.key_variable names another)"
)


def main() -> None:
    """Run; a user's mistake is one line on stderr and exit code 2, whoever notices it."""
    if any(re.match(r"\+*~?transfer\.api_key=.", a) for a in sys.argv[1:]):
        sys.exit(_stop(_KEY_IN_SIGHT, 2))
    # Hydra alone would print several lines and advice on debugging Hydra; raised, its errors become one line too.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        # Not as a decorator: a launcher pickles the function by its name only where that is its own.
        hydra.main(version_base="1.3", config_path=str(data_dir("configs")), config_name="config")(_composed)()
    except OSError as error:
        if isinstance(error, HydraException):
            sys.exit(_stop(f"bad configuration: {composition_problem(error)}", 2))
        if error.errno not in _NO_FOLDER:
            raise
        sys.exit(_stop(f"{error.filename} cannot be written ({error.strerror}); give another run_dir", 2))
    except KeyboardInterrupt:
        sys.exit(_stop("interrupted; jobs that Slurm has taken go on", 130))
    except _SaidError:
        sys.exit(2)
    except Exception as error:
        if is_composition_problem(error):
            sys.exit(_stop(f"bad configuration: {composition_problem(error)}", 2))
        if (problem := launcher_problem(error)) is None:
            raise
        sys.exit(_stop(problem, 1))


def _composed(cfg: DictConfig) -> None:
    """Validate and run what Hydra composed."""
    quieten_libraries()
    # A batch system that preempts a job sends SIGTERM first: a job that then ends by itself has ended for good (Slurm
    # 22.05), one that goes on is killed and put back into the queue.
    hurry = [signal.SIGTERM] if _slurm_job() else []
    with interrupts.listening(only_hurry=hurry, patience=_SIGTERM_AGAIN) as before:
        try:
            _run_or_hand_on(cfg, before)
        except UserError:
            raise
        except Exception:
            # Hydra makes a result of it, and to the batch system the job would have succeeded.
            if not _under_submitit():
                raise
            traceback.print_exc()
            sys.exit(1)


def _run_or_hand_on(cfg: DictConfig, before: Mapping[int, Any]) -> None:
    try:
        _run(cfg)
    except KeyboardInterrupt as stop:
        signum = stop.signum if isinstance(stop, interrupts.Interrupted) else signal.SIGINT
        for other in interrupts.SIGNALS:
            # What comes now says nothing new, and must not keep the job from its queue.
            signal.signal(other, signal.SIG_IGN)
        sys.exit(_handed_on(signum, before))


def _run(cfg: DictConfig) -> None:
    try:
        config = validated(cfg)
        settings = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(settings, dict)
        group = start_group()
        if group.rank:
            _assist(config, group)
            return
        pipeline.run(
            config,
            run_dir=Path(HydraConfig.get().runtime.output_dir),
            command=f"python -m trigger_opt {shlex.join(without_keys(_arguments()))}",
            settings=without_secrets({str(k): v for k, v in settings.items()}),
            sweep=Path(HydraConfig.get().sweep.dir).name if _in_sweep() else "",
            again=_in_sweep() or "SLURM_RESTART_COUNT" in os.environ,
        )
    except UserError as error:
        _end(str(error))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _end(f"no space left on the disk of {error.filename or 'the run folder'}; the records so far are kept")


def _end(message: str) -> None:
    """Say what is wrong and end with exit code 2; of several jobs in this process, only the one."""
    _stop(message, 2)
    if _in_sweep() and not _under_submitit():
        raise _SaidError(message)
    sys.exit(2)


class _SaidError(UserError):
    """It was said when it happened."""


def _arguments() -> list[str]:
    """Of the command that is this run; the process of a sweep's job may have been started otherwise."""
    if _in_sweep():
        return list(HydraConfig.get().overrides.task)
    return sys.argv[1:]


def _under_submitit() -> bool:
    return "SUBMITIT_EXECUTOR" in os.environ


def _in_sweep() -> bool:
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def _assist(config: RunConfig, group: Group) -> None:
    """Beside the first process, which alone decides what a signal means."""
    with interrupts.listening(only_hurry=interrupts.SIGNALS):
        try:
            pipeline.assist(config, group)
        except RuntimeError:
            if not interrupts.asked():
                raise
            # The first process has stopped.
            sys.exit(interrupts.LATER)


def _handed_on(signum: int, before: Mapping[int, Any]) -> int:
    """After a signal, with all saved: the exit code, once whoever may start the run again knows."""
    in_sweep = f"hydra.sweep.dir={shlex.quote(HydraConfig.get().sweep.dir)}"
    place = in_sweep if _in_sweep() else quoted_folder(Path(HydraConfig.get().runtime.output_dir))
    go_on = f"to go on, give the same command and {place}"
    name = signal.Signals(signum).name
    if signum == signal.SIGINT:
        return _stop(f"interrupted; {go_on}", 130)
    if callable(handler := before[signum]):
        # A launcher's own: it puts the job back into the queue and leaves.
        handler(signum, None)
    if signum in (signal.SIGUSR1, signal.SIGUSR2) and (job := _slurm_job()):
        made = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        if made.returncode == 0:
            print(f"{name}: stopped; Slurm will start job {job} again, and it goes on", file=sys.stderr)
            return interrupts.LATER
        return _stop(f"{name}: Slurm does not requeue job {job} ({made.stderr.strip()}); {go_on}", interrupts.LATER)
    return _stop(f"{name}: interrupted; {go_on}", interrupts.LATER)


def _slurm_job() -> str:
    """The job as scontrol takes it: the bare number of an array's last task stands for the whole array."""
    if task := os.environ.get("SLURM_ARRAY_TASK_ID"):
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
    return os.environ.get("SLURM_JOB_ID", "")


def _stop(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
