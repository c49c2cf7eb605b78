"""A run that is killed at any moment and started again leaves what an undisturbed one leaves."""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.run_processes import Runs, run_processes, until
from tests.tiny_pair import TinyPair, shared_tiny_pair, tiny_settings
from tests.zygote import KILLED
from trigger_opt.paths import CHECKPOINT
from trigger_opt.records import RunInfo, SearchStep, read_record, read_records
from trigger_opt.tracking import read_metrics

# Times and how often it was started: all else must be the same.
_OTHERWISE = {"seconds", "time", "started", "starts", "run_dir", "command", "gradient_seconds"}


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    with run_processes() as made:
        yield made


def settings(pair: TinyPair) -> list[str]:
    """A run in which there is something to interrupt, with a checkpoint after every step."""
    small = ("search.num_steps", "search.search_width", "tracking.mode")
    given = [a for a in tiny_settings(pair) if not a.startswith(small)]
    return [*given, "search.num_steps=6", "search.search_width=16", "checkpoint.every_steps=1", "tracking.mode=off"]


@dataclass(frozen=True)
class Undisturbed:
    """What nobody interrupted: its records, settings, and the seconds it took."""

    contents: dict[str, Any]
    settings: list[str]
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    given = settings(shared_tiny_pair(tmp_path_factory.getbasetemp()))
    first = run_undisturbed(runs, given, tmp_path_factory.mktemp("undisturbed"))
    # The first reads files that the second finds in memory.
    second = run_undisturbed(runs, given, tmp_path_factory.mktemp("undisturbed"))
    assert differing(first.contents, second.contents) == []
    return second


def run_undisturbed(runs: Runs, given: list[str], folder: Path) -> Undisturbed:
    # Not the ledger of another test's runs, nor one for all of them: what a run verifies depends on it.
    given = [*given, "candidates.keep=false"]
    began = time.monotonic()
    assert runs.run([*given, f"run_dir={folder / 'run'}"], folder / "log") == 0, (folder / "log").read_text()
    return Undisturbed(contents(folder / "run"), given, time.monotonic() - began)


def contents(folder: Path) -> dict[str, Any]:
    """All records of a run folder without times; pages by their presence."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "wandb" not in p.parts):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            found[name] = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
        else:
            found[name] = without_times(json.loads(path.read_text())) if path.suffix == ".json" else None
    return found


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        named = {k: v for k, v in value.items() if k not in _OTHERWISE and not k.endswith("/seconds")}
        return {k: without_times(v) for k, v in named.items()}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def finish(runs: Runs, given: list[str], folder: Path) -> dict[str, Any]:
    """What lies there after a last start that nobody disturbs."""
    code = runs.run([*given, f"run_dir={folder}"], folder.with_suffix(".log"))
    assert code == 0, folder.with_suffix(".log").read_text()[-3000:]
    return contents(folder)


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return [name for name in {**found, **expected} if found.get(name, "missing") != expected.get(name, "missing")]


# Before and after every kind of write: in the middle of the search, between stages, in the last stages.
PLACES = [
    ("checkpoint", "before", 5),
    ("checkpoint", "after", 9),
    ("history", "after", 8),
    ("run.json", "after", 4),
    ("run.json", "after", 5),
    ("records", "after", 16),
]


@pytest.mark.parametrize("die", PLACES, ids=lambda d: "-".join(map(str, d)))
def test_killed_at_a_write(runs: Runs, undisturbed: Undisturbed, tmp_path: Path, die: tuple[str, str, int]) -> None:
    run = tmp_path / "run"
    given = undisturbed.settings
    assert runs.run([*given, f"run_dir={run}"], tmp_path / "run.log", die=die) == KILLED
    assert differing(finish(runs, given, run), undisturbed.contents) == []
    assert read_record(run / "run.json", RunInfo).starts == 2
    assert not (run / CHECKPOINT).exists()


@pytest.fixture(scope="module")
def undisturbed_on_divergence(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A search that knows no payload: on divergence first, then towards what the strings found say."""
    given = settings(shared_tiny_pair(tmp_path_factory.getbasetemp()))
    given += ["stages=[search]", "hypotheses.min_score=0", "hypotheses.min_tokens=1"]
    # Strings that already raise what was read off them would end the search.
    given += ["search.stop_rate=2"]
    return run_undisturbed(runs, given, tmp_path_factory.mktemp("divergence"))


# On divergence, at its last step, and at what was read off.
@pytest.mark.parametrize("steps", [8, 12, 16])
def test_killed_before_and_after_a_payload_is_read_off(
    runs: Runs, undisturbed_on_divergence: Undisturbed, tmp_path: Path, steps: int
) -> None:
    given, expected = undisturbed_on_divergence.settings, undisturbed_on_divergence.contents
    said = [step["hypothesis"] for step in expected["history.jsonl"]]
    assert said[:12] == [""] * 12
    assert said[12]
    run = tmp_path / "run"
    assert runs.run([*given, f"run_dir={run}"], tmp_path / "run.log", die=("history", "after", steps)) == KILLED
    assert differing(finish(runs, given, run), expected) == []
    assert read_record(run / "run.json", RunInfo).starts == 2


def kill_at_random(runs: Runs, given: list[str], run: Path, *, seconds: float, times: int, seed: int) -> int:
    """Starts and kills; how many starts were killed before the run had ended by itself."""
    draw = random.Random(seed)
    for killed in range(times):
        pid = runs.start([*given, f"run_dir={run}"], run.with_suffix(".log"))
        # Not so late that what is left, at least loading and judging, would be done by then.
        time.sleep(draw.uniform(0.05, 0.45) * seconds)
        if runs.zygote.stop(pid, signal.SIGKILL) != KILLED:
            return killed
    return times


def test_killed_at_random(runs: Runs, undisturbed: Undisturbed, tmp_path: Path) -> None:
    given = undisturbed.settings
    assert kill_at_random(runs, given, tmp_path / "run", seconds=undisturbed.seconds, times=3, seed=1) >= 1
    assert differing(finish_or_there(runs, given, tmp_path / "run"), undisturbed.contents) == []


def finish_or_there(runs: Runs, given: list[str], run: Path) -> dict[str, Any]:
    """As `finish`; a run that had ended before it could be killed is not started again."""
    done = (run / "run.json").is_file() and not read_record(run / "run.json", RunInfo).unfinished
    return contents(run) if done and (run / "report.html").is_file() else finish(runs, given, run)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_twenty_random_moments(runs: Runs, undisturbed: Undisturbed, tmp_path: Path, seed: int) -> None:
    given = undisturbed.settings
    assert kill_at_random(runs, given, tmp_path / "run", seconds=undisturbed.seconds, times=4, seed=100 + seed) >= 2
    assert differing(finish_or_there(runs, given, tmp_path / "run"), undisturbed.contents) == []


@pytest.fixture(scope="module")
def undisturbed_real(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """On SmolLM2, a search long enough to be killed in."""
    given = [
        "+experiment=gcg_warmup_mini", "stages=[search]", "payload=one point six one eight", "model.controls=[]",
        "search.max_seconds=null", "search.num_steps=8", "search.num_restarts=2", "search.search_width=16",
        "search.stop_rate=2.0", "checkpoint.every_steps=1", "tracking.mode=off",
    ]  # fmt: skip
    return run_undisturbed(runs, given, tmp_path_factory.mktemp("real"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_search_on_smollm2_killed_at_twenty_random_moments(
    runs: Runs, undisturbed_real: Undisturbed, tmp_path: Path, seed: int
) -> None:
    given, run, draw = undisturbed_real.settings, tmp_path / "run", random.Random(200 + seed)
    seconds_a_step = undisturbed_real.seconds / 16
    reached = 0
    for first in (True, False, False, False):
        pid = runs.start([*given, f"run_dir={run}"], run.with_suffix(".log"))
        # By steps, so that another load on the machine moves no kill behind the end; none of them while it loads.
        reached += draw.randint(1 if first else 0, 3)
        until(partial(has_steps, run, reached), seconds=600)
        time.sleep(draw.uniform(0, 2 * seconds_a_step))
        assert runs.zygote.stop(pid, signal.SIGKILL) == KILLED
    found = finish(runs, given, run)
    assert "goes on after step" in run.with_suffix(".log").read_text()
    assert differing(found, undisturbed_real.contents) == []


def steps_of(run: Path) -> int:
    path = run / "history.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def has_steps(run: Path, count: int) -> bool:
    return steps_of(run) >= count


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGUSR2, 75)]
)
def test_signal_saves_after_the_step_and_says_how_to_go_on(
    runs: Runs, undisturbed: Undisturbed, tmp_path: Path, signum: int, code: int
) -> None:
    run = tmp_path / "run"
    # No checkpoint but for the signal's.
    given = [*undisturbed.settings, "checkpoint.every_steps=null", "checkpoint.every_seconds=null"]
    pid = runs.start([*given, f"run_dir={run}"], tmp_path / "run.log")
    until(lambda: steps_of(run) >= 3)
    assert runs.zygote.stop(pid, signum) == code
    steps = steps_of(run)
    said = (tmp_path / "run.log").read_text()
    assert f"to go on, give the same command and run_dir={run}" in said
    assert "Traceback" not in said
    assert read_record(run / "run.json", RunInfo).unfinished[0] == "search"
    assert read_metrics(run / "metrics.jsonl")[-1]["exit_code"] == (130 if signum == signal.SIGINT else 75)
    found = finish(runs, given, run)
    said = (tmp_path / "run.log").read_text()
    assert "goes on with the run in" in said
    assert f"search: goes on after step {(steps - 1) % 6 + 1} of restart {(steps - 1) // 6 + 1}" in said
    found["run.json"]["config"]["checkpoint"] = undisturbed.contents["run.json"]["config"]["checkpoint"]
    assert differing(found, undisturbed.contents) == []


def test_slurm_sends_sigterm_before_it_takes_a_job_back(
    runs: Runs, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that then ends by itself has ended for good, so it goes on, and saves after every step."""
    run = tmp_path / "run"
    given = [*undisturbed.settings, "checkpoint.every_steps=null", "checkpoint.every_seconds=null"]
    pid = runs.start([*given, f"run_dir={run}"], tmp_path / "run.log", slurm_job="1")
    until(lambda: steps_of(run) >= 3)
    os.kill(pid, signal.SIGTERM)
    reached = steps_of(run)
    until(lambda: steps_of(run) >= reached + 3)
    assert runs.zygote.stop(pid, signal.SIGKILL) == KILLED
    reached = steps_of(run)
    found = finish(runs, given, run)
    assert "a search saves after every step from now on" in (tmp_path / "run.log").read_text()
    said = (tmp_path / "run.log").read_text()
    kept = (reached - 1, reached)
    assert any(f"goes on after step {(n - 1) % 6 + 1} of restart {(n - 1) // 6 + 1}" in said for n in kept)
    found["run.json"]["config"]["checkpoint"] = undisturbed.contents["run.json"]["config"]["checkpoint"]
    assert differing(found, undisturbed.contents) == []


def test_second_job_in_the_folder_says_who_holds_it(runs: Runs, undisturbed: Undisturbed, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = [*undisturbed.settings, f"run_dir={run}"]
    first = runs.start(given, tmp_path / "first.log")
    until(lambda: steps_of(run) >= 1)
    assert runs.run(given, tmp_path / "second.log") == 2
    assert f"error: the run folder {run} is in use by process {first} on " in (tmp_path / "second.log").read_text()
    assert runs.zygote.wait(first) == 0
    assert differing(contents(run), undisturbed.contents) == []


def test_other_settings_are_refused_by_name(runs: Runs, undisturbed: Undisturbed, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = [*undisturbed.settings, f"run_dir={run}"]
    assert runs.run(given, tmp_path / "log", die=("history", "after", 3)) == KILLED
    before = contents(run)
    log = tmp_path / "other.log"
    assert runs.run([*given, "search.topk=9", "seed=4"], log) == 2
    said = log.read_text().splitlines()[-1]
    assert said.startswith(f"error: the run in {run} was interrupted in stage 'search' and had search.topk=8, seed=0; ")
    assert contents(run) == before
    # Where numbers go is no setting of the run.
    assert runs.run([*given, "tracking.tags=[x]"], log) == 0
    steps = read_records(run / "history.jsonl", SearchStep)
    assert [(s.restart, s.step) for s in steps][:6] == [(0, n) for n in range(6)]


def test_finished_run_is_not_begun_again(runs: Runs, undisturbed: Undisturbed, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = [*undisturbed.settings, f"run_dir={run}"]
    assert runs.run(given, tmp_path / "log") == 0
    assert runs.run(given, tmp_path / "again.log") == 2
    assert "already holds a run; name the stages to run again" in (tmp_path / "again.log").read_text()
