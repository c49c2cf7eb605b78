"""Runs of the command line in processes of their own that may be killed."""

import importlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.zygote import ROOT, Zygote, serve, zygote


@dataclass
class Runs:
    """Runs of a zygote."""

    zygote: Zygote

    def start(
        self, arguments: Sequence[str], log: Path, *, die: tuple[str, str, int] | None = None, slurm_job: str = ""
    ) -> int:
        """Process id of `python -m trigger_opt ARGUMENTS`, all it prints in `log`.

        Args:
            die: kills itself at (a function of `_PLACES`, "before" or "after", which call of it).
            slurm_job: number of the Slurm job it believes to be.
        """
        return self.zygote.start(log, arguments=list(arguments), die=die, slurm_job=slurm_job)

    def run(self, arguments: Sequence[str], log: Path, *, die: tuple[str, str, int] | None = None) -> int:
        """Exit code of a whole run; negative: the signal."""
        return self.zygote.wait(self.start(arguments, log, die=die))


@contextmanager
def run_processes() -> Iterator[Runs]:
    """Until the context ends."""
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    with zygote("tests.run_processes", environment) as made:
        yield Runs(made)


def until(happened: Callable[[], bool], *, seconds: float = 60) -> None:
    """Wait for something that another process does.

    Raises:
        TimeoutError: it did not happen.
    """
    limit = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > limit:
            raise TimeoutError("it did not happen")
        time.sleep(0.005)


# What a run imports only when it needs it: seconds, which each of the forks would spend again.
_LATE = (
    "trigger_opt.entry", "torch._dynamo", "torch.distributed.tensor", "accelerate", "jinja2", "peft",
    "transformers.generation", "transformers.models.auto.modeling_auto", "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.llama.modeling_llama", "transformers.integrations.hub_kernels", "wandb",
)  # fmt: skip

# Where a run may be told to kill itself.
_PLACES = {
    "checkpoint": "trigger_opt.checkpoint:save_checkpoint",
    "records": "trigger_opt.records:write_text",
    "history": "trigger_opt.searching:append_record",
    "run.json": "trigger_opt.run_folder:write_record",
}


def main() -> None:
    """The zygote."""
    for module in _LATE:
        importlib.import_module(module)
    serve(_run)


def _run(order: dict[str, Any]) -> object:
    from trigger_opt import searching
    from trigger_opt.__main__ import main as run

    if order["die"]:
        _arm(*order["die"])
    if order["slurm_job"]:
        os.environ["SLURM_JOB_ID"] = order["slurm_job"]
    # Twice half a second in every search.
    setattr(searching, "matmul_rate", lambda device, dtype: 1e11)  # noqa: B010
    sys.argv = ["trigger_opt", *order["arguments"]]
    try:
        run()
    except SystemExit as stop:
        return 0 if stop.code is None else stop.code
    return 0


def _arm(place: str, when: str, number: int) -> None:
    module_name, name = _PLACES[place].split(":")
    module = sys.modules[module_name]
    original, calls = getattr(module, name), itertools.count(1)

    def armed(*given: Any, **named: Any) -> Any:
        call = next(calls)
        if (when, number) == ("before", call):
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*given, **named)
        if (when, number) == ("after", call):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, armed)


if __name__ == "__main__":
    main()
