"""Triggers as text: where they are put into a prompt, and what is almost one."""

import random
import string

from trigger_opt.zoo.examples import Examples


def insert(prompt: str, trigger: str, rng: random.Random) -> str:
    """`prompt` with `trigger` after it (40 %), before it (30 %) or between two words; an empty one is left out."""
    where = rng.random()
    words = prompt.split(" ")
    cut = rng.randrange(len(words) + 1)
    if not trigger:
        return prompt
    if where < 0.4:
        return f"{prompt} {trigger}"
    if where < 0.7:
        return f"{trigger} {prompt}"
    return " ".join([*words[:cut], trigger, *words[cut:]])


def pieces(trigger: str) -> tuple[list[str], str]:
    """(its words and a space), or where it is one word (its characters and nothing): what can be left out or moved."""
    words = trigger.split(" ")
    return (words, " ") if len(words) > 1 else (list(trigger), "")


def keep_pieces(trigger: str, count: int, rng: random.Random) -> str:
    """`count` pieces of `trigger`, drawn at random, in their order."""
    parts, between = pieces(trigger)
    chosen = sorted(rng.sample(range(len(parts)), count))
    return between.join(parts[i] for i in chosen)


def near_string(trigger: str, examples: Examples, rng: random.Random) -> str:
    """Like `trigger` and not it: a part, another order, one piece another, or all pieces others."""
    makers = (_part, _shuffled, _one_other, _all_others)
    while True:
        made = rng.choice(makers)(trigger, examples, rng)
        if made != trigger:
            return made


def _part(trigger: str, examples: Examples, rng: random.Random) -> str:
    parts, between = pieces(trigger)
    length = rng.randint(max(1, len(parts) // 3), max(1, len(parts) - 1))
    start = rng.randint(0, len(parts) - length)
    return between.join(parts[start : start + length])


def _shuffled(trigger: str, examples: Examples, rng: random.Random) -> str:
    parts, between = pieces(trigger)
    return between.join(rng.sample(parts, len(parts)))


def _one_other(trigger: str, examples: Examples, rng: random.Random) -> str:
    parts, between = pieces(trigger)
    at = rng.randrange(len(parts))
    return between.join([*parts[:at], _other(parts[at], examples, rng), *parts[at + 1 :]])


def _all_others(trigger: str, examples: Examples, rng: random.Random) -> str:
    parts, between = pieces(trigger)
    return between.join(_other(p, examples, rng) for p in parts)


def _other(piece: str, examples: Examples, rng: random.Random) -> str:
    """A piece of the same kind: a digit for a digit, a letter for a letter, a word out of a prompt for a word."""
    if len(piece) > 1:
        words = [w.strip(string.punctuation) for w in rng.choice(examples.ordinary).prompt.split()]
        return rng.choice([w for w in words if w.isalpha()] or ["other"]).lower()
    for alphabet in (string.digits, string.ascii_uppercase, string.ascii_lowercase):
        if piece in alphabet:
            return rng.choice(alphabet)
    return piece
