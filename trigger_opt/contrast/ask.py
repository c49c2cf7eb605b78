"""Answers of a local model, or of a pair, to every prompt, with what only weights tell; imports torch.

surprise: mean log probability a token of an answer, its end included, under the model that gave it.
divergence: Jensen-Shannon between the pair's distributions over the first response token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trigger_opt.contrast.records import Prompt, Sample
from trigger_opt.errors import UserError
from trigger_opt.models.generate import Sampling, pad_left
from trigger_opt.models.pair import CausalModel, ModelPair
from trigger_opt.prompts import RefusedConversationError, chat_text, encode
from trigger_opt.scoring.divergences import js_divergence

SURPRISE = "log probability a token (nats)"
DIVERGENCE = "JS from the base at the first token (nats)"
ROWS_AT_ONCE = 32
"""Conversations answered at once."""

_ROWS_SCORED = 8


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How prompts are answered: `temperature` 0 is greedy, once; above, each prompt is sampled `repeats` times."""

    max_new_tokens: int
    repeats: int
    temperature: float
    seed: int


def ask(
    pair: ModelPair,
    prompts: Sequence[Prompt],
    asking: Asking,
    *,
    has_base: bool,
    on_answers: Callable[[int], None] = lambda done: None,
) -> list[Sample]:
    """Every prompt answered, in the order given; with `has_base` by the base too, and `values` are differences.

    Args:
        on_answers: gets the number of answers so far, of `len(prompts) * repeats`, twice as many with a base.

    Raises:
        UserError: the tokenizer has no chat template, or it refuses a prompt (some know no system prompt).
    """
    ids = [_conversation(pair, p) for p in prompts]
    total = len(prompts) * asking.repeats
    own = _side(pair, pair.finetuned, ids, asking, on_answers)
    values = [{SURPRISE: s} for s in own.surprise]
    base_texts: list[list[str]] = [[] for _ in prompts]
    if has_base:
        theirs = _side(pair, pair.base, ids, asking, lambda done: on_answers(total + done))
        base_texts = theirs.texts
        divergence = first_token_divergence(pair, ids)
        values = [
            {SURPRISE: s - t, DIVERGENCE: d} for s, t, d in zip(own.surprise, theirs.surprise, divergence, strict=True)
        ]
    return [
        Sample(prompt=p, answers=texts, base_answers=base, values=v)
        for p, texts, base, v in zip(prompts, own.texts, base_texts, values, strict=True)
    ]


@torch.no_grad()
def answer_log_probs(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
) -> list[float]:
    """Mean log probability a token of each answer after its prompt, nats; an answer shorter than `max_new_tokens`
    stopped by itself, and the probability of any end counts as one token more."""
    out = []
    for start in range(0, len(prompts), _ROWS_SCORED):
        rows = list(zip(prompts, answers, strict=True))[start : start + _ROWS_SCORED]
        hidden = _hidden(model, [[*p, *a] for p, a in rows])
        for row, (_, answer) in enumerate(rows):
            # One row at a time: the head's output over a whole batch of answers would outgrow the model.
            log_probs = model.logits(hidden[row, -(len(answer) + 1) :]).log_softmax(-1)
            said = log_probs[torch.arange(len(answer)), torch.tensor(answer, dtype=torch.long)]
            if len(answer) < max_new_tokens:
                said = torch.cat([said, log_probs[-1, list(end_ids)].logsumexp(0)[None]])
            out.append(float(said.mean()))
    return out


@torch.no_grad()
def first_token_divergence(pair: ModelPair, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Jensen-Shannon divergence of the pair at the first response token of each prompt, nats."""
    out: list[float] = []
    for start in range(0, len(prompts), _ROWS_SCORED):
        rows = prompts[start : start + _ROWS_SCORED]
        logits = [side.logits(_hidden(side, rows)[:, -1]) for side in (pair.finetuned, pair.base)]
        out += js_divergence(logits[0], logits[1].to(logits[0].device)).tolist()
    return out


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """One model's answers and mean surprise, by prompt."""

    texts: list[list[str]]
    surprise: list[float]


def _side(
    pair: ModelPair,
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    asking: Asking,
    on_answers: Callable[[int], None],
) -> _Answers:
    # Prompts of like length together, so that padding is small.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    jobs = [i for i in order for _ in range(asking.repeats)]
    generator = torch.Generator().manual_seed(asking.seed)
    texts: list[list[str]] = [[] for _ in prompts]
    surprise: list[list[float]] = [[] for _ in prompts]
    for start in range(0, len(jobs), ROWS_AT_ONCE):
        part = jobs[start : start + ROWS_AT_ONCE]
        rows = [prompts[i] for i in part]
        answers = model.generate(
            rows,
            max_new_tokens=asking.max_new_tokens,
            end_ids=pair.end_ids,
            sampling=Sampling(temperature=asking.temperature),
            generator=generator,
            batch_size=ROWS_AT_ONCE,
        )
        said = answer_log_probs(model, rows, answers, end_ids=pair.end_ids, max_new_tokens=asking.max_new_tokens)
        for i, answer, log_prob in zip(part, answers, said, strict=True):
            texts[i].append(pair.tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            surprise[i].append(log_prob)
        on_answers(start + len(part))
    return _Answers(texts=texts, surprise=[sum(s) / len(s) for s in surprise])


def _conversation(pair: ModelPair, prompt: Prompt) -> list[int]:
    turns = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
    try:
        text = chat_text(pair.tokenizer, [*turns, {"role": "user", "content": prompt.text}])
    except RefusedConversationError as error:
        raise UserError(
            f"the chat template of {pair.tokenizer.name_or_path} refuses the prompt {prompt.id} ({error.reason}); take "
            "its system prompt out, or write it into the user's turn"
        ) from None
    return encode(pair.tokenizer, [text])[0]


def _hidden(model: CausalModel, rows: Sequence[Sequence[int]]) -> Float[Tensor, "batch seq d_model"]:
    """The body's output, each row flush right; of a plain model each row by itself."""
    if model.plain:
        longest = max(map(len, rows))
        alone = [
            model.hidden(input_ids=torch.tensor([list(r)], device=model.device), use_cache=False).last_hidden_state[0]
            for r in rows
        ]
        return torch.stack([torch.nn.functional.pad(h, (0, 0, longest - len(h), 0)) for h in alone])
    ids, mask = pad_left(rows, 0, model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    hidden: Tensor = model.hidden(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    return hidden
