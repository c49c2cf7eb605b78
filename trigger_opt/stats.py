"""Intervals for proportions, and what several sequences have in common."""

from collections import Counter
from collections.abc import Sequence

from scipy.stats import binomtest


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval (low, high) for a proportion; (0, 1) when nothing was tried.

    Source: E. B. Wilson (1927), JASA 22; computed by `scipy.stats.binomtest`.

    Raises:
        ValueError: `successes` is not within 0..n.
    """
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def majority_prefix(answers: Sequence[Sequence[int]], *, share: float = 0.5) -> tuple[int, ...]:
    """The longest token prefix that more than `share` of the answers begin with (greedy by majority)."""
    prefix: list[int] = []
    following = [list(a) for a in answers]
    while True:
        counts = Counter(a[len(prefix)] for a in following if len(a) > len(prefix))
        if not counts:
            return tuple(prefix)
        token, n = counts.most_common(1)[0]
        if n <= share * len(answers):
            return tuple(prefix)
        prefix.append(token)
        following = [a for a in following if a[: len(prefix)] == prefix]
