"""Divergences against slow float64 references, on ordinary and on absurd logits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trigger_opt.scoring import js_divergence, kl_divergence, sequence_log_prob, tv_distance

Logits = list[float]
_EXTREME = st.sampled_from([-1e4, -300.0, -100.0, 0.0, 80.0, 300.0, 1e4])
_VALUE = st.one_of(st.floats(-30, 30, width=32), _EXTREME)


@st.composite
def two_logits(draw: st.DrawFn) -> tuple[Logits, Logits]:
    size = draw(st.integers(1, 12))
    row = st.lists(_VALUE, min_size=size, max_size=size)
    return draw(row), draw(row)


def log_softmax(logits: Logits) -> np.ndarray:
    """In float64, the plain way."""
    row = np.asarray(logits, dtype=np.float64)
    row = row - row.max()
    log_probs: np.ndarray = row - np.log(np.exp(row).sum())
    return log_probs


def slow_kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if math.exp(a) > 0))


def slow_js(p: np.ndarray, q: np.ndarray) -> float:
    middle = np.log((np.exp(p) + np.exp(q)) / 2 + 1e-300)
    return 0.5 * slow_kl(p, middle) + 0.5 * slow_kl(q, middle)


def slow_tv(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.abs(np.exp(p) - np.exp(q)).sum() / 2)


@given(two_logits())
@settings(max_examples=200, deadline=None)
def test_agree_with_float64_references(rows: tuple[Logits, Logits]) -> None:
    a, b = rows
    p, q = log_softmax(a), log_softmax(b)
    finetuned, base = torch.tensor(a), torch.tensor(b)
    assert float(js_divergence(finetuned, base)) == pytest.approx(slow_js(p, q), abs=3e-5)
    assert float(tv_distance(finetuned, base)) == pytest.approx(slow_tv(p, q), abs=1e-5)
    assert float(kl_divergence(finetuned, base)) == pytest.approx(slow_kl(p, q), rel=1e-4, abs=3e-5)


@given(two_logits())
@settings(max_examples=200, deadline=None)
def test_bounds_symmetry_and_zero(rows: tuple[Logits, Logits]) -> None:
    finetuned, base = (torch.tensor(r) for r in rows)
    js, tv, kl = (float(f(finetuned, base)) for f in (js_divergence, tv_distance, kl_divergence))
    assert -1e-6 <= js <= math.log(2) + 1e-6
    assert 0 <= tv <= 1 + 1e-6
    assert kl >= -3e-5
    assert float(js_divergence(base, finetuned)) == pytest.approx(js, abs=1e-6)
    assert float(tv_distance(base, finetuned)) == pytest.approx(tv, abs=1e-6)
    for divergence in (js_divergence, tv_distance, kl_divergence):
        assert float(divergence(finetuned, finetuned)) == pytest.approx(0, abs=1e-6)
        assert float(divergence(finetuned, finetuned + 3)) == pytest.approx(0, abs=1e-3)


def test_known_values() -> None:
    sure, other = torch.tensor([1e4, 0.0, 0.0]), torch.tensor([0.0, 1e4, 0.0])
    assert float(js_divergence(sure, other)) == pytest.approx(math.log(2))
    assert float(tv_distance(sure, other)) == 1
    fair, loaded = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert float(kl_divergence(fair, loaded)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert float(kl_divergence(loaded, fair)) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert float(tv_distance(fair, loaded)) == pytest.approx(0.25)


def test_reduce_the_last_axis_only_and_in_fp32() -> None:
    a, b = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    for divergence in (js_divergence, tv_distance, kl_divergence):
        whole = divergence(a, b)
        assert whole.shape == (2, 3)
        assert float(whole[1, 2]) == pytest.approx(float(divergence(a[1, 2], b[1, 2])), abs=1e-6)
        half = divergence(a.bfloat16(), b.bfloat16())
        assert half.dtype == torch.float32
        assert torch.allclose(half, divergence(a.bfloat16().float(), b.bfloat16().float()))


@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 9), st.integers(0, 2**20))
@settings(max_examples=40, deadline=None)
def test_sequence_log_prob_is_the_sum_over_tokens(batch: int, length: int, vocab: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, length, vocab, generator=generator) * 20
    target = torch.randint(vocab, (length,), generator=generator)
    got = sequence_log_prob(logits, target)
    for row in range(batch):
        slow = sum(log_softmax(logits[row, t].tolist())[int(target[t])] for t in range(length))
        assert float(got[row]) == pytest.approx(slow, rel=1e-5, abs=1e-4)
