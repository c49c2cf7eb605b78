"""Intervals for proportions."""

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
