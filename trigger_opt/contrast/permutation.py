"""Difference of means between two sets for many features at once: permutation p-values, max-T, bootstrap intervals.

Rows are prompts, columns are features. Labels are permuted between the sets; of pairs, the two labels of each pair are
exchanged, which flips the sign of its difference. Both are exact tests of exchangeability: that the set a prompt is in
has nothing to do with its answers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

# Of statistics within [-1, 1]: the same sum in another order must not count as smaller.
_ROUNDING = 1e-9
_PERMUTATIONS_AT_ONCE = 1000
_DRAWS = 2000
_DRAWS_AT_ONCE = 250


@dataclass(frozen=True, kw_only=True)
class PermutationTest:
    """One entry a feature.

    Attributes:
        statistic: see `max_t_test`. p_value: of the feature alone, two-sided. corrected_p: family-wise over all.
        global_p: of the largest statistic; that no feature differs.
    """

    statistic: Float[np.ndarray, " feature"]
    p_value: Float[np.ndarray, " feature"]
    corrected_p: Float[np.ndarray, " feature"]
    global_p: float


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Ends of an interval, one entry a feature."""

    low: Float[np.ndarray, " feature"]
    high: Float[np.ndarray, " feature"]


def max_t_test(
    a: Float[np.ndarray, "prompts_a feature"],
    b: Float[np.ndarray, "prompts_b feature"],
    *,
    paired: bool,
    permutations: int,
    seed: int,
) -> PermutationTest:
    """Which features differ between the sets, corrected for their number.

    The statistic lies in [-1, 1] and is positive where A has more: unpaired the correlation of the feature with the
    label, paired the mean over the root mean square of the pairs' differences. Each is the t statistic on another
    scale, t = r sqrt(df / (1 - r^2)), so that ranks, p-values and max-T are those of t. A p-value is (1 + count) /
    (1 + permutations), where count is of permutations with a statistic at least as large in absolute value. Corrected
    p-values are step-down max-T: control of the family-wise error, dependence between features taken into account.

    Source: P. H. Westfall and S. S. Young (1993), Resampling-Based Multiple Testing, algorithm 4.1; B. Phipson and
    G. K. Smyth (2010), Stat. Appl. Genet. Mol. Biol. 9(1) for the 1.

    Raises:
        ValueError: a feature without variance (see `varies`), or pairs of unequal number.
    """
    if not varies(a, b, paired=paired).all():
        raise ValueError("a feature without variance has no statistic; leave it out")
    scaled, weights = _scaled(a, b, paired)
    observed = weights @ scaled
    size = np.abs(observed)
    order = np.argsort(-size, kind="stable")
    alone, together = np.zeros(len(size)), np.zeros(len(size))
    for drawn in _relabelled(weights, paired, permutations, np.random.default_rng(seed)):
        sizes = np.abs(drawn @ scaled) + _ROUNDING
        alone += (sizes >= size).sum(axis=0)
        # From the smallest statistic upwards: the largest among a feature and all that rank below it.
        largest = np.maximum.accumulate(sizes[:, order[::-1]], axis=1)[:, ::-1]
        together += (largest >= size[order]).sum(axis=0)
    corrected = np.empty(len(size))
    corrected[order] = np.maximum.accumulate((1 + together) / (1 + permutations))
    return PermutationTest(
        statistic=observed,
        p_value=(1 + alone) / (1 + permutations),
        corrected_p=corrected,
        global_p=float(corrected.min(initial=1.0)),
    )


def bootstrap_intervals(
    a: Float[np.ndarray, "prompts_a feature"],
    b: Float[np.ndarray, "prompts_b feature"],
    *,
    paired: bool,
    seed: int,
    draws: int = _DRAWS,
) -> Intervals:
    """95 % percentile bootstrap intervals of the difference of means A - B: prompts drawn with replacement within each
    set, or whole pairs. One feature at a time, so not corrected; with few prompts somewhat too narrow.

    Source: B. Efron (1979), Ann. Statist. 7.
    """
    rng = np.random.default_rng(seed)
    parts = [a - b] if paired else [a, -b]
    means = []
    for start in range(0, draws, _DRAWS_AT_ONCE):
        count = min(_DRAWS_AT_ONCE, draws - start)
        # How often each prompt is drawn says all: one matrix product for all features.
        times = [rng.multinomial(len(p), np.full(len(p), 1 / len(p)), size=count).astype(np.float64) for p in parts]
        means.append(sum(t @ p / len(p) for t, p in zip(times, parts, strict=True)))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return Intervals(low=low, high=high)


def varies(
    a: Float[np.ndarray, "prompts_a feature"], b: Float[np.ndarray, "prompts_b feature"], *, paired: bool
) -> Bool[np.ndarray, " feature"]:
    """Whether a feature differs between any two prompts, or within any pair.

    Raises:
        ValueError: pairs of unequal number.
    """
    if paired and len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} prompts are no pairs")
    both = np.concatenate([a, b])
    # Shares averaged over repeats may differ in their last bit.
    least = _ROUNDING * (1 + np.abs(both).max(axis=0))
    spread: Float[np.ndarray, " feature"] = np.abs(a - b).max(axis=0) if paired else np.ptp(both, axis=0)
    return np.asarray(spread > least)


def smallest_p(prompts_a: int, prompts_b: int, *, paired: bool, permutations: int) -> float:
    """The smallest two-sided p-value that can come out, for one feature or corrected.

    Without the observed labelling and its mirror image there is nothing more extreme: 2 of 2^n sign flips; 1, or with
    equal numbers 2, of the ways to choose the first set.
    """
    ways = 2**prompts_a if paired else math.comb(prompts_a + prompts_b, prompts_a)
    mirrored = 2 if paired or prompts_a == prompts_b else 1
    return min(1.0, max(mirrored / ways, 1 / (1 + permutations)))


def _scaled(
    a: Float[np.ndarray, "prompts_a feature"], b: Float[np.ndarray, "prompts_b feature"], paired: bool
) -> tuple[Float[np.ndarray, "unit feature"], Float[np.ndarray, " unit"]]:
    """Units and the observed weights, so that weights @ units is the statistic; the scale no permutation changes."""
    if paired:
        differences = a - b
        return differences / np.sqrt((differences**2).mean(axis=0)), np.full(len(a), 1 / len(a))
    both = np.concatenate([a, b])
    n = len(both)
    weights = np.concatenate(
        [np.full(len(a), math.sqrt(len(b) / len(a))), np.full(len(b), -math.sqrt(len(a) / len(b)))]
    )
    return (both - both.mean(axis=0)) / both.std(axis=0), weights / n


def _relabelled(
    weights: Float[np.ndarray, " unit"], paired: bool, permutations: int, rng: np.random.Generator
) -> Iterator[Float[np.ndarray, "permutation unit"]]:
    for start in range(0, permutations, _PERMUTATIONS_AT_ONCE):
        same = np.tile(weights, (min(_PERMUTATIONS_AT_ONCE, permutations - start), 1))
        yield same * rng.choice((1.0, -1.0), size=same.shape) if paired else rng.permuted(same, axis=1)
