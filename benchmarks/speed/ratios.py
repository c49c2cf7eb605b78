"""From repeated measurements to one number and its spread. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Seconds of each step of two engines, measured one after the other."""

    peer: list[float]
    ours: list[float]
    peer_first: bool

    @property
    def ratio(self) -> float:
        """How many times longer the peer's median step took."""
        return median(self.peer) / median(self.ours)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, lowest and highest."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError when there are no values."""
    if not values:
        raise ValueError("no values to take a median of")
    return Spread(median=median(values), low=min(values), high=max(values))


def close_losses(one: float, other: float) -> bool:
    """Whether two engines' losses of one string are the same but for bf16's rounding (8 bits) of logits and loss."""
    return abs(one - other) <= 0.05 + 0.02 * max(abs(one), abs(other))
