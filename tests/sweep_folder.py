"""Sweep folders made of records alone: jobs in every state, and what a command line printed about them."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.test_report import a_verdict
from trigger_opt.collect.commands import main
from trigger_opt.records import Candidate, NullControl, RunInfo, StageRun, write_record, write_records

LONG_AGO = 3600.0


def a_candidate(trigger: str, **changes: Any) -> Candidate:
    """One found in restart 1, step 20, toward "hello there"."""
    fields: dict[str, Any] = {
        "trigger_ids": [1, 2], "payload": "hello there", "objective": "payload", "score": 5.0, "selection_rate": 0.5,
        "restart": 1, "step": 20, "seed": 0, "evaluations": 100,
    }  # fmt: skip
    return Candidate(trigger=trigger, **(fields | changes))


def a_stage(stage: str, summary: str = "done", seconds: float = 2.5) -> StageRun:
    """One of 100 evaluations."""
    return StageRun(stage=stage, started="2026-01-01T00:00:00+00:00", seconds=seconds, evaluations=100, summary=summary)


def a_control(name: str, score: float | None, verdict: str = "unstable") -> NullControl:
    """One that a job searched for its null."""
    return NullControl(
        name=name, folder=name, kind="twin", score=score, verdict=verdict, trigger="t", payload="p", trigger_rate=None,
        seconds=1.0, note="",
    )  # fmt: skip


def a_config(**changes: Any) -> dict[str, Any]:
    """The parts of a resolved configuration that are looked at here."""
    config: dict[str, Any] = {
        "name": "x",
        "seed": 0,
        "model": {"finetuned": "zoo:a", "base": "zoo:b"},
        "contexts": {"search": ["{trigger} a"], "held_out": ["{trigger} b"]},
        "objective": {"name": "payload", "floor": -8.0},
        "verify": {"candidates": 3, "random_strings": 2},
    }
    return config | changes


def write_plan(sweep_dir: Path, *overrides: str, **hydra: Any) -> None:
    """A multirun.yaml as Hydra leaves it, in what matters; JSON is YAML."""
    part: dict[str, Any] = {
        "sweep": {"dir": str(sweep_dir), "subdir": "${hydra.job.num}"},
        "sweeper": {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "params": None},
        "overrides": {"hydra": [], "task": list(overrides)},
        "runtime": {"config_sources": [{"path": "hydra.conf", "schema": "pkg", "provider": "hydra"}]},
    }
    sweep_dir.mkdir(parents=True, exist_ok=True)
    (sweep_dir / "multirun.yaml").write_text(json.dumps({"hydra": part | hydra}))


def write_job(
    folder: Path,
    *,
    candidates: Sequence[Candidate] | None = None,
    stages: Sequence[StageRun] = (a_stage("search"),),
    unfinished: Sequence[str] = (),
    metrics: Sequence[dict[str, Any]] = ({"exit_code": 0},),
    age: float = LONG_AGO,
    verdict: dict[str, Any] | None = None,
    **info: Any,
) -> None:
    """A job's folder; all its files were last changed `age` seconds ago, the metrics after run.json."""
    folder.mkdir(parents=True)
    fields: dict[str, Any] = {
        "name": "x", "command": "python -m trigger_opt seed=0", "seed": 0, "started": "s", "machine": "m",
        "config": a_config(), "versions": {"python": "3.11"}, "plan": [],
    }  # fmt: skip
    write_record(folder / "run.json", RunInfo(**(fields | info), stages=list(stages), unfinished=list(unfinished)))
    if candidates is not None:
        write_records(folder / "candidates.jsonl", candidates)
    if verdict is not None:
        write_record(folder / "verdict.json", a_verdict(**verdict))
    if metrics:
        (folder / "metrics.jsonl").write_text("".join(json.dumps({"time": 1.0, **m}) + "\n" for m in metrics))
    set_age(folder, age)
    if metrics:
        # As the last file a process writes.
        _age(folder / "metrics.jsonl", age - 1)


def set_age(folder: Path, seconds: float) -> None:
    """All files of a folder were last changed so long ago."""
    for path in folder.iterdir():
        _age(path, seconds)


def _age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


@dataclass(frozen=True)
class Collected:
    """What `trigger-opt collect` left."""

    code: int
    out: list[str]
    err: str

    @property
    def error(self) -> str:
        """The one line of a mistake; fails where there is more or other."""
        assert (self.code, self.out) == (2, []), (self.code, self.out, self.err)
        assert self.err.splitlines()[-1].startswith("error: "), self.err
        assert "Traceback" not in self.err
        return self.err.splitlines()[-1].removeprefix("error: ")

    def row(self, job: str) -> list[str]:
        """The cells of a job's line in the table."""
        (line,) = [line for line in self.out[1:] if line.split("  ")[0] == job]
        return [cell for cell in line.split("  ") if cell]

    @property
    def commands(self) -> list[str]:
        """The command lines printed."""
        return [line for line in self.out if line.startswith(("python ", "mv "))]


class Collector:
    """`trigger-opt collect …` inside this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> Collected:
        self._capsys.readouterr()
        code = main([str(a) for a in arguments])
        printed = self._capsys.readouterr()
        return Collected(code, printed.out.split("\n")[:-1], printed.err)
