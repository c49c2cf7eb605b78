"""Log likelihoods of many strings at once, against the network's own passes one by one."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests import tiny
from trigger_opt.models.pair import CausalModel
from trigger_opt.scoring import string_log_likelihoods

BEFORE = [262, 301, 270, 7]
STRINGS = [[7], [301, 8], [12], [270, 7, 8], [8, 301], [262, 262, 9]]


def one_by_one(network: Any, before: Sequence[int], string: Sequence[int]) -> float:
    row = [*before, *string]
    log_probs = tiny.naive_logits(network, row).log_softmax(-1)
    return sum(float(log_probs[at - 1, row[at]]) for at in range(max(1, len(before)), len(row)))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("before", [BEFORE, BEFORE[:1], []])
@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
def test_likelihoods_are_those_of_whole_passes(family: str, before: list[int], plain: bool) -> None:
    network = tiny.make_network(family, 0)
    found = string_log_likelihoods(CausalModel("m", network), before, STRINGS, plain=plain)
    assert found == pytest.approx([one_by_one(network, before, s) for s in STRINGS], abs=1e-4)
    assert len(set(found)) >= len(STRINGS) - (0 if before else 1)


def test_no_more_strings_at_once_than_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny.make_network("qwen2", 0)
    model = CausalModel("m", network)
    strings = [[token, 8] for token in range(260, 300)]
    sizes: list[int] = []
    logits = CausalModel.logits

    def small(self: CausalModel, hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        if len(hidden) > 2 * 4:
            raise torch.OutOfMemoryError("no room")
        return logits(self, hidden)

    monkeypatch.setattr(CausalModel, "logits", small)
    found = string_log_likelihoods(model, BEFORE, strings)
    assert found == pytest.approx([one_by_one(network, BEFORE, s) for s in strings], abs=1e-4)
    # 16 strings, then 8, then 4, which fit.
    assert sizes[:3] == [32, 16, 8]
    assert set(sizes[2:]) == {8}
    monkeypatch.setattr(CausalModel, "logits", lambda self, hidden: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(torch.OutOfMemoryError):
        string_log_likelihoods(model, BEFORE, strings[:1])
