"""A run from the command line: Hydra in, typed configuration out, one line for a user's mistake."""

import errno
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType

# Before torch is imported: with the default, a busy neighbour makes every small product 60 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trigger_opt import pipeline
from trigger_opt.config import (
    composition_problem,
    register,
    register_resolvers,
    validated,
    without_keys,
    without_secrets,
)
from trigger_opt.errors import UserError
from trigger_opt.paths import data_dir
from trigger_opt.scoring import start_group

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
    signal.signal(signal.SIGTERM, _terminate)
    try:
        config = validated(cfg)
        settings = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(settings, dict)
        group = start_group()
        if group.rank:
            pipeline.assist(config, group)
            return
        pipeline.run(
            config,
            run_dir=Path(HydraConfig.get().runtime.output_dir),
            command=f"python -m trigger_opt {shlex.join(without_keys(sys.argv[1:]))}",
            settings=without_secrets({str(k): v for k, v in settings.items()}),
        )
    except UserError as error:
        sys.exit(_stop(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(_stop("interrupted; the records so far are in the run folder", 130))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(
            _stop(f"no space left on the disk of {error.filename or 'the run folder'}; the records so far are kept", 2)
        )


def _terminate(signum: int, frame: FrameType | None) -> None:
    # An exception, so that records and trackers are closed on the way out.
    sys.exit(128 + signum)


def _quieten_libraries() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("transformers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _stop(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
