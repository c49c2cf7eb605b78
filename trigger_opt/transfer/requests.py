"""What is asked of a remote model, and what came back. Nothing here knows how it travels."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

CHAT = "chat"
ACTIVATIONS = "activations"

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question to one model.

    Attributes:
        server: of the client that asks (`Client.server`): the same question to another server is another request.
        model: as the client names it.
        endpoint: `CHAT` or `ACTIVATIONS`.
        messages: chat messages {role, content}.
        options: what else decides the answer and travels with it (max_tokens, temperature); empty where the server
            takes nothing.
        module_names: whose outputs are asked for; empty for `CHAT`.
        repeat: number of the repetition: a question asked again is another request.
    """

    server: str
    model: str
    endpoint: str
    messages: tuple[dict[str, str], ...]
    options: dict[str, Any] = field(default_factory=dict)
    module_names: tuple[str, ...] = ()
    repeat: int = 0

    @property
    def key(self) -> str:
        """32 hex digits, the same for equal requests in every process."""
        parts = [self.server, self.model, self.endpoint, self.messages, self.options, self.module_names, self.repeat]
        text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A request in a batch, under the identifier the server echoes."""

    custom_id: str
    request: Request


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server said to one line.

    Attributes:
        custom_id: as echoed.
        text: the model's answer; may be empty. activations: module name -> (tokens, width); empty for `CHAT`.
        error: why there is no answer, in the server's words; None when there is one.
        input_tokens, output_tokens: as the server counted; None where it does not.
    """

    custom_id: str
    text: str = ""
    activations: dict[str, Array] = field(default_factory=dict)
    error: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
