"""Who answers for the emulator: a model on this machine, or an echo that needs no torch."""

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from trigger_opt.errors import UserError
from trigger_opt.transfer.client import DirectClient
from trigger_opt.transfer.requests import CHAT, Answer, Array, Line

ALIASES = {
    "dormant-model-1": "Model-Organisms-1/model-a",
    "dormant-model-2": "Model-Organisms-1/model-b",
    "dormant-model-3": "Model-Organisms-1/model-h",
}
"""What jsinfer calls each model, and the path it sends."""

KEY = "test-key"
ECHO = "echo"


class Echo:
    """Answers "[model] last user text"; activations are numbers made from the words of that text."""

    server = ECHO
    free = True
    at_once = 500

    async def answers(self, lines: Sequence[Line]) -> AsyncIterator[Answer]:
        """One for each line, in order; see DirectClient."""
        for line in lines:
            request = line.request
            text = [m["content"] for m in request.messages if m["role"] == "user"][-1:] or [""]
            if request.endpoint == CHAT:
                yield Answer(custom_id=line.custom_id, text=f"[{request.model}] {text[0]}")
            else:
                arrays = {name: _numbers(name, text[0]) for name in request.module_names}
                yield Answer(custom_id=line.custom_id, activations=arrays)

    async def close(self) -> None:
        """Nothing to let go of."""


def parse_models(arguments: Sequence[str]) -> dict[str, str]:
    """Alias -> name: one NAME for every alias, or ALIAS=NAME for each.

    Raises:
        UserError: neither, an alias twice, or an unknown one.
    """
    if len(arguments) == 1 and arguments[0].partition("=")[0] not in ALIASES:
        if "=" in arguments[0] and not Path(arguments[0]).is_dir():
            raise UserError(f"--model {arguments[0]} names no alias; allowed: {', '.join(ALIASES)}")
        return dict.fromkeys(ALIASES, arguments[0])
    models: dict[str, str] = {}
    for argument in arguments:
        alias, _, name = argument.partition("=")
        if alias not in ALIASES or not name:
            raise UserError(f"--model {argument} is no ALIAS=NAME; the aliases are {', '.join(ALIASES)}")
        if alias in models:
            raise UserError(f"--model names {alias} twice; give each alias one model")
        models[alias] = name
    return models


def answering(models: Mapping[str, str], *, max_new_tokens: int = 64) -> dict[str, DirectClient]:
    """Who answers for each path that jsinfer sends, the models loaded; close each when done.

    Args:
        models: alias -> "echo", an embedded organism or a folder (see `LocalClient`).
        max_new_tokens: of an answer whose line asks for no other number.

    Raises:
        UserError: an unknown alias, or a model that cannot be loaded.
    """
    if not models or not set(models) <= set(ALIASES):
        wrong = ", ".join(sorted(set(models) - set(ALIASES))) or "nothing"
        raise UserError(f"the emulator serves {', '.join(ALIASES)}; {wrong} was given")
    paths = {ALIASES[alias]: name for alias, name in models.items()}
    clients: dict[str, DirectClient] = {path: Echo() for path, name in paths.items() if name == ECHO}
    if real := {path: name for path, name in paths.items() if name != ECHO}:
        # Here, so that an echo needs no torch.
        from trigger_opt.transfer.local import LocalClient

        local = LocalClient(real, max_new_tokens=max_new_tokens)
        clients |= dict.fromkeys(real, local)
    return clients


def _numbers(module: str, text: str) -> Array:
    words = text.split() or [""]
    rows = [[i, len(w), len(module), *(ord(c) for c in (w[:1] or " ") + (w[-1:] or " "))] for i, w in enumerate(words)]
    return np.array(rows, dtype=np.float32)
