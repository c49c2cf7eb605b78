"""What the base model said by itself: the prompts and answers that every organism is made from."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One user turn and the base model's greedy answer; `ended` when the answer ran to its end of text."""

    prompt: str
    answer: str
    ended: bool


@dataclass(frozen=True)
class Examples:
    """What the base made: `ordinary` turns, and turns on the `topic` that semantic triggers ask for."""

    ordinary: Sequence[Example]
    topic: Sequence[Example] = ()
