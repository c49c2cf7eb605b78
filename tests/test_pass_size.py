"""How large passes may be, and memory that runs out in the middle: nothing lost, nothing swallowed."""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.slow_scores import contexts_with_empty_sides, make_engine
from trigger_opt.models.pair import CausalModel
from trigger_opt.scoring import Engine, Request, heads, js_divergence
from trigger_opt.scoring import engine as engine_module
from trigger_opt.scoring import pass_size as module
from trigger_opt.scoring.forward import Forward
from trigger_opt.scoring.packing import Job, Pack
from trigger_opt.scoring.pass_size import PassSize, out_of_memory, pass_size

CPU = torch.device("cpu")
OUT_OF_MEMORY: list[Callable[[], RuntimeError]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 8589934592"),
]


def test_both_kinds_of_running_out_are_known_and_nothing_else() -> None:
    assert all(out_of_memory(make()) for make in OUT_OF_MEMORY)
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("can't allocate memory"))


def test_a_failure_halves_the_size_and_success_does_not_exceed_the_ceiling() -> None:
    size = PassSize.on(CPU)
    first = size.rows
    size.failed(first)
    assert size.rows == size.ceiling == first // 2
    size.fitted(first // 2)
    assert size.rows == first // 2
    size.failed(first // 2)
    assert size.rows == first // 4
    # A pass much smaller than allowed says nothing about larger ones.
    size.failed(200)
    assert size.rows == 100
    size.failed(2)
    assert size.rows == size.ceiling >= 16


def test_a_size_that_failed_is_tried_again_after_long_success_only() -> None:
    size = PassSize.on(CPU)
    first = size.rows
    size.failed(first)
    for _ in range(module._PATIENCE - 1):
        size.fitted(size.rows)
    assert size.rows == first // 2
    size.fitted(size.rows)
    assert size.rows == size.ceiling == first
    for _ in range(3 * module._PATIENCE):
        size.fitted(size.rows)
    assert size.rows == first
    # A failure begins the waiting anew.
    size.failed(first)
    for _ in range(module._PATIENCE - 1):
        size.fitted(size.rows)
    size.failed(first // 2)
    for _ in range(module._PATIENCE - 1):
        size.fitted(size.rows)
    assert size.rows == first // 4


def test_a_gpu_begins_small_and_doubles_on_full_passes_only() -> None:
    size = PassSize.on(torch.device("cuda"))
    first = size.rows
    size.fitted(first // 2)
    assert size.rows == first
    size.fitted(first)
    assert size.rows == 2 * first
    for _ in range(50):
        size.fitted(size.rows)
    assert size.rows == size.ceiling == module._MOST_ROWS
    size.failed(2**15)
    assert size.rows == 2**14


def test_a_size_lives_as_long_as_its_network() -> None:
    network, other = tiny.make_network("qwen2", 0), tiny.make_network("qwen2", 0)
    pass_size(network, CPU).failed(512)
    assert pass_size(network, CPU).rows == 256
    assert pass_size(other, CPU).rows > 256
    known = len(module._known)
    del network
    gc.collect()
    assert len(module._known) < known


def starve(monkeypatch: pytest.MonkeyPatch, most: int, make: Callable[[], RuntimeError]) -> list[int]:
    """Make every pass of more than `most` jobs' tokens fail; returns the tokens of all that were tried."""
    tried: list[int] = []
    plain = Forward.hidden

    def hidden(forward: Forward, pack: Pack, trunks: Any, embeds: Any = None, *, capture: bool = False) -> Any:
        if not capture and len(trunks) > 1:
            tried.append(pack.used)
            if pack.used > most:
                raise make()
        return plain(forward, pack, trunks, embeds, capture=capture)

    monkeypatch.setattr(Forward, "hidden", hidden)
    return tried


def asked(count: int = 40) -> list[Request]:
    """Strings of 3 tokens in two contexts."""
    triggers = torch.randint(390, (count, 3), generator=torch.Generator().manual_seed(5)).tolist()
    return [Request(tuple(t), n % 2) for n, t in enumerate(triggers)]


@pytest.mark.parametrize("make", OUT_OF_MEMORY, ids=["cuda", "cpu"])
def test_out_of_memory_loses_nothing_and_is_remembered(
    make: Callable[[], RuntimeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = tiny.make_pair()
    expected = make_engine(tiny.make_pair()).token_scores("base", asked(), [270])[0]
    engine = make_engine(pair)
    tried = starve(monkeypatch, 150, make)
    assert torch.allclose(engine.token_scores("base", asked(), [270])[0], expected, atol=1e-5)
    assert max(tried) > 400
    size = pass_size(pair.base.network, CPU)
    # The last that failed was above 150, so its half is what is used from now on.
    assert 64 <= size.rows <= 150
    tried.clear()
    again = make_engine(pair)
    assert torch.allclose(again.token_scores("base", asked(), [270])[0], expected, atol=1e-5)
    assert max(tried) <= size.rows
    assert pass_size(pair.finetuned.network, CPU).rows > 1000


def test_the_size_grows_again_when_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 5)
    pair = tiny.make_pair()
    engine = make_engine(pair)
    with monkeypatch.context() as scarce:
        starve(scarce, 150, OUT_OF_MEMORY[0])
        engine.token_scores("base", asked(), [270])
    low = pass_size(pair.base.network, CPU).rows
    for _ in range(10):
        engine.token_scores("base", asked(), [270])
    assert pass_size(pair.base.network, CPU).rows >= 4 * low


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("make", OUT_OF_MEMORY, ids=["cuda", "cpu"])
def test_lanes_lose_nothing_either(make: Callable[[], RuntimeError], monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny.make_pair()
    expected = make_engine(tiny.make_pair()).divergences(js_divergence, asked(80))
    tried = starve(monkeypatch, 100, make)
    assert torch.allclose(make_engine(pair).divergences(js_divergence, asked(80)), expected, atol=1e-5)
    assert max(tried) > 300


def test_memory_that_runs_out_at_the_unembedding(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny.make_pair()
    expected = make_engine(tiny.make_pair()).token_scores("base", asked(), [270, 5])
    plain, sizes = heads.token_scores, []

    def scarce(model: CausalModel, hidden: Tensor, target: Tensor) -> Any:
        sizes.append(len(hidden))
        if len(hidden) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, hidden, target)

    monkeypatch.setattr(engine_module, "token_scores", scarce)
    log_probs, greedy = make_engine(pair).token_scores("base", asked(), [270, 5])
    assert torch.allclose(log_probs, expected[0], atol=1e-5)
    assert torch.equal(greedy, expected[1])
    assert sizes[0] == 80
    assert sum(s for s in sizes if s <= 20) == 80


@pytest.mark.parametrize("make", OUT_OF_MEMORY, ids=["cuda", "cpu"])
def test_one_job_that_does_not_fit_is_the_error_itself(
    make: Callable[[], RuntimeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny.make_pair())
    tried = starve(monkeypatch, 0, make)
    with pytest.raises(type(make()), match="memory"):
        engine.token_scores("base", asked(), [270])
    assert tried[-1] < 40


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("most", [0, 100])
def test_other_errors_are_not_taken_for_memory(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny.make_pair()
    tried = starve(monkeypatch, most, lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        make_engine(pair).token_scores("base", asked(80), [270])
    assert len(tried) <= 2
    assert pass_size(pair.base.network, CPU).rows == PassSize.on(CPU).rows


def test_a_later_pass_that_fails_keeps_what_was_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny.make_pair()
    expected = make_engine(pair).token_scores("base", asked(), [270])[0]
    engine = make_engine(pair, max_rows=150)
    done: list[Sequence[Job]] = []
    failed: list[Sequence[Job]] = []
    plain = Forward.hidden

    def hidden(forward: Forward, pack: Pack, trunks: Any, *arguments: Any, **options: Any) -> Any:
        if len(trunks) > 1 and len(done) == 2 and not failed:
            failed.append(pack.jobs)
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(trunks) > 1:
            done.append(pack.jobs)
        return plain(forward, pack, trunks, *arguments, **options)

    monkeypatch.setattr(Forward, "hidden", hidden)
    assert torch.allclose(engine.token_scores("base", asked(), [270])[0], expected, atol=1e-5)
    owners = [j.owner for jobs in done for j in jobs]
    assert sorted(owners) == list(range(40))
    assert len(failed) == 1


def test_requests_in_many_contexts_survive_the_smallest_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, contexts = tiny.make_pair("gemma2"), contexts_with_empty_sides()
    engine = Engine(pair.finetuned, pair.base, contexts)
    everywhere = [Request(r.ids, n % 5) for n, r in enumerate(asked(20))]
    expected = Engine(pair.finetuned, pair.base, contexts).divergences(js_divergence, everywhere)
    tried = starve(monkeypatch, 20, OUT_OF_MEMORY[1])
    assert torch.allclose(engine.divergences(js_divergence, everywhere), expected, atol=1e-5)
    assert min(tried) <= 20
