"""TensorBoard's files read back with its own reader, over restarts; and what is said without the package."""

import html
import json
import signal
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.tracking_setup import TEXT, open_run, run_python
from trigger_opt.tracking import Tracker, read_metrics


def log_rows(tracker: Tracker, begin: int, end: int) -> None:
    for step in range(begin, end):
        tracker.log({"search/score": step / 4, "search/best": f"try | {step}"})


def read(run_dir: Path) -> EventAccumulator:
    # 0: all events, rather than a sample of them.
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def texts(events: EventAccumulator, name: str) -> list[tuple[int, str]]:
    found = events.Tensors(f"{name}/text_summary")
    return [(event.step, html.unescape(event.tensor_proto.string_val[0].decode())) for event in found]


def log_whole_run(tracker: Tracker, run_dir: Path) -> None:
    log_rows(tracker, 0, 5)
    tracker.table("candidates", ["trigger", "score"], [[TEXT, 1.5], ["plain *text*", None]])
    (run_dir / "report.html").write_text("page")
    tracker.artifact("report", "report", [run_dir / "report.html"])
    tracker.summary({"verdict": "backdoor"})
    tracker.summary({"null/p_value": 0.05})


def check_whole_run(events: EventAccumulator, rows: int) -> None:
    scores = events.Scalars("search/score")
    assert [(event.step, event.value) for event in scores[:5]] == [(step, step / 4) for step in range(5)]
    assert len(scores) == rows
    assert texts(events, "search/best")[:5] == [(step, f"try | {step}") for step in range(5)]
    ((step, table),) = texts(events, "candidates")
    clean = TEXT.encode("utf-8", "backslashreplace").decode()
    assert (step, table) == (5, f"| trigger | score |\n| --- | --- |\n| {clean} | 1.5 |\n| plain *text* | null |")
    assert texts(events, "artifact/report") == [(5, "| report |\n| --- |\n| report.html |")]
    assert texts(events, "summary")[-1] == (
        5,
        "| name | value |\n| --- | --- |\n| verdict | backdoor |\n| null/p_value | 0.05 |",
    )
    assert len(texts(events, "summary")) == 2
    ((_, config),) = texts(events, "config")
    assert json.loads(config) == {"search": {"num_steps": 3}, "seed": 0}


def test_numbers_words_tables_and_outcome_are_there(tmp_path: Path) -> None:
    tracker = open_run(tmp_path, "tensorboard")
    log_whole_run(tracker, tmp_path)
    tracker.finish(3)
    events = read(tmp_path)
    check_whole_run(events, rows=5)
    assert texts(events, "exit_code") == [(5, "3")]
    times = [line["time"] for line in read_metrics(tmp_path / "metrics.jsonl") if "search/score" in line]
    assert [event.wall_time for event in events.Scalars("search/score")] == times
    assert tracker.sync_hint() is None


def test_a_table_cell_cannot_break_the_table(tmp_path: Path) -> None:
    tracker = open_run(tmp_path, "tensorboard")
    tracker.table("t", ["c"], [["a|b\nc <b>d</b> _e_ `f`"]])
    tracker.finish(0)
    (event,) = read(tmp_path).Tensors("t/text_summary")
    raw = event.tensor_proto.string_val[0].decode()
    assert len(raw.splitlines()) == 3
    assert raw.count("|") == 6
    assert not set("<>_`*") & set(raw)


def test_over_restarts_nothing_is_doubled(tmp_path: Path) -> None:
    tracker = open_run(tmp_path, "tensorboard")
    log_whole_run(tracker, tmp_path)
    tracker.finish(75)
    for begin in (6, 8):
        tracker = open_run(tmp_path, "tensorboard")
        log_rows(tracker, begin, begin + 2)
        tracker.finish(0)
    events = read(tmp_path)
    check_whole_run(events, rows=9)
    assert [event.step for event in events.Scalars("search/score")] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert texts(events, "exit_code") == [(9, "0")]


def test_what_a_killed_process_did_not_write_is_there_after_the_restart(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.test_tensorboard import log_rows\n"
        "from tests.tracking_setup import open_run\ntracker = open_run(Path(sys.argv[1]), 'tensorboard')\n"
        "for step in range(10000):\n    log_rows(tracker, step, step + 1)\n    print(step, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(30):
            process.stdout.readline()
        process.kill()
        process.wait(timeout=60)
    assert process.returncode == -signal.SIGKILL
    tracker = open_run(tmp_path, "tensorboard")
    logged = len(read_metrics(tmp_path / "metrics.jsonl"))
    assert logged >= 30
    log_rows(tracker, logged, logged + 1)
    tracker.finish(0)
    scores = read(tmp_path).Scalars("search/score")
    assert [(event.step, event.value) for event in scores] == [(n, n / 4) for n in range(logged + 1)]


def test_without_the_package_the_remedy_is_named_and_nothing_was_written(tmp_path: Path) -> None:
    code = "sys.modules['tensorboard'] = None\nopen_tracker(run_dir, mode='tensorboard', **about)"
    done = run_python(code, tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("trigger_opt.errors.UserError: tracking.mode=tensorboard needs the package tensorboard (")
    assert "pip install 'trigger-opt[tensorboard]'" in last
    assert not list(tmp_path.iterdir())


def test_the_other_modes_import_neither_torch_nor_tensorboard(tmp_path: Path) -> None:
    code = (
        "open_tracker(run_dir, mode='off', **about).finish(0)\n"
        "print([m for m in sys.modules if m.partition('.')[0] in ('tensorboard', 'torch')])"
    )
    assert run_python(code, tmp_path).stdout == "[]\n"
