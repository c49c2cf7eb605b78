"""Text out of a causal language model: batches, greedy or sampled, stopped at end of text."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn: `temperature` 0 is greedy; `top_p` is the nucleus."""

    temperature: float = 0.0
    top_p: float = 1.0


GREEDY = Sampling()


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (batch, longest), each row flush right."""
    longest = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.tensor(sequence, dtype=torch.long)
        mask[row, longest - len(sequence) :] = 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def generate(
    model: Any,
    sequences: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
    batch_size: int = 32,
    plain: bool = False,
) -> list[list[int]]:
    """Continuations of each prompt, without the end-of-text token; order kept.

    Prompts are sorted by length before they are batched, so that padding is small.

    Args:
        model: a transformers causal model that takes `use_cache`.
        sequences: prompts as token ids.
        max_new_tokens: at most so many new tokens a prompt.
        end_ids: a row stops at any of these.
        sampling: greedy unless told otherwise; sampling needs `generator`.
        plain: compute the whole conversation anew for each token, with no padding: for a model with code of its own,
            which may do anything with its token ids.
    """
    out: list[list[int]] = [[] for _ in sequences]
    batch = _plain_batch if plain else _batch
    for rows in batches_by_length(sequences, batch_size, alike=plain):
        texts = batch(model, [sequences[i] for i in rows], max_new_tokens, set(end_ids), sampling, generator)
        for row, text in zip(rows, texts, strict=True):
            out[row] = text
    return out


def batches_by_length(sequences: Sequence[Sequence[int]], size: int, *, alike: bool) -> list[list[int]]:
    """Numbers of `sequences` in batches of at most `size`, shortest first: little padding, and with `alike` none."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    groups = [list(g) for _, g in groupby(order, key=lambda i: len(sequences[i]))] if alike else [order]
    return [group[n : n + size] for group in groups for n in range(0, len(group), size)]


def _plain_batch(
    model: Any,
    sequences: list[Sequence[int]],
    max_new_tokens: int,
    end_ids: set[int],
    sampling: Sampling,
    generator: torch.Generator | None,
) -> list[list[int]]:
    ids = torch.tensor([list(s) for s in sequences], dtype=torch.long, device=model.device)
    running = list(range(len(sequences)))
    out: list[list[int]] = [[] for _ in sequences]
    for _ in range(max_new_tokens):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
        tokens = draw(head_logits(model, hidden.contiguous()), sampling, generator)
        kept = [n for n, token in enumerate(tokens.tolist()) if token not in end_ids]
        for n in kept:
            out[running[n]].append(int(tokens[n]))
        running = [running[n] for n in kept]
        if not running:
            break
        ids = torch.cat([ids, tokens.to(ids.device)[:, None]], 1)[kept]
    return out


def _batch(
    model: Any,
    sequences: list[Sequence[int]],
    max_new_tokens: int,
    end_ids: set[int],
    sampling: Sampling,
    generator: torch.Generator | None,
) -> list[list[int]]:
    pad_id = min(end_ids) if end_ids else 0
    ids, mask = pad_left(sequences, pad_id, model.device)
    cache = None
    done = [False] * len(sequences)
    out: list[list[int]] = [[] for _ in sequences]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(max_new_tokens):
        step = model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = step.past_key_values
        # Contiguous before the head: a strided slice turns the product into a batched one that copies the
        # whole unembedding for every row (5.5 s instead of 0.55 s at 576 x 49,152 on this CPU).
        logits = head_logits(model, step.last_hidden_state[:, -1].contiguous())
        ids = draw(logits, sampling, generator)[:, None]
        for row, token in enumerate(ids[:, 0].tolist()):
            done[row] = done[row] or token in end_ids
            if not done[row]:
                out[row].append(token)
        if all(done):
            break
        mask = torch.cat([mask, mask.new_ones(len(sequences), 1)], 1)
        positions = positions[:, -1:] + 1
    return out


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """fp32 logits of `hidden` (rows, d_model), with the family's final soft cap where it has one (Gemma-2)."""
    logits: Tensor = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """One token id a row of `logits` (batch, vocab)."""
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    probs = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p < 1.0:
        sorted_probs, order = probs.sort(-1, descending=True)
        outside = sorted_probs.cumsum(-1) - sorted_probs >= sampling.top_p
        probs = probs.scatter(-1, order, sorted_probs.masked_fill(outside, 0.0))
    return torch.multinomial(probs.cpu(), 1, generator=generator)[:, 0].to(logits.device)
