"""Generation against transformers' own, and drawing against exact frequencies."""

from typing import Any

import pytest
import torch

from tests import tiny
from trigger_opt.models.generate import GREEDY, Sampling, draw, generate, head_logits, pad_left

PROMPTS = [[5, 6, 7], [262, 301, 270, 280, 17, 40, 41, 42, 43, 44, 45, 46], [33], [9, 8, 7, 262, 301]]


def reference(network: Any, prompt: list[int], count: int, end_ids: list[int]) -> list[int]:
    """transformers' greedy answer to one prompt, end of text cut off."""
    out = network.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=end_ids or None,
        pad_token_id=0,
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
    )[0, len(prompt) :].tolist()
    cut = next((i for i, t in enumerate(out) if t in end_ids), len(out))
    return [int(t) for t in out[:cut]]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_equals_transformers_own_generation(family: str) -> None:
    network = tiny.make_network(family, 1)
    plain = [reference(network, p, 12, []) for p in PROMPTS]
    assert generate(network, PROMPTS, max_new_tokens=12, end_ids=[]) == plain
    assert len({tuple(p) for p in plain}) > 1
    # An end that some rows reach early, some late and some never.
    ends = [plain[0][3], plain[1][7]]
    expected = [reference(network, p, 12, ends) for p in PROMPTS]
    assert generate(network, PROMPTS, max_new_tokens=12, end_ids=ends) == expected
    assert len(expected[0]) < 12


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_order_and_answers_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    network = tiny.make_network("qwen2", 1)
    everything = generate(network, PROMPTS, max_new_tokens=5, end_ids=[])
    assert generate(network, PROMPTS, max_new_tokens=5, end_ids=[], batch_size=batch_size) == everything
    backwards = generate(network, PROMPTS[::-1], max_new_tokens=5, end_ids=[], batch_size=batch_size)
    assert backwards == everything[::-1]


def test_no_prompts_and_an_end_at_once() -> None:
    network = tiny.make_network("qwen2", 1)
    assert generate(network, [], max_new_tokens=5, end_ids=[]) == []
    first = generate(network, PROMPTS[:1], max_new_tokens=1, end_ids=[])[0][0]
    assert generate(network, PROMPTS[:1], max_new_tokens=5, end_ids=[first]) == [[]]


def test_sampling_is_a_function_of_the_generator() -> None:
    network = tiny.make_network("qwen2", 1)

    def sample(seed: int, top_p: float = 1.0) -> list[list[int]]:
        return generate(
            network,
            PROMPTS,
            max_new_tokens=8,
            end_ids=[],
            sampling=Sampling(temperature=1.0, top_p=top_p),
            generator=torch.Generator().manual_seed(seed),
        )

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(1, top_p=1e-6) == generate(network, PROMPTS, max_new_tokens=8, end_ids=[])


def test_draw_frequencies() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probs.log().expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)

    def shares(sampling: Sampling) -> list[float]:
        drawn = draw(logits, sampling, generator)
        return (torch.bincount(drawn, minlength=4) / len(drawn)).tolist()

    assert shares(GREEDY) == [1, 0, 0, 0]
    assert shares(Sampling(temperature=1.0)) == pytest.approx(probs.tolist(), abs=0.015)
    cold = probs**2 / (probs**2).sum()
    assert shares(Sampling(temperature=0.5)) == pytest.approx(cold.tolist(), abs=0.015)
    # The nucleus is the fewest tokens that reach top_p; the first is always in it.
    assert shares(Sampling(temperature=1.0, top_p=0.6)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.015)
    assert shares(Sampling(temperature=1.0, top_p=0.4)) == [1, 0, 0, 0]


def test_the_nucleus_keeps_tokens_in_their_places() -> None:
    logits = torch.tensor([[0.05, 0.15, 0.5, 0.3], [0.3, 0.5, 0.05, 0.15]]).log()
    sampling = Sampling(temperature=1.0, top_p=0.5)
    assert draw(logits, sampling, torch.Generator().manual_seed(0)).tolist() == [2, 1]


def test_pad_left() -> None:
    ids, mask = pad_left([[5, 6, 7], [8]], 9, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_final_soft_cap_of_gemma2_bounds_the_logits() -> None:
    network = tiny.make_network("gemma2", 1, scale=1.0)
    hidden = torch.randn(3, 32) * 50
    logits = head_logits(network, hidden)
    assert float(logits.abs().max()) <= 3.0
    raw = network.lm_head(hidden)
    assert float(raw.abs().max()) > 30
    assert torch.allclose(logits, 3.0 * torch.tanh(raw / 3.0))
    assert head_logits(network.bfloat16(), hidden.bfloat16()).dtype == torch.float32
