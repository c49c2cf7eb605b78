"""The permutation test against textbook t tests and a slow enumeration; its invariants; how often it is wrong."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_ind

from trigger_opt.contrast.features import text_features
from trigger_opt.contrast.permutation import bootstrap_intervals, max_t_test, smallest_p, varies
from trigger_opt.contrast.phrases import frequent_phrases, phrases_of

Matrix = np.ndarray
WORDS = "the sea is wide and blue or green when rain falls I can't say why ; perhaps! (not) 12 He"


def draw(n: int, seed: int = 0) -> Matrix:
    """Rows of five features: one, another that follows it, discrete, rare, heavy-tailed."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=n)
    rare = rng.permutation(n) < n / 4
    columns = [first, first + 0.3 * rng.normal(size=n), rng.integers(0, 2, n), rare, rng.normal(size=n) ** 5]
    return np.stack(columns, axis=1).astype(np.float64)


def slow_unpaired(a: Matrix, b: Matrix) -> Iterator[Matrix]:
    """|t| of every labelling."""
    both = np.concatenate([a, b])
    for chosen in itertools.combinations(range(len(both)), len(a)):
        other = [i for i in range(len(both)) if i not in chosen]
        yield np.abs(ttest_ind(both[list(chosen)], both[other]).statistic)


def slow_paired(a: Matrix, b: Matrix) -> Iterator[Matrix]:
    """|t| of every sign flip."""
    for signs in itertools.product([1.0, -1.0], repeat=len(a)):
        yield np.abs(ttest_1samp((a - b) * np.array(signs)[:, None], 0.0).statistic)


def slow_max_t(observed: Matrix, all_t: list[Matrix]) -> Matrix:
    """Step-down max-T, loop by loop, over every relabelling."""
    order = sorted(range(len(observed)), key=lambda j: -observed[j])
    corrected, above = np.empty(len(observed)), 0.0
    for rank, j in enumerate(order):
        below = order[rank:]
        share = sum(max(t[k] for k in below) >= observed[j] - 1e-9 for t in all_t) / len(all_t)
        above = max(above, share)
        corrected[j] = above
    return corrected


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("paired", [False, True])
def test_against_a_slow_enumeration(paired: bool) -> None:
    n = 7 if paired else 5
    a, b = draw(n, seed=1) + np.array([1.2, 0.6, 0.0, 0.0, 0.0]), draw(n, seed=2)
    all_t = [np.nan_to_num(t, nan=np.inf) for t in (slow_paired if paired else slow_unpaired)(a, b)]
    plain = ttest_1samp(a - b, 0.0) if paired else ttest_ind(a, b)
    found = max_t_test(a, b, paired=paired, permutations=20_000, seed=0)
    df = n - 1 if paired else 2 * n - 2
    assert found.statistic * np.sqrt(df / (1 - found.statistic**2)) == pytest.approx(plain.statistic)
    observed = np.abs(plain.statistic)
    alone = np.mean([t >= observed - 1e-9 for t in all_t], axis=0)
    assert found.p_value == pytest.approx(alone, abs=0.012)
    slow = slow_max_t(observed, all_t)
    assert found.corrected_p == pytest.approx(slow, abs=0.012)
    assert found.global_p == found.corrected_p.min()
    # The correction is none of the easy ones.
    assert np.abs(found.corrected_p - found.p_value).max() > 0.05
    assert np.abs(found.corrected_p - np.minimum(1, 5 * found.p_value)).max() > 0.05


@pytest.mark.parametrize("paired", [False, True])
def test_planted_feature_and_decoys(paired: bool) -> None:
    a, b = draw(40, seed=3), draw(40, seed=4)
    a[:, 0] += 1.5
    found = max_t_test(a, b, paired=paired, permutations=999, seed=0)
    assert found.statistic[0] > 0
    assert found.corrected_p[0] == pytest.approx(1 / 1000)
    assert found.corrected_p[2:].min() > 0.05
    assert max_t_test(b, a, paired=paired, permutations=999, seed=0).statistic == pytest.approx(-found.statistic)


def test_pairs_see_what_differences_between_prompts_hide() -> None:
    rng = np.random.default_rng(0)
    subject = rng.normal(size=(20, 1)) * 10
    a = subject + 0.5 + 0.3 * rng.normal(size=(20, 1))
    b = subject + 0.3 * rng.normal(size=(20, 1))
    assert max_t_test(a, b, paired=True, permutations=999, seed=0).global_p < 0.01
    assert max_t_test(a, b, paired=False, permutations=999, seed=0).global_p > 0.2


@pytest.mark.parametrize("paired", [False, True])
def test_units_do_not_matter_and_the_seed_decides(paired: bool) -> None:
    a, b = draw(12, seed=5), draw(12, seed=6)
    one = max_t_test(a, b, paired=paired, permutations=499, seed=0)
    scaled = max_t_test(a * 1e6 + 3, b * 1e6 + 3, paired=paired, permutations=499, seed=0)
    assert scaled.corrected_p.tolist() == one.corrected_p.tolist()
    assert scaled.p_value.tolist() == one.p_value.tolist()
    assert max_t_test(a, b, paired=paired, permutations=499, seed=0).p_value.tolist() == one.p_value.tolist()
    assert max_t_test(a, b, paired=paired, permutations=499, seed=1).p_value.tolist() != one.p_value.tolist()
    assert (one.corrected_p >= one.p_value).all()


def words_of_a_shuffled_pool(seed: int) -> Matrix:
    """Features of forty answers that were all made alike."""
    rng = np.random.default_rng(seed)
    words = np.array(WORDS.split())
    answers = [" ".join(rng.choice(words, size=rng.integers(4, 14))) + "." for _ in range(40)]
    phrases = frequent_phrases([[phrases_of(x)] for x in answers])
    rows = [
        [*text_features(x).values(), *(float(p.is_in(read)) for p in phrases)]
        for x in answers
        for read in [phrases_of(x)]
    ]
    return np.array(rows)


@pytest.mark.parametrize("paired", [False, True])
def test_shuffled_labels_seldom_differ(paired: bool) -> None:
    pool = words_of_a_shuffled_pool(7)
    rng = np.random.default_rng(11)
    corrected, alone, compared = 0, 0, 0
    for seed in range(200):
        shuffled = rng.permutation(pool)
        a, b = shuffled[:20], shuffled[20:]
        kept = varies(a, b, paired=paired)
        found = max_t_test(a[:, kept], b[:, kept], paired=paired, permutations=199, seed=seed)
        corrected += found.corrected_p.min() <= 0.05
        alone += found.p_value.min() <= 0.05
        compared = max(compared, int(kept.sum()))
    assert compared > 30
    assert corrected <= 0.08 * 200
    assert alone > 0.5 * 200, "without the correction most scans of nothing would find something"


def test_intervals_cover_the_true_difference() -> None:
    rng = np.random.default_rng(0)
    inside = []
    for seed in range(50):
        a, b = rng.normal(1.0, 2.0, size=(30, 2)), rng.normal(0.5, 0.5, size=(25, 2))
        found = bootstrap_intervals(a, b, paired=False, seed=seed, draws=400)
        inside.append((found.low <= 0.5) & (found.high >= 0.5))
    assert 0.9 <= np.mean(inside) <= 0.98


def test_intervals_of_pairs_are_those_of_their_differences() -> None:
    a, b = draw(15, seed=8), draw(15, seed=9)
    found = bootstrap_intervals(a, b, paired=True, seed=0)
    alone = bootstrap_intervals(a - b, np.zeros_like(b), paired=True, seed=0)
    assert (found.low.tolist(), found.high.tolist()) == (alone.low.tolist(), alone.high.tolist())
    subject = np.random.default_rng(0).normal(size=(15, 1)) * 100
    shifted = bootstrap_intervals(a + subject, b + subject, paired=True, seed=0)
    assert shifted.high - shifted.low == pytest.approx(found.high - found.low)


def test_what_varies() -> None:
    a = np.array([[0.1 + 0.2, 1.0, 5.0], [0.3, 1.0, 6.0]])
    b = np.array([[0.3, 2.0, 5.0], [0.3, 1.0, 6.0]])
    assert varies(a, b, paired=False).tolist() == [False, True, True]
    assert varies(a, b, paired=True).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="without variance"):
        max_t_test(a, b, paired=True, permutations=9, seed=0)
    with pytest.raises(ValueError, match="2 and 1 prompts are no pairs"):
        varies(a, b[:1], paired=True)


@pytest.mark.parametrize(
    ("a", "b", "paired", "permutations", "expected"),
    [
        (3, 3, True, 9999, 2 / 8),
        (3, 3, False, 9999, 2 / 20),
        (2, 3, False, 9999, 1 / 10),
        (20, 20, False, 99, 0.01),
        (1, 1, True, 99, 1.0),
    ],
)
def test_smallest_p(a: int, b: int, paired: bool, permutations: int, expected: float) -> None:
    assert smallest_p(a, b, paired=paired, permutations=permutations) == pytest.approx(expected)


@pytest.mark.parametrize("paired", [False, True])
def test_smallest_p_is_reached_by_a_perfect_feature(paired: bool) -> None:
    a, b = np.array([[1.0], [1.1], [1.2], [1.3]]), np.array([[0.0], [0.1], [0.2], [0.25]])
    found = max_t_test(a, b, paired=paired, permutations=20_000, seed=0)
    assert found.global_p == pytest.approx(smallest_p(4, 4, paired=paired, permutations=20_000), abs=0.01)
