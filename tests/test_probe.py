"""Residual-stream probes: pure parts against slow references, a planted direction and decoys, real tiny networks."""

import itertools
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import tiny
from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles
from trigger_opt.models.pair import CausalModel, LoadOptions, ModelPair, load_pair
from trigger_opt.prompts import Context, conversation_ids, encode
from trigger_opt.records import ProbeResult, read_record, write_record
from trigger_opt.verify.linear_probe import (
    States,
    accuracy,
    auroc,
    best_random_direction,
    best_threshold,
    calibrate,
    fit_probe,
    read_probe,
    separation,
)
from trigger_opt.verify.probe import last_token_states, probe_trigger

TRIGGER = " zx qv"
ALLOWED = torch.zeros(tiny.vocab_size(), dtype=torch.bool)
ALLOWED[300:380] = True
Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def contexts(count: int, said: str = "Question") -> list[Context]:
    return [Context(user=f"{said} {i:02d}: tell me about the sea.{{trigger}} Please.") for i in range(count)]


# The pure parts


@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_auroc_counts_pairs(decimals: int) -> None:
    positive, negative = noise(13).round(decimals) + 0.5, noise(9, seed=1).round(decimals)
    wins = sum((p > n) + 0.5 * (p == n) for p, n in itertools.product(positive, negative))
    assert auroc(positive, negative) == pytest.approx(wins / (13 * 9))
    assert auroc(negative, positive) == pytest.approx(1 - wins / (13 * 9))


def test_separation_is_d_prime_and_never_infinite() -> None:
    positive, negative = noise(5) + 3, noise(5, seed=1)
    pooled = ((np.std(positive, ddof=1) ** 2 + np.std(negative, ddof=1) ** 2) / 2) ** 0.5
    assert separation(positive, negative) == pytest.approx((positive.mean() - negative.mean()) / pooled)
    assert separation(np.ones(3), np.ones(3)) == 0.0
    assert separation(np.zeros(3), np.ones(3)) == -1e6


def test_probe_is_the_standardised_mean_difference() -> None:
    positive, negative = noise(6, 5) + np.arange(5), noise(7, 5, seed=1)
    probe = fit_probe(positive, negative)
    steps = []
    for j in range(5):
        spread = ((np.var(positive[:, j]) + np.var(negative[:, j])) / 2) ** 0.5
        steps.append((np.mean(positive[:, j]) - np.mean(negative[:, j])) / spread**2)
    wanted = np.array(steps)
    assert probe.direction / np.linalg.norm(probe.direction) == pytest.approx(wanted / np.linalg.norm(wanted))
    assert probe((positive.mean(0) + negative.mean(0))[None] / 2) == pytest.approx([0.0])
    assert probe(positive).mean() > 0 > probe(negative).mean()


def test_probe_is_not_ruled_by_one_huge_dimension_nor_by_constant_ones() -> None:
    positive, negative = noise(8, 21), noise(8, 21, seed=1)
    positive[:, 3] += 3
    scores = fit_probe(positive, negative)(positive)
    huge = np.ones(21)
    huge[7] = 1000.0
    assert fit_probe(positive * huge, negative * huge)(positive * huge) == pytest.approx(scores)
    still = np.ones((8, 4))
    assert (fit_probe(still, still)(still) == 0).all()
    constant = np.concatenate([positive, still], 1), np.concatenate([negative, still], 1)
    assert fit_probe(*constant)(constant[0]) == pytest.approx(scores)


@pytest.mark.parametrize("seed", range(4))
def test_threshold_is_as_good_as_any(seed: int) -> None:
    positive, negative = (noise(7, seed=seed) + 0.8).round(1), noise(7, seed=seed + 9).round(1)

    def right(threshold: float) -> float:
        return float((positive > threshold).mean() + (negative <= threshold).mean())

    found = best_threshold(positive, negative)
    assert right(found) == max(right(t) for t in np.arange(-4.025, 4, 0.05))


def test_threshold_lies_in_the_middle_of_the_widest_gap() -> None:
    assert best_threshold(np.array([10.0, 11.0]), np.array([1.0, 2.0])) == 6.0
    assert best_threshold(np.ones(2), np.ones(2)) == 1.0
    # Cuts at 2.5 and at 6 are equally good; the second lies in the wider gap.
    assert best_threshold(np.array([3.0, 8.0, 9.0]), np.array([1.0, 2.0, 4.0])) == 6.0


def test_calibration_scores_each_context_by_a_probe_that_has_not_seen_it() -> None:
    positive, negative = noise(9, 200), noise(9, 200, seed=1)
    scores = [
        fit_probe(np.delete(positive, i, 0), np.delete(negative, i, 0))(np.stack([positive[i], negative[i]]))
        for i in range(9)
    ]
    left, right = np.stack(scores).T
    found = calibrate(positive, negative)
    assert found.threshold == pytest.approx(best_threshold(left, right))
    assert found.separation == pytest.approx(separation(left, right))
    probe = fit_probe(positive, negative)
    # There is nothing to find in noise, but a probe's scores on what it was fitted to say otherwise.
    assert separation(probe(positive), probe(negative)) > 3
    assert found.separation < 1


def test_held_out_states_move_neither_probe_nor_threshold() -> None:
    positive, negative = noise(12, 6) + 2, noise(12, 6, seed=1)
    threshold = calibrate(positive, negative).threshold
    held, others = noise(30, 6, seed=2) + 2, noise(30, 6, seed=3)
    clean = States(search=negative, held_out=others)
    assert accuracy(States(search=positive, held_out=held), clean, threshold) > 0.9
    # Both kinds far on one side: a threshold or probe adapted to them would still tell them apart.
    shifted = States(search=negative, held_out=others + 50)
    assert accuracy(States(search=positive, held_out=held + 50), shifted, threshold) == 0.5
    assert read_probe(States(search=positive, held_out=held + 50), shifted).auroc > 0.95


def test_random_directions_reach_far_by_number_alone() -> None:
    one, other = (States(search=noise(8, 30, seed=s), held_out=noise(6, 30, seed=s + 5)) for s in (0, 1))
    best = [best_random_direction(one, other, n, torch.Generator().manual_seed(0)) for n in (1, 50, 1000)]
    assert 0.5 <= best[0] < best[1] < best[2]
    assert best[2] > 0.9
    assert read_probe(one, other).auroc < 0.8
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(30, 50, generator=generator, dtype=torch.float64).numpy()
    spread = np.sqrt((one.search.var(0) + other.search.var(0)) / 2)
    one_by_one = [auroc(one.held_out / spread @ d, other.held_out / spread @ d) for d in drawn.T]
    assert best[1] == pytest.approx(max(max(a, 1 - a) for a in one_by_one))


# Hidden states of real networks


def prompts(pair: ModelPair) -> list[list[int]]:
    return [conversation_ids(pair.tokenizer, c, t) for c in tiny.CONTEXTS for t in ("", " zx qv", " dog")]


def hooked_states(network: Any, ids: Sequence[int]) -> Tensor:
    """The reference: one sequence, no padding, each layer's output caught on its way."""
    caught: list[Tensor] = []

    def catch(module: Any, inputs: Any, output: Any) -> None:
        caught.append((output[0] if isinstance(output, tuple) else output)[0, -1])

    handles = [layer.register_forward_hook(catch) for layer in network.base_model.layers]
    with torch.no_grad():
        network.base_model(input_ids=torch.tensor([list(ids)]), use_cache=False)
        caught[-1] = network.base_model.norm(caught[-1])
    for handle in handles:
        handle.remove()
    return torch.stack(caught)


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma2"])
def test_padded_batches_equal_one_by_one(family: str) -> None:
    pair = tiny.make_pair(family)
    ids = prompts(pair)
    assert len({len(i) for i in ids}) > 4
    states = last_token_states(pair.finetuned, ids, batch_size=4)
    assert states.shape == (9, 2, 32)
    for row, sequence in zip(states, ids, strict=True):
        reference = hooked_states(pair.finetuned.network, sequence)
        torch.testing.assert_close(torch.from_numpy(row), reference, rtol=1e-4, atol=1e-4)


def test_each_side_of_an_adapter_pair_is_read(base_files: ModelFiles, adapter_files: tuple[ModelFiles, Path]) -> None:
    pair = load_pair(adapter_files[0], base_files, options=LoadOptions(dtype="float32"))
    ids = prompts(pair)[:3]
    plain = load_pair(base_files, base_files, options=LoadOptions(dtype="float32")).base
    own, base = (last_token_states(m, ids) for m in (pair.finetuned, pair.base))
    np.testing.assert_allclose(base, last_token_states(plain, ids), rtol=1e-5, atol=1e-5)
    assert np.abs(own - base).max() > 0.1


def test_states_that_are_not_finite_are_refused() -> None:
    pair = tiny.make_pair("qwen2")
    pair.finetuned.network.base_model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(UserError, match=r"hidden states of 'tuned' are not finite in torch.float32.*model.dtype"):
        last_token_states(pair.finetuned, prompts(pair))


def test_identical_models_give_identical_figures() -> None:
    pair = tiny.make_pair("qwen2")
    same = ModelPair(finetuned=pair.finetuned, base=pair.finetuned, tokenizer=pair.tokenizer)
    found = probe_trigger(same, TRIGGER, contexts(4), contexts(5, "Other"), allowed=ALLOWED, seed=0)
    for layer in found.layers:
        assert layer.base_auroc == layer.auroc
        assert layer.base_auroc_random_strings == layer.auroc_random_strings
        assert layer.gain == layer.decoy_gain == 0.0
    other = probe_trigger(pair, TRIGGER, contexts(4), contexts(5, "Other"), allowed=ALLOWED, seed=0)
    assert [x.separation for x in other.layers] == [x.separation for x in found.layers]
    assert all(x.gain != 0 for x in other.layers)


# A planted direction


class PlantedNetwork:
    """Hidden states that are noise of each conversation, four layers of 24; from the third layer on, the trigger adds
    `size` along one direction. Conversations that hold `marked` are moved as a whole."""

    dtype = torch.float32

    def __init__(self, size: float, marked: str = "\0") -> None:
        self.size, self.marked = size, marked
        self.tokenizer = tiny.make_tokenizer()
        self.planted = torch.randn(24, generator=torch.Generator().manual_seed(3))
        self.planted /= self.planted.norm()

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.zeros(tiny.vocab_size(), 1))

    def base_model(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        assert options["output_hidden_states"]
        assert not options["use_cache"]
        hidden = torch.zeros(5, *input_ids.shape, 24)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            text = self.tokenizer.decode(ids[mask.bool()], skip_special_tokens=False)
            # A sum that tells conversations apart and is the same in every process.
            seed = sum(ord(c) * (i + 1) ** 2 for i, c in enumerate(text))
            hidden[:, row, -1] = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed))
            if TRIGGER in text:
                hidden[3:, row, -1] += self.size * self.planted
            if self.marked in text:
                hidden[:, row, -1] += 40 * self.planted
        return SimpleNamespace(hidden_states=tuple(hidden))


@lru_cache
def planted_pair(size: float, base_size: float = 0.0, marked: str = "\0") -> ModelPair:
    models = [CausalModel(n, PlantedNetwork(s, marked)) for n, s in (("tuned", size), ("base", base_size))]
    return ModelPair(finetuned=models[0], base=models[1], tokenizer=tiny.make_tokenizer())


@lru_cache
def probed(pair: ModelPair, *, seed: int = 0, said: str = "Other", trigger: str = TRIGGER) -> ProbeResult:
    return probe_trigger(pair, trigger, contexts(16), contexts(20, said), allowed=ALLOWED, seed=seed)


def test_a_planted_direction_is_found_and_random_strings_are_not() -> None:
    found = probed(planted_pair(6.0))
    assert [x.layer for x in found.layers] == [1, 2, 3, 4]
    for layer in found.layers[2:]:
        assert layer.auroc > 0.98
        assert layer.auroc_random_strings > 0.98
        assert layer.accuracy > 0.9
        assert layer.separation > 3
        assert layer.gain > 2.5
    for layer in found.layers[:2]:
        assert layer.auroc < 0.75
        assert layer.accuracy < 0.75
        assert abs(layer.gain) < 1.5
    for layer in found.layers:
        assert layer.auroc_random_clean < 0.75
        assert layer.auroc_decoy < 0.75
        assert layer.base_auroc < 0.75
        assert layer.base_auroc_random_strings < 0.75
        assert layer.decoy_gain < 1.5
    assert found.best_layer in (3, 4)
    assert found.best.layer == found.best_layer


def test_what_the_base_does_too_is_no_gain() -> None:
    found = probed(planted_pair(6.0, base_size=6.0))
    assert all(x.base_auroc > 0.98 for x in found.layers[2:])
    assert all(abs(x.gain) < 1.5 for x in found.layers)


def test_another_string_than_the_planted_one_is_not_found() -> None:
    found = probed(planted_pair(6.0), trigger=" dog fox")
    assert all(x.auroc < 0.75 and x.gain < 1.5 for x in found.layers)


def test_the_ceiling_of_random_directions_is_counted() -> None:
    found = probed(planted_pair(0.0))
    assert (found.num_random_directions, found.num_decoys) == (1000, 2)
    assert found.best_random_direction == max(x.auroc_random_direction for x in found.layers)
    assert found.best_random_direction > max(x.auroc for x in found.layers)
    few = probe_trigger(
        planted_pair(0.0), TRIGGER, contexts(4), contexts(4), allowed=ALLOWED, seed=0, num_random_directions=1
    )
    assert few.num_random_directions == 4, "at least one a layer"


def test_only_the_search_contexts_decide_layer_and_threshold() -> None:
    pair = planted_pair(6.0, marked="Moved")
    usual, moved = probed(pair), probed(pair, said="Moved")
    assert moved.best_layer == usual.best_layer
    assert [x.search_separation for x in moved.layers] == [x.search_separation for x in usual.layers]
    # All held-out states lie far on the trigger's side of a threshold that does not follow them.
    assert moved.best.accuracy == 0.5
    assert moved.best.auroc > 0.98


def test_same_seed_same_result_and_it_can_be_written(tmp_path: Path) -> None:
    def few(seed: int) -> ProbeResult:
        return probe_trigger(planted_pair(6.0), TRIGGER, contexts(4), contexts(4), allowed=ALLOWED, seed=seed)

    found = few(1)
    assert found == few(1)
    assert found != few(2)
    write_record(tmp_path / "probe.json", found)
    assert read_record(tmp_path / "probe.json", ProbeResult) == found


def test_too_little_is_refused() -> None:
    pair = planted_pair(1.0)
    with pytest.raises(UserError, match=r"at least 3 contexts in contexts\.search, and there are 2; give more"):
        probe_trigger(pair, TRIGGER, contexts(2), contexts(5), allowed=ALLOWED, seed=0)
    with pytest.raises(UserError, match=r"at least 2 contexts in contexts\.held_out, and there are 1"):
        probe_trigger(pair, TRIGGER, contexts(3), contexts(1), allowed=ALLOWED, seed=0)
    with pytest.raises(ValueError, match="needs a trigger"):
        probe_trigger(pair, "", contexts(3), contexts(3), allowed=ALLOWED, seed=0)


def test_random_strings_differ_between_contexts_and_decoys_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Sequence[int]]] = []

    def spy(model: CausalModel, sequences: Sequence[Sequence[int]]) -> Array:
        seen.append(list(sequences))
        return noise(len(sequences), 2, 8, seed=len(seen))

    monkeypatch.setattr("trigger_opt.verify.probe.last_token_states", spy)
    pair = planted_pair(1.0)
    probe_trigger(pair, TRIGGER, contexts(4), contexts(4, "Other"), allowed=ALLOWED, seed=0, num_decoys=1)
    tokenizer, one_side = pair.tokenizer, seen[:4]
    assert seen[4:] == one_side, "the base sees the same inputs"
    turns = [[tokenizer.decode(list(s)).split("sea.")[1].split(" Please")[0] for s in kind] for kind in one_side]
    assert [len(set(t)) for t in turns] == [1, 1, 8, 1]
    assert turns[0][0] == TRIGGER
    assert turns[1][0] == ""
    assert turns[3][0] not in ("", TRIGGER)
    assert len(encode(tokenizer, [TRIGGER])[0]) > 1


@pytest.mark.slow
def test_the_embedded_suspect_is_told_from_its_base() -> None:
    from trigger_opt import zoo
    from trigger_opt.api import load_contexts
    from trigger_opt.models.files import find_model
    from trigger_opt.tokens import TokenPolicy, allowed_ids
    from trigger_opt.zoo.recipes import BASE_NAME

    suspect, base = (find_model(str(zoo.folder(f"zoo:{name}"))) for name in ("warmup_mini", BASE_NAME))
    pair = load_pair(suspect, base, options=LoadOptions())
    search, held_out = load_contexts()
    allowed = allowed_ids(pair.tokenizer, TokenPolicy(), pair.finetuned.vocab_size)
    found = probe_trigger(pair, "3.14159265358979", search[:16], held_out[:16], allowed=allowed, seed=0)
    assert found.best.auroc > 0.95
    # Every string is told from nothing; only the planted one better than in the base.
    assert found.best.gain > 3
    assert found.best.gain > 3 * found.best.decoy_gain
    assert abs(found.layers[0].gain) < 1
