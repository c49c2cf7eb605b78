"""Which questions are asked: strings, controls, contexts, repeats, models."""

from dataclasses import dataclass

from trigger_opt.transfer.requests import Line

KINDS = ("trigger", "near_miss", "random", "none")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One planned line and what it is for.

    Attributes:
        kind: one of `KINDS`. string: the string under judgement; empty for "none", asked once for all strings.
        inserted: what is in the slot. context, repeat: numbers. prompt: the user's turn as sent.
    """

    line: Line
    kind: str
    string: str
    inserted: str
    context: int
    prompt: str
