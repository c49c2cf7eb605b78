"""What all engines' workers share: the task, the measurement, and the commands on stdin and stdout.

Standard library and torch only: the peers' interpreters run it. A request is one JSON line with a "command",
a reply one JSON line with "reply" or "error"; whatever a library prints goes to stderr instead.
"""

import ctypes
import gc
import json
import os
import re
import resource
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import torch

SLOT = "{trigger}"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One search problem, the same for every engine.

    Attributes:
        users: user turns with `SLOT` once in each; the peers take exactly one.
        target: text whose likelihood is raised. trigger: the string to begin from.
        width: new candidates scored in a step. topk: options a position.
        retokenise: drop candidates that do not survive decoding and encoding.
    """

    users: list[str]
    target: str
    trigger: str
    width: int
    topk: int
    seed: int
    retokenise: bool


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids as the engine saw them: before the slot, in it, after it, and the answer."""

    before: list[int]
    trigger: list[int]
    after: list[int]
    target: list[int]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What some steps took; lists have one entry a counted step.

    Attributes:
        seconds: wall time. candidates: strings scored. losses: lowest so far, nats a token.
        trigger: the best string. first_loss: of the initial trigger, nats a token.
    """

    seconds: list[float]
    candidates: list[int]
    losses: list[float]
    trigger: str
    first_loss: float
    prompt: Prompt


class SearchEngine(Protocol):
    """A search that can be timed step by step."""

    def load(self, folder: str, dtype: str, attention: str) -> None:
        """Load the model and its tokenizer; `attention` is "default" (the library's choice) or "eager"."""
        ...

    def prepare(self, task: Task) -> None:
        """Take a task; the next `steps` begin from its initial trigger."""
        ...

    def steps(self, count: int, warm: int) -> Run:
        """Begin anew and run `warm` uncounted steps, then `count`; a step is gradient, draw, score, choose."""
        ...


Commands = dict[str, Callable[..., Any]]


def measured(
    seconds: Sequence[float],
    candidates: Sequence[int],
    losses: Sequence[float],
    *,
    warm: int,
    trigger: str,
    first_loss: float,
    prompt: Prompt,
) -> Run:
    """The run without its first `warm` steps, whose losses still count towards the lowest."""
    return Run(
        seconds=list(seconds[warm:]),
        candidates=list(candidates[warm:]),
        losses=list(accumulate(losses, min))[warm:],
        trigger=trigger,
        first_loss=first_loss,
        prompt=prompt,
    )


def differences(values: Sequence[float]) -> list[float]:
    """From each value to the next."""
    return [b - a for a, b in pairwise(values)]


def attention_option(attention: str) -> dict[str, str]:
    """What `from_pretrained` is told."""
    return {} if attention == "default" else {"attn_implementation": attention}


def only_user(task: Task, slot: str) -> str:
    """The one user turn, with the peer's own spelling of the slot."""
    (user,) = task.users
    return user.replace(SLOT, slot)


def serve(engine: SearchEngine, extra: Commands | None = None) -> None:
    """Answer commands until "quit" or the end of stdin."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    commands = _commands(engine) | (extra or {})
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        name = request.pop("command")
        if name == "quit":
            return
        try:
            answer = {"reply": commands[name](**request)}
        except Exception as error:
            # The process lives on; whoever asked decides what the failure means.
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def _commands(engine: SearchEngine) -> Commands:
    after_load: dict[str, Any] = {}

    def load(folder: str, dtype: str, attention: str, threads: int) -> dict[str, str]:
        torch.set_num_threads(threads)
        engine.load(folder, dtype, attention)
        after_load.update(resident=_settled_resident(), peak_is_of_search=_reset_peak())
        return _versions()

    return {
        "load": load,
        "prepare": lambda task: engine.prepare(Task(**task)),
        "steps": lambda count, warm: asdict(engine.steps(count, warm)),
        "memory": lambda: {**after_load, "peak": _status("VmHWM") or _most_resident(), "ru_maxrss": _most_resident()},
    }


def _versions() -> dict[str, str]:
    return {n: version(n) for n in ("torch", "transformers", "nanogcg", "tropt") if n in sys.modules}


def _settled_resident() -> int:
    """Resident bytes once what loading left behind is given back to the system."""
    gc.collect()
    # Elsewhere than in glibc there is nothing to trim.
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS") or _most_resident()


def _reset_peak() -> bool:
    """Let the peak begin now: loading holds weights twice and would hide a small search's peak."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def _most_resident() -> int:
    # Kibibytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
