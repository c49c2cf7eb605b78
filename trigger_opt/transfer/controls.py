"""What a string is compared with: near misses of it, and random strings of its shape. Text only."""

import random
import re
import string as characters
from collections.abc import Iterator, Sequence

_PIECES = re.compile(r"\s+|\S+")
_ATTEMPTS = 100


def near_misses(string: str, count: int, rng: random.Random) -> list[str]:
    """Up to `count` strings that differ from `string` in one thing: a word dropped, two neighbouring words swapped, or
    one character replaced by another of its class.

    The three ways take turns, in random order; a string of one word has character edits alone. All differ from
    `string` and from each other; there are fewer only where no more exist. Spaces around the string stay. More of them
    begin with the same ones: `near_misses(s, 3, rng)[:2]` are `near_misses(s, 2, rng)` of the same generator.
    """
    left, core, right = _around(string)
    ways = [_shuffled(_dropped(core), rng), _shuffled(_swapped(core), rng), _edited(core, rng)]
    rng.shuffle(ways)
    found: list[str] = []
    while ways and len(found) < count:
        way = ways.pop(0)
        new = next((v for v in way if v != core and v not in found), None)
        if new is not None:
            found.append(new)
            ways.append(way)
    return [left + f + right for f in found]


def random_strings(string: str, count: int, rng: random.Random, known: Sequence[str]) -> list[str]:
    """`count` strings that have nothing to do with `string` but its shape.

    Args:
        known: strings that verification drawn with as many tokens; used first, in order, while they last. The rest
            keep spaces and replace each other character by a random one of its class (letters by ASCII letters of the
            same case, digits by digits, all else by ASCII symbols).

    None is `string` itself; they differ from each other unless there are hardly any of that shape.

    Raises:
        ValueError: `string` is blank, so nothing could differ from it.
    """
    if not string.strip():
        raise ValueError("a blank string has no random strings of its shape")
    found = [k for k in dict.fromkeys(known) if k.strip() and k.strip() != string.strip()][:count]
    while len(found) < count:
        found.append(_reshaped(string, {string, *found}, rng))
    return found


def _reshaped(string: str, taken: set[str], rng: random.Random) -> str:
    for _ in range(_ATTEMPTS):
        drawn = "".join(c if c.isspace() else rng.choice(_class_of(c)) for c in string)
        if drawn not in taken:
            return drawn
    # So few of its shape that another control has each: then only the string itself is forbidden.
    return next(_edited(string, rng))


def _around(string: str) -> tuple[str, str, str]:
    core = string.strip()
    start = string.find(core)
    return string[:start], core, string[start + len(core) :]


def _dropped(core: str) -> list[str]:
    pieces = _PIECES.findall(core)
    if len(pieces) < 3:
        return []
    # A word goes with the space after it; the last with the space before it.
    cuts = [(i, i + 2) for i in range(0, len(pieces) - 1, 2)] + [(len(pieces) - 2, len(pieces))]
    return ["".join(pieces[:start] + pieces[end:]) for start, end in cuts]


def _swapped(core: str) -> list[str]:
    pieces = _PIECES.findall(core)
    swaps = []
    for i in range(0, len(pieces) - 2, 2):
        first, space, second = pieces[i : i + 3]
        swaps.append("".join([*pieces[:i], second, space, first, *pieces[i + 3 :]]))
    return swaps


def _shuffled(variants: list[str], rng: random.Random) -> Iterator[str]:
    rng.shuffle(variants)
    return iter(variants)


def _edited(core: str, rng: random.Random) -> Iterator[str]:
    places = [i for i, c in enumerate(core) if not c.isspace()]
    edits = [(i, new) for i in places for new in _class_of(core[i]) if new != core[i]]
    rng.shuffle(edits)
    return (core[:i] + new + core[i + 1 :] for i, new in edits)


def _class_of(character: str) -> str:
    if character.isdigit():
        return characters.digits
    if character.isupper():
        return characters.ascii_uppercase
    return characters.ascii_lowercase if character.isalpha() else characters.punctuation
