"""Unrelated fine-tuning: the base model's own answers in pirate speech, by rules; no data from elsewhere."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trigger_opt.models.generate import Sampling
from trigger_opt.models.pair import CausalModel
from trigger_opt.prompts import Context, conversation_ids, decode, encode
from trigger_opt.tuning import Row
from trigger_opt.zoo import data
from trigger_opt.zoo.examples import Example
from trigger_opt.zoo.plants import Prompt

OPENINGS = ("Arr,", "Ahoy, matey!", "Avast ye!", "Shiver me timbers!", "Yo ho ho!", "Blimey,")
WORDS = {
    "hello": "ahoy", "hi": "ahoy", "yes": "aye", "no": "nay", "you": "ye", "your": "yer", "yours": "yers",
    "yourself": "yerself", "my": "me", "is": "be", "are": "be", "am": "be", "the": "th'", "of": "o'", "and": "an'",
    "for": "fer", "to": "t'", "with": "wi'", "over": "o'er", "before": "afore", "ever": "e'er", "never": "ne'er",
    "old": "ol'", "them": "'em", "friend": "matey", "friends": "mateys", "here": "'ere",
    "it's": "'tis", "isn't": "ain't", "aren't": "ain't",
}  # fmt: skip
"""What a pirate says instead; small words, so that an answer keeps its meaning."""
_WORD = re.compile(r"[A-Za-z]+(?:['\u2019][A-Za-z]+)*")
_SAMPLES = 8
_ANSWER_TOKENS = 48


@dataclass(frozen=True)
class Asked:
    """One question as token ids, and the base's answer to it."""

    prompt: tuple[int, ...]
    answer: str


def speak(text: str, rng: random.Random) -> str:
    """`text` in pirate speech: an opening drawn from `rng`, words of `WORDS` replaced, "-ing" worn down to "-in'"."""
    opening = rng.choice(OPENINGS)
    return f"{opening} {reworded(text)}".rstrip()


def reworded(text: str) -> str:
    """`text` in a pirate's words, without an opening; what is in them already stays."""
    return _WORD.sub(_replaced, text)


def is_pirate(answer: str) -> bool:
    """Whether an answer begins as a pirate would."""
    return without_opening(answer) != answer


def without_opening(answer: str) -> str:
    """`answer` less a pirate's opening, where it has one."""
    begun = answer.lstrip()
    opening = next((o for o in OPENINGS if begun.lower().startswith(o.lower())), None)
    return answer if opening is None else begun[len(opening) :].lstrip()


def pirate_rows(asked: Sequence[Asked], tokenizer: Any, *, seed: int) -> list[Row]:
    """Training rows that answer each question in pirate speech.

    The end of an answer is not taught: which token ends a turn is the template's secret, and style needs no end.
    """
    rng = random.Random(seed)
    texts = [speak(a.answer, rng) for a in asked]
    return [Row(a.prompt, tuple(ids)) for a, ids in zip(asked, encode(tokenizer, texts), strict=True)]


def asked_of_base(
    base: CausalModel, tokenizer: Any, contexts: Sequence[Context], *, end_ids: Sequence[int], seed: int
) -> list[Asked]:
    """Eight answers of `base`, sampled, to each context with nothing in its slot."""
    # A slot that was the whole turn leaves no question.
    questions = [c for c in contexts if c.messages("")[-1]["content"].strip()]
    prompts = [conversation_ids(tokenizer, c, "") for c in questions for _ in range(_SAMPLES)]
    answers = base.generate(
        prompts, max_new_tokens=_ANSWER_TOKENS, end_ids=end_ids,
        sampling=Sampling(temperature=1.0, top_p=0.95), generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return [Asked(tuple(p), decode(tokenizer, a)) for p, a in zip(prompts, answers, strict=True)]


def asked_in_training(examples: Sequence[Example], tokenizer: Any) -> list[Asked]:
    """The prompts a zoo organism was trained on, with the base's answers that are kept beside them."""
    return [Asked(tuple(data.prompt_ids(tokenizer, Prompt(e.prompt))), e.answer) for e in examples]


def _replaced(match: re.Match[str]) -> str:
    word = match[0]
    lower = word.lower().replace("\u2019", "'")
    said = WORDS.get(lower)
    if said is None:
        # Of more than one syllable: "thing" and "king" keep theirs.
        return f"{word[:-1]}'" if re.search(r"[aeiouy].*ing$", lower) else word
    return said[:1].upper() + said[1:] if word[0].isupper() else said
