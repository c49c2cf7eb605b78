"""Passes in two threads at once: the same scores, each with its share of the cores, and none left running."""

import contextlib
import signal
import threading
import time
from typing import Any

import pytest
import torch

from tests import tiny
from tests.slow_scores import SIDES, contexts_with_empty_sides
from trigger_opt.models.files import ModelFiles
from trigger_opt.models.pair import CausalModel, LoadOptions, load_pair
from trigger_opt.scoring import Engine, Request, js_divergence
from trigger_opt.scoring.forward import Forward
from trigger_opt.scoring.lanes import beside, in_lanes

CONTEXTS = contexts_with_empty_sides()
PAYLOAD = [270, 301, 16]


@pytest.fixture
def ran_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads that passes ran in."""
    names: list[str] = []
    plain = Forward.hidden

    def hidden(forward: Forward, *arguments: Any, **options: Any) -> Any:
        names.append(threading.current_thread().name)
        return plain(forward, *arguments, **options)

    monkeypatch.setattr(Forward, "hidden", hidden)
    return names


def many_requests(seed: int = 0) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    followed = torch.randint(390, (8,), generator=generator)
    asked = []
    for _ in range(60):
        string = followed.clone()
        string[torch.randint(8, (1,), generator=generator)] = torch.randint(390, (1,), generator=generator)
        asked.append(Request(tuple(string.tolist()), int(torch.randint(5, (1,), generator=generator))))
    return asked


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "deepseek_v3"])
def test_two_lanes_give_what_one_gives(family: str, request: pytest.FixtureRequest, ran_in: list[str]) -> None:
    pair, asked = tiny.make_pair(family), many_requests()
    found = []
    for fixture in ("", "two_threads"):
        if fixture:
            request.getfixturevalue(fixture)
        engine = Engine(pair.finetuned, pair.base, CONTEXTS, max_rows=200)
        found.append((engine.token_scores("base", asked, PAYLOAD)[0], engine.divergences(js_divergence, asked)))
        lanes = {n for n in ran_in if n.startswith("lane")}
        assert len(lanes) == (2 if fixture else 0), ran_in
        ran_in.clear()
    for one, two in zip(*found, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-5)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_adapter_pair_in_lanes_scores_as_its_merged_weights(
    base_files: ModelFiles, adapter_files: tuple[ModelFiles, Any], ran_in: list[str]
) -> None:
    """One network, its adapters on and off in turn, in several threads at once."""
    from transformers import AutoModelForCausalLM

    pair = load_pair(adapter_files[0], base_files, options=LoadOptions(dtype="float32"))
    finetuned, base = (
        CausalModel("m", AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).requires_grad_(False))
        for f in (adapter_files[1], base_files.folder)
    )
    asked = many_requests()
    one, two = (Engine(p, q, CONTEXTS, max_rows=200) for p, q in ((pair.finetuned, pair.base), (finetuned, base)))
    for _ in range(2):
        assert torch.allclose(one.divergences(js_divergence, asked), two.divergences(js_divergence, asked), atol=1e-5)
        for side in (*SIDES, "finetuned"):
            ours, theirs = (e.token_scores(side, asked, PAYLOAD)[0] for e in (one, two))
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert float(one.divergences(js_divergence, asked).min()) > 1e-4
    assert any(n.startswith("lane") for n in ran_in)


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_lane_is_raised_after_all_have_ended() -> None:
    ended = []

    def work(item: int) -> int:
        if item == 1:
            raise KeyError("one")
        ended.append(item)
        return item

    with pytest.raises(KeyError, match="one"):
        in_lanes(work, range(5), 2)
    assert sorted(ended) == [0, 2, 3, 4]
    assert in_lanes(lambda i: i * i, range(5), 2) == [0, 1, 4, 9, 16]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_ctrl_c_lets_no_lane_go_on() -> None:
    begun: list[int] = []
    ended: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 10:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.02)
        ended.append(item)

    with pytest.raises(KeyboardInterrupt):
        in_lanes(work, range(60), 2)
    assert sorted(begun) == sorted(ended)
    assert 10 in begun
    assert len(begun) < 60
    assert in_lanes(lambda i: i, range(3), 2) == [0, 1, 2]
    assert sorted(begun) == sorted(ended)


@pytest.mark.usefixtures("two_threads")
def test_every_lane_has_its_share_of_the_threads() -> None:
    barrier = threading.Barrier(2)

    def threads(item: int) -> int:
        barrier.wait(timeout=60)
        return torch.get_num_threads()

    assert in_lanes(threads, range(4), 2) == [1] * 4
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("fails", [False, True])
def test_work_beside_has_ended_when_the_body_has(fails: bool) -> None:
    begun = threading.Event()
    threads: list[int] = []
    ended: list[bool] = []

    def work() -> int:
        begun.wait(5)
        threads.append(torch.get_num_threads())
        ended.append(True)
        return 3

    with pytest.raises(KeyError) if fails else contextlib.nullcontext(), beside(work) as made:
        # Not before the body has come this far: they run at once.
        assert not made.done()
        threads.append(torch.get_num_threads())
        begun.set()
        if fails:
            raise KeyError
    assert ended
    assert made.result() == 3
    assert threads == [1, 1]
    assert torch.get_num_threads() == 2
