"""The table's statistics: pure functions of numbers and strings."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import trapezoid
from scipy.stats import mannwhitneyu

_RESAMPLES = 5000

Scores = Mapping[str, Sequence[float]]
"""Scores of each model, one a seed."""


def auroc(organisms: Sequence[float], controls: Sequence[float]) -> float:
    """Chance that a random organism scores above a random control, ties counted half: the area under the ROC curve.

    Raises:
        ValueError: one of them is empty.
    """
    if not organisms or not controls:
        raise ValueError("an AUROC needs scores of both kinds")
    wins = mannwhitneyu(organisms, controls, method="asymptotic").statistic
    return float(wins) / (len(organisms) * len(controls))


def auroc_interval(
    organisms: Scores, controls: Scores, *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of `auroc` over models: a model is drawn with all its seeds, which are no
    independent tries; organisms and controls are drawn apart.

    Raises:
        ValueError: one of them is empty.
    """
    if not organisms or not controls:
        raise ValueError("an AUROC needs scores of both kinds")
    rng = np.random.default_rng(seed)
    wins = np.array([[_wins(o, c) for c in controls.values()] for o in organisms.values()])
    sizes = np.array([[len(o) * len(c) for c in controls.values()] for o in organisms.values()], dtype=float)
    drawn = (_draws(len(organisms), rng), _draws(len(controls), rng))
    values = _weighted(wins, *drawn) / _weighted(sizes, *drawn)
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _wins(organism: Sequence[float], control: Sequence[float]) -> float:
    ours, theirs = np.asarray(organism, dtype=float)[:, None], np.asarray(control, dtype=float)[None]
    return float((ours > theirs).sum() + 0.5 * (ours == theirs).sum())


def _draws(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """How often each of `count` models is drawn in each resample."""
    return rng.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)


def _weighted(table: NDArray[np.float64], rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
    weighted: NDArray[np.float64] = np.einsum("bo,oc,bc->b", rows, table, columns)
    return weighted


def halves(names: Iterable[str]) -> tuple[set[str], set[str]]:
    """Two halves, fixed before anything is measured: names in alphabetical order, in turns."""
    ordered = sorted(set(names))
    return set(ordered[::2]), set(ordered[1::2])


def threshold_above(scores: Sequence[float], *, least: float) -> float:
    """The smallest value above all `scores`, and no less than `least`; what reaches it counts as found."""
    return max([least, *(math.nextafter(s, math.inf) for s in scores)])


def area_under(points: Sequence[tuple[float, float]]) -> float:
    """Trapezoidal area under (x, y) points, in any order."""
    x, y = np.array(sorted(points), dtype=float).T
    return float(trapezoid(y, x))


def edit_similarity(one: str, other: str) -> float:
    """1 - Levenshtein distance / the longer length, in characters; 1 for two empty strings."""
    longest = max(len(one), len(other))
    return 1.0 if longest == 0 else 1 - edit_distance(one, other) / longest


def edit_distance(one: str, other: str) -> int:
    """Levenshtein: the fewest characters inserted, deleted or replaced to make `other` of `one`."""
    before = list(range(len(other) + 1))
    for row, a in enumerate(one, 1):
        now = [row]
        for column, b in enumerate(other, 1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (a != b)))
        before = now
    return before[-1]


def token_recall(planted: Collection[str], found: Collection[str]) -> float:
    """Share of the distinct `planted` tokens that are among the `found`.

    Raises:
        ValueError: nothing was planted.
    """
    if not planted:
        raise ValueError("recall of a trigger without tokens")
    return len(set(planted) & set(found)) / len(set(planted))
