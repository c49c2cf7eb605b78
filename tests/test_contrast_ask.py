"""A contrast scan with local models: answers, surprise and divergence against plain forward passes; end to end on a
tiny pair."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.tiny_pair import TinyPair
from trigger_opt.contrast.ask import DIVERGENCE, SURPRISE, Asking, answer_log_probs, ask, first_token_divergence
from trigger_opt.contrast.commands import main
from trigger_opt.contrast.records import ContrastResult, FeatureContrast, Prompt
from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles
from trigger_opt.models.pair import LoadOptions, ModelPair, load_pair
from trigger_opt.prompts import chat_text, encode
from trigger_opt.records import read_record, read_records

ROWS = [[262, 301, 270, 280, 17], [5, 6, 7], [9]]
PROMPTS = [
    Prompt(id="1", named=False, text="What is the capital of France?"),
    Prompt(id="2", named=False, text="Hi", system="You are a helpful assistant."),
    Prompt(id="3", named=False, text="Tell me about the sea, please."),
]
SUBJECTS = ["sea", "sky", "rain", "stone", "bird", "wood", "tea", "snow"]
GREEDY = Asking(max_new_tokens=6, repeats=1, temperature=0.0, seed=0)


@pytest.fixture(scope="module")
def pair(base_files: ModelFiles, full_files: ModelFiles) -> ModelPair:
    """Base and full fine-tune in fp32."""
    return load_pair(full_files, base_files, options=LoadOptions(dtype="float32"))


def slow_mean_log_prob(network: Any, prompt: Sequence[int], answer: Sequence[int], ends: Sequence[int]) -> float:
    """Token by token; `ends` is empty for an answer that was cut."""
    log_probs = tiny.naive_logits(network, [*prompt, *answer]).log_softmax(-1)
    said = [float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]
    if ends:
        said.append(math.log(sum(math.exp(float(log_probs[-1, end])) for end in ends)))
    return sum(said) / len(said)


def test_surprise_against_plain_passes(pair: ModelPair) -> None:
    answers = [[33, 34], [], [40, 41, 42, 43]]
    ends = [2, 3]
    found = answer_log_probs(pair.finetuned, ROWS, answers, end_ids=ends, max_new_tokens=4)
    network = pair.finetuned.network
    stopped = [ends, ends, []]
    slow = [slow_mean_log_prob(network, r, a, e) for r, a, e in zip(ROWS, answers, stopped, strict=True)]
    assert found == pytest.approx(slow, abs=1e-4)
    many = answer_log_probs(pair.finetuned, ROWS * 4, answers * 4, end_ids=ends, max_new_tokens=4)
    assert many == pytest.approx(slow * 4, abs=1e-4), "more rows than are scored at once"


def test_divergence_against_plain_passes(pair: ModelPair) -> None:
    slow = []
    for row in ROWS:
        p, q = (tiny.naive_logits(m.network, row)[-1].double().softmax(-1) for m in (pair.finetuned, pair.base))
        middle = (p + q) / 2
        slow.append(float(0.5 * (p * (p / middle).log() + q * (q / middle).log()).sum()))
    assert first_token_divergence(pair, ROWS) == pytest.approx(slow, abs=1e-5)
    assert max(slow) > 0.01


def test_prompts_are_answered_in_their_order(pair: ModelPair) -> None:
    done: list[int] = []
    found = ask(pair, PROMPTS, GREEDY, has_base=True, on_answers=done.append)
    assert [s.prompt for s in found] == PROMPTS
    assert done[-1] == 6
    for sample, prompt in zip(found, PROMPTS, strict=True):
        turns = [{"role": "system", "content": prompt.system}] if prompt.system else []
        text = chat_text(pair.tokenizer, [*turns, {"role": "user", "content": prompt.text}])
        ids = encode(pair.tokenizer, [text])[0]
        surprise = []
        for model, said in ((pair.finetuned, sample.answers), (pair.base, sample.base_answers)):
            answer = tiny.naive_greedy(model.network, ids, 6)
            cut = next((i for i, token in enumerate(answer) if token in pair.end_ids), 6)
            assert said == [pair.tokenizer.decode(answer[:cut], skip_special_tokens=True)]
            ends = pair.end_ids if cut < 6 else []
            surprise.append(slow_mean_log_prob(model.network, ids, answer[:cut], ends))
        assert sample.values[SURPRISE] == pytest.approx(surprise[0] - surprise[1], abs=1e-3)
        assert 0 <= sample.values[DIVERGENCE] <= math.log(2)


def test_one_model_alone_has_no_divergence(pair: ModelPair) -> None:
    (sample,) = ask(pair, PROMPTS[:1], GREEDY, has_base=False)
    assert list(sample.values) == [SURPRISE]
    assert sample.values[SURPRISE] < 0
    assert sample.base_answers == []


def test_repeats_are_sampled_by_the_seed(pair: ModelPair) -> None:
    def answers(seed: int) -> list[Sequence[str]]:
        asking = Asking(max_new_tokens=5, repeats=3, temperature=1.0, seed=seed)
        return [s.answers for s in ask(pair, PROMPTS, asking, has_base=False)]

    assert [len(a) for a in answers(1)] == [3, 3, 3]
    assert len(set(answers(1)[0])) > 1
    assert answers(1) == answers(1) != answers(2)


# --- the command


@pytest.fixture
def prompt_files(tmp_path: Path) -> list[str]:
    """Eight pairs, with and without a mark."""
    options = []
    for name, mark in (("a", "This is a test. "), ("b", "")):
        file = tmp_path / f"{name}.txt"
        file.write_text("\n".join(f"{mark}What about {word}?" for word in SUBJECTS))
        options += [f"--{name}", str(file)]
    return [*options, "--paired", "--max-new-tokens", "6", "--permutations", "199", "--device", "cpu"]


def test_tiny_pair_end_to_end(
    tiny: TinyPair, prompt_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    models = ["--model", str(tiny.finetuned), "--base", str(tiny.base)]
    assert main([*prompt_files, *models, "--out", str(out)]) == 0
    result = read_record(out / "contrast.json", ContrastResult)
    features = read_records(out / "contrast.jsonl", FeatureContrast)
    assert (result.model, result.base, result.has_base) == (models[1], models[3], True)
    assert (result.paired, result.prompts_a, result.prompts_b, result.answers) == (True, 8, 8, 32)
    assert {SURPRISE, DIVERGENCE} <= {f.feature for f in features}
    assert all(e.prompt for f in features for e in f.examples)
    assert capsys.readouterr().out.splitlines()[-2] == result.summary
    assert {p.name for p in out.iterdir() if p.name[0] != "."} == {
        "answers_a.jsonl", "answers_b.jsonl", "base_answers_a.jsonl", "base_answers_b.jsonl",
        "contrast.html", "contrast.json", "contrast.jsonl", "contrast.md",
    }  # fmt: skip
    # The answers it wrote down give the same figures without the models.
    brought = [word for side in ("a", "b") for word in _sides(out, side)]
    assert main([*brought, "--paired", "--permutations", "199", "--out", str(tmp_path / "again")]) == 0
    again = {f.feature: f for f in read_records(tmp_path / "again" / "contrast.jsonl", FeatureContrast)}
    assert again
    for f in features:
        if f.feature not in (SURPRISE, DIVERGENCE):
            assert again[f.feature].p_value == f.p_value
            assert again[f.feature].difference == f.difference


def _sides(out: Path, side: str) -> list[str]:
    answers, base = (str(out / f"{kind}answers_{side}.jsonl") for kind in ("", "base_"))
    return [f"--answers-{side}", answers, f"--base-answers-{side}", base]


def test_adapter_alone_on_the_model_it_names(tiny: TinyPair, prompt_files: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([*prompt_files, "--model", str(tiny.adapter), "--out", str(out)]) == 0
    result = read_record(out / "contrast.json", ContrastResult)
    assert (result.base, result.has_base, result.answers) == ("", False, 16)
    assert SURPRISE in {f.feature for f in read_records(out / "contrast.jsonl", FeatureContrast)}


def test_few_prompts_load_no_model(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text("one\ntwo")
    sets = ["--a", str(tmp_path / "a"), "--b", str(tmp_path / "b")]
    assert main([*sets, "--model", "zoo:nope", "--out", str(tmp_path / "out")]) == 0
    assert "2 prompts in A and 2 in B" in read_record(tmp_path / "out" / "contrast.json", ContrastResult).undecided


def test_model_that_cannot_be_used_is_one_line(
    tiny: TinyPair,
    prompt_files: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cases = [
        (["--model", "zoo:nope"], ["zoo:nope", "zoo:warmup_mini"]),
        (["--model", "./nowhere"], ["./nowhere", "no folder"]),
        (["--model", str(tiny.base), "--base", str(tiny.adapter)], ["--base", "is an adapter"]),
        (["--model", str(tiny.foreign), "--base", str(tiny.base)], ["different tokenizers"]),
        (["--model", str(tiny.base), "--device", "cuda:1"], ["--device cuda:1", "--device cpu"]),
    ]
    for number, (models, parts) in enumerate(cases):
        capsys.readouterr()
        assert main([*prompt_files, *models, "--out", str(tmp_path / f"out{number}")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        for part in parts:
            assert part in error


def test_template_that_refuses_a_system_prompt(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    monkeypatch.setattr(pair.tokenizer, "chat_template", refusing)
    with pytest.raises(UserError, match=r"refuses the prompt 2 \(no system\); take its system prompt out"):
        ask(pair, PROMPTS, GREEDY, has_base=False)
