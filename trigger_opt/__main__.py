"""`python -m trigger_opt +experiment=NAME` and the console script `trigger-opt`."""

import errno
import logging
import os
import shlex
import sys
from pathlib import Path

# Before torch is imported: with the default, a busy neighbour makes every small product 60 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from trigger_opt import pipeline
from trigger_opt.config import register, register_resolvers, validated
from trigger_opt.errors import UserError
from trigger_opt.paths import data_dir

register_resolvers()
register()


@hydra.main(version_base="1.3", config_path=str(data_dir("configs")), config_name="config")
def main(cfg: DictConfig) -> None:
    """Compose, validate, run; a user's mistake is one line and exit code 2."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        config = validated(cfg)
        settings = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(settings, dict)
        pipeline.run(
            config,
            run_dir=Path(HydraConfig.get().runtime.output_dir),
            command=f"python -m trigger_opt {shlex.join(sys.argv[1:])}",
            settings={str(k): v for k, v in settings.items()},
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


def _stop(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
