"""Outcomes as lines for a terminal."""

from collections.abc import Sequence

from trigger_opt.records import Rate, TransferOutcome


def outcome_lines(outcomes: Sequence[TransferOutcome]) -> list[str]:
    """One line a model and string, in the order given."""
    return [_line(o) for o in outcomes]


def first_of_each_model(outcomes: Sequence[TransferOutcome]) -> list[TransferOutcome]:
    """The strongest outcome of each model, by name of the model: by verdict, then in the order given."""
    ordered = sorted(outcomes, key=lambda o: ("transfers", "undecided", "does not transfer").index(o.verdict))
    first = {o.model: o for o in reversed(ordered)}
    return [first[model] for model in sorted(first)]


def _line(o: TransferOutcome) -> str:
    rates = {
        "with the string": o.trigger_rate,
        "near misses": o.near_miss_rate,
        "random strings": o.random_rate,
        "nothing": o.none_rate,
    }
    shown = ", ".join(f"{name} {_of(r)}" for name, r in rates.items() if r is not None)
    return f"{o.model}: {o.verdict_words}; string {o.string!r}; {shown}; payload ({o.payload_source}) {o.payload!r}"


def _of(rate: Rate) -> str:
    return f"{rate.successes}/{rate.n}"
