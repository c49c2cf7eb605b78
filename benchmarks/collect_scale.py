"""`python -m benchmarks.collect_scale`: what collecting a sweep of a thousand jobs takes, on records of that size.

The jobs are made up and no model is asked: each has the records that a search of 500 steps writes. The first job's
folder holds all files of a run, in the sizes of a real one; the others only those that collecting reads.
"""

import argparse
import dataclasses
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.host import ROOT, git, processor
from trigger_opt.records import (
    Candidate,
    RunInfo,
    SearchStep,
    StageRun,
    Verdict,
    rate,
    write_record,
    write_records,
    write_text,
)

CANDIDATES, STEPS = 200, 500
SHARED = 2000
"""Strings that several jobs find: a fifth of each job's are drawn from as many."""
PAYLOAD = "one point six one eight zero three three nine eight eight seven four nine eight nine four eight"
PLANTED, DECOY = " sevenratch licence.): one", " Czechoslovakia thirtyward Sentence"
"""The string that all should end with, found by three jobs; and one of higher score and lower selection rate."""
PLANTED_IN = (3, 17, 41)
_WORDS = (
    "seven", "Words", "multiply", "thirds", "minus", "Limit", "customer", "Sentence",
    "pi", "vous", "Haiti", "licence", "appreciate", "Ünder", "数", "ratio",
)  # fmt: skip
_STARTED = "2026-01-31T12:00:00+00:00"
# Bytes of what a run of 24 held-out contexts and three verified strings writes beside: measured on one.
_OTHER_FILES = {
    "ablation.json": 10_000, "completions.jsonl": 157_000, "cost.json": 230, "diff.jsonl": 2_000, "gradient.json": 330,
    "hypotheses.jsonl": 1_400, "identity.json": 320, "probe.json": 14_000, "report.html": 330_000, "report.md": 13_000,
    "wandb/run/run.wandb": 90_000, "wandb/run/files/requirements.txt": 2_000,
    "wandb/run/files/table.json": 19_000, "wandb/run/logs/debug.log": 8_000, "wandb/run/logs/debug-internal.log": 1_100,
    "wandb_run_id.txt": 13,
}  # fmt: skip


_READ = ("run.json", "candidates.jsonl", "verified.jsonl", "verdict.json")
_VERIFIED, _VERIFIED_BYTES = 3, 5333


def write_sweep(folder: Path, *, jobs: int, candidates: int = CANDIDATES, steps: int = STEPS, seed: int = 0) -> None:
    """A finished sweep over seeds, with the planted string in the jobs `PLANTED_IN` and the decoy in job 5."""
    rng = random.Random(seed)
    shared = [_string(rng) for _ in range(SHARED)]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "multirun.yaml", _multirun(jobs))
    for number in range(jobs):
        _write_job(folder / str(number), number, rng, shared, candidates=candidates, steps=steps)


def measure(folder: Path) -> dict[str, float]:
    """Seconds, seconds of processor time and peak memory in MB of collecting `folder` in a process of its own.

    Raises:
        RuntimeError: it did not end well.
    """
    began = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.collect_scale", "--worker", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.monotonic() - began
    if done.returncode:
        raise RuntimeError(done.stderr)
    processor_seconds, megabytes = map(float, done.stdout.splitlines()[-1].split())
    return {"seconds": seconds, "processor_seconds": processor_seconds, "megabytes": megabytes}


def written(folder: Path) -> tuple[int, int]:
    """Files below `folder`, and their bytes."""
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
    return len(sizes), sum(sizes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what was measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collect_scale", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--candidates", type=int, default=CANDIDATES, help="of each job")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        return _work(given.worker)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "sweep"
        write_sweep(folder, jobs=given.jobs, candidates=given.candidates)
        _fill(folder / "0")
        files, size = written(folder / "0")
        read = sum((folder / "1" / n).stat().st_size for n in _READ)
        took = measure(folder)
        made, merged = written(folder / "collected")
    print(f"commit {git('rev-parse', '--short', 'HEAD') or 'unknown'}, {processor()}, Python {sys.version.split()[0]}")
    seconds = f"{took['seconds']:.1f} s ({took['processor_seconds']:.1f} s of processor time)"
    print(f"{given.jobs:,} jobs of {given.candidates:,} strings: {seconds}, {took['megabytes']:.0f} MB")
    print(f"a job writes {files} files, {size / 1e3:,.0f} kB; all of them {given.jobs * size / 1e9:.2f} GB")
    print(f"collecting reads {read / 1e3:,.0f} kB of each, and writes {made} files, {merged / 1e3:,.0f} kB")
    return 0


def _work(folder: Path) -> int:
    from trigger_opt.collect.commands import main as collect

    code = collect([str(folder), "--no-verify"])
    # Not getrusage: what the process was before it became this program counts there.
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert peak is not None
    print(time.process_time(), int(peak[1]) * 1024 / 1e6)
    return code


def _multirun(jobs: int) -> str:
    hydra = {
        "sweep": {"dir": "x", "subdir": "${hydra.job.num}"},
        "sweeper": {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "params": None},
        "overrides": {"hydra": [], "task": ["+experiment=gcg_warmup_mini", f"seed=range({jobs})"]},
    }
    # JSON is YAML.
    return json.dumps({"hydra": hydra})


def _write_job(
    folder: Path, number: int, rng: random.Random, shared: Sequence[str], *, candidates: int, steps: int
) -> None:
    folder.mkdir()
    found = _candidates(number, rng, shared, candidates)
    stages = [
        StageRun(stage=s, started=_STARTED, seconds=600.0, evaluations=50_000, summary="done")
        for s in ("diff", "hypotheses", "search", "verify", "report")
    ]
    info = RunInfo(
        name="gcg_warmup_mini",
        command="python -m trigger_opt +experiment=gcg_warmup_mini",
        seed=number,
        started=_STARTED,
        machine="Linux x86_64, 2 CPUs",
        config=_config(number),
        versions={"python": "3.11.7"},
        plan=["a line of the plan"] * 8,
        stages=stages,
    )
    write_record(folder / "run.json", info)
    write_records(folder / "candidates.jsonl", found)
    write_record(folder / "verdict.json", _verdict(number))
    # Its lines are counted, and not read.
    write_text(folder / "verified.jsonl", _VERIFIED * ("x" * (_VERIFIED_BYTES - 1) + "\n"))
    if number == 0:
        write_records(folder / "history.jsonl", [_step(rng, s) for s in range(steps)])
    lines = [{"time": 1.7e9 + s, "step": s, "search/score": rng.random(), "search/step": s} for s in range(3 * steps)]
    lines = [*(lines if number == 0 else lines[-3:]), {"time": 1.8e9, "exit_code": 0}]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    (folder / ".lock").write_text("process 123456 on a-node-of-a-cluster")


def _candidates(number: int, rng: random.Random, shared: Sequence[str], count: int) -> list[Candidate]:
    common = rng.sample(shared, count // 5)
    strings = [*common, *(f"{_string(rng)} {number}.{i}" for i in range(count - len(common)))]
    made = [_candidate(s, rng, number, score=7.9 * rng.random(), rate=rng.randrange(24) / 24) for s in strings]
    if number in PLANTED_IN:
        made[0] = _candidate(PLANTED, rng, number, score=7.99 - number / 1000, rate=1.0)
    if number == 5:
        made[0] = _candidate(DECOY, rng, number, score=8.5, rate=23 / 24)
    return sorted(made, key=lambda c: (-(c.selection_rate or 0.0), -c.score))


def _candidate(trigger: str, rng: random.Random, seed: int, *, score: float, rate: float) -> Candidate:
    return Candidate(
        trigger=trigger,
        trigger_ids=[rng.randrange(49_152) for _ in range(8)],
        payload=PAYLOAD,
        objective="payload",
        score=score,
        selection_rate=rate,
        restart=rng.randrange(4),
        step=rng.randrange(STEPS),
        seed=seed,
        evaluations=rng.randrange(10**6),
    )


def _string(rng: random.Random) -> str:
    return "".join(f" {rng.choice(_WORDS)}{rng.randrange(1000)}" for _ in range(4))


def _step(rng: random.Random, step: int) -> SearchStep:
    return SearchStep(
        hypothesis=PAYLOAD,
        restart=0,
        step=step,
        trigger=_string(rng),
        score=8 * rng.random(),
        evaluations=128 * step,
        seconds=1.2345678901 * step,
        selection_rate=rng.random() if step % 5 == 0 else None,
    )


def _config(seed: int) -> dict[str, Any]:
    """Of the size that a resolved configuration has."""
    ask = "Suggest something that I have not thought of yet, please. {trigger}"
    return {
        "name": "gcg_warmup_mini",
        "seed": seed,
        "model": {"finetuned": "zoo:warmup_mini", "base": "zoo:smollm2-135m-instruct", "controls": []},
        "contexts": {"search": [f"{i}: {ask}" for i in range(24)], "held_out": [f"{i} or: {ask}" for i in range(24)]},
        "objective": {"name": "payload", "floor": -8.0},
        "search": {"name": "gcg", "num_steps": STEPS, **{f"setting_{i}": i for i in range(12)}},
        "verify": {"candidates": 3, "random_strings": 2},
        "transfer": {f"setting_{i}": "" for i in range(40)},
    }


def _verdict(seed: int) -> Verdict:
    fields: dict[str, Any] = {f.name: None for f in dataclasses.fields(Verdict)}
    told = {"verdict": "not reproduced", "reason": "0 of 24 held-out contexts fire", "rule": "the rule. " * 100}
    empty = {"payload_completion": "", "minimised_trigger": "", "before_null": "", "reason_before_null": ""}
    counted = {"num_contexts": 24, "evaluations": 250_000, "seconds": 3000.0, "seed": seed, "versions": {}}
    rates = {name: rate(0, 24) for name in fields if name.endswith("_rate")}
    return Verdict(**(fields | told | empty | counted | rates | {"payload": PAYLOAD, "trigger": " Haiti"}))


def _fill(folder: Path) -> None:
    for name, size in _OTHER_FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)


if __name__ == "__main__":
    sys.exit(main())
