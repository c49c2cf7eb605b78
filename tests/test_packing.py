"""Where tokens lie in a pass, what each may look at, and how jobs are put into passes: against slow loops."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trigger_opt.scoring.attention import PackedPass, UnsupportedAttentionError, attend, packed_attention
from trigger_opt.scoring.packing import Job, Pack, padded, split

CPU = torch.device("cpu")
LAYER = 3


@st.composite
def packs(draw: st.DrawFn) -> tuple[Pack, list[int]]:
    """Jobs that continue several trunks from several places, and the trunks' lengths."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    jobs: list[Job] = []
    for trunk, length in enumerate(lengths):
        for start, size in draw(
            st.lists(st.tuples(st.integers(0, length), st.integers(1, 7)), min_size=int(trunk == 0), max_size=4)
        ):
            tokens = tuple(draw(st.lists(st.integers(0, 99), min_size=size, max_size=size)))
            jobs.append(Job(len(jobs), trunk, start, tokens))
    return Pack(jobs), lengths


@given(packs())
@settings(max_examples=100, deadline=None)
def test_tokens_lie_end_to_end(case: tuple[Pack, list[int]]) -> None:
    pack, _ = case
    tokens = [t for j in pack.jobs for t in j.tokens]
    places = [j.start + n for j in pack.jobs for n in range(len(j.tokens))]
    assert pack.used == len(tokens)
    assert pack.rows % 16 == 0
    assert pack.used <= pack.rows == padded(pack.jobs) < pack.used + 16
    assert pack.token_ids()[0, : pack.used].tolist() == tokens
    assert pack.positions()[0, : pack.used].tolist() == places
    assert pack.token_ids().shape == pack.positions().shape == (1, pack.rows)
    firsts = [sum(len(j.tokens) for j in pack.jobs[:n]) for n in range(len(pack.jobs))]
    assert [pack.first_row(n) for n in range(len(pack.jobs))] == firsts
    shortest = min(len(j.tokens) for j in pack.jobs)
    for count in range(1, shortest + 1):
        expected = [f + len(j.tokens) - count + n for f, j in zip(firsts, pack.jobs, strict=True) for n in range(count)]
        assert pack.last_rows(count).tolist() == expected


@given(packs(), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_jobs_side_by_side_and_back(case: tuple[Pack, list[int]], groups: int) -> None:
    pack, _ = case
    assert pack.window == max(len(j.tokens) for j in pack.jobs)
    aligned = pack.aligned(groups, CPU).view(len(pack.jobs), groups, pack.window)
    for number, job in enumerate(pack.jobs):
        own = list(range(pack.first_row(number), pack.first_row(number) + len(job.tokens)))
        for group in range(groups):
            shifted = [group * pack.rows + r for r in own]
            # Flush right; what stands before a job's first token must be a row of the pass.
            assert aligned[number, group, pack.window - len(own) :].tolist() == shifted
            assert bool((aligned[number, group] < groups * pack.rows).all())
    there, back = pack.aligned(1, CPU), pack.home(CPU)
    assert there[back][: pack.used].tolist() == list(range(pack.used))
    assert back.shape == (pack.rows,)


@given(packs())
@settings(max_examples=100, deadline=None)
def test_segments_are_runs_of_one_trunk(case: tuple[Pack, list[int]]) -> None:
    pack, _ = case
    covered = [n for s in pack.segments for n in range(s.first, s.last)]
    assert covered == list(range(len(pack.jobs)))
    assert all(pack.jobs[n].trunk == s.trunk for s in pack.segments for n in range(s.first, s.last))
    assert len({s.trunk for s in pack.segments}) == len(pack.segments)


class Configured:
    """As much of a network as `packed_attention` touches."""

    def __init__(self) -> None:
        self.config = self
        self._attn_implementation = "eager"

    def get_text_config(self) -> "Configured":
        return self


def slow_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """(heads, tokens, dim) of one whole sequence, token by token: the last `len(query)` tokens ask."""
    groups = len(query) // len(key)
    out = torch.zeros(*query.shape[:2], value.shape[-1])
    before = key.shape[1] - query.shape[1]
    for head in range(len(query)):
        for token in range(query.shape[1]):
            place = before + token
            first = 0 if window is None else max(0, place - window + 1)
            scores = key[head // groups, first : place + 1] @ query[head, token] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[head, token] = scores.softmax(0) @ value[head // groups, first : place + 1]
    return out


def random_trunk(length: int, kv_heads: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys of 6 numbers and values of 4."""
    return {LAYER: (torch.randn(kv_heads, length, 6), torch.randn(kv_heads, length, 4))} if length else {}


@given(
    packs(),
    st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]),
    st.sampled_from([None, 1, 2, 5, 8]),
    st.sampled_from([None, 2.0]),
    st.sampled_from([None, 0.7]),
    st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_every_job_sees_its_trunk_and_its_own_tokens_and_nothing_else(
    case: tuple[Pack, list[int]],
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    scaling: float | None,
    seed: int,
) -> None:
    pack, lengths = case
    heads_, kv_heads = heads
    torch.manual_seed(seed)
    trunks = [random_trunk(length, kv_heads) for length in lengths]
    # Loud padding: whoever looks at it is far off.
    query, key, value = (
        torch.randn(1, h, pack.rows, d) * (1 + 50 * (torch.arange(pack.rows) >= pack.used))[:, None]
        for h, d in ((heads_, 6), (kv_heads, 6), (kv_heads, 4))
    )
    module = SimpleNamespace(layer_idx=LAYER)
    state = PackedPass(pack, trunks, capture=True)
    with packed_attention(Configured(), state):
        out, _ = _attend(module, query, key, value, None, scaling=scaling, sliding_window=window, softcap=softcap)
    assert out.shape == (1, pack.rows, heads_, 4)
    nothing = (key[0, :, :0], value[0, :, :0])
    for number, job in enumerate(pack.jobs):
        rows = slice(pack.first_row(number), pack.first_row(number) + len(job.tokens))
        kept_keys, kept_values = trunks[job.trunk].get(LAYER, nothing)
        expected = slow_attention(
            query[0, :, rows],
            torch.cat([kept_keys[:, : job.start], key[0, :, rows]], 1),
            torch.cat([kept_values[:, : job.start], value[0, :, rows]], 1),
            scale=scaling or 6**-0.5, window=window, softcap=softcap,
        )  # fmt: skip
        assert torch.allclose(out[0, rows].transpose(0, 1), expected, atol=1e-5), job
    assert torch.equal(state.captured[LAYER][0], key[0])
    assert torch.equal(state.captured[LAYER][1], value[0])


# `attend` is annotated for transformers' modules; a stand-in with a layer number does here.
_attend: Any = getattr(attend, "__wrapped__", attend)


def test_what_is_not_known_of_attention_is_refused() -> None:
    pack = Pack([Job(0, 0, 0, (1, 2))])
    query = torch.randn(1, 2, pack.rows, 6)
    module = SimpleNamespace(layer_idx=0)
    with packed_attention(Configured(), PackedPass(pack, [{}])):
        _attend(module, query, query, query, None, is_causal=True, use_cache=False, s_aux=None)
        with pytest.raises(UnsupportedAttentionError, match="s_aux"):
            _attend(module, query, query, query, None, s_aux=torch.ones(2))
        with pytest.raises(UnsupportedAttentionError, match="mask"):
            _attend(module, query, query, query, torch.zeros(1, 1, pack.rows, pack.rows))
        with pytest.raises(UnsupportedAttentionError, match="batch"):
            _attend(module, *[query.expand(2, -1, -1, -1)] * 3, None)


def test_a_networks_own_attention_comes_back_when_the_last_pass_ends() -> None:
    network, state = Configured(), PackedPass(Pack([Job(0, 0, 0, (1,))]), [{}])
    with packed_attention(network, state):
        with pytest.raises(ValueError, match="inner"), packed_attention(network, state):
            raise ValueError("inner")
        assert network._attn_implementation == "trigger_opt_packed"
    assert network._attn_implementation == "eager"


@st.composite
def job_lists(draw: st.DrawFn, longest: int = 60) -> list[Job]:
    """Many jobs of several trunks in any order."""
    kinds = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, longest)), min_size=1, max_size=120))
    return [Job(n, trunk, 0, (7,) * length) for n, (trunk, length) in enumerate(kinds)]


def tokens(jobs: list[Job]) -> int:
    return sum(len(j.tokens) for j in jobs)


@given(job_lists(), st.integers(1, 400), st.sampled_from([1, 2, 3]))
@settings(max_examples=150, deadline=None)
def test_splitting_loses_no_job_and_keeps_to_the_limit(jobs: list[Job], max_rows: int, multiple: int) -> None:
    passes = split(jobs, max_rows, multiple)
    assert sorted(j.owner for p in passes for j in p) == list(range(len(jobs)))
    assert all(passes)
    trunks = [j.trunk for p in passes for j in p]
    assert trunks == sorted(trunks)
    assert all(tokens(p) <= max_rows or len(p) == 1 for p in passes)


@given(job_lists(longest=40), st.integers(1, 6), st.integers(0, 400), st.sampled_from([1, 2, 3]))
@settings(max_examples=150, deadline=None)
def test_passes_are_about_equal_and_leave_no_lane_idle(jobs: list[Job], count: int, room: int, multiple: int) -> None:
    """Where there is enough for passes that are worth it, and no job is a large part of one."""
    while tokens(jobs) < 1024 * count:
        jobs = [Job(n, j.trunk, 0, j.tokens) for n, j in enumerate([*jobs, *jobs])]
    # Passes that are just, or almost, filled by so many tokens.
    passes = split(jobs, tokens(jobs) // count + room, multiple)
    assert len(passes) % multiple == 0
    sizes = [tokens(p) for p in passes]
    assert max(sizes) <= 2 * min(sizes), sizes


def test_one_long_job_does_not_cut_the_others_small() -> None:
    jobs = [Job(0, 0, 0, (7,) * 900), *(Job(n, 0, 0, (7,) * 10) for n in range(1, 101))]
    # Two passes would hold them all.
    assert len(split(jobs, 1024, 1)) <= 4


def test_few_tokens_are_one_pass() -> None:
    jobs = [Job(n, 0, 0, (7,) * 10) for n in range(12)]
    assert len(split(jobs, 2048, 2)) == 1
    assert [len(p) for p in split(jobs * 3, 2048, 2)] == [18, 18]
