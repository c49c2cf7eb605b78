"""Who holds a run folder, what lies in it, and what is kept."""

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trigger_opt.errors import UserError
from trigger_opt.records import RunInfo, StageRun, read_record
from trigger_opt.run_folder import (
    STAGE_FILES,
    code_versions,
    differences,
    has_ended,
    hold_run_folder,
    machine,
    now,
    timed,
    versions,
)

INFO = RunInfo(
    name="x",
    command="c",
    seed=0,
    started="2026-01-01T00:00:00+00:00",
    machine="m",
    config={},
    versions={},
    plan=[],
    stages=[],
)
ALL = tuple(STAGE_FILES)
RUN = StageRun(stage="diff", started=INFO.started, seconds=1.0, evaluations=0, summary="s")


def test_is_made_with_its_parents_and_released(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with hold_run_folder(path, INFO, stages=ALL) as folder:
        folder.set_plan(["one", "two"])
        folder.add_stage(RUN)
    left = [s for s in ALL if s != "diff"]
    made = replace(INFO, plan=["one", "two"], stages=[RUN], unfinished=left)
    assert read_record(path / "run.json", RunInfo) == made
    with hold_run_folder(path, INFO, stages=["diff"]):
        pass


def _hold(path: Path, held: Any, done: Any) -> None:
    with hold_run_folder(path, INFO, stages=ALL):
        held.set()
        done.wait(60)


def test_second_process_is_told_who_holds_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, held, done))
    holder.start()
    try:
        assert held.wait(60)
        with (
            pytest.raises(UserError, match=rf"in use by process {holder.pid} on .+; wait for it"),
            hold_run_folder(tmp_path, INFO, stages=["report"]),
        ):
            pass
    finally:
        done.set()
        holder.join(60)
    with hold_run_folder(tmp_path, INFO, stages=ALL):
        pass


def test_killed_process_holds_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, held, done))
    holder.start()
    assert held.wait(60)
    holder.kill()
    holder.join(60)
    with hold_run_folder(tmp_path, INFO, stages=ALL):
        pass


@pytest.mark.parametrize("stages", [ALL, ("diff", "search", "verify", "report")])
def test_second_whole_run_is_refused(tmp_path: Path, stages: tuple[str, ...]) -> None:
    with hold_run_folder(tmp_path, INFO, stages=ALL) as folder:
        for stage in ALL:
            folder.add_stage(replace(RUN, stage=stage))
    before = (tmp_path / "run.json").read_bytes()
    with (
        pytest.raises(UserError, match=r"already holds a run; name the stages.*or give another run_dir"),
        hold_run_folder(tmp_path, INFO, stages=stages),
    ):
        pass
    assert (tmp_path / "run.json").read_bytes() == before


def test_later_stages_join_the_earlier_run(tmp_path: Path) -> None:
    with hold_run_folder(tmp_path, INFO, stages=ALL) as folder:
        folder.add_stage(RUN)
    again = replace(INFO, command="another", seed=3)
    with hold_run_folder(tmp_path, again, stages=["verify", "report"]) as folder:
        folder.add_stage(replace(RUN, stage="verify"))
    joined = read_record(tmp_path / "run.json", RunInfo)
    assert [s.stage for s in joined.stages] == ["diff", "verify"]


def test_run_that_never_began_is_no_run(tmp_path: Path) -> None:
    with hold_run_folder(tmp_path, replace(INFO, config={"model": 1}), stages=ALL) as folder:
        folder.set_plan(["refused after this, say for a wrong base"])
    with hold_run_folder(tmp_path, replace(INFO, config={"model": 2}), stages=ALL) as folder:
        assert folder.info.config == {"model": 2}


@pytest.mark.parametrize("part", ["model", "contexts"])
def test_later_stages_of_another_pair_are_refused(tmp_path: Path, part: str) -> None:
    first = replace(INFO, command="first command\nsecond command", config={part: {"a": 1}, "seed": 1})
    with hold_run_folder(tmp_path, first, stages=ALL) as folder:
        folder.add_stage(RUN)
    with pytest.raises(UserError) as caught, hold_run_folder(tmp_path, INFO, stages=["verify"]):
        pass
    assert str(caught.value).endswith(f"was made with another {part}; repeat its settings: first command")
    with hold_run_folder(tmp_path, replace(first, config={part: {"a": 1}, "seed": 2}), stages=["verify"]):
        pass


def test_old_files_are_put_aside_one_by_one(tmp_path: Path) -> None:
    with hold_run_folder(tmp_path, INFO, stages=ALL) as folder:
        for text in ("first", "second", "third"):
            folder.put_aside("verify")
            folder.file("verdict.json").write_text(text)
            folder.file("candidates.jsonl").write_text(text)
    assert (tmp_path / "verdict.json").read_text() == "third"
    assert (tmp_path / "verdict.json.old-1").read_text() == "first"
    assert (tmp_path / "verdict.json.old-2").read_text() == "second"
    assert not list(tmp_path.glob("candidates.jsonl.old*")), "another stage's file"


@pytest.mark.parametrize("below", ["", "/x"])
def test_folder_that_cannot_be_written(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"file.* cannot be written \(.+\); give another run_dir"),
        hold_run_folder(Path(f"{tmp_path}/file{below}"), INFO, stages=ALL),
    ):
        pass


def test_damaged_run_json_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"name": "x"}))
    with (
        pytest.raises(UserError, match=r"run\.json is not a RunInfo record"),
        hold_run_folder(tmp_path, INFO, stages=["report"]),
    ):
        pass


def test_records_name_versions_and_no_host() -> None:
    import platform

    found = versions()
    assert {"python", "torch", "transformers", "trigger-opt", "peft"} <= set(found)
    assert found["python"] == platform.python_version()
    assert platform.node() not in machine()
    assert "T" in now()


def test_timed_counts_also_after_an_error() -> None:
    with pytest.raises(KeyError), timed() as seconds:
        raise KeyError
    assert len(seconds) == 1
    assert seconds[0] >= 0


def broken_off(path: Path, info: RunInfo, *, ended: Sequence[str], broken: str) -> None:
    """A run of all stages that ended some and was interrupted in one."""
    with hold_run_folder(path, info, stages=ALL) as folder:
        folder.begin()
        for stage in ended:
            folder.add_stage(replace(RUN, stage=stage))
        folder.add_stage(replace(RUN, stage=broken, summary="interrupted"), ended=False)


def test_same_command_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    info = replace(INFO, config={"seed": 1, "tracking": {"mode": "off"}})
    broken_off(tmp_path, info, ended=["diff"], broken="hypotheses")
    again = replace(info, config={"seed": 1, "tracking": {"mode": "offline"}}, command="typed again", started="later")
    with hold_run_folder(tmp_path, again, stages=ALL) as folder:
        assert folder.goes_on == "hypotheses"
        assert (folder.info.starts, folder.info.command, folder.info.started) == (2, "c", INFO.started)
        assert [s.stage for s in folder.info.stages] == ["diff"]
        assert folder.info.unfinished == list(ALL[1:])
        folder.begin()
    # Killed before it wrote anything else.
    with hold_run_folder(tmp_path, again, stages=ALL) as folder:
        assert (folder.goes_on, folder.info.starts) == ("hypotheses", 3)


def test_interrupted_run_is_not_gone_on_with_under_other_settings(tmp_path: Path) -> None:
    broken_off(tmp_path, replace(INFO, config={"search": {"topk": 8}}), ended=["diff"], broken="search")
    before = (tmp_path / "run.json").read_bytes()
    other = replace(INFO, config={"search": {"topk": 9}})
    expected = r"interrupted in stage 'hypotheses' and had search.topk=8; give the same to go on"
    with pytest.raises(UserError, match=expected), hold_run_folder(tmp_path, other, stages=ALL):
        pass
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize("ended", [["diff", "hypotheses"], []])
def test_search_that_waits_is_not_given_up_unasked(tmp_path: Path, ended: list[str]) -> None:
    """Neither for other stages, nor where a kill left no word of any stage."""
    stages = [*ended, "search"]
    info = replace(INFO, config={"stages": stages, "seed": 1}, command="the command")
    with hold_run_folder(tmp_path, info, stages=stages) as folder:
        folder.begin()
        for stage in ended:
            folder.add_stage(replace(RUN, stage=stage))
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_text("hours of search")
    later = replace(INFO, config={"stages": ["verify"], "seed": 1})
    with (
        pytest.raises(
            UserError, match=r"goes on with the same command: the command; to give up .+ remove .+checkpoint"
        ),
        hold_run_folder(tmp_path, later, stages=["verify"]),
    ):
        pass
    other = replace(info, config={"stages": stages, "seed": 2})
    with pytest.raises(UserError, match="had seed=1; give the same"), hold_run_folder(tmp_path, other, stages=stages):
        pass
    with hold_run_folder(tmp_path, info, stages=stages) as folder:
        assert folder.goes_on == "search"
    checkpoint.unlink()
    with hold_run_folder(tmp_path, later, stages=["verify"]) as folder:
        assert folder.goes_on is None


def test_another_card_is_no_other_setting(tmp_path: Path) -> None:
    broken_off(tmp_path, replace(INFO, config={"model": {"device": "cuda:0"}}), ended=["diff"], broken="search")
    again = replace(INFO, config={"model": {"device": "cuda:1"}})
    with hold_run_folder(tmp_path, again, stages=ALL) as folder:
        assert folder.goes_on == "hypotheses"


def test_group_of_settings_against_none_differs() -> None:
    some, none = {"a": {"b": 1, "c": 2}}, {"a": None}
    assert differences(some, none, ["a"]) == ["a.b=1", "a.c=2"]
    assert differences(none, some, ["a"]) == ["a=null"]
    # Written by a version that did not know it yet.
    assert differences({"a": {"b": 1}}, some, ["a"]) == differences(some, {"a": {"b": 1}}, ["a"]) == []


def test_other_stages_of_an_interrupted_run_are_a_command_of_their_own(tmp_path: Path) -> None:
    broken_off(tmp_path, replace(INFO, config={"stages": list(ALL)}), ended=["diff"], broken="search")
    later = replace(INFO, config={"stages": ["verify"]}, command="d")
    with hold_run_folder(tmp_path, later, stages=["verify"]) as folder:
        assert folder.goes_on is None
        assert (folder.info.starts, folder.info.unfinished, folder.info.command) == (1, ["verify"], "c\nd")


def test_finished_stages_of_an_earlier_command_stay_in_the_record(tmp_path: Path) -> None:
    with hold_run_folder(tmp_path, INFO, stages=["search", "verify"]) as folder:
        for stage in ("search", "verify"):
            folder.add_stage(replace(RUN, stage=stage))
    for _ in range(2):
        with hold_run_folder(tmp_path, INFO, stages=["verify"]) as folder:
            folder.begin()
    assert folder.goes_on == "verify"
    assert [s.stage for s in folder.info.stages] == ["search", "verify"]


def test_has_ended_only_with_the_same_settings_and_nothing_left(tmp_path: Path) -> None:
    info = replace(INFO, config={"seed": 1, "tracking": {"mode": "off"}})
    stages = ["search", "verify"]
    assert not has_ended(tmp_path, info, stages=stages)
    with hold_run_folder(tmp_path, info, stages=stages) as folder:
        folder.add_stage(replace(RUN, stage="search"))
        assert not has_ended(tmp_path, info, stages=stages)
        folder.add_stage(replace(RUN, stage="verify"))
    assert has_ended(tmp_path, replace(info, config={"seed": 1, "tracking": {"mode": "offline"}}), stages=stages)
    assert not has_ended(tmp_path, replace(info, config={"seed": 2}), stages=stages)
    # What was run there later is another command's; one of these that was begun again has not ended.
    with hold_run_folder(tmp_path, info, stages=["report"]) as folder:
        folder.begin()
        assert has_ended(tmp_path, info, stages=stages)
    with hold_run_folder(tmp_path, info, stages=["verify"]) as folder:
        folder.begin()
        assert not has_ended(tmp_path, info, stages=stages)


def test_code_is_told_by_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "trigger_opt"
    (package / "sub").mkdir(parents=True)
    (package / "a.py").write_text("x = 1")
    monkeypatch.setattr("trigger_opt.run_folder.__file__", str(package / "run_folder.py"))
    first = code_versions()
    assert first["torch"] == versions()["torch"]
    assert "commit" not in first
    (package / "page.md").write_text("words")
    (package / "report").mkdir()
    (package / "report" / "a.py").write_text("y = 1")
    assert code_versions() == first
    (package / "sub" / "b.py").write_text("x = 1")
    second = code_versions()
    assert second != first
    (package / "sub" / "b.py").rename(package / "b.py")
    assert code_versions()["code"] not in (first["code"], second["code"])
