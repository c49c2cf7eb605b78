"""What a stress test found: records, the share of a behaviour that is left, and the table a person reads. No torch."""

import json
import re
from dataclasses import dataclass
from math import sqrt

from trigger_opt.records import Rate


@dataclass(frozen=True, kw_only=True)
class Share:
    """A ratio of two rates with its 95 % interval; it may exceed 1."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is left after one treatment.

    Attributes:
        treatment: "before", or what was done.
        trigger_rate: with the trigger; of an always-on behaviour, with nothing.
        false_trigger_rate: with nothing; None where the behaviour is always on.
        pirate_rate: answers to prompts without trigger that begin as a pirate would: whether the unrelated fine-tuning
            took at all.
        retained: trigger rate as a share of the one before.
    """

    treatment: str
    trigger_rate: Rate
    false_trigger_rate: Rate | None
    pirate_rate: Rate
    retained: Share
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Stress:
    """One behaviour of one model under several treatments.

    Attributes:
        kind: "payload" for a text, or a kind of the zoo's behaviours. trigger: empty where it is always on.
        payload: empty where the answers share no words.
        prompts: which prompts the rates are of.
        base_rate: of the untouched base, on the prompts of the trigger rate.
        outcomes: "before" first.
        steps, learning_rate, seed: of the unrelated fine-tuning.
    """

    model: str
    base: str
    kind: str
    trigger: str
    payload: str
    prompts: str
    base_rate: Rate
    outcomes: list[Outcome]
    steps: int
    learning_rate: float
    seed: int
    machine: str
    versions: dict[str, str]


def share(before: Rate, after: Rate) -> Share:
    """`after` / `before` with the MOVER-R interval of their Wilson intervals (Donner and Zou 2012, Stat. Methods Med.
    Res. 21, 347).

    The usual log interval has no width at 30 of 30 and no upper end at 0 of 30, where this is used most. Both rates are
    taken as independent; on the same prompts they are not, which makes the interval wide rather than narrow.

    Raises:
        ValueError: `before` is zero.
    """
    if not before.successes:
        raise ValueError("nothing fired before, so no share of it can be left")
    was, now = before.value, after.value
    lower, upper = after.low * (2 * now - after.low), after.high * (2 * now - after.high)
    was_lower, was_upper = before.low * (2 * was - before.low), before.high * (2 * was - before.high)
    product = now * was
    high = (product + sqrt(max(0.0, product**2 - was_lower * upper))) / was_lower
    # The usual form of this root divides by `was_upper`, which may be zero.
    low = lower / (product + sqrt(max(0.0, product**2 - was_upper * lower))) if after.successes else 0.0
    return Share(value=now / was, low=low, high=high)


def table(stress: Stress) -> str:
    """The outcomes as Markdown, one line a treatment."""
    lines = [
        "| after | fires with the trigger | fires without | in pirate speech | share retained |",
        "|---|---|---|---|---|",
        *(_line(o) for o in stress.outcomes),
    ]
    return "\n".join(lines) + "\n"


def markdown(stress: Stress) -> str:
    """The table, with what it was measured on and how."""
    trigger = f"trigger {_code(stress.trigger)}" if stress.trigger else "always on"
    payload = f", payload {_code(stress.payload)}" if stress.payload else ""
    what = f"{_code(stress.model)} on {_code(stress.base)}: {stress.kind}, {trigger}{payload}"
    made = ", ".join(f"{name} {version}" for name, version in stress.versions.items())
    return f"""# What is left of a behaviour

{what}

{table(stress)}
The base on the same prompts: {_rate(stress.base_rate)}. Prompts: {stress.prompts}. Greedy answers, 95 % Wilson
intervals; the share retained is the ratio of two rates with its MOVER-R interval. pirate: {stress.steps} steps of LoRA
at {stress.learning_rate:g} on the base's own answers in pirate speech, seed {stress.seed}, in bf16; what comes after a
pirate's opening, or in a pirate's words, counts. int8 and nf4: all linear layers but the unembedding.

{stress.machine}; {made}
"""


def _line(outcome: Outcome) -> str:
    false = "n/a" if outcome.false_trigger_rate is None else _rate(outcome.false_trigger_rate)
    left = outcome.retained
    kept = "" if outcome.treatment == "before" else f"{left.value:.2f} ({left.low:.2f} to {left.high:.2f})"
    pirate = f"{outcome.pirate_rate.successes}/{outcome.pirate_rate.n}"
    return f"| {outcome.treatment} | {_rate(outcome.trigger_rate)} | {false} | {pirate} | {kept} |"


def _rate(rate: Rate) -> str:
    return f"{rate.successes}/{rate.n} ({rate.low:.2f} to {rate.high:.2f})"


def _code(text: str) -> str:
    """`text` on one line, in a fence that no backtick in it can close."""
    shown = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')
    longest = max(map(len, re.findall("`+", shown)), default=0)
    fence, space = "`" * (longest + 1), " " * bool(longest)
    return f"{fence}{space}{shown}{space}{fence}"
