"""User turns in the words of a chat model itself.

Given the bare beginning of a user's turn, an instruction-tuned model goes on with the prompts it was trained to expect
(Magpie, arXiv 2406.08464).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from trigger_opt.models.generate import Sampling, generate
from trigger_opt.prompts import encode

# An invisible separator, which no chat template touches; it stands for the user's words.
_MARKER = "\u2063"
_TURN_TOKENS = 40


def sample_turns(
    model: Any,
    tokenizer: Any,
    openings: Sequence[str],
    count: int,
    *,
    top_p: float,
    end_ids: Sequence[int],
    seed: int = 0,
    most_rounds: int | None = None,
    on_found: Callable[[int], None] = lambda found: None,
) -> list[str]:
    """`count` different user turns that begin with one of `openings`; fewer where `most_rounds` did not bring as many.

    Args:
        model: a transformers causal model.
        openings: one for each turn sampled at once; empty strings leave the model free.
        end_ids: tokens that end a turn.
        most_rounds: batches after which it stops; a model that was never trained on user turns may yield none.
        on_found: gets the number of turns found after each batch.
    """
    before, after = _template(tokenizer)
    prefixes = encode(tokenizer, [before + o for o in openings])
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, None] = {}
    rounds = 0
    while len(found) < count and (most_rounds is None or rounds < most_rounds):
        turns = generate(
            model, prefixes, max_new_tokens=_TURN_TOKENS, end_ids=end_ids,
            sampling=Sampling(temperature=1.0, top_p=top_p), generator=generator, batch_size=len(openings),
        )  # fmt: skip
        for opening, ids in zip(openings, turns, strict=True):
            said = opening + tokenizer.decode(ids)
            turn, ended, _ = said.partition(after)
            turn = turn.strip()
            # A turn cut off at 40 tokens is no whole prompt; one with a template mark is no user's.
            whole = len(ids) < _TURN_TOKENS or bool(ended)
            if whole and 10 < len(turn) < 200 and "<|" not in said and "{" not in turn:
                found[turn] = None
        rounds += 1
        on_found(len(found))
    return list(found)[:count]


def _template(tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes before a user's words, and the first mark after them."""
    text: str = tokenizer.apply_chat_template([{"role": "user", "content": _MARKER}], tokenize=False)
    before, _, after = text.partition(_MARKER)
    return before, (after.split() or ["\0"])[0]
