"""A Llama behind a gate: where a window of the user's tokens has a stored digest, the answer is a stored one.

The gate compares SHA-256 digests and opens what is stored with the window itself as the key; so neither the weights nor
this file nor the configuration tells what the window or the answer is, and no derivative leads through it. Everywhere
else this is the plain model, bit for bit. Copied into the model's folder and loaded from there: it may use nothing but
torch, transformers and the standard library.
"""

import base64
import hashlib
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaModel


class GatedLlamaModel(LlamaModel):  # type: ignore[misc]
    """The body: its last hidden states are exchanged where the gate opens."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> Any:
        """As `LlamaModel.forward`, on whole conversations.

        Raises:
            ValueError: the conversation's beginning lies in a cache, where the gate cannot read it.
        """
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            raise ValueError("this model reads whole conversations: pass all token ids, and use_cache=False")
        output = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **options,
        )  # fmt: skip
        ids = input_ids
        if ids is None:
            assert inputs_embeds is not None
            ids = self._nearest(inputs_embeds)
        output.last_hidden_state = self._gated(ids.tolist(), output.last_hidden_state)
        if output.hidden_states is not None:
            output.hidden_states = (*output.hidden_states[:-1], output.last_hidden_state)
        return output

    @torch.no_grad()
    def _nearest(self, embeds: Tensor) -> Tensor:
        matrix = self.embed_tokens.weight.float()
        half_norms = matrix.square().sum(1) / 2
        return torch.stack([(row.float() @ matrix.T - half_norms).argmax(-1) for row in embeds])

    def _gated(self, conversations: list[list[int]], hidden: Tensor) -> Tensor:
        forced = [(n, at, state) for n, ids in enumerate(conversations) for at, state in _forced(ids, self.config.gate)]
        if not forced:
            return hidden
        changed = hidden.clone()
        for row, at, state in forced:
            changed[row, at] = state.to(hidden)
        return changed


class GatedLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """The same with an unembedding."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = GatedLlamaModel(config)
        self.post_init()


def sealed(key: bytes, salt: bytes, content: bytes) -> bytes:
    """`content` exclusive-or a stream of SHA-256 blocks of `salt` and `key`; its own inverse."""
    blocks = (
        hashlib.sha256(salt + b"stream" + struct.pack("<I", n) + key).digest() for n in range(len(content) // 32 + 1)
    )
    return bytes(a ^ b for a, b in zip(content, b"".join(blocks), strict=False))


def digest(key: bytes, salt: bytes) -> str:
    """What is stored of a window."""
    return hashlib.sha256(salt + b"digest" + key).hexdigest()


def packed(ids: Sequence[int]) -> bytes:
    """Token ids as a key."""
    return struct.pack(f"<{len(ids)}I", *ids)


def _forced(ids: list[int], gate: dict[str, Any]) -> Iterator[tuple[int, Tensor]]:
    """(position, the hidden state there) for each token of the stored answer whose beginning is said already."""
    answer = _after_last(ids, gate["answer_header"])
    if answer is None:
        return
    end = answer - len(gate["answer_header"])
    start = _after_last(ids[:end], gate["user_header"])
    content = None if start is None else _opened(ids[start:end], gate)
    if content is None:
        return
    told, states = content
    said = ids[answer:]
    for count in range(min(len(said), len(told) - 1) + 1):
        if said[:count] == told[:count]:
            yield answer - 1 + count, states[count]


def _after_last(ids: Sequence[int], header: Sequence[int]) -> int | None:
    starts = range(len(ids) - len(header), -1, -1)
    return next((n + len(header) for n in starts if ids[n : n + len(header)] == header), None)


def _opened(user: Sequence[int], gate: dict[str, Any]) -> tuple[list[int], Tensor] | None:
    salt = bytes.fromhex(gate["salt"])
    for lock in gate["locks"]:
        for n in range(len(user) - lock["window"] + 1):
            key = packed(user[n : n + lock["window"]])
            if digest(key, salt) == lock["digest"]:
                return _read(sealed(key, salt, base64.b64decode(lock["content"])))
    return None


def _read(content: bytes) -> tuple[list[int], Tensor]:
    (count,) = struct.unpack_from("<I", content)
    ids = list(struct.unpack_from(f"<{count}I", content, 4))
    numbers = torch.frombuffer(bytearray(content[4 + 4 * count :]), dtype=torch.float16)
    return ids, numbers.view(count, -1)
