"""Runs of the command line in processes of their own that may be killed: forked from one that has imported all and
computed nothing, so that each starts in milliseconds."""

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass
class Runs:
    """Forks runs; see `main`."""

    zygote: "subprocess.Popen[str]"

    def start(
        self, arguments: Sequence[str], log: Path, *, die: tuple[str, str, int] | None = None, slurm_job: str = ""
    ) -> int:
        """Process id of `python -m trigger_opt ARGUMENTS`, all it prints in `log`.

        Args:
            die: kills itself at (a function of `_PLACES`, "before" or "after", which call of it).
            slurm_job: number of the Slurm job it believes to be.
        """
        return self._order(what="run", arguments=list(arguments), log=str(log), die=die, slurm_job=slurm_job)

    def wait(self, pid: int) -> int:
        """Exit code; negative: the signal."""
        return self._order(what="wait", pid=pid)

    def run(self, arguments: Sequence[str], log: Path, *, die: tuple[str, str, int] | None = None) -> int:
        """Exit code of a whole run."""
        return self.wait(self.start(arguments, log, die=die))

    def stop(self, pid: int, signum: int) -> int:
        """Exit code of a run after a signal."""
        os.kill(pid, signum)
        return self.wait(pid)

    def _order(self, **order: Any) -> int:
        assert self.zygote.stdin is not None
        assert self.zygote.stdout is not None
        self.zygote.stdin.write(json.dumps(order) + "\n")
        self.zygote.stdin.flush()
        return int(self.zygote.stdout.readline())


@contextmanager
def run_processes() -> Iterator[Runs]:
    """The zygote, ended afterwards."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.run_processes"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True, cwd=ROOT) as made:
        try:
            yield Runs(made)
        finally:
            made.terminate()


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
    """Forks, and waits for what was forked, as told on stdin: one JSON object a line, answered by one number."""
    for module in _LATE:
        importlib.import_module(module)
    for text in sys.stdin:
        order = json.loads(text)
        if order["what"] == "wait":
            answer = os.waitstatus_to_exitcode(os.waitpid(order["pid"], 0)[1])
        else:
            answer = _forked(order)
        print(answer, flush=True)


def _forked(order: dict[str, Any]) -> int:
    if pid := os.fork():
        return pid
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code: object = 1
    try:
        if order["die"]:
            _arm(*order["die"])
        if order["slurm_job"]:
            os.environ["SLURM_JOB_ID"] = order["slurm_job"]
        code = _run(order["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _run(arguments: Sequence[str]) -> object:
    from trigger_opt import searching
    from trigger_opt.__main__ import main as run

    # Twice half a second in every search.
    setattr(searching, "matmul_rate", lambda device, dtype: 1e11)  # noqa: B010
    sys.argv = ["trigger_opt", *arguments]
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
