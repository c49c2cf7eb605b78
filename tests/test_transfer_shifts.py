"""Shifts of activations against a slow reference; planted shifts, and none; arrays on disk."""

import itertools
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trigger_opt.errors import UserError
from trigger_opt.records import ModuleShift
from trigger_opt.transfer.requests import Array
from trigger_opt.transfer.shifts import load_activations, module_shifts, save_activations

Side = dict[int, dict[str, Array]]


def drawn(rng: np.random.Generator, contexts: int, *, width: int = 5, shift: float = 0.0, module: str = "m") -> Side:
    """Contexts with outputs of different lengths, moved by `shift` along the first axis."""
    sides: Side = {}
    for context in range(contexts):
        values = rng.normal(size=(int(rng.integers(1, 5)), width))
        values[:, 0] += shift
        sides[context] = {module: values.astype(np.float32)}
    return sides


def slow(triggered: Side, controls: Side, module: str = "m") -> tuple[float, float]:
    """Shift and exact p-value by loops over all sign flips."""
    contexts = sorted(set(triggered) & set(controls))
    ours = [triggered[c][module].astype(float).mean(axis=0) for c in contexts]
    theirs = [controls[c][module].astype(float).mean(axis=0) for c in contexts]
    unit = sum(np.linalg.norm(t) for t in theirs) / len(theirs)

    def statistic(signs: tuple[int, ...]) -> float:
        total = sum(s * (a - b) for s, a, b in zip(signs, ours, theirs, strict=True))
        return float(np.linalg.norm(total / len(contexts)))

    observed = statistic((1,) * len(contexts))
    all_signs = list(itertools.product((1, -1), repeat=len(contexts)))
    as_large = sum(statistic(s) >= observed * (1 - 1e-9) for s in all_signs)
    return observed / float(unit), as_large / len(all_signs)


@given(st.integers(3, 8), st.integers(0, 1000), st.floats(0, 2))
@settings(max_examples=30)
def test_agrees_with_the_slow_reference(contexts: int, seed: int, shift: float) -> None:
    rng = np.random.default_rng(seed)
    triggered, controls = drawn(rng, contexts, shift=shift), drawn(rng, contexts)
    (found,) = module_shifts(triggered, controls, seed=0)
    expected_shift, expected_p = slow(triggered, controls)
    assert found.shift == pytest.approx(expected_shift, rel=1e-6)
    assert found.p_value == pytest.approx(expected_p, abs=1e-12)
    assert found.contexts == contexts


def test_random_flips_estimate_the_exact_share() -> None:
    rng = np.random.default_rng(5)
    triggered, controls = drawn(rng, 12, shift=0.5), drawn(rng, 12)
    (found,) = module_shifts(triggered, controls, seed=1, permutations=4000)
    _, exact = slow(triggered, controls)
    assert 0.02 < exact < 0.9, "a case in which an error would show"
    assert found.p_value == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 4000) ** 0.5 + 1 / 4000)
    assert (found.p_value * 4001) == pytest.approx(round(found.p_value * 4001))
    assert module_shifts(triggered, controls, seed=1, permutations=4000) == [found]
    assert module_shifts(triggered, controls, seed=2, permutations=4000) != [found]


def test_planted_shift_is_found_among_modules_that_do_not_move() -> None:
    rng = np.random.default_rng(0)
    triggered: Side = {c: {} for c in range(20)}
    controls: Side = {c: {} for c in range(20)}
    for module, shift in {"a.still": 0.0, "moved": 3.0, "z.still": 0.0}.items():
        ours, theirs = drawn(rng, 20, shift=shift, module=module), drawn(rng, 20, module=module)
        for c in range(20):
            triggered[c] |= ours[c]
            controls[c] |= theirs[c]
    found = module_shifts(triggered, controls, seed=0)
    assert found[0].module == "moved"
    assert found[0].p_value == 1 / 2001
    assert found[0].shift > 1
    assert all(f.p_value > 0.02 for f in found[1:])
    alone = module_shifts(triggered, {c: {"moved": a["moved"]} for c, a in controls.items()}, seed=0)
    assert alone == found[:1], "what else was asked for changes nothing"


def test_any_fixed_string_has_a_small_p_value_so_that_shifts_are_to_be_compared() -> None:
    """Strings as vectors: one in every context against another in each; neither is a trigger, and one moves further."""
    rng = np.random.default_rng(0)
    contexts = rng.normal(size=(12, 50))
    random_strings = rng.normal(size=(12, 50))

    def side(strings: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Side:
        return {c: {"m": row[None].astype(np.float32)} for c, row in enumerate(contexts + strings)}

    fixed = rng.normal(size=50)
    ((plain,), (far,)) = (
        module_shifts(side(np.tile(s, (12, 1))), side(random_strings), seed=0) for s in (fixed, 3 * fixed)
    )
    assert max(plain.p_value, far.p_value) < 0.01
    assert far.shift > 2 * plain.shift
    assert "Any fixed string may" in (module_shifts.__doc__ or "")


def test_p_values_are_even_where_nothing_moves() -> None:
    p_values = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        p_values.append(module_shifts(drawn(rng, 6), drawn(rng, 6), seed=0)[0].p_value)
    # Of 200 tries at 9.4 % (6 of 64 sign flips), three standard deviations are 6.2 %.
    assert 0.032 < np.mean(np.array(p_values) <= 0.1) < 0.156


def test_smallest_exact_p_value() -> None:
    ones, zeros = ({c: {"m": np.full((2, 3), v, dtype=np.float32)} for c in range(10)} for v in (2.0, 1.0))
    (found,) = module_shifts(ones, zeros, seed=0)
    assert found.shift == pytest.approx(1.0)
    assert replace(found, shift=1.0) == ModuleShift(module="m", shift=1.0, p_value=2 / 1024, contexts=10)
    (same,) = module_shifts(ones, ones, seed=0)
    assert (same.shift, same.p_value) == (0.0, 1.0)


def test_contexts_without_either_side_are_left_out() -> None:
    rng = np.random.default_rng(0)
    triggered, controls = drawn(rng, 6), drawn(rng, 6)
    (full,) = module_shifts({c: triggered[c] for c in (1, 2, 3, 4)}, {c: controls[c] for c in (1, 2, 3, 4)}, seed=0)
    (holes,) = module_shifts(
        {c: triggered[c] for c in (0, 1, 2, 3, 4)}, {c: controls[c] for c in (1, 2, 3, 4, 5)}, seed=0
    )
    assert holes == full
    controls[2] = {}
    (fewer,) = module_shifts(triggered, controls, seed=0)
    assert fewer.contexts == 5
    assert module_shifts(triggered, {}, seed=0) == []
    assert module_shifts(triggered, {c: {"other": a} for c, d in controls.items() for a in d.values()}, seed=0) == []


@pytest.mark.parametrize("contexts", [1, 2])
def test_too_few_contexts_prove_nothing(contexts: int) -> None:
    rng = np.random.default_rng(0)
    triggered, controls = drawn(rng, contexts, shift=100.0), drawn(rng, contexts)
    (found,) = module_shifts(triggered, controls, seed=0)
    assert (found.p_value, found.contexts) == (1.0, contexts)
    assert found.shift == pytest.approx(slow(triggered, controls)[0], rel=1e-6)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1.0, np.nan, 0.0]]), "holds NaN or infinity"),
        (np.array([[np.inf, 0.0, 0.0]]), "holds NaN or infinity"),
        (np.ones((2, 4)), "is 3 and 4 wide in different contexts"),
        (np.ones(3), r"has the shape \(3,\); \(tokens, width\) is needed"),
        (np.ones((0, 3)), r"has the shape \(0, 3\)"),
        (np.ones((1, 2, 3)), r"has the shape \(1, 2, 3\)"),
    ],
)
@pytest.mark.parametrize("side", ["triggered", "controls"])
def test_unusable_outputs_name_the_module(array: Array, message: str, side: str) -> None:
    good: Side = {c: {"mlp": np.ones((2, 3), dtype=np.float32)} for c in range(4)}
    bad: Side = {**good, 2: {"mlp": array.astype(np.float32)}}
    pair = (bad, good) if side == "triggered" else (good, bad)
    with pytest.raises(UserError, match=f"module 'mlp' {message}.*leave it out of transfer.activations"):
        module_shifts(*pair, seed=0)


def test_widths_that_differ_between_the_sides() -> None:
    wide: Side = {c: {"mlp": np.ones((2, 4), dtype=np.float32)} for c in range(4)}
    narrow: Side = {c: {"mlp": np.ones((2, 3), dtype=np.float32)} for c in range(4)}
    with pytest.raises(UserError, match="'mlp' is 4 and 3 wide"):
        module_shifts(wide, narrow, seed=0)


def test_controls_of_zeros_give_no_unit() -> None:
    zeros: Side = {c: {"mlp": np.zeros((1, 2), dtype=np.float32)} for c in range(4)}
    ones: Side = {c: {"mlp": np.ones((1, 2), dtype=np.float32)} for c in range(4)}
    with pytest.raises(UserError, match="'mlp' is zero in all controls"):
        module_shifts(ones, zeros, seed=0)
    assert module_shifts(zeros, zeros, seed=0)[0].shift == 0.0


NAMES = ["model.layers.0.mlp", "../up", "/abs/path", "file", "names", "array0", "é\n\0 ", "", "\ud800", "a" * 300]


def test_arrays_round_trip_under_any_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(i, 3)).astype(np.float32) for i, name in enumerate(NAMES)}
    path = tmp_path / "x.activations"
    save_activations(path, {"old": arrays[""]})
    save_activations(path, arrays)
    found = load_activations(path)
    assert list(found) == NAMES
    for name, array in found.items():
        assert array.dtype == np.float32
        assert array.shape == arrays[name].shape
        assert np.array_equal(array, arrays[name])
    assert [p.name for p in tmp_path.iterdir()] == ["x.activations"], "nothing left beside it"
    save_activations(path, {})
    assert load_activations(path) == {}


def test_disk_full_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    old = {"m": np.ones((1, 1), dtype=np.float32)}
    save_activations(path, old)
    large = {"m": np.random.default_rng(0).normal(size=(200, 200)).astype(np.float32)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_activations(path, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_activations(path)["m"] == old["m"]
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"], "no half file takes the space that is short"


def test_zeros_take_little_space(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    save_activations(path, {"m": np.zeros((500, 500), dtype=np.float32)})
    assert path.stat().st_size < 20_000


def test_damaged_files_are_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with pytest.raises(UserError, match=r"x\.npz is missing"):
        load_activations(path)
    save_activations(path, {"m": np.random.default_rng(0).normal(size=(50, 50)).astype(np.float32)})
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = [b"", b"no archive", whole[:middle], whole[:middle] + b"\0" * 40 + whole[middle + 40 :]]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.npz holds no activations \(.+\); delete it and run") as caught:
            load_activations(path)
        assert "\n" not in str(caught.value)
    with path.open("wb") as file:
        np.savez(file, other=np.ones(2))
    with pytest.raises(UserError, match="holds no activations"):
        load_activations(path)
