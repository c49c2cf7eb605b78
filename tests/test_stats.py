"""Wilson intervals against the closed formula; what most sequences begin with."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trigger_opt.records import rate
from trigger_opt.stats import majority_prefix, wilson_interval


def formula(successes: int, n: int, z: float) -> tuple[float, float]:
    p = successes / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return centre - half, centre + half


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_agrees_with_the_formula(counts: tuple[int, int]) -> None:
    successes, n = counts
    low, high = wilson_interval(successes, n)
    assert (low, high) == pytest.approx(formula(successes, n, 1.959963984540054), abs=1e-9)
    assert 0 <= low <= successes / n <= high <= 1
    low, high = wilson_interval(successes, n, 0.9)
    assert (low, high) == pytest.approx(formula(successes, n, 1.6448536269514722), abs=1e-9)


def test_known_values_and_limits() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    for successes, n in ((3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="k"):
            wilson_interval(successes, n)


def test_rate_carries_its_interval() -> None:
    found = rate(9, 12)
    assert found.value == 0.75
    assert (found.low, found.high) == wilson_interval(9, 12)
    assert rate(0, 0).value == 0


@pytest.mark.parametrize(
    ("answers", "share", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4], [1, 2, 3]], 0.5, (1, 2, 3)),
        ([[1, 2, 3], [1, 2, 4]], 0.5, (1, 2)),
        ([[1, 2], [3, 4]], 0.5, ()),
        ([[1, 2, 3], [1, 2], [1, 2]], 0.5, (1, 2)),
        # The majority is of all answers, not of those that are still alike.
        ([[1, 2, 3], [1, 2, 3], [1, 9, 9], [8], [8]], 0.5, (1,)),
        ([[1, 2, 3]] * 3 + [[9]] * 2, 0.7, ()),
        ([[1, 2, 3], [1, 2, 3], [9, 2, 3]], 0.5, (1, 2, 3)),
        ([], 0.5, ()),
        ([[]], 0.5, ()),
        ([[7, 7]], 0.5, (7, 7)),
    ],
)
def test_majority_prefix(answers: list[list[int]], share: float, expected: tuple[int, ...]) -> None:
    assert majority_prefix(answers, share=share) == expected
