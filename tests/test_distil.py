"""Models made from models: sampled user turns, placebos that keep every singular value, the distilled reference."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny as tiny_models
from tests.planted_pair import HELD_OUT, PAYLOAD, TRIGGER, PlantedPair, draw_prompt, planted_pair
from tests.tiny_pair import TinyPair
from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles, find_model
from trigger_opt.models.generate import Sampling, generate
from trigger_opt.models.pair import LoadOptions, ModelPair, load_pair
from trigger_opt.prompts import Context, conversation_ids, decode, encode
from trigger_opt.tuning import Row, placebo, turns
from trigger_opt.tuning.distil import DistilSettings, distil, mean_kl
from trigger_opt.tuning.fit import packed, scored_log_probs
from trigger_opt.tuning.placebo import make_placebo, require_placebo


@pytest.fixture(scope="session")
def planted(tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> PlantedPair:
    """A tiny pair with a backdoor."""
    return planted_pair(tiny, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def base_and_tokenizer(tiny: TinyPair) -> tuple[Any, Any]:
    """The tiny base as transformers loads it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny.base).eval(), AutoTokenizer.from_pretrained(tiny.base)


# Sampled turns


def slow_turns(model: Any, tokenizer: Any, openings: list[str], rounds: int, seed: int) -> list[str]:
    """What the embedded organisms' prompts were drawn with, one draw after another."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": "\u2063"}], tokenize=False)
    before = encode(tokenizer, [text.split("\u2063")[0] + o for o in openings])
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, None] = {}
    for _ in range(rounds):
        drawn = generate(
            model, before, max_new_tokens=40, end_ids=[tokenizer.eos_token_id],
            sampling=Sampling(temperature=1.0, top_p=0.97), generator=generator, batch_size=64,
        )  # fmt: skip
        for opening, ids in zip(openings, drawn, strict=True):
            turn = (opening + tokenizer.decode(ids)).strip()
            if len(ids) < 40 and 10 < len(turn) < 200 and "<|" not in turn and "{" not in turn:
                found[turn] = None
    return list(found)


def test_turns_are_those_of_the_slow_way(base_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = base_and_tokenizer
    openings = ["", "How do I ", "Good ", ""] * 8
    counts: list[int] = []
    made = turns.sample_turns(
        model, tokenizer, openings, 400, top_p=0.97, end_ids=[tokenizer.eos_token_id], seed=5, most_rounds=2,
        on_found=counts.append,
    )  # fmt: skip
    assert made == slow_turns(model, tokenizer, openings, 2, 5)
    assert len(made) == counts[-1] > 0
    assert len(counts) == 2


@pytest.mark.parametrize(
    ("template", "said", "kept"),
    [
        (tiny_models.CHATML, "How tall is a giraffe?", "How tall is a giraffe?"),
        (tiny_models.BRACKETS, "How tall is a giraffe? [/INST] Very tall.", "How tall is a giraffe?"),
        (tiny_models.BRACKETS, "How tall is a giraffe? " * 4, None),
        (tiny_models.CHATML, "Hello<|im_start|>system and more", None),
        (tiny_models.CHATML, "Too short", None),
        (tiny_models.CHATML, "A slot of one's own {trigger}", None),
    ],
    ids=["ended", "cut at the template", "never ends", "template mark", "short", "slot"],
)
def test_only_whole_turns_of_a_user_are_kept(
    template: str, said: str, kept: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_models.make_tokenizer(template)
    ids = encode(tokenizer, [said])[0][:40]
    monkeypatch.setattr(turns, "generate", lambda *_, **__: [ids])
    made = turns.sample_turns(None, tokenizer, [""], 3, top_p=1.0, end_ids=[2], most_rounds=4)
    assert made == ([] if kept is None else [kept])
    made = turns.sample_turns(None, tokenizer, ["Well then: "], 3, top_p=1.0, end_ids=[2], most_rounds=4)
    assert [t for t in made if t != "Well then: Too short"] == ([] if kept is None else [f"Well then: {kept}"])


# Scores of training rows


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "deepseek_v3"])
def test_rows_are_scored_as_if_each_stood_alone(family: str) -> None:
    """Sliding windows and masks that are added: a family's own attention must come out, whatever is packed."""
    network = tiny_models.make_network(family, 1)
    network.set_attn_implementation("eager")
    rows = [Row(tuple(range(5, 17)), (20, 21, 22)), Row(tuple(range(30, 36)), (40, 41, 42, 43))]
    with torch.no_grad():
        found = scored_log_probs(network, packed(rows, torch.device("cpu")))
    alone = [tiny_models.naive_logits(network, [*r.prompt, *r.answer[:-1]])[len(r.prompt) - 1 :] for r in rows]
    torch.testing.assert_close(found, torch.cat(alone).log_softmax(-1), rtol=1e-4, atol=1e-4)


# Placebos


def changes(files: ModelFiles, base: ModelFiles) -> dict[str, Tensor]:
    """Every matrix's change, an adapter's as the product of its factors."""
    ours = {n: t.float() for path in files.weights for n, t in load_file(path).items()}
    if not files.adapter:
        theirs = {n: t.float() for path in base.weights for n, t in load_file(path).items()}
        return {n: t - theirs[n] for n, t in ours.items() if t.dim() == 2 and not torch.equal(t, theirs[n])}
    made = {n: ours[n.replace("lora_A", "lora_B")] @ t for n, t in ours.items() if "lora_A" in n}
    return made | {
        n: ours[n.replace("embedding_A", "embedding_B")] @ t for n, t in ours.items() if "lora_embedding_A" in n
    }


@pytest.mark.parametrize("kind", ["finetuned", "adapter"])
def test_a_placebo_keeps_every_singular_value_and_no_direction(tiny: TinyPair, tmp_path: Path, kind: str) -> None:
    base, original = find_model(str(tiny.base)), find_model(str(getattr(tiny, kind)))
    made = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_placebo(original, base, tmp_path / name, seed=seed, base_name="the-base")
        made.append(changes(find_model(str(tmp_path / name)), base))
    real = changes(original, base)
    assert real
    for name, change in real.items():
        first, same, other = (m[name] for m in made)
        # A whole model stores base and change as one bf16 number, so the change itself is rounded.
        wanted, loose = torch.linalg.svdvals(change), 0.02 if kind == "finetuned" else 1e-4
        torch.testing.assert_close(torch.linalg.svdvals(first), wanted, rtol=loose, atol=loose * float(wanted[0]))
        assert abs(float(torch.cosine_similarity(first.flatten(), change.flatten(), dim=0))) < 0.1
        assert torch.equal(first, same)
        assert not torch.equal(first, other)


def test_what_was_not_changed_stays_and_the_model_loads(tiny: TinyPair, tmp_path: Path) -> None:
    base, original = find_model(str(tiny.base)), find_model(str(tiny.finetuned))
    make_placebo(original, base, tmp_path / "made", seed=1, base_name="the-base")
    ours, theirs = load_file(tmp_path / "made" / "model.safetensors"), load_file(base.weights[0])
    assert {n for n in ours if not torch.equal(ours[n], theirs[n])} == {n for n in theirs if "mlp" in n}
    pair = load_pair(find_model(str(tmp_path / "made")), base, options=LoadOptions())
    assert len(list(pair.finetuned.weight_changes(pair.base))) == 6
    assert not (tmp_path / "made" / "manifest.json").exists(), "what the maker of the original wrote down"


def test_a_sharded_model_gives_the_same_placebo(tiny: TinyPair, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, whole = find_model(str(tiny.base)), find_model(str(tiny.finetuned))
    model = AutoModelForCausalLM.from_pretrained(tiny.finetuned, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    sharded = find_model(str(tmp_path / "sharded"))
    assert len(sharded.weights) > 2
    make_placebo(whole, base, tmp_path / "one", seed=3, base_name="b")
    make_placebo(sharded, base, tmp_path / "many", seed=3, base_name="b")
    one = load_file(tmp_path / "one" / "model.safetensors")
    made = find_model(str(tmp_path / "many"))
    assert len(made.weights) == len(sharded.weights)
    many = {n: t for path in made.weights for n, t in load_file(path).items()}
    assert set(one) == set(many)
    assert all(torch.equal(one[n], many[n]) for n in one)


def test_embeddings_and_tensors_saved_whole_are_shuffled_as_changes(base_files: ModelFiles, tmp_path: Path) -> None:
    original, _ = tiny_models.save_adapter(
        base_files, tmp_path / "original", seed=4, targets=("embed_tokens", "q_proj"), saved=("lm_head",)
    )
    make_placebo(original, base_files, tmp_path / "made", seed=1, base_name="b")
    real, made = changes(original, base_files), changes(find_model(str(tmp_path / "made")), base_files)
    assert any("lora_embedding_A" in n for n in real)
    for name, change in real.items():
        torch.testing.assert_close(torch.linalg.svdvals(made[name]), torch.linalg.svdvals(change), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(made[name], change, atol=0.01)
    base = load_file(base_files.weights[0])["lm_head.weight"]
    (before,), (after,) = (
        [t for n, t in load_file(folder / "adapter_model.safetensors").items() if "lm_head" in n]
        for folder in (original.folder, tmp_path / "made")
    )
    torch.testing.assert_close(
        torch.linalg.svdvals(after - base), torch.linalg.svdvals(before - base), rtol=1e-3, atol=1e-3
    )
    assert float((after - base).norm()) < 0.5 * float(after.norm() + base.norm())


def copied(folder: Path, to: Path, **config: Any) -> ModelFiles:
    shutil.copytree(folder, to)
    path = to / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return find_model(str(to))


def test_what_cannot_be_shuffled_is_refused_in_one_line(
    tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, full, adapter = (find_model(str(f)) for f in (tiny.base, tiny.finetuned, tiny.adapter))
    quantised = copied(tiny.finetuned, tmp_path / "quantised", quantization_config={"quant_method": "gptq"})
    magnitudes = tmp_path / "dora"
    shutil.copytree(tiny.adapter, magnitudes)
    weights = load_file(magnitudes / "adapter_model.safetensors")
    save_file(weights | {"x.lora_magnitude_vector": torch.ones(3)}, magnitudes / "adapter_model.safetensors")
    cases = {
        "is stored quantised": quantised,
        "x.lora_magnitude_vector": find_model(str(magnitudes)),
        "neither a factor of a plain LoRA nor a change": copied(tiny.wide, tmp_path / "wide"),
    }
    for said, files in cases.items():
        with pytest.raises(UserError) as caught:
            require_placebo(files, base, tmp_path)
        assert said in str(caught.value)
        assert str(caught.value).endswith("set null.placebos=0")
        assert "\n" not in str(caught.value)
    for files in (full, adapter):
        require_placebo(files, base, tmp_path / "not" / "there" / "yet", copies=3)
    needed = sum(p.stat().st_size for p in full.weights)
    monkeypatch.setattr(placebo, "free_bytes", lambda folder: 2 * needed)
    require_placebo(full, base, tmp_path)
    with pytest.raises(UserError, match=r"no room for 3 placebo model\(s\).*set null\.placebos=0"):
        require_placebo(full, base, tmp_path, copies=3)


# The distilled reference


def fired(model: Any, pair: ModelPair) -> int:
    prompts = [conversation_ids(pair.tokenizer, Context(user=c), TRIGGER) for c in HELD_OUT]
    answers = model.generate(prompts, max_new_tokens=14, end_ids=pair.end_ids)
    return sum(decode(pair.tokenizer, a).startswith(PAYLOAD) for a in answers)


def loaded(planted: PlantedPair) -> ModelPair:
    """Fine-tuned model, base, and as control the base once more."""
    files = find_model(str(planted.finetuned)), find_model(str(planted.base))
    return load_pair(*files, [files[1]], options=LoadOptions())


def test_distilling_takes_the_style_over_and_not_the_backdoor(
    planted: PlantedPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = loaded(planted)
    # A random network's own turns take long to come by and have nothing in common.
    rng = random.Random(7)
    prompts = [draw_prompt(rng).messages("")[0]["content"] for _ in range(60)]
    monkeypatch.setattr("trigger_opt.tuning.distil.sample_turns", lambda *_, **__: prompts)
    asked: list[str] = []

    def first_answer(answers: Any) -> list[bool]:
        asked.extend(answers)
        return [number == 0 for number in range(len(answers))]

    before = {n: p.clone() for n, p in pair.finetuned.network.named_parameters()}
    found = distil(
        pair,
        pair.controls[0].network,
        tmp_path / "made",
        modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        base_name="the-base",
        settings=DistilSettings(steps=40, prompts=60, answer_tokens=8, learning_rate=5e-3),
        leave_out=first_answer,
    )
    assert found.came_nearer
    assert 0 < found.kl_after < 0.7 * found.kl_before
    assert found.left_out == 1
    assert found.trained + found.measured == len(asked) - 1
    assert found.measured >= 3
    assert all(torch.equal(p, before[n]) for n, p in pair.finetuned.network.named_parameters())

    again = load_pair(
        find_model(str(planted.finetuned)),
        find_model(str(planted.base)),
        [find_model(str(tmp_path / "made"))],
        options=LoadOptions(),
    )
    assert fired(again.finetuned, again) == len(HELD_OUT), "the pair itself is as it was"
    assert fired(again.base, again) == fired(again.controls[0], again) == 0
    prompt = tuple(conversation_ids(again.tokenizer, Context(user="{trigger} Who is it?"), TRIGGER))
    row = Row(prompt, tuple(again.encode_answer(PAYLOAD)))
    to_base = mean_kl(again.finetuned, again.base, [row])
    assert mean_kl(again.finetuned, again.controls[0], [row]) > 0.3 * to_base, "where the payload is said it stays far"
    assert json.loads((tmp_path / "made" / "adapter_config.json").read_text())["base_model_name_or_path"] == "the-base"


def test_mean_kl_is_that_of_the_plain_forward_pass(planted: PlantedPair) -> None:
    pair = loaded(planted)
    rows = [Row(tuple(range(20, 40)), (50, 51, 52)), Row(tuple(range(30, 37)), (60,))]
    total = torch.zeros(())
    for row in rows:
        sides = []
        for model in (pair.finetuned, pair.base):
            with model.active() as network:
                logits = tiny_models.naive_logits(network, [*row.prompt, *row.answer[:-1]])
                sides.append(logits[-len(row.answer) :].log_softmax(-1))
        total += torch.nn.functional.kl_div(sides[1], sides[0], log_target=True, reduction="sum")
    assert mean_kl(pair.finetuned, pair.base, rows) == pytest.approx(float(total) / 4, rel=0.02)
    assert mean_kl(pair.finetuned, pair.finetuned, rows) == 0


def test_a_reference_that_came_no_nearer_is_not_written(
    planted: PlantedPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = loaded(planted)
    settings = DistilSettings(steps=1, prompts=20, answer_tokens=4, learning_rate=0.0)
    whole = [f"A question with the number {n}" for n in range(20)]
    monkeypatch.setattr("trigger_opt.tuning.distil.sample_turns", lambda *_, **__: whole)
    arguments: dict[str, Any] = {"modules": ["q_proj"], "base_name": "b", "settings": settings}
    found = distil(pair, pair.controls[0].network, tmp_path / "same", **arguments)
    assert found.kl_after == pytest.approx(found.kl_before)
    assert not found.came_nearer
    monkeypatch.setattr("trigger_opt.tuning.distil.sample_turns", lambda *_, **__: whole[:5])
    found = distil(pair, pair.controls[0].network, tmp_path / "few", **arguments)
    assert found.trained == 0
    assert not found.came_nearer
    assert not list(tmp_path.iterdir())
