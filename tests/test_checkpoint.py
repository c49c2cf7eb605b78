"""The checkpoint file: whole or not at all, plain values only, and what is cut back to it."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from trigger_opt.checkpoint import (
    Checkpoint,
    Checkpoints,
    cut_back,
    load_checkpoint,
    save_checkpoint,
)
from trigger_opt.errors import UserError
from trigger_opt.paths import CHECKPOINT

STATE: dict[str, Any] = {
    "step": 3,
    "none": None,
    "texts": ["\ud800 lone", "\u2028"],
    "tuple": ("side", 1, 1.5, float("-inf"), True),
    "tensor": torch.arange(6, dtype=torch.int32).view(2, 3),
    "generator": torch.Generator().manual_seed(1).get_state(),
    "bf16": torch.full((2,), 1 / 3, dtype=torch.bfloat16),
}


def checkpoint(**changed: Any) -> Checkpoint:
    return Checkpoint(**{"stage": "search", "state": STATE, "sizes": {}, "versions": {"torch": "1"}, **changed})


def checkpoints(folder: Path, *, torch_version: str = "1", **every: Any) -> Checkpoints:
    return Checkpoints(folder, grows=["a.jsonl"], versions={"torch": torch_version}, exact=["search"], **every)


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint())
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert list(found.state) == list(STATE)
    for name, value in STATE.items():
        if isinstance(value, torch.Tensor):
            assert found.state[name].dtype == value.dtype
            assert torch.equal(found.state[name], value)
        else:
            assert found.state[name] == value
    assert os.listdir(tmp_path) == [CHECKPOINT]


def test_no_checkpoint(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None


def test_crash_while_saving_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, checkpoint())

    def crash(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, checkpoint(stage="verify"))
    assert os.listdir(tmp_path) == [CHECKPOINT], "room for what was found"
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.stage == "search"


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("content", ["torn", "empty", "text", "evil", "format", "fields"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path, checkpoint())
    path = tmp_path / CHECKPOINT
    if content == "torn":
        path.write_bytes(path.read_bytes()[:-100])
    elif content == "evil":
        torch.save({"format": 1, **vars(checkpoint(state={"x": Evil()}))}, path)
    elif content == "format":
        torch.save({"format": 99, **vars(checkpoint())}, path)
    elif content == "fields":
        torch.save({"format": 1, "stage": "search"}, path)
    else:
        path.write_bytes({"empty": b"", "text": pickle.dumps("hello")}[content])
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path)
    assert str(path) in str(caught.value)
    assert "remove it, and its stage begins again" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil").exists()


def test_growing_files_are_cut_back(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one\ntwo\n")
    (tmp_path / "b").write_text("one\n")
    (tmp_path / "c").write_text("one\n")
    cut_back(tmp_path, {"a": 4, "b": 0, "c": 4, "d": 0})
    assert sorted(os.listdir(tmp_path)) == ["a", "c"]
    assert (tmp_path / "a").read_text() == (tmp_path / "c").read_text() == "one\n"
    with pytest.raises(UserError, match=r"holds 4 bytes, and the checkpoint beside it was written at 5"):
        cut_back(tmp_path, {"a": 5})


def test_goes_on_only_with_the_stage_that_was_interrupted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("1\n")
    first = checkpoints(tmp_path)
    first.find(None)
    assert first.begun("search") is None
    first.save("search", {"step": 1})
    (tmp_path / "a.jsonl").write_text("1\n2\n")

    same = checkpoints(tmp_path)
    same.find("search")
    assert (tmp_path / "a.jsonl").read_text() == "1\n"
    assert same.begun("search") == {"step": 1}
    assert same.begun("search") is None, "said once"

    for found in (None, "verify"):
        same.save("search", {"step": 1})
        (tmp_path / "a.jsonl").write_text("1\n2\n")
        other = checkpoints(tmp_path)
        other.find(found)
        assert other.begun("search") is None
        assert (tmp_path / "a.jsonl").read_text() == "1\n2\n"
        assert load_checkpoint(tmp_path) is None, "it would be taken for that of a later command"
    same.forget()


def test_other_version_is_named(tmp_path: Path) -> None:
    checkpoints(tmp_path).save("search", {"step": 1})
    expected = r"stopped in stage 'search' under torch 1 \(now 2\); go on with that, or remove .+checkpoint.pt"
    with pytest.raises(UserError, match=expected):
        checkpoints(tmp_path, torch_version="2").find("search")
    # A stage that begins again needs nothing of the other version, nor one whose state decides no last bits.
    for stage, state in (("search", {}), ("verify", {"chosen": [1]})):
        checkpoints(tmp_path).save(stage, state)
        newer = checkpoints(tmp_path, torch_version="2")
        newer.find(stage)
        assert newer.begun(stage) == state


def test_due_by_steps_and_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    by_steps = checkpoints(tmp_path, every_steps=3)
    by_steps.save("search", {})
    assert [by_steps.due() for _ in range(4)] == [False, False, True, True]
    by_steps.save("search", {})
    assert not by_steps.due()
    by_seconds = checkpoints(tmp_path, every_seconds=10.0)
    by_seconds.save("search", {})
    now[0] = 9.0
    assert not by_seconds.due()
    now[0] = 10.0
    assert by_seconds.due()
    assert not checkpoints(tmp_path).due()
