"""Tracking: nothing logged is lost, steps never go backwards, and W&B can neither stop nor delay a run."""

import json
import os
import shlex
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.tracking_setup import TEXT, isolate_wandb, open_run, run_python
from tests.wandb_reader import OfflineArtifact, read_run, read_table, sessions
from trigger_opt.errors import UserError
from trigger_opt.tracking import JsonlTracker, Moment, Tracker, job_type_of, read_metrics


@pytest.fixture(autouse=True)
def _no_wandb_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolate_wandb(monkeypatch, tmp_path)


def log_whole_run(tracker: Tracker, artifact: Path) -> None:
    for step in range(3):
        tracker.log({"search/score": step / 2, "search/evaluations": 512 * step, "search/best": f"try {step}"})
    tracker.table("candidates", ["trigger", "score", "rate"], [[TEXT, 1.5, None], ["plain", 2, 0.5]])
    tracker.artifact("candidates gcg/0", "candidates", [artifact])
    tracker.summary({"verdict": "backdoor", "score": 1.5})
    tracker.finish(0)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    path = tmp_path / "candidates.jsonl"
    path.write_text('{"trigger": "x"}\n', encoding="utf-8")
    return path


def test_offline_run_can_be_read_back_whole(tmp_path: Path, artifact: Path) -> None:
    run_dir = tmp_path / "run"
    log_whole_run(open_run(run_dir), artifact)
    (session,) = sessions(run_dir)
    run = read_run(session)
    assert run.run_id == (run_dir / "wandb_run_id.txt").read_text().strip()
    assert (run.project, run.group, run.name, run.tags) == ("backdoors", "sweep-1", "gcg seed=0", ["gcg", "cpu"])
    assert run.job_type == "search"
    assert run.config == {"search": {"num_steps": 3}, "seed": 0}
    assert [row["_step"] for row in run.history] == [0, 1, 2, 3]
    assert run.history[2]["search/score"] == 1.0
    assert run.history[2]["search/evaluations"] == 1024
    assert run.history[2]["search/best"] == "try 2"
    assert (run.summary["verdict"], run.summary["score"]) == ("backdoor", 1.5)
    assert run.exit_code == 0
    table = read_table(session, "candidates")
    assert table["columns"] == ["trigger", "score", "rate"]
    assert table["data"] == [[TEXT, 1.5, None], ["plain", 2, 0.5]]
    assert OfflineArtifact(name="candidates-gcg-0", kind="candidates", files=["candidates.jsonl"]) in run.artifacts


def test_offline_run_says_nothing_about_the_machine(tmp_path: Path) -> None:
    open_run(tmp_path).finish(0)
    (session,) = sessions(tmp_path)
    assert read_run(session).host == ""
    left = {path.name for path in (session / "files").rglob("*") if path.is_file()}
    assert left <= {"requirements.txt"}  # no wandb-metadata.json, no code, no diff.patch


def test_exit_code_of_a_failed_run_is_kept(tmp_path: Path) -> None:
    open_run(tmp_path).finish(143)
    assert read_run(sessions(tmp_path)[0]).exit_code == 143
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["exit_code"] == 143


def test_a_reopened_folder_continues_the_same_run_at_the_next_step(tmp_path: Path, artifact: Path) -> None:
    log_whole_run(open_run(tmp_path), artifact)
    log_whole_run(open_run(tmp_path), artifact)
    first, second = (read_run(session) for session in sessions(tmp_path))
    assert first.run_id == second.run_id != ""
    assert [row["_step"] for row in second.history] == list(range(8))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "step" in line] == list(range(8))


def test_a_second_run_in_one_process_keeps_its_rows_to_itself(tmp_path: Path) -> None:
    first = open_run(tmp_path / "job0")
    first.log({"a/x": 1})
    second = open_run(tmp_path / "job1")  # a multirun whose first job never finished its tracker
    second.log({"a/x": 2})
    second.finish(0)
    rows = [read_run(sessions(tmp_path / job)[0]).history for job in ("job0", "job1")]
    assert [[row["a/x"] for row in history] for history in rows] == [[1], [2]]


def test_offline_samples_the_machine_but_opens_no_connection_whatever_the_environment_says(tmp_path: Path) -> None:
    code = (
        "import time\nt = open_tracker(run_dir, mode='offline', **about); t.log({'a/x': 1})\n"
        "for _ in range(4): time.sleep(0.2)\nt.finish(0)"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        # As proxy too, so that a call to any other host would come by here.
        here = f"http://127.0.0.1:{server.getsockname()[1]}"
        names = ("WANDB_BASE_URL", "WANDB__STATS_COREWEAVE_METADATA_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        asked = {"WANDB_MODE": "online", "WANDB_API_KEY": "k" * 40, "WANDB__STATS_SAMPLING_INTERVAL": "0.1"}
        done = run_python(code, tmp_path, **asked, **dict.fromkeys(names, here))
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    run = read_run(sessions(tmp_path)[0])
    assert run.history[0]["a/x"] == 1
    assert {"cpu", "memory_percent", "proc.memory.rssMB"} <= {name for sample in run.system for name in sample}


def test_sync_hint_names_the_newest_session_until_it_is_uploaded(tmp_path: Path) -> None:
    run_dir = tmp_path / "with space"
    tracker = open_run(run_dir)
    tracker.finish(0)
    (first,) = sessions(run_dir)
    assert shlex.split(tracker.sync_hint() or "") == ["wandb", "sync", str(first)]
    tracker = open_run(run_dir)
    tracker.finish(0)
    (second,) = set(sessions(run_dir)) - {first}
    assert shlex.split(tracker.sync_hint() or "") == ["wandb", "sync", str(second)]
    (second / "run-x.wandb.synced").touch()
    assert tracker.sync_hint() is None


@pytest.mark.parametrize("mode", ["disabled", "off"])
def test_disabled_never_imports_wandb(tmp_path: Path, mode: str) -> None:
    code = (
        f"t = open_tracker(run_dir, mode={mode!r}, **about); t.log({{'a/x': 1}}); t.table('t', ['c'], [[1]])\n"
        "t.artifact('n', 'k', []); t.summary({'s': 1}); t.finish(0)\n"
        "print(t.sync_hint(), [m for m in sys.modules if m.partition('.')[0] in ('wandb', 'torch')])"
    )
    done = run_python(code, tmp_path)
    assert done.stdout == "None []\n", done.stderr
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["a/x"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_online_without_a_key_fails_at_once_with_the_remedy(tmp_path: Path) -> None:
    began = time.monotonic()
    done = run_python("open_tracker(run_dir, mode='online', **about)", tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("trigger_opt.errors.UserError: W&B cannot start in tracking.mode=online: ")
    for remedy in ("tracking.mode=offline", "WANDB_API_KEY", "`wandb login`"):
        assert remedy in last
    assert time.monotonic() - began < 20


def test_online_never_asks_for_a_key_on_a_terminal(tmp_path: Path) -> None:
    code = (
        "import pty, os, sys\n"
        "program = [sys.executable, '-c', '''import sys\n"
        "from pathlib import Path\nfrom trigger_opt.errors import UserError\n"
        "from trigger_opt.tracking import open_tracker\n"
        'try: open_tracker(Path(sys.argv[1]), mode="online", project="p", group="g", name="n", tags=[], config={})\n'
        "except UserError: print(\"refused\", sys.stdin.isatty())''', str(run_dir)]\n"
        "sys.exit(os.waitstatus_to_exitcode(pty.spawn(program, stdin_read=lambda fd: b'')))"
    )
    pytest.importorskip("pty")
    done = run_python(code, tmp_path, WANDB_SILENT="false", TERM="xterm")
    assert "refused True" in done.stdout, done.stdout + done.stderr


def test_online_with_an_unreachable_server_fails_soon_with_the_remedy(tmp_path: Path) -> None:
    began = time.monotonic()
    code = "WandbBackend(run_dir, online=True, patience=1.0, **about)"
    done = run_python(code, tmp_path, WANDB_BASE_URL="http://127.0.0.1:1", WANDB_API_KEY="0123456789" * 4)
    last = done.stderr.strip().splitlines()[-1]
    assert "UserError: W&B cannot start in tracking.mode=online: CommError" in last
    assert "tracking.mode=offline" in last
    assert time.monotonic() - began < 20


def test_a_name_wandb_refuses_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Invalid project name"):
        open_run(tmp_path, project="a/b")


def test_the_death_of_wandb_costs_the_run_one_line_on_stderr(tmp_path: Path, artifact: Path) -> None:
    code = (
        "import psutil\n"
        "t = open_tracker(run_dir, mode='offline', **about)\n"
        "t.log({'a/x': 0})\n"
        "core = [p for p in psutil.Process().children(recursive=True) if 'wandb' in p.name()]\n"
        "assert core\n"
        "for p in core: p.kill(); p.wait()\n"
        "for x in range(1, 6): t.log({'a/x': x})\n"
        f"t.table('t', ['c'], [[1]]); t.artifact('n', 'k', [Path({str(artifact)!r})])\n"
        "t.summary({'s': 1}); t.finish(0); print('alive')"
    )
    done = run_python(code, tmp_path)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "warning: W&B stopped (Connection" in done.stderr
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["a/x"] for line in lines if "a/x" in line] == list(range(6))
    assert [sorted(line.keys() & {"table", "artifact", "summary", "exit_code"}) for line in lines[6:]] == [
        ["table"],
        ["artifact"],
        ["summary"],
        ["exit_code"],
    ]


@pytest.mark.parametrize("mode", ["off", "offline"])
def test_an_error_of_the_callers_is_the_same_in_every_mode(tmp_path: Path, mode: str) -> None:
    tracker = open_run(tmp_path, mode)
    with pytest.raises(FileNotFoundError, match="missing"):
        tracker.artifact("n", "k", [tmp_path / "missing"])
    with pytest.raises(ValueError, match="2 columns, but a row of 1 cells"):
        tracker.table("t", ["a", "b"], [[1, 2], [3]])
    tracker.log({"a/x": 1})
    tracker.finish(1)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "step" in line] == [0]


def test_jsonl_keeps_every_value_as_strict_json(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    tracker.log({"a/text": TEXT, "a/nan": float("nan"), "a/low": float("-inf"), "a/int": 2**60})
    tracker.table("t", ["c"], [[float("inf")], [TEXT]])
    row, table = read_metrics(tmp_path / "metrics.jsonl")
    assert (row["a/text"], row["a/nan"], row["a/low"], row["a/int"]) == (TEXT, "NaN", "-Infinity", 2**60)
    assert table["rows"] == [["Infinity"], [TEXT]]
    assert abs(row["time"] - time.time()) < 60
    assert len((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_every_line_is_on_disk_when_log_returns(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    for n in range(3):
        tracker.log({"a/x": n})
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == n + 1


@pytest.mark.parametrize("torn", [b'{"time": 1.0, "st', b'{"time": 1.0, "step": 1, "a/x": 9}'])
def test_a_torn_last_line_is_left_out_and_not_grown_onto(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonlTracker(tmp_path).log({"a/x": 0})
    with path.open("ab") as file:
        file.write(torn)
    assert [line["a/x"] for line in read_metrics(path)] == [0]
    JsonlTracker(tmp_path).log({"a/x": 1})
    assert [(line["step"], line["a/x"]) for line in read_metrics(path)] == [(0, 0), (1, 1)]


def test_a_file_that_is_one_torn_line_starts_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"ti')
    JsonlTracker(tmp_path).log({"a/x": 0})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0]


@pytest.mark.parametrize("damage", ["{", "5", ""])
def test_damage_before_the_last_line_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    good = json.dumps({"step": 0, "time": 1.0})
    path.write_text(f"{good}\n{damage}\n{good}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2, is damaged"):
        read_metrics(path)


def test_missing_metrics_are_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("name", ["step", "time", "summary"])
def test_a_metric_cannot_take_a_key_of_the_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        JsonlTracker(tmp_path).log({name: 1})


def test_an_unknown_mode_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracking\.mode=on is unknown; choose one of online, offline, tensorboard,"):
        open_run(tmp_path, mode="on")


@pytest.mark.parametrize(
    ("stages", "kind"),
    [(["diff", "search", "verify"], "search"), (["verify", "report"], "verify"), (["transfer"], "transfer"), ([], "")],
)
def test_a_run_that_searches_is_a_search_and_others_are_what_they_begin_with(stages: list[str], kind: str) -> None:
    assert job_type_of(stages) == kind


class Recorder:
    """A backend that remembers what it was given."""

    def __init__(self, hint: str | None = None) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.hint = hint

    def log(self, at: Moment, metrics: Mapping[str, float | int | str]) -> None:
        self.calls.append((at, dict(metrics)))

    def table(self, at: Moment, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self.calls.append((at, name, columns, rows))

    def artifact(self, name: str, kind: str, files: Sequence[Path]) -> None:
        self.calls.append((name, kind, [file.name for file in files], [file.read_text() for file in files]))

    def summary(self, values: Mapping[str, object]) -> None:
        self.calls.append((values,))

    def finish(self, exit_code: int) -> None:
        self.calls.append((exit_code,))

    def sync_hint(self) -> str | None:
        return self.hint


def test_a_backend_gets_everything_live_and_all_but_the_end_again_when_the_folder_is_reopened(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "page.html").write_text("page")
    tracker, live = JsonlTracker(tmp_path), Recorder()
    tracker.attach(live)
    tracker.log({"a/x": 1, "a/low": float("-inf")})
    tracker.table("t", ["c"], [[None], ["NaN"], [float("inf")]])
    tracker.artifact("n", "k", [tmp_path / "sub" / "page.html"])
    tracker.summary({"s": float("nan")})
    tracker.finish(3)
    assert [call[1:] for call in live.calls[:2]] == [
        ({"a/x": 1, "a/low": float("-inf")},),
        ("t", ["c"], [[None], ["NaN"], ["Infinity"]]),
    ]
    assert live.calls[2:] == [("n", "k", ["page.html"], ["page"]), ({"s": "NaN"},), (3,)]
    assert [call[0].step for call in live.calls[:2] if isinstance(call[0], Moment)] == [0, 1]
    again = Recorder()
    JsonlTracker(tmp_path).attach(again)
    assert again.calls == live.calls[:-1]


def test_an_artifact_is_given_again_once_and_only_while_its_files_are_there(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    for text in ("first", "second"):
        for name in ("kept", "gone"):
            (tmp_path / name).write_text(text)
            tracker.artifact(name, "k", [tmp_path / name])
    (tmp_path / "gone").unlink()
    again = Recorder()
    JsonlTracker(tmp_path).attach(again)
    assert again.calls == [("kept", "k", ["kept"], ["second"])]


def test_the_first_hint_of_a_backend_is_the_hint(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    for hint in (None, "wandb sync x", "another"):
        tracker.attach(Recorder(hint))
    assert tracker.sync_hint() == "wandb sync x"


def test_rows_cut_off_leave_their_steps_to_those_logged_next(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    tracker.log({"a/x": 0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    tracker.log({"a/x": 1})
    os.truncate(tmp_path / "metrics.jsonl", size)
    JsonlTracker(tmp_path).log({"a/x": 2})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["a/x"]) for line in lines] == [(0, 0), (1, 2)]
