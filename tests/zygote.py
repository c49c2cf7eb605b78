"""A process that has imported all and computed nothing, and forks on order: each fork then starts in milliseconds, and
may be killed.

The module that is run as the zygote calls `serve`; the test talks to it through `zygote`.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KILLED = -signal.SIGKILL
"""Exit code of what SIGKILL ended."""


@dataclass
class Zygote:
    """Orders go in as JSON objects, one a line, and one number comes back for each."""

    process: "subprocess.Popen[str]"

    def start(self, log: Path, **order: Any) -> int:
        """Process id of a fork that does as ordered, all it prints in `log`."""
        return self._order(order | {"log": str(log)})

    def wait(self, pid: int) -> int:
        """Exit code of a fork; negative: the signal."""
        return self._order({"wait": pid})

    def stop(self, pid: int, signum: int = signal.SIGKILL) -> int:
        """Exit code of a fork after a signal."""
        os.kill(pid, signum)
        return self.wait(pid)

    def _order(self, order: Mapping[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextmanager
def zygote(module: str, environment: Mapping[str, str]) -> Iterator[Zygote]:
    """`python -m MODULE`, ended afterwards; `environment`: beside this process's own."""
    command, pipe = [sys.executable, "-m", module], subprocess.PIPE
    env = os.environ | environment
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, text=True, cwd=ROOT) as process:
        try:
            yield Zygote(process)
        finally:
            process.terminate()


def serve(work: Callable[[dict[str, Any]], object]) -> None:
    """In the zygote: fork `work(order)`, whose result is the exit code, and wait for forks, as told on stdin."""
    for text in sys.stdin:
        order = json.loads(text)
        print(_ended(order["wait"]) if "wait" in order else _forked(work, order), flush=True)


def _ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _forked(work: Callable[[dict[str, Any]], object], order: dict[str, Any]) -> int:
    if pid := os.fork():
        return pid
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code: object = 1
    try:
        code = work(order)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
