"""A run from the command line: Hydra in, typed configuration out, one line for a user's mistake."""

import errno
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Before torch is imported: with the default, a busy neighbour makes every small product 60 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trigger_opt import interrupts, pipeline
from trigger_opt.config import (
    RunConfig,
    composition_problem,
    register,
    register_resolvers,
    validated,
    without_keys,
    without_secrets,
)
from trigger_opt.errors import UserError
from trigger_opt.paths import data_dir
from trigger_opt.scoring import Group, start_group

register_resolvers()
register()


# What a disk answers to a run folder that cannot be there; any other OSError is a defect and shows its traceback.
_NO_FOLDER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)

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
        _composed()
    except OSError as error:
        if isinstance(error, HydraException):
            sys.exit(_stop(f"bad configuration: {composition_problem(error)}", 2))
        if error.errno not in _NO_FOLDER:
            raise
        sys.exit(_stop(f"{error.filename} cannot be written ({error.strerror}); give another run_dir", 2))
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(_stop(f"bad configuration: {composition_problem(error)}", 2))


@hydra.main(version_base="1.3", config_path=str(data_dir("configs")), config_name="config")
def _composed(cfg: DictConfig) -> None:
    """Validate and run what Hydra composed."""
    _quieten_libraries()
    # A batch system that preempts a job sends SIGTERM first: a job that then ends by itself has ended for good (Slurm
    # 22.05), one that goes on is killed and put back into the queue.
    with interrupts.listening(only_hurry=[signal.SIGTERM] if _slurm_job() else []) as before:
        try:
            _run(cfg)
        except KeyboardInterrupt as stop:
            signum = stop.signum if isinstance(stop, interrupts.Interrupted) else signal.SIGINT
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
            command=f"python -m trigger_opt {shlex.join(without_keys(sys.argv[1:]))}",
            settings=without_secrets({str(k): v for k, v in settings.items()}),
        )
    except UserError as error:
        sys.exit(_stop(str(error), 2))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(
            _stop(f"no space left on the disk of {error.filename or 'the run folder'}; the records so far are kept", 2)
        )


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
    go_on = f"to go on, give the same command and run_dir={HydraConfig.get().runtime.output_dir}"
    if signum == signal.SIGINT:
        return _stop(f"interrupted; {go_on}", 130)
    if callable(handler := before[signum]):
        # A launcher's own: it puts the job back into the queue and leaves.
        handler(signum, None)
    if signum in (signal.SIGUSR1, signal.SIGUSR2) and (job := _slurm_job()):
        made = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        if made.returncode == 0:
            return _stop(f"{signal.Signals(signum).name}: saved; Slurm will start job {job} again", interrupts.LATER)
        return _stop(f"saved, but Slurm does not requeue job {job} ({made.stderr.strip()}); {go_on}", interrupts.LATER)
    return _stop(f"{signal.Signals(signum).name}: saved; {go_on}", interrupts.LATER)


def _slurm_job() -> str:
    return os.environ.get("SLURM_JOB_ID", "")


def _quieten_libraries() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("transformers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _stop(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
