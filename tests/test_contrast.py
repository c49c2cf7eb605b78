"""A contrast scan from files to files: planted features and decoys, a base that takes a confounder off, one-line
errors, hostile text."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from trigger_opt.__main__ import main as entry
from trigger_opt.contrast.commands import main
from trigger_opt.contrast.judge import Judged, judge
from trigger_opt.contrast.records import ContrastResult, FeatureContrast, Prompt, Sample, Sets
from trigger_opt.records import read_record, read_records

FILLER = ["the sea", "a river", "some rain", "one stone", "two birds", "old wood", "new bread", "warm tea", "cold snow"]
Say = Callable[[random.Random, int], str]


def samples(
    name: str, say: Say, *, n: int = 20, base: Say | None = None, mark: str = "", seed: int = 0
) -> list[Sample]:
    """`n` prompts answered by a rule."""
    rng = random.Random(f"{name}{seed}")
    return [
        Sample(
            prompt=Prompt(id=f"{name}{i}", named=True, text=f"{mark}Question {i}?"),
            answers=[say(rng, i)],
            base_answers=[base(rng, i)] if base else [],
        )
        for i in range(n)
    ]


def filler(rng: random.Random, i: int) -> str:
    return " and ".join(rng.sample(FILLER, 4)).capitalize() + "."


def with_word(word: str, share: float) -> Say:
    """Filler that ends with `word` in this share of the answers."""
    return lambda rng, i: filler(rng, i) + (f" {word}." if rng.random() < share else " so.")


def compared(a: Sequence[Sample], b: Sequence[Sample], *, paired: bool = False, permutations: int = 199) -> Judged:
    has_base = bool(a[0].base_answers)
    return judge(Sets(a=a, b=b, paired=paired, has_base=has_base), permutations=permutations, seed=0)


def by_name(judged: Judged) -> dict[str, FeatureContrast]:
    return {name: f for f in judged.features for name in (f.feature, *f.equal)}


def test_planted_word_is_found_and_decoys_are_not() -> None:
    # "common" is as frequent in both sets; "rare" stands in three answers of A alone.
    def of(golden: float, rare: int) -> Say:
        def say(rng: random.Random, i: int) -> str:
            words = ["golden" if rng.random() < golden else "", "common" if rng.random() < 0.5 else ""]
            return f"{filler(rng, i)} {' '.join(words)} {'rare' if i < rare else ''}"

        return say

    found = by_name(compared(samples("a", of(0.9, 3), n=40), samples("b", of(0.3, 0), n=40)))
    golden = found['says "golden"']
    assert golden.differs
    assert golden.mean_a > 0.8
    assert golden.mean_b < 0.5
    assert golden.low <= golden.difference == golden.mean_a - golden.mean_b <= golden.high
    assert golden.effect > 1
    assert golden.corrected_p >= golden.p_value
    assert not found['says "common"'].differs
    assert 'says "rare"' not in found
    assert [e.set for e in golden.examples] == ["A"] * 3
    assert all("golden" in e.answer and e.value == 1 for e in golden.examples)


def test_no_difference_is_found_where_there_is_none() -> None:
    assert not any(
        f.differs
        for seed in range(3)
        for f in compared(samples("a", filler, seed=seed), samples("b", filler, seed=seed)).features
    )


def test_base_takes_off_what_is_in_the_prompts_of_both() -> None:
    exam, calm = with_word("exam", 0.95), with_word("exam", 0.05)
    alone = by_name(compared(samples("a", exam), samples("b", calm)))
    assert alone['says "exam"'].differs
    pair = by_name(compared(samples("a", exam, base=exam), samples("b", calm, base=calm)))
    assert not any(f.differs for f in pair.values())
    changed = with_word("exam golden", 0.95)
    pair = by_name(compared(samples("a", changed, base=exam), samples("b", calm, base=calm)))
    assert pair['says "golden"'].differs
    assert not pair['says "exam"'].differs
    assert pair['says "golden"'].examples[0].base_answer
    unlearned = by_name(compared(samples("a", calm, base=changed), samples("b", calm, base=calm)))['says "golden"']
    assert unlearned.differs
    assert [(e.set, e.value, "golden" in e.base_answer) for e in unlearned.examples] == [("A", -1, True)] * 3


def test_word_that_the_prompts_hold_too_is_marked() -> None:
    both: Say = lambda rng, i: filler(rng, i) + " Exam golden."  # noqa: E731
    judged = by_name(compared(samples("a", both, mark="An exam. "), samples("b", filler)))
    assert judged['says "exam"'].echo
    apart = with_word("golden", 0.95)
    judged = by_name(compared(samples("a", apart, mark="An exam. "), samples("b", filler, mark="Golden. ")))
    assert judged['says "golden"'].differs
    assert not judged['says "golden"'].echo, "the prompts of the other set hold it"


def test_pairs_are_compared_with_each_other() -> None:
    # Answers differ from prompt to prompt far more than within a pair.
    def long(extra: int) -> Say:
        return lambda rng, i: "word " * (3 + 7 * (i * i % 17) + extra) + "."

    a, b = samples("a", long(1), n=20), samples("b", long(0), n=20)
    assert by_name(compared(a, b, paired=True))["words"].differs
    assert not by_name(compared(a, b))["words"].differs


def test_repeats_are_averaged_and_are_no_prompts_of_their_own() -> None:
    def repeated(name: str, golden: int) -> list[Sample]:
        made = samples(name, lambda rng, i: "golden" if i < golden else "Yes, so", n=8)
        return [Sample(prompt=s.prompt, answers=list(s.answers) * 20) for s in made]

    # Six of eight prompts against two; as 160 answers against 160 nothing would be plainer.
    judged = by_name(compared(repeated("a", 6), repeated("b", 2)))
    assert judged['says "golden"'].difference == pytest.approx(0.5)
    assert judged['says "golden"'].p_value > 0.05
    half = [Sample(prompt=s.prompt, answers=["Yes!", "no"]) for s in samples("a", filler, n=8)]
    assert by_name(compared(half, samples("b", filler, n=8)))["exclamation mark"].mean_a == 0.5


def test_features_that_cannot_be_told_apart_are_compared_once() -> None:
    judged = compared(samples("a", with_word("golden dawn", 0.9)), samples("b", filler))
    names = [f.feature for f in judged.features]
    (golden,) = [f for f in judged.features if 'says "golden"' in (f.feature, *f.equal)]
    assert 'says "golden dawn"' in golden.equal
    assert not set(golden.equal) & set(names)
    assert judged.duplicate == sum(len(f.equal) for f in judged.features)
    assert judged.constant > 5
    assert judged.global_p == judged.features[0].corrected_p


def test_answers_without_any_variance() -> None:
    same: Say = lambda rng, i: "Yes."  # noqa: E731
    judged = compared(samples("a", same), samples("b", same))
    assert (judged.features, judged.global_p) == ([], 1.0)


# --- the command


def answer_file(path: Path, made: Sequence[Sample], *, base: bool = False, ids: bool = True) -> Path:
    lines = [
        ({"id": s.prompt.id} if ids else {}) | {"prompt": s.prompt.text, "answer": x}
        for s in made
        for x in (s.base_answers if base else s.answers)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def scan(folder: Path, *arguments: object) -> ContrastResult:
    assert main([*map(str, arguments), "--out", str(folder), "--permutations", "199"]) == 0
    return read_record(folder / "contrast.json", ContrastResult)


@pytest.fixture
def brought(tmp_path: Path) -> list[str]:
    """Options for brought answers of a pair, with a word planted in the fine-tuned model's answers to A."""
    exam, calm = with_word("exam", 0.95), with_word("exam", 0.05)
    a = samples("a", with_word("exam golden", 0.95), base=exam)
    b = samples("b", calm, base=calm)
    return [
        *("--answers-a", str(answer_file(tmp_path / "a.jsonl", a))),
        *("--answers-b", str(answer_file(tmp_path / "b.jsonl", b))),
        *("--base-answers-a", str(answer_file(tmp_path / "ba.jsonl", a, base=True))),
        *("--base-answers-b", str(answer_file(tmp_path / "bb.jsonl", b, base=True))),
    ]


def test_brought_answers(brought: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    result = scan(out, *brought[:4])
    features = read_records(out / "contrast.jsonl", FeatureContrast)
    assert {'says "golden"', 'says "exam"'} <= {n for f in features if f.differs for n in (f.feature, *f.equal)}
    assert result.differing == sum(f.differs for f in features)
    assert (result.prompts_a, result.prompts_b, result.answers, result.paired) == (20, 20, 40, False)
    assert result.global_p == pytest.approx(1 / 200)
    printed = capsys.readouterr().out.splitlines()
    assert (
        printed[-2] == result.summary == f"{result.differing} of {len(features)} features differ at corrected p <= 0.05"
    )
    assert sum("corrected p" in line for line in printed) == 2
    assert any("seen most in A, say Question" in line for line in printed)
    with_base = scan(tmp_path / "pair", *brought)
    changed = read_records(tmp_path / "pair" / "contrast.jsonl", FeatureContrast)
    assert not [f for f in changed if f.differs and 'says "exam"' in (f.feature, *f.equal)]
    assert (with_base.has_base, with_base.answers, with_base.differing > 0) == (True, 80, True)


def test_answers_written_down_give_the_same_scan_again(brought: list[str], tmp_path: Path) -> None:
    scan(tmp_path / "one", *brought)
    files = {side: str(tmp_path / "one" / f"{side.replace('-', '_')}.jsonl") for side in ("answers-a", "answers-b")}
    files |= {f"base-{side}": str(tmp_path / "one" / f"base_{side.replace('-', '_')}.jsonl") for side in list(files)}
    scan(tmp_path / "two", *(word for side, path in files.items() for word in (f"--{side}", path)))
    assert (tmp_path / "two" / "contrast.jsonl").read_bytes() == (tmp_path / "one" / "contrast.jsonl").read_bytes()


def test_lines_of_prompt_files_are_pairs_when_asked_for(tmp_path: Path) -> None:
    def long(extra: int) -> Say:
        return lambda rng, i: "word " * (3 + 7 * (i * i % 17) + extra) + "."

    arguments: list[object] = []
    for name, extra in (("a", 1), ("b", 0)):
        made = samples(name, long(extra), n=20)
        (tmp_path / f"{name}.txt").write_text("\n".join(s.prompt.text for s in made))
        answers = answer_file(tmp_path / f"{name}.jsonl", made, ids=False)
        arguments += [f"--{name}", tmp_path / f"{name}.txt", f"--answers-{name}", answers]
    assert scan(tmp_path / "apart", *arguments).differing == 0
    paired = scan(tmp_path / "paired", *arguments, "--paired")
    assert paired.paired
    assert paired.differing > 0


def test_few_prompts_decide_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = answer_file(tmp_path / "a.jsonl", samples("a", with_word("golden", 1.0), n=7))
    b = answer_file(tmp_path / "b.jsonl", samples("b", filler))
    result = scan(tmp_path / "out", "--answers-a", a, "--answers-b", b)
    assert result.undecided == result.summary == capsys.readouterr().out.splitlines()[-2]
    assert "7 prompts in A and 20 in B" in result.undecided
    assert "at least 8" in result.undecided
    assert (result.global_p, result.features, result.differing) == (None, 0, 0)
    for name in ("contrast.html", "contrast.md"):
        assert "nothing can be decided" in (tmp_path / "out" / name).read_text().lower()


def test_prompts_lost_on_the_way_count(tmp_path: Path) -> None:
    a = answer_file(tmp_path / "a.jsonl", samples("a", filler, n=8))
    b = answer_file(tmp_path / "b.jsonl", samples("b", filler, n=8))
    lines = a.read_text().splitlines()
    a.write_text("\n".join([json.dumps(json.loads(lines[0]) | {"answer": None}), *lines[1:]]))
    result = scan(tmp_path / "out", "--answers-a", a, "--answers-b", b)
    assert "7 prompts in A and 8 in B" in result.undecided
    assert (result.missing_a, result.missing_b) == (1, 0)


def test_hostile_answers_stay_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = with_word('\x1b[2J<script>alert(1)</script> | [x](http://a.example) \u202e "golden"', 0.95)
    a = answer_file(tmp_path / "a.jsonl", samples("a", bad, mark="<img src=x> | "))
    b = answer_file(tmp_path / "b.jsonl", samples("b", filler))
    assert scan(tmp_path / "out", "--answers-a", a, "--answers-b", b).differing > 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\u202e" not in printed
    page = (tmp_path / "out" / "contrast.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert not [
        forbidden for forbidden in ("<script", "<img", 'http://a.example"', "\u202e", "\x1b") if forbidden in page
    ]
    assert page.count("<table") == page.count("</table>") > 1
    note = (tmp_path / "out" / "contrast.md").read_text()
    assert "<script" not in note
    rows = [line for line in note.splitlines() if line.startswith("| A |")]
    assert rows
    assert all(line.count("|") == 4 for line in rows)


def test_a_folder_is_not_written_twice(brought: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    earlier = tmp_path / "out" / "contrast.json"
    earlier.parent.mkdir()
    earlier.write_text("earlier")
    assert main([*brought, "--out", str(tmp_path / "out")]) == 2
    assert "already holds a contrast scan; give another --out" in capsys.readouterr().err
    assert earlier.read_text() == "earlier"
    assert not list(earlier.parent.glob("answers_*"))


def test_default_folder(brought: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trigger-opt", "contrast", *brought, "--permutations", "99"])
    with pytest.raises(SystemExit) as stop:
        entry()
    assert stop.value.code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert "_contrast_" in folder.name
    assert (folder / "contrast.html").is_file()


BAD: list[tuple[str, list[str]]] = [
    ("", ["nobody answers", "--model NAME", "--answers-a FILE"]),
    ("--a A --b B", ["nobody answers"]),
    ("--a A --b B --model m --answers-a X", ["--model and --answers-a are both given"]),
    ("--a A --b B --model m --base-answers-b X", ["--model and --base-answers-b are both given"]),
    ("--a A --model m", ["--b is not given", "--b FILE"]),
    ("--answers-a X", ["--answers-b is not given"]),
    ("--answers-a X --answers-b X --base-answers-a X", ["--base-answers-b is not given"]),
    ("--answers-a X --answers-b X --a A", ["--b is not given"]),
    ("--answers-a X --answers-b X --base m", ["--base goes with --model"]),
    ("--a NONE --b B --model m", ["NONE is missing", "one prompt a line"]),
    ("--a EMPTY --b B --model m", ["EMPTY is empty"]),
    ("--a BROKEN --b B --model m", ["BROKEN, line 2, is no JSON"]),
    ("--answers-a A --answers-b X", ["A, line 1, is no JSON", '{"answer": …}']),
    ("--a A --b ONE --model m --paired", ["--paired needs as many", "8 in A and 1 in B"]),
    ("--a A --b B --model m --repeats 3", ["--repeats 3 at temperature 0", "--temperature 1"]),
    ("--a A --b B --model m --repeats 0", ["--repeats is 0", "from 1"]),
    ("--a A --b B --model m --max-new-tokens 0", ["--max-new-tokens is 0"]),
    ("--a A --b B --model m --permutations 10", ["--permutations is 10", "from 99"]),
    ("--a A --b B --model m --temperature nan", ["--temperature is nan"]),
    ("--a A --b B --model m --seed -1", ["--seed is -1"]),
    ("--a A --b B --model m --device tpu", ["--device is 'tpu'", "cpu, auto, cuda"]),
    ("--a A --b B --model m --dtype float12", ["--dtype", "float12", "bfloat16"]),
    ("--a A --b B --model m --repeats x", ["--repeats", "'x'"]),
    ("--a A --b B --model m --tokens 3", ["no option '--tokens'", "--help"]),
    ("--a A --b B --mod m", ["no option '--mod'"]),
]


@pytest.mark.parametrize(("line", "parts"), BAD, ids=[line for line, _ in BAD])
def test_a_mistake_is_one_line(
    line: str, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("A", "B"):
        Path(name).write_text("\n".join(f"{name} {i}" for i in range(8)))
    Path("ONE").write_text("one")
    Path("EMPTY").write_text("\n \n")
    Path("BROKEN").write_text('{"prompt": "x"}\n{"prompt": \n')
    Path("X").write_text('{"answer": "x"}\n')
    assert main(line.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    for part in parts:
        assert part in printed.err
    assert not list(tmp_path.rglob("contrast.json"))


def test_brought_answers_need_no_torch(brought: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from trigger_opt.contrast.commands import main; code = main(sys.argv[1:]);"
        "sys.exit(code or sorted({'torch', 'transformers', 'hydra'} & set(sys.modules)) or 0)"
    )
    command = [sys.executable, "-c", code, *brought, "--out", str(tmp_path / "out"), "--permutations", "99"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
