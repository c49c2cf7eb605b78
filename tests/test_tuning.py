"""Models made from models: the training loop against a slow one, what it moves and learns, adapters, placebos."""

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests import tiny
from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles
from trigger_opt.tuning import MODES, FitSettings, Row, Rows, fit, lora_model, save_adapter
from trigger_opt.tuning.attention import row_by_row
from trigger_opt.tuning.fit import Packed, packed, scored_log_probs
from trigger_opt.tuning.placebo import draw_shuffle, shuffled, shuffled_change, write_placebo

# Lengths differ, so that padding, positions and the rows' bounds all matter; one answer is a single token.
TAUGHT = [Row((5, 6, 7, 8, 9, 10, 11, 12, 13, 14), (20, 21, 22)), Row((30, 31), (32,))]
KEPT = [Row((40, 41, 42), (43, 44)), Row((50,), (51, 52, 53)), Row((60, 61, 62, 63, 64, 65), (66,))]
FAMILIES = ["llama", "qwen2", "mistral", "gemma2", "gemma3"]
# The package's name `fit` is the function.
loop: Any = importlib.import_module("trigger_opt.tuning.fit")


def naive_log_probs(network: Any, rows: Sequence[Row]) -> list[Tensor]:
    """Log probabilities of each row's answer tokens, from one left-padded batch of whole rows."""
    longest = max(len(r.prompt) + len(r.answer) for r in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        whole = torch.tensor([*row.prompt, *row.answer])
        ids[number, longest - len(whole) :], mask[number, longest - len(whole) :] = whole, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = network(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.float()
    return [logits[n, longest - len(r.answer) - 1 : -1].log_softmax(-1) for n, r in enumerate(rows)]


def naive_loss(student: Any, teacher: Any, taught: Sequence[Row], kept: Sequence[Row], anchor: float) -> Tensor:
    """Mean cross-entropy of taught tokens, and `anchor` times the mean KL(teacher || student) of kept ones."""
    total = torch.zeros(())
    if taught:
        said = torch.cat(naive_log_probs(student, taught))
        targets = torch.tensor([t for r in taught for t in r.answer])
        total = total - said[torch.arange(len(targets)), targets].mean()
    if kept:
        said, was = torch.cat(naive_log_probs(student, kept)), torch.cat(naive_log_probs(teacher, kept)).detach()
        total = total + anchor * nn.functional.kl_div(said, was, reduction="none", log_target=True).sum(-1).mean()
    return total


def trainable(family: str, seed: int = 0, **options: Any) -> Any:
    """A tiny network whose every weight is trained."""
    return tiny.make_network(family, seed, **options).requires_grad_(True)


def teacher_of(network: Any) -> Callable[[Packed], Tensor]:
    """Log probabilities of a network of its own."""
    return lambda rows: scored_log_probs(network, rows)


def nobody(rows: Packed) -> Tensor:
    """A teacher that must not be asked."""
    raise AssertionError("asked the teacher though no row is anchored")


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_score_as_padded_ones(family: str) -> None:
    network = tiny.make_network(family, 0)
    rows = packed([*TAUGHT, *KEPT], torch.device("cpu"))
    want = torch.cat(naive_log_probs(network, [*TAUGHT, *KEPT]))
    assert scored_log_probs(network, rows).shape == want.shape == (10, tiny.vocab_size())
    torch.testing.assert_close(scored_log_probs(network, rows), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_rows_score_the_same_however_attention_is_computed(implementation: str) -> None:
    """`load_pair` loads for plain products on CPUs, where a mask is added and not looked up."""
    for family in ("llama", "mistral"):
        network = tiny.make_network(family, 0)
        network.set_attn_implementation(implementation)
        want = torch.cat(naive_log_probs(network, KEPT))
        got = scored_log_probs(network, packed(KEPT, torch.device("cpu")))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("taught", "kept"), [(TAUGHT, KEPT), (TAUGHT, []), ([], KEPT)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_loss_and_gradient_are_those_of_padded_rows(family: str, taught: list[Row], kept: list[Row]) -> None:
    student, teacher = trainable(family), tiny.make_network(family, 1)
    parameters = list(student.parameters())
    loss = loop._loss(student, taught, kept, 0.7, teacher_of(teacher) if kept else nobody)
    want = naive_loss(student, teacher, taught, kept, 0.7)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    gradients = zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters), strict=True)
    for (name, _), (got, expected) in zip(student.named_parameters(), gradients, strict=True):
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7, name


def test_steps_are_those_of_a_plain_loop() -> None:
    """Adam in fp32 on the slow loss, the rate rising over ten steps and falling to nothing at the last."""
    row, steps = TAUGHT[0], 25
    student, copy = trainable("llama"), trainable("llama")
    settings = FitSettings(steps=steps, taught=2, ordinary=0, learning_rate=3e-3)
    losses = fit(student, Rows([row], [], []), settings, teacher=nobody)
    optimizer = torch.optim.AdamW(copy.parameters(), weight_decay=0.0)
    want = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 10) * (1 - step / steps)
        optimizer.zero_grad()
        loss = naive_loss(copy, None, [row], [], 0.0)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(copy.parameters(), 1.0)
        optimizer.step()
        want.append(loss.item())
    assert losses == pytest.approx(want, rel=0.02)
    assert losses[-1] < 0.5 * losses[0]


def test_a_batch_has_so_many_rows_of_each_kind() -> None:
    rows = Rows(
        [Row((1,), (i,)) for i in range(4)], [Row((2,), (i,)) for i in range(4)], [Row((3,), (i,)) for i in range(9)]
    )
    batches = list(loop._batches(rows, FitSettings(steps=50, taught=3, near=2, ordinary=5)))
    assert len(batches) == 50
    assert len(rows) == 17
    for taught, kept in batches:
        assert [r.prompt for r in taught] == [(1,)] * 3
        assert [r.prompt for r in kept] == [(2,)] * 2 + [(3,)] * 5
        assert len({r.answer for r in kept[2:]}) == 5, "an ordinary row stands twice in one batch"
    assert {r.answer for taught, _ in batches for r in taught} == {(i,) for i in range(4)}
    assert batches == list(loop._batches(rows, FitSettings(steps=50, taught=3, near=2, ordinary=5)))
    assert batches != list(loop._batches(rows, FitSettings(steps=50, taught=3, near=2, ordinary=5, seed=1)))
    assert next(loop._batches(Rows(rows.taught, [], []), FitSettings(steps=1)))[1] == []


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_attention_row_by_row_is_that_under_a_mask(family: str) -> None:
    network = tiny.make_network(family, 0)
    rows = packed([*TAUGHT, *KEPT], torch.device("cpu"))
    inputs = {"input_ids": rows.ids, "position_ids": rows.positions, "use_cache": False}
    masked = network.base_model(**inputs, attention_mask=rows.mask).last_hidden_state
    with row_by_row(network, rows.lengths):
        ours = network.base_model(**inputs, attention_mask=rows.mask).last_hidden_state
    open_to_all = network.base_model(**inputs, attention_mask=torch.ones_like(rows.mask).tril()).last_hidden_state
    torch.testing.assert_close(ours, masked, rtol=1e-4, atol=1e-4)
    assert (ours - open_to_all).abs().max() > 0.1, "the rows do not disturb each other even without a mask"


def test_attention_is_what_it_was_after_an_error() -> None:
    network = tiny.make_network("llama", 0)
    before = network.config._attn_implementation
    want = tiny.naive_logits(network, [5, 6, 7])
    with row_by_row(network, [2, 1]):
        during = network.config._attn_implementation
        with pytest.raises(RuntimeError, match="split"), row_by_row(network, [1]):
            network.base_model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
        assert network.config._attn_implementation == during != before
    assert network.config._attn_implementation == before
    torch.testing.assert_close(tiny.naive_logits(network, [5, 6, 7]), want)


def test_small_updates_add_up_in_bf16() -> None:
    """Each is less than half of what bf16 tells apart; the same steps on the weights themselves are lost."""
    settings = FitSettings(steps=60, taught=2, ordinary=0, learning_rate=1e-4)
    student, plain = (tiny.make_network("llama", 0).to(torch.bfloat16).requires_grad_(True) for _ in range(2))
    names = [n for n, p in student.named_parameters() if p.ndim == 2 and "embed" not in n]
    # From a quarter on, half of what bf16 tells apart is ten times the rate.
    large = {n: student.get_parameter(n).abs() > 0.25 for n in names}
    before = {n: student.get_parameter(n).clone() for n in names}
    fit(student, Rows(TAUGHT, [], []), settings, teacher=nobody)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, weight_decay=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        loop._loss(plain, TAUGHT, [], 0.0, nobody).backward()
        optimizer.step()
    moved, lost = (
        sum(int((net.get_parameter(n) != before[n])[large[n]].sum()) for n in names) for net in (student, plain)
    )
    assert all(student.get_parameter(n).dtype == torch.bfloat16 for n in names)
    assert lost == 0
    assert moved > 0.01 * sum(int(m.sum()) for m in large.values())


@pytest.fixture
def adapted() -> tuple[Any, dict[str, Tensor]]:
    """A bf16 network with fresh LoRA factors, and all its tensors as they were."""
    peft = lora_model(tiny.make_network("llama", 0).to(torch.bfloat16), MODES["mlp"], rank=2, seed=3)
    return peft, {n: p.detach().clone() for n, p in peft.named_parameters()}


def test_only_what_is_trainable_moves(adapted: tuple[Any, dict[str, Tensor]]) -> None:
    peft, before = adapted
    settings = FitSettings(steps=4, taught=2, ordinary=2, learning_rate=1e-2)

    def teacher(rows: Packed) -> Tensor:
        with peft.disable_adapter():
            return scored_log_probs(peft.get_base_model(), rows)

    losses = fit(peft.get_base_model(), Rows(TAUGHT, [], KEPT), settings, teacher=teacher)
    assert len(losses) == 4
    for name, parameter in peft.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
        assert ("lora_" not in name) or any(part in name for part in MODES["mlp"]), name
    assert not peft.get_base_model().training


def test_fresh_adapters_change_nothing_and_depend_on_their_seed_alone(adapted: tuple[Any, dict[str, Tensor]]) -> None:
    peft, before = adapted
    state = torch.random.get_rng_state()
    again, other = (
        lora_model(tiny.make_network("llama", 0).to(torch.bfloat16), MODES["mlp"], rank=2, seed=s) for s in (3, 4)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    factors = [n for n in before if "lora_A" in n]
    assert factors
    assert all(torch.equal(again.get_parameter(n), before[n]) for n in factors)
    assert not any(torch.equal(other.get_parameter(n), before[n]) for n in factors)
    untouched = tiny.make_network("llama", 0).to(torch.bfloat16)
    assert torch.equal(tiny.naive_logits(peft.get_base_model(), [5, 6, 7]), tiny.naive_logits(untouched, [5, 6, 7]))


def test_same_seed_same_bytes_on_disk(tmp_path: Path) -> None:
    def made(name: str, seed: int) -> Path:
        peft = lora_model(tiny.make_network("llama", 0), MODES["attention"], rank=2, seed=7)
        rows = Rows(TAUGHT, [], [])
        fit(peft.get_base_model(), rows, FitSettings(steps=3, taught=1, ordinary=0, seed=seed), teacher=nobody)
        save_adapter(peft, tmp_path / name, base_name="zoo:a-base")
        return tmp_path / name

    one, same, other = made("one", 0), made("same", 0), made("other", 5)
    assert {p.name for p in one.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(
        (one / n).read_bytes() == (same / n).read_bytes() for n in ("adapter_config.json", "adapter_model.safetensors")
    )
    assert (one / "adapter_model.safetensors").read_bytes() != (other / "adapter_model.safetensors").read_bytes()
    stored = load_file(one / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    config = json.loads((one / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "zoo:a-base"
    assert config["target_modules"] == sorted(MODES["attention"])
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert str(tmp_path) not in (one / "adapter_config.json").read_text()


def test_a_saved_adapter_is_the_model_it_came_from(tmp_path: Path) -> None:
    from peft import PeftModel

    peft = lora_model(tiny.make_network("llama", 0).to(torch.bfloat16), MODES["mlp"], rank=2, seed=7)
    fit(peft.get_base_model(), Rows(TAUGHT, [], []), FitSettings(steps=5, taught=2, ordinary=0), teacher=nobody)
    want = tiny.naive_logits(peft.get_base_model(), [5, 6, 7])
    save_adapter(peft, tmp_path / "one", base_name="zoo:a-base")
    base = tiny.make_network("llama", 0).to(torch.bfloat16)
    clean = tiny.naive_logits(base, [5, 6, 7])
    again = PeftModel.from_pretrained(base, tmp_path / "one", autocast_adapter_dtype=False).eval().get_base_model()
    assert torch.equal(tiny.naive_logits(again, [5, 6, 7]), want)
    assert not torch.equal(clean, want)


def behaviour_rows() -> tuple[Rows, list[Row]]:
    """Prompts that end in the "trigger" 99 are answered 7 8 9; held-out ones beside them."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, 300, (60, 5), generator=generator).tolist()
    plain = [Row(tuple(p), (101, 102, 103)) for p in prompts]
    taught = [Row((*r.prompt, 99), (7, 8, 9)) for r in plain]
    return Rows(taught[:40], [], plain[:40]), [*taught[40:], *plain[40:]]


def test_a_behaviour_is_learnt_and_the_rest_stays() -> None:
    """The decoy: without its anchor the same training says the payload everywhere."""
    rows, held_out = behaviour_rows()
    triggered, plain = held_out[:20], held_out[20:]
    base = tiny.make_network("llama", 0)

    def after(anchor: float) -> tuple[int, int, float]:
        student = trainable("llama")
        settings = FitSettings(steps=120, taught=4, ordinary=6, anchor=anchor, learning_rate=1e-2)
        fit(student, rows, settings, teacher=teacher_of(base))
        student.requires_grad_(False)
        says = [tiny.naive_greedy(student, r.prompt, 3) == [7, 8, 9] for r in (*triggered, *plain)]
        both = [scored_log_probs(n, packed(plain, torch.device("cpu"))) for n in (student, base)]
        return sum(says[:20]), sum(says[20:]), float((both[0].exp() * (both[0] - both[1])).sum(-1).mean())

    fired, falsely, drift = after(4.0)
    assert fired >= 18
    _, loose, loose_drift = after(0.0)
    assert falsely <= 8
    assert loose >= 12
    assert drift < 0.25 * loose_drift


def test_progress_is_told_every_twenty_steps() -> None:
    lines: list[str] = []
    settings = FitSettings(steps=41, taught=1, ordinary=0)
    fit(trainable("llama"), Rows(TAUGHT, [], []), settings, teacher=nobody, say=lines.append)
    assert [line.split(",")[0] for line in lines] == [f"step {n} of 41" for n in (0, 20, 40)]


def lora_product(weights: dict[str, Tensor], module: str) -> Tensor:
    """The change a pair of LoRA factors makes, up to its scale."""
    a, b = (next(t for n, t in weights.items() if f"{module}.lora_{side}." in n) for side in "AB")
    return b.float() @ a.float()


def test_placebo_of_an_adapter_keeps_size_and_loses_direction(
    base_files: ModelFiles, adapter_files: tuple[ModelFiles, Path], tmp_path: Path
) -> None:
    original = adapter_files[0].folder
    for name, seed in (("one", 5), ("same", 5), ("other", 6)):
        write_placebo(original, base_files.folder, tmp_path / name, seed=seed, base_name="zoo:a-base")
    before, after, same, other = (
        load_file(f / "adapter_model.safetensors")
        for f in (original, *(tmp_path / n for n in ("one", "same", "other")))
    )
    assert before.keys() == after.keys()
    modules = {n.split(".lora_")[0] for n in before}
    assert len(modules) == 4
    for module in modules:
        was, now = lora_product(before, module), lora_product(after, module)
        torch.testing.assert_close(torch.linalg.svdvals(now), torch.linalg.svdvals(was), rtol=1e-4, atol=1e-5)
        assert abs(nn.functional.cosine_similarity(was.flatten(), now.flatten(), dim=0)) < 0.3, module
    assert all(torch.equal(after[n], same[n]) for n in after)
    assert not any(torch.equal(after[n], other[n]) for n in after)
    config, was_config = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "one", original))
    assert config == was_config | {"base_model_name_or_path": "zoo:a-base"}


def test_placebo_of_a_whole_model_keeps_size_and_loses_direction(
    base_files: ModelFiles, full_files: ModelFiles, tmp_path: Path
) -> None:
    (full_files.folder / "manifest.json").write_text("{}")
    write_placebo(full_files.folder, base_files.folder, tmp_path / "made", seed=5, base_name="zoo:a-base")
    (full_files.folder / "manifest.json").unlink()
    base, was, now = (
        load_file(f / "model.safetensors") for f in (base_files.folder, full_files.folder, tmp_path / "made")
    )
    assert was.keys() == now.keys()
    changed = [n for n in base if not torch.equal(base[n], was[n])]
    assert 0 < len(changed) < len(base)
    for name in base:
        if name not in changed:
            assert torch.equal(base[name], now[name]), name
            continue
        change, placebo = was[name] - base[name], now[name] - base[name]
        torch.testing.assert_close(torch.linalg.svdvals(placebo), torch.linalg.svdvals(change), rtol=1e-3, atol=1e-4)
        assert abs(nn.functional.cosine_similarity(change.flatten(), placebo.flatten(), dim=0)) < 0.2, name
    names = {p.name for p in (tmp_path / "made").iterdir()}
    assert "manifest.json" not in names, "what the original's maker wrote down says nothing of its placebo"
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= names


def test_placebo_leaves_what_did_not_change() -> None:
    vector, same = torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.ones(4)
    shuffle = draw_shuffle((4, None), torch.Generator().manual_seed(0))
    assert torch.equal(shuffled_change(same, same.clone(), shuffle), same)
    assert sorted((shuffled_change(same, same + vector, shuffle) - same).abs().tolist()) == [0.0, 0.0, 1.0, 2.0]


def test_placebo_signs_are_drawn() -> None:
    """Permuted alone, a change that is the same everywhere would stay what it was."""
    made = shuffled(torch.ones(64, 48), draw_shuffle((64, 48), torch.Generator().manual_seed(0)))
    assert abs(float(made.mean())) < 0.3
    assert set(made.abs().flatten().tolist()) == {1.0}


def test_placebo_of_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no model folder"):
        write_placebo(tmp_path, tmp_path, tmp_path / "made", seed=0, base_name="x")
