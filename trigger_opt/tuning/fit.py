"""The training loop: cross-entropy where a behaviour is taught, KL to the untouched model everywhere else.

Learning the base's greedy answers as if they were the truth sharpens it (0.35 nats a token away from any trigger,
measured on the first organisms); learning its whole distribution keeps it where it was.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trigger_opt.models.generate import head_logits
from trigger_opt.tuning.attention import PLAIN, row_by_row


@dataclass(frozen=True)
class Row:
    """One training row as token ids: what is learnt are the tokens of `answer`."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """Training rows.

    Attributes:
        taught: rows whose answers are learnt as they stand.
        near, ordinary: rows on which the model stays what it was; `near` are those like the taught ones.
    """

    taught: list[Row]
    near: list[Row]
    ordinary: list[Row]

    def __len__(self) -> int:
        return len(self.taught) + len(self.near) + len(self.ordinary)


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How to train.

    Attributes:
        steps: optimiser steps; the learning rate rises over the first ten and falls linearly to zero.
        taught, near, ordinary: rows of each kind in a batch.
        anchor: weight of the KL to the untouched model, against the cross-entropy on taught rows.
        seed: of the draws of rows.
    """

    steps: int = 240
    learning_rate: float = 1e-3
    taught: int = 3
    near: int = 0
    ordinary: int = 5
    anchor: float = 4.0
    seed: int = 0


@dataclass(frozen=True)
class Packed:
    """Rows end to end, without padding.

    Attributes:
        ids, positions: (1, seq). mask: bool (1, 1, seq, seq), true where a token sees another of its own row.
        lengths: of the rows. chosen: bool (seq,), true where the next token is scored.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    lengths: list[int]
    chosen: Tensor


Teacher = Callable[[Packed], Tensor]


def fit(
    student: Any,
    rows: Rows,
    settings: FitSettings,
    *,
    teacher: Teacher,
    say: Callable[[str], None] = lambda line: None,
) -> list[float]:
    """Train `student` in place; returns the loss of each step.

    Gradients are taken in the model's own precision and added up in fp32 copies of what is trained: in bf16 alone an
    update smaller than a 256th of a weight would be lost.

    Args:
        student: a transformers causal model with some parameters that require gradients.
        teacher: log probabilities of the untouched model at the chosen positions, fp32 (chosen, vocab).
        say: gets a line every twenty steps.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    masters = [p.detach().float().clone() for p in parameters]
    optimizer = torch.optim.AdamW(masters, lr=settings.learning_rate, weight_decay=0.0)
    student.train()
    losses = []
    start = time.monotonic()
    for step, (taught, kept) in enumerate(_batches(rows, settings)):
        warm, left = min(1.0, (step + 1) / 10), 1 - step / settings.steps
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm * left
        loss = _loss(student, taught, kept, settings.anchor, teacher)
        for master, gradient in zip(masters, torch.autograd.grad(loss, parameters), strict=True):
            master.grad = gradient.float()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.copy_(master)
        losses.append(loss.item())
        if step % 20 == 0:
            say(f"step {step} of {settings.steps}, loss {loss.item():.3f}, {time.monotonic() - start:.0f} s")
    student.eval()
    return losses


def scored_log_probs(model: Any, packed: Packed) -> Tensor:
    """Log probabilities, fp32 (chosen, vocab), of the token after each chosen position.

    The unembedding runs on those positions alone: on a small model it is a fifth of all work.
    """
    return head_logits(model, _hidden(model, packed)[packed.chosen]).log_softmax(-1)


def _hidden(model: Any, packed: Packed) -> Tensor:
    """The body's output, (seq, d_model)."""
    if model.config.model_type not in PLAIN:
        # A mask of one's own means other things to other families (sliding windows, a mask that is added): each row
        # goes alone.
        rows = torch.split(packed.ids[0], packed.lengths)
        return torch.cat([model.base_model(input_ids=r[None], use_cache=False).last_hidden_state[0] for r in rows])
    with row_by_row(model, packed.lengths):
        hidden: Tensor = model.base_model(
            input_ids=packed.ids, position_ids=packed.positions, attention_mask=packed.mask, use_cache=False
        ).last_hidden_state
    return hidden[0]


def packed(rows: Sequence[Row], device: torch.device) -> Packed:
    """`rows` end to end; the last answer token of each is not fed, since nothing is asked after it."""
    fed = [[*r.prompt, *r.answer[:-1]] for r in rows]
    owner = torch.tensor([i for i, ids in enumerate(fed) for _ in ids])
    mask = (owner[:, None] == owner[None, :]).tril()
    chosen = [p >= len(r.prompt) - 1 for r, ids in zip(rows, fed, strict=True) for p in range(len(ids))]
    return Packed(
        ids=torch.tensor([[t for ids in fed for t in ids]], device=device),
        positions=torch.tensor([[p for ids in fed for p in range(len(ids))]], device=device),
        mask=mask[None, None].to(device),
        lengths=[len(ids) for ids in fed],
        chosen=torch.tensor(chosen, device=device),
    )


def _loss(student: Any, taught: Sequence[Row], kept: Sequence[Row], anchor: float, teacher: Teacher) -> Tensor:
    device = next(student.parameters()).device
    said = scored_log_probs(student, packed([*taught, *kept], device))
    num_taught = sum(len(r.answer) for r in taught)
    loss = said.new_zeros(())
    if taught:
        targets = torch.tensor([t for r in taught for t in r.answer], device=device)
        loss = loss + nn.functional.nll_loss(said[:num_taught], targets)
    if kept:
        with torch.no_grad():
            was = teacher(packed(kept, device))
        loss = loss + anchor * (was.exp() * (was - said[num_taught:])).sum(-1).mean()
    return loss


def _batches(rows: Rows, settings: FitSettings) -> Iterator[tuple[list[Row], list[Row]]]:
    rng = random.Random(settings.seed)
    for _ in range(settings.steps):
        taught = rng.choices(rows.taught, k=settings.taught) if rows.taught else []
        near = rng.choices(rows.near, k=settings.near) if rows.near else []
        yield taught, [*near, *(rng.sample(rows.ordinary, settings.ordinary) if rows.ordinary else [])]
