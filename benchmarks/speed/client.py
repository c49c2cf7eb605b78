"""Starts an engine's worker with the engine's own interpreter, and speaks with it."""

import json
import os
import signal
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.host import ROOT
from benchmarks.speed.worker import Prompt, Run, Task
from trigger_opt.errors import UserError


class WorkerError(UserError):
    """A worker could not do what it was asked; one line says which and why."""


class Worker:
    """One engine in a process of its own; use it as a context manager."""

    def __init__(self, engine: str, interpreter: Path) -> None:
        self.engine = engine
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        # Idle threads must sleep: the other engine is being timed on the same cores.
        quiet = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [str(interpreter), "-m", f"benchmarks.speed.worker_{engine}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            env=os.environ | quiet,
            text=True,
            encoding="utf-8",
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def load(self, folder: Path, *, attention: str, threads: int) -> dict[str, str]:
        """Load a model in bf16; versions of what the worker runs on."""
        versions: dict[str, str] = self.ask(
            "load", folder=str(folder), dtype="bfloat16", attention=attention, threads=threads
        )
        return versions

    def prepare(self, task: Task) -> None:
        """Take a task."""
        self.ask("prepare", task=asdict(task))

    def steps(self, count: int, *, warm: int) -> Run:
        """Run `warm` uncounted steps and `count` more from the task's initial trigger."""
        return run_from(self.ask("steps", count=count, warm=warm))

    def memory(self) -> dict[str, int]:
        """Bytes: `resident` after loading, `peak` since (of all time where `peak_is_of_search` is false)."""
        memory: dict[str, int] = self.ask("memory")
        return memory

    def ask(self, command: str, **arguments: Any) -> Any:
        """One command, one answer.

        Raises:
            WorkerError: it failed, or the process is gone.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self.engine} died at {command!r}, {self._end()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.engine} failed at {command!r}: {answer['error']}")
        return answer["reply"]

    def _end(self) -> str:
        """How the process ended, and the last thing it said."""
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "killed from outside; too little memory is the usual cause"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"exit code {code}: {lines[-1] if lines else 'it said nothing'}"


def run_from(answer: dict[str, Any]) -> Run:
    """The measurement in a worker's answer."""
    known = {k: v for k, v in answer.items() if k in Run.__dataclass_fields__}
    return Run(**(known | {"prompt": Prompt(**answer["prompt"])}))
