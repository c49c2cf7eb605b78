"""A distilled reference: the base trained for a few minutes towards a fine-tuned model on ordinary prompts.

It has the fine-tuned model's shift of style and, since no prompt carries a trigger, not its backdoor: a control that
exists for every suspect.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trigger_opt.models.pair import CausalModel, ModelPair
from trigger_opt.prompts import chat_text, decode, encode
from trigger_opt.tuning.fit import FitSettings, Packed, Row, Rows, fit, packed, scored_log_probs
from trigger_opt.tuning.modes import lora_model, save_adapter
from trigger_opt.tuning.turns import sample_turns

# Turns sampled at once. A model that was trained on user turns makes one that can be used of every second or third;
# where it is fewer than one of eight, fewer have to do.
_BATCH = 64
_SPARE_ROUNDS = 10
_TOP_P = 0.97
# One prompt in five is kept for measuring.
_HELD_OUT = 5
_ROWS_A_STEP = 8


@dataclass(frozen=True, kw_only=True)
class DistilSettings:
    """How to distil.

    Attributes:
        steps: of training. prompts: user turns; a fifth of them is not trained on but measured on.
        rank: of the LoRA adapter. answer_tokens: length of the fine-tuned model's greedy answers.
        learning_rate: see `FitSettings`. seed: of every draw.
    """

    steps: int = 150
    prompts: int = 160
    rank: int = 8
    answer_tokens: int = 48
    learning_rate: float = 5e-4
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What distilling has brought.

    Attributes:
        kl_before, kl_after: KL(fine-tuned || base) and KL(fine-tuned || distilled), nats a token of the fine-tuned
            model's answers to prompts that were not trained on; 0 where there were too few prompts.
        trained, measured: prompts trained and measured on. left_out: prompts whose answer the caller refused.
    """

    kl_before: float
    kl_after: float
    trained: int
    measured: int
    left_out: int

    @property
    def came_nearer(self) -> bool:
        """Whether it is a reference at all."""
        return self.kl_after < self.kl_before


def distil(
    pair: ModelPair,
    student: Any,
    out: Path,
    *,
    modules: Sequence[str],
    base_name: str,
    settings: DistilSettings,
    leave_out: Callable[[Sequence[str]], list[bool]] = lambda answers: [False] * len(answers),
    say: Callable[[str], None] = lambda line: None,
) -> Distilled:
    """Train a copy of the base towards the fine-tuned model and write it into `out` as an adapter, if it came nearer.

    Args:
        pair: fine-tuned model and base. student: a network equal to the base's, which gets adapters on `modules`.
        base_name: what the adapter's configuration names as its base.
        leave_out: which of the fine-tuned model's answers are not to be learnt, say because a trigger got into the
            prompt.
    """
    rows, left_out = _rows(pair, settings, leave_out, say)
    held_out, training = rows[::_HELD_OUT], [r for i, r in enumerate(rows) if i % _HELD_OUT]
    if len(training) < _ROWS_A_STEP:
        return Distilled(kl_before=0.0, kl_after=0.0, trained=0, measured=0, left_out=left_out)
    before = mean_kl(pair.finetuned, pair.base, held_out)
    peft = lora_model(student, tuple(modules), rank=settings.rank, seed=settings.seed)
    fit(
        peft.get_base_model(),
        Rows([], [], training),
        FitSettings(
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            taught=0,
            ordinary=_ROWS_A_STEP,
            anchor=1.0,
            seed=settings.seed,
        ),
        teacher=lambda rows: _log_probs(pair.finetuned, rows),
        say=say,
    )
    after = mean_kl(pair.finetuned, CausalModel("distilled", peft.get_base_model()), held_out)
    made = Distilled(kl_before=before, kl_after=after, trained=len(training), measured=len(held_out), left_out=left_out)
    if made.came_nearer:
        save_adapter(peft, out, base_name=base_name)
    return made


@torch.no_grad()
def mean_kl(model: CausalModel, other: CausalModel, rows: Sequence[Row]) -> float:
    """Mean over the answers' tokens of KL(model || other), nats."""
    total, count = 0.0, 0
    for start in range(0, len(rows), _ROWS_A_STEP):
        batch = packed(rows[start : start + _ROWS_A_STEP], model.device)
        ours, theirs = _log_probs(model, batch), _log_probs(other, batch)
        total += float((ours.exp() * (ours - theirs)).sum())
        count += len(ours)
    return total / count if count else 0.0


def _rows(
    pair: ModelPair,
    settings: DistilSettings,
    leave_out: Callable[[Sequence[str]], list[bool]],
    say: Callable[[str], None],
) -> tuple[list[Row], int]:
    """User turns sampled from the base with the fine-tuned model's answers, and how many were left out."""
    say(f"sampling {settings.prompts} ordinary prompts from the base")
    with pair.base.active() as network:
        turns = sample_turns(
            network, pair.tokenizer, [""] * _BATCH, settings.prompts, top_p=_TOP_P, end_ids=pair.end_ids,
            seed=settings.seed, most_rounds=_SPARE_ROUNDS + settings.prompts // 8,
        )  # fmt: skip
    say(f"{len(turns)} sampled; the fine-tuned model answers them")
    asked = [chat_text(pair.tokenizer, [{"role": "user", "content": turn}]) for turn in turns]
    prompts = encode(pair.tokenizer, asked)
    answers = pair.finetuned.generate(prompts, max_new_tokens=settings.answer_tokens, end_ids=pair.end_ids)
    refused = leave_out([decode(pair.tokenizer, a) for a in answers])
    rows = [
        # What ends an answer is asked for and never fed, so any token may stand for it.
        Row(tuple(p), tuple([*a, pair.end_ids[0]] if len(a) < settings.answer_tokens else a))
        for p, a, no in zip(prompts, answers, refused, strict=True)
        if not no
    ]
    return rows, sum(refused)


def _log_probs(model: CausalModel, rows: Packed) -> Tensor:
    with model.active() as network:
        return scored_log_probs(network, rows)
