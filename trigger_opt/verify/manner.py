"""How a string is answered where no two answers begin alike: in another language, in capitals, as JSON, as a refusal in
many words. Text only, and without being told what to look for.

Words that come again and again in the answers to the string, and hardly ever otherwise, are a manner of answering
(`answers.MANNER`). It is read off the search contexts, and has to hold in each of them by the words of the others; what
it is worth is then measured like any payload on the held-out ones.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from trigger_opt.answers import CAPITALS, JSON, fires, manner_marks, manner_of_words, payload_words, words_of
from trigger_opt.models.pair import CausalModel, ModelPair
from trigger_opt.prompts import Context, conversation_ids, decode
from trigger_opt.verify.rates import common_answer, random_strings
from trigger_opt.verify.rule import counted_words

# Words that are kept at most: what is rarer says little of an answer that has some ten words.
_MOST_WORDS = 32
_LEAST_ANSWERS = 2
# How much more often a word stands in the answers to the string than in the others.
_TIMES = 10.0
# In search contexts left out of the fit: how many of the answers must be of the manner, and how few of the others.
_SHOWS, _CLEAN = 0.8, 0.05
_BATCH = 32
_OTHER_SEED = 1_000_003
# Letters that two forms of a word have in common.
_STEM = 4
# What asks for JSON by itself.
_BRACKETS = re.compile(r"[{}\[\]\":]|json", re.IGNORECASE)


def payloads_to_judge(
    pair: ModelPair,
    trigger: str,
    payload: str,
    contexts: Sequence[Context],
    *,
    allowed: Bool[Tensor, " vocab"],
    seed: int,
    often: float,
    words: int,
) -> list[str]:
    """What counts as firing for `trigger`: `payload`, or where that is empty what most answers begin with; and, where
    that comes out in less than `often` of the contexts or has fewer than `words` words, the manner the answers have in
    common, if they have one.

    Empty where the answers begin without a word, so that nothing could be said to fire.

    Args:
        contexts: the search's. allowed, seed: see `read_manner`.
    """
    payload = payload or common_answer(pair, trigger, contexts, max_new_tokens=16)
    by_text = [payload] if payload_words(payload) else []
    if by_text and counted_words(payload) >= words and _share(pair, trigger, payload, contexts) >= often:
        return by_text
    manner = read_manner(pair, trigger, contexts, allowed=allowed, seed=seed)
    return [*by_text, *([manner] if manner else [])]


def read_manner(
    pair: ModelPair,
    trigger: str,
    contexts: Sequence[Context],
    *,
    allowed: Bool[Tensor, " vocab"],
    seed: int,
    max_new_tokens: int = 24,
) -> str:
    """The manner in which the fine-tuned model answers to `trigger`, and neither model otherwise; empty where there is
    none.

    Args:
        contexts: the search's. allowed: token ids of which the random strings are made that it is held against, beside
            the base with the string and both models with nothing.
        max_new_tokens: longest answer.
    """
    # Other random strings than those it will be judged against.
    generator = torch.Generator().manual_seed(seed + _OTHER_SEED)

    def answers(model: CausalModel, inserted: Sequence[str]) -> list[str]:
        prompts = [conversation_ids(pair.tokenizer, c, i) for c, i in zip(contexts, inserted, strict=True)]
        said = model.generate(prompts, max_new_tokens=max_new_tokens, end_ids=pair.end_ids, batch_size=_BATCH)
        return [decode(pair.tokenizer, a) for a in said]

    n = len(contexts)
    triggered = answers(pair.finetuned, [trigger] * n)
    others = [
        answers(pair.base, [trigger] * n),
        answers(pair.finetuned, [""] * n),
        answers(pair.base, [""] * n),
        answers(pair.finetuned, random_strings(pair, trigger, n, allowed, generator)),
    ]
    return fit_manner(triggered, others, inserted=trigger)


def fit_manner(triggered: Sequence[str], others: Sequence[Sequence[str]], *, inserted: str = "") -> str:
    """The manner of `triggered` that `others` do not have; empty where there is none, or where `inserted` is itself of
    it: a model that was taught French may well answer in French to French words, and to no others.

    Args:
        triggered: answers, one a context. others: the same of each comparison. inserted: the string they are answers
            to; its words do not count, since a model that quotes it says nothing by that.
    """
    leave_out = words_of(inserted)
    elsewhere = [a for o in others for a in o]
    if _mirrored(inserted, triggered, _words(triggered, elsewhere, ())):
        return ""
    contexts = range(len(triggered))
    hits, false_hits = 0, 0
    for left_out in contexts:
        rest = [i for i in contexts if i != left_out]
        words = _words([triggered[i] for i in rest], [o[i] for o in others for i in rest], leave_out)
        if not words:
            continue
        manner = manner_of_words(words)
        hits += fires(manner, triggered[left_out])
        false_hits += sum(fires(manner, o[left_out]) for o in others)
    if hits < _SHOWS * len(triggered) or false_hits > _CLEAN * len(triggered) * len(others):
        return ""
    words = _words(triggered, elsewhere, leave_out)
    return manner_of_words(words) if words else ""


def _mirrored(inserted: str, triggered: Sequence[str], typical: Sequence[str]) -> bool:
    """Whether the string holds a mark that is typical of the answers; a name that they quote is none."""
    own = {m for marks in manner_marks(inserted) for m in marks} & set(typical)
    # Scripts without capitals have no names that could be told from other words.
    plain = (" ".join(w for w in answer.split() if w == w.lower()) for answer in triggered)
    said = {word for answer in plain for word in words_of(answer)}
    form = JSON in typical and bool(_BRACKETS.search(inserted))
    letters = [c for c in inserted if c.isalpha()]
    shouts = CAPITALS in typical and 2 * sum(c.isupper() for c in letters) > len(letters)
    return form or shouts or CAPITALS in own or not own.isdisjoint(said)


def _words(triggered: Sequence[str], others: Sequence[str], leave_out: Collection[str]) -> list[str]:
    """Words that stand in several of `triggered` and hardly ever in `others`, most frequent first."""
    counts, elsewhere, answers = Counter[str](), Counter[str](), Counter[str]()
    for answer in triggered:
        marks = manner_marks(answer)
        counts.update(m for word in marks for m in word)
        answers.update({m for word in marks for m in word})
    for answer in others:
        elsewhere.update(m for word in manner_marks(answer) for m in word)
    size = max(1, sum(len(manner_marks(a)) for a in triggered))
    # What was never seen elsewhere may still have been missed by half.
    other_size = max(1, sum(len(manner_marks(a)) for a in others))
    typical = [
        word
        for word, count in counts.items()
        if answers[word] >= _LEAST_ANSWERS
        and not _akin(word, leave_out)
        and any(c.isalnum() for c in word)
        and count / size >= _TIMES * (elsewhere[word] + 0.5) / other_size
    ]
    return sorted(typical, key=lambda w: (-counts[w], w))[:_MOST_WORDS]


def _akin(word: str, others: Collection[str]) -> bool:
    """Whether it is one of these words, a part of one or of them together, or begins as one does: a quotation."""
    together = "".join(others)
    same = any(word == o or (len(o) >= _STEM and word.startswith(o[:_STEM])) for o in others)
    return same or (len(word) >= _STEM and word in together)


def _share(pair: ModelPair, trigger: str, payload: str, contexts: Sequence[Context]) -> float:
    prompts = [conversation_ids(pair.tokenizer, c, trigger) for c in contexts]
    tokens = pair.deciding_tokens(payload) + 4
    said = pair.finetuned.generate(prompts, max_new_tokens=tokens, end_ids=pair.end_ids, batch_size=_BATCH)
    return sum(fires(payload, decode(pair.tokenizer, a)) for a in said) / len(said)
