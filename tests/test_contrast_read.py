"""Prompt and answer files as people write them, and which prompts become pairs."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from trigger_opt.contrast.read import read_answers, read_prompts
from trigger_opt.contrast.records import Prompt, Sample
from trigger_opt.contrast.sets import complete_sets, pair_up, with_base
from trigger_opt.errors import UserError
from trigger_opt.transfer.ledger import EXPORTED


def write(path: Path, *lines: object) -> Path:
    """A file of these lines, JSON where they are no text."""
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


def prompt(id_: str, text: str = "", *, named: bool = True, system: str | None = None) -> Prompt:
    return Prompt(id=id_, named=named, text=text, system=system)


def said(samples: Sequence[Sample]) -> dict[str, list[str]]:
    return {s.prompt.id: list(s.answers) for s in samples}


def test_prompts_as_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffFirst one\r\n\r\n  {not json\u2028at all}\n".encode())
    found = read_prompts(path)
    assert found == [prompt("1", "First one", named=False), prompt("2", "  {not json\u2028at all}", named=False)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_prompts_as_json_lines(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, {"prompt": "x", "id": 7, "more": 1}, {"user": "y", "system": "s", "id": "b"})
    assert read_prompts(path) == [prompt("7", "x"), prompt("b", "y", system="s")]


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ([], ["a.jsonl is empty", "one prompt a line"]),
        (["{"], ["a.jsonl, line 1, is no JSON", "one prompt a line"]),
        ([{"prompt": "x"}, "", "[1]"], ["line 3, is no JSON object"]),
        ([{"text": "x"}], ["line 1, has no prompt"]),
        ([{"prompt": " "}], ["line 1, has no prompt"]),
        ([{"prompt": 3}], ["line 1, has the prompt 3", "give a text"]),
        ([{"prompt": "x", "system": 1}], ["has the system 1"]),
        ([{"prompt": "x", "id": 1.5}], ["has the id 1.5", "whole number"]),
        ([{"prompt": "x", "id": 1}, {"prompt": "y"}], ["an id in some lines only"]),
        ([{"prompt": "x", "id": 1}, {"prompt": "y", "id": "1"}], ["has the id '1' twice"]),
        ([{"prompt": "x"}, {"prompt": "x"}], ["has the prompt 'x' twice", "keep one"]),
    ],
)
def test_prompt_file_that_cannot_be_used(tmp_path: Path, lines: list[object], parts: list[str]) -> None:
    path = write(tmp_path / "a.jsonl", *lines)
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt is missing; give one prompt a line"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_prompts(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot be read \(it is no UTF-8\)"):
        read_prompts(tmp_path / "bytes")


def test_the_same_prompt_under_two_systems_is_two_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "x", "system": "one"}, {"prompt": "x", "system": "two"})
    assert len(read_prompts(path)) == 2


def test_answers_alone_with_repeats_and_gaps(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"id": "p", "answer": "1"},
        {"id": "q", "answer": None},
        {"id": "p", "answer": ""},
    )
    assert said(read_answers(path, None)) == {"p": ["1", ""], "q": []}


def test_answers_alone_without_ids_go_by_their_prompt(tmp_path: Path) -> None:
    lines = [{"prompt": "x", "answer": "1"}, {"prompt": "y", "answer": "2"}, {"prompt": "x", "answer": "3"}]
    found = read_answers(write(tmp_path / "a.jsonl", *lines), None)
    assert [(s.prompt.text, list(s.answers)) for s in found] == [("x", ["1", "3"]), ("y", ["2"])]
    assert not any(s.prompt.named for s in found)
    alone = read_answers(write(tmp_path / "b.jsonl", {"answer": "1"}, {"answer": "1"}), None)
    assert len(alone) == 2


def test_answers_are_matched_to_prompts_by_id_then_text_then_order(tmp_path: Path) -> None:
    named = [prompt("p", "x"), prompt("q", "y")]
    by_id = write(tmp_path / "a.jsonl", {"id": "q", "answer": "of q"}, {"id": "p", "answer": "of p"})
    assert said(read_answers(by_id, named)) == {"p": ["of p"], "q": ["of q"]}
    unnamed = [prompt("1", "x", named=False), prompt("2", "y", named=False)]
    by_text = write(tmp_path / "b.jsonl", {"prompt": "y", "answer": "of y"})
    assert said(read_answers(by_text, unnamed)) == {"1": [], "2": ["of y"]}
    in_order = write(tmp_path / "c.jsonl", {"answer": "first"}, {"answer": "second"})
    assert said(read_answers(in_order, unnamed)) == {"1": ["first"], "2": ["second"]}
    assert said(read_answers(in_order, named)) == {"p": ["first"], "q": ["second"]}


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ([{"prompt": "x"}], ["line 1, has no answer", "null where there was none"]),
        ([{"answer": 3}], ["line 1, has no answer"]),
        ([{"id": "z", "answer": "a"}], ["line 1, answers no prompt"]),
        ([{"prompt": "z", "answer": "a"}], ["line 1, answers no prompt"]),
        ([{"answer": "a"}], ["line 1, says not which prompt it answers", "same order"]),
        ([{"id": "p", "answer": "a"}, {"answer": "b"}], ["an id in some lines only"]),
        (
            [{"id": "p", "answer": "a", "model": "m1"}, {"id": "q", "answer": "b", "model": "m2"}],
            ["several models (m1, m2)"],
        ),
        ([{"id": "p", "answer": "a", "messages": "hi"}], ["line 1, has messages that are no list"]),
        ([{"id": "p", "answer": None, "endpoint": "activations"}], ["holds no answer"]),
    ],
)
def test_answer_file_that_cannot_be_used(tmp_path: Path, lines: list[object], parts: list[str]) -> None:
    path = write(tmp_path / "a.jsonl", *lines)
    with pytest.raises(UserError) as caught:
        read_answers(path, [prompt("p", "x"), prompt("q", "y")])
    for part in parts:
        assert part in str(caught.value)


def test_an_export_of_the_transfer_ledger_is_read(tmp_path: Path) -> None:
    def row(context: int, answer: str | None, *, endpoint: str = "chat") -> dict[str, object]:
        turns = [{"role": "system", "content": "s"}, {"role": "user", "content": f"question {context}"}]
        given = {"model": "m", "endpoint": endpoint, "context": context, "messages": turns, "answer": answer}
        return dict.fromkeys(EXPORTED) | given

    lines = [row(0, "a"), row(0, "b"), row(1, None), row(1, None, endpoint="activations")]
    found = read_answers(write(tmp_path / "export.jsonl", *lines), None)
    assert said(found) == {"0": ["a", "b"], "1": []}
    assert (found[0].prompt.text, found[0].prompt.system, found[0].prompt.named) == ("question 0", "s", True)


def test_pairs_by_id_by_line_and_none() -> None:
    a, b = [prompt("p"), prompt("q"), prompt("r")], [prompt("r"), prompt("p"), prompt("q")]
    assert pair_up(a, b, by_line=False) == [1, 2, 0]
    assert pair_up(a, b, by_line=True) == [1, 2, 0], "ids say more than lines"
    numbered = [prompt(str(i), named=False) for i in range(3)]
    assert pair_up(numbered, numbered, by_line=False) is None, "line numbers are no ids"
    assert pair_up(numbered, numbered, by_line=True) == [0, 1, 2]
    assert pair_up(a, [prompt("x"), prompt("y")], by_line=False) is None
    with pytest.raises(UserError, match="3 in A and 2 in B"):
        pair_up(a, [prompt("x"), prompt("y")], by_line=True)
    with pytest.raises(UserError, match="2 of 3 ids of A are also in B"):
        pair_up(a, [prompt("p"), prompt("q"), prompt("s")], by_line=False)


def test_a_pair_goes_when_one_of_it_did_not_answer() -> None:
    a = [Sample(prompt=prompt(i), answers=["x"] if i != "q" else []) for i in "pqr"]
    b = [Sample(prompt=prompt(i), answers=["y"] if i != "r" else []) for i in "rqp"]
    paired = complete_sets(a, b, [2, 1, 0], has_base=False)
    assert [s.prompt.id for s in paired.a] == [s.prompt.id for s in paired.b] == ["p"]
    assert (paired.missing_a, paired.missing_b) == (1, 1)
    apart = complete_sets(a, b, None, has_base=False)
    assert ([s.prompt.id for s in apart.a], [s.prompt.id for s in apart.b]) == (["p", "r"], ["q", "p"])
    assert complete_sets(a, b, None, has_base=True).missing_a == 3


def test_answers_of_the_base_belong_to_the_same_prompts() -> None:
    own = [Sample(prompt=prompt("p", "x"), answers=["1"]), Sample(prompt=prompt("q", "y"), answers=["2"])]
    base = [Sample(prompt=prompt("q"), answers=["3"])]
    assert [list(s.base_answers) for s in with_base(own, base, "f")] == [[], ["3"]]
    with pytest.raises(UserError, match="f answers 'z', which the model was not asked"):
        with_base(own, [Sample(prompt=prompt("z"), answers=["3"])], "f")
    with pytest.raises(UserError, match="f answers 'q'"):
        with_base(own, [Sample(prompt=prompt("q", "another"), answers=["3"])], "f")
