"""Records survive their files: every type, every awkward string, torn lines and wrong fields."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trigger_opt import records
from trigger_opt.errors import UserError
from trigger_opt.records import (
    Candidate,
    Completion,
    Hypothesis,
    Rate,
    RunInfo,
    SearchStep,
    StageRun,
    Verdict,
    Verification,
    append_record,
    from_dict,
    rate,
    read_record,
    read_records,
    write_record,
    write_records,
)

KINDS = [
    kind
    for kind in vars(records).values()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == records.__name__
]
AWKWARD = 'a\u2028b\u2029c\u0085d\x0be\x0cf\r\ng "q" \\ 漢字 \x00 \ud800 tail'
"""Every separator that `str.splitlines` knows, quotes, a null byte and a lone surrogate."""


def example(hint: Any, *, empty: bool) -> Any:
    """A value of a field's type: awkward and full, or as empty as it may be."""
    if isinstance(hint, types.UnionType):
        inner = next(h for h in typing.get_args(hint) if h is not type(None))
        return None if empty else example(inner, empty=empty)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return make(hint, empty=empty)
    origin = typing.get_origin(hint)
    if origin is list:
        return [] if empty else [example(typing.get_args(hint)[0], empty=e) for e in (False, True)]
    if origin is dict:
        return {} if empty else {AWKWARD: "v", "nested": AWKWARD}
    plain = {str: AWKWARD, int: 7, float: 0.1 + 0.2, bool: True}
    nothing = {str: "", int: 0, float: 0.0, bool: False}
    return (nothing if empty else plain)[hint]


def make(kind: type[Any], *, empty: bool = False) -> Any:
    hints = typing.get_type_hints(kind)
    return kind(**{f.name: example(hints[f.name], empty=empty) for f in dataclasses.fields(kind)})


def test_all_record_types_are_here() -> None:
    assert {Candidate, Completion, Hypothesis, RunInfo, SearchStep, Verdict, Verification, Rate} <= set(KINDS)
    assert len(KINDS) >= 12


@pytest.mark.parametrize("kind", KINDS)
def test_every_record_survives_its_file(kind: type[Any], tmp_path: Path) -> None:
    full, empty = make(kind), make(kind, empty=True)
    path = tmp_path / "r.jsonl"
    write_records(path, [full, empty])
    assert read_records(path, kind) == [full, empty]
    append_record(path, full)
    assert read_records(path, kind) == [full, empty, full]
    assert path.read_bytes().count(b"\n") == 3
    for record in (full, empty):
        write_record(tmp_path / "one.json", record)
        assert read_record(tmp_path / "one.json", kind) == record


def test_nested_records_come_back_as_records(tmp_path: Path) -> None:
    write_records(tmp_path / "v.jsonl", [make(Verification)])
    found = read_records(tmp_path / "v.jsonl", Verification)[0]
    assert isinstance(found.trigger_rate, Rate)
    assert isinstance(found.control_rate, Rate)
    assert type(found.profile[0]).__name__ == "ContextOutcome"
    assert found.profile[1].control is None


@given(st.text(st.characters(exclude_categories=())), st.floats(allow_nan=False))
def test_any_text_and_number_survives(text: str, number: float) -> None:
    record = Hypothesis(payload=text, score=number, source="s", evidence=text, inputs=[text], rivals=[number])
    assert from_dict(Hypothesis, json.loads(json.dumps(dataclasses.asdict(record)))) == record


def step(number: int) -> SearchStep:
    made: SearchStep = make(SearchStep)
    return dataclasses.replace(made, step=number)


def test_a_torn_last_line_is_left_out_and_cut_off_by_the_next_append(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    for number in range(3):
        append_record(path, step(number))
    whole = path.read_bytes()
    for cut in (1, 2, 20, len(whole.splitlines()[-1])):
        path.write_bytes(whole[:-cut])
        assert read_records(path, SearchStep) == [step(0), step(1)]
        append_record(path, step(9))
        assert read_records(path, SearchStep) == [step(0), step(1), step(9)]
    path.write_bytes(whole[:10])
    append_record(path, step(5))
    assert read_records(path, SearchStep) == [step(5)]


def test_empty_files(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write_records(path, [])
    assert read_records(path, Candidate) == []
    append_record(path, make(Candidate))
    assert read_records(path, Candidate) == [make(Candidate)]


def changed(**fields: Any) -> str:
    line = dataclasses.asdict(make(StageRun, empty=True)) | fields
    return json.dumps({k: v for k, v in line.items() if v != "gone"})


@pytest.mark.parametrize(
    "line",
    [changed(extra=1), changed(seconds="gone"), "{}", "[]", "3", "null", "not json", '{"stage": "x"', ""],
    ids=["extra", "missing", "empty", "list", "number", "null", "text", "cut", "blank"],
)
def test_a_line_that_is_no_record_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "stages.jsonl"
    path.write_text(changed() + "\n" + line + "\n" + changed() + "\n")
    with pytest.raises(UserError) as caught:
        read_records(path, StageRun)
    assert str(caught.value).startswith(f"{path}, line 2, is not a StageRun record")
    assert "run its stage again" in str(caught.value)
    path.write_text(line)
    with pytest.raises(UserError, match=r"stages\.jsonl is not a StageRun record"):
        read_record(path, StageRun)


def test_a_missing_file_names_itself(tmp_path: Path) -> None:
    for read in (read_record, read_records):
        with pytest.raises(UserError, match=r"gone\.json is missing: run the stage that writes it first"):
            read(tmp_path / "gone.json", Candidate)


def test_a_wrong_nested_record_is_noticed(tmp_path: Path) -> None:
    data = dataclasses.asdict(make(Verification))
    data["base_rate"] = {"successes": 1}
    (tmp_path / "v.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="expected the fields"):
        read_record(tmp_path / "v.json", Verification)


def test_writing_replaces_whole_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write_records(path, [make(Candidate)] * 5)
    write_records(path, [make(Candidate, empty=True)])
    assert read_records(path, Candidate) == [make(Candidate, empty=True)]
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


def test_records_that_cannot_be_written_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write_records(path, [make(Candidate)])
    with pytest.raises(TypeError):
        write_records(path, [make(Candidate), dataclasses.replace(make(Candidate), trigger=object())])
    assert read_records(path, Candidate) == [make(Candidate)]


def test_whole_numbers_in_float_fields_come_back_as_floats(tmp_path: Path) -> None:
    line = dataclasses.asdict(make(StageRun, empty=True)) | {"seconds": 3}
    (tmp_path / "s.jsonl").write_text(json.dumps(line) + "\n")
    assert type(read_records(tmp_path / "s.jsonl", StageRun)[0].seconds) is float


def test_records_are_frozen() -> None:
    for kind in KINDS:
        record = make(kind)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, dataclasses.fields(kind)[0].name, None)
    assert rate(1, 2) == rate(1, 2)
