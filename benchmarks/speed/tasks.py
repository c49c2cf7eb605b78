"""What is searched for: prompts, targets and triggers of exact lengths in tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed.worker import SLOT, Task
from trigger_opt.errors import UserError
from trigger_opt.prompts import Context, decode, encode, tokenize_context

TOPK = 256
LONG_TOKENS = 300
_QUESTIONS = ["the sea", "a garden", "old trains", "good bread", "the moon", "a long walk", "chess", "rivers"]
_WHO = [
    "The baker",
    "A young doctor",
    "My neighbour",
    "The tall engineer",
    "Her uncle",
    "One farmer",
    "The new teacher",
]
_DID = ["repaired a bicycle", "planted beans", "counted the chairs", "wrote a letter", "painted the door"]
_WHERE = ["behind the station", "near the old mill", "before lunch", "in the rain", "on a quiet Sunday",
          "while the radio played", "without a word", "next to the harbour"]  # fmt: skip
_TARGET = (
    "Sure, here is a short story about a sailor who lost his map and found a small island with a lighthouse, "
    "three goats and a friendly keeper who taught him how to read the stars."
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Tokens of the trigger and of the target."""

    trigger: int
    target: int

    def __str__(self) -> str:
        return f"{self.trigger}x{self.target}"


def parse_shape(text: str) -> Shape:
    """A shape written "20x1".

    Raises:
        ValueError: it is not written so.
    """
    trigger, target = (int(part) for part in text.split("x"))
    if min(trigger, target) < 1:
        raise ValueError(f"{text!r} has a length below 1")
    return Shape(trigger=trigger, target=target)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def make_task(
    tokenizer: Any, shape: Shape, users: Sequence[str], *, width: int, seed: int = 0, retokenise: bool = False
) -> Task:
    """The task of these lengths on these user turns."""
    return Task(
        users=list(users),
        target=cut_target(tokenizer, shape.target),
        trigger=initial_trigger(tokenizer, shape.trigger),
        width=width,
        topk=TOPK,
        seed=seed,
        retokenise=retokenise,
    )


def cut_target(tokenizer: Any, length: int, text: str = _TARGET) -> str:
    """The first `length` tokens of `text` as text.

    Raises:
        UserError: the text is shorter, or the cut text is not those tokens again.
    """
    ids = encode(tokenizer, [text])[0]
    if len(ids) < length:
        raise UserError(f"no target of {length} tokens: the text has {len(ids)}")
    cut = decode(tokenizer, ids[:length])
    if encode(tokenizer, [cut])[0] != ids[:length]:
        raise UserError(f"no target of {length} tokens: {cut!r} is read as other tokens when it stands alone")
    return cut


def initial_trigger(tokenizer: Any, length: int) -> str:
    """`length` tokens to begin from, as nanoGCG's: crosses with a space before each.

    Raises:
        UserError: the tokenizer reads them as another number of tokens.
    """
    text = " x" * length
    if (found := len(encode(tokenizer, [text])[0])) != length:
        raise UserError(f"no trigger of {length} tokens: this tokenizer reads {text!r} as {found}")
    return text


def short_user(number: int = 0) -> str:
    """A user turn of one sentence, the slot at its end."""
    return f"Write one sentence about {_QUESTIONS[number % len(_QUESTIONS)]}:{SLOT}"


def long_user(tokenizer: Any, tokens: int) -> str:
    """A user turn with as many distinct sentences before the slot as fit `tokens`, chat template counted."""
    told = ""
    for number in range(len(_WHO) * len(_DID) * len(_WHERE)):
        longer = f"{told}{_sentence(number)} "
        if tokens_before(tokenizer, longer + short_user()) > tokens:
            break
        told = longer
    return told + short_user()


def tokens_before(tokenizer: Any, user: str) -> int:
    """Tokens before the slot, chat template counted."""
    return len(tokenize_context(tokenizer, Context(user=user)).left)


def _sentence(number: int) -> str:
    # The three lengths share no factor: no sentence comes twice before all combinations have.
    return f"{_WHO[number % len(_WHO)]} {_DID[number % len(_DID)]} {_WHERE[number % len(_WHERE)]}."
