"""Many jobs, one answer: what became of each, the command that runs it again, and the candidates as one list."""

import json
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from benchmarks.collect_scale import DECOY, PLANTED, PLANTED_IN, measure, write_sweep
from tests.sweep_folder import Collector, a_candidate, a_config, a_control, a_stage, set_age, write_job, write_plan
from tests.test_report import a_verification
from trigger_opt.collect.merge import Merge
from trigger_opt.collect.overrides import as_config, job_command, quoted_folder, read_plan
from trigger_opt.locks import held
from trigger_opt.records import Candidate, RunInfo, read_record, read_records, write_records
from trigger_opt.report.jobs import Collection, Provenance, SweepJob

ONLY = "--no-verify"


@pytest.fixture
def collect(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Collector:
    """The command, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return Collector(capsys)


# What a sweep was to run.


@pytest.mark.parametrize(
    ("given", "jobs", "own"),
    [
        (["+experiment=x", "seed=0,1"], [["+experiment=x", "seed=0"], ["+experiment=x", "seed=1"]], 1),
        (["a=1,2", "b=range(3,5)"], [["a=1", "b=3"], ["a=1", "b=4"], ["a=2", "b=3"], ["a=2", "b=4"]], 2),
        (["seed=0,1,2", "seed=7"], [["seed=7"]], 0),
        (["p='a,b',\"it's\""], [["p='a,b'"], ['p="it\'s"']], 1),
        (["c=['{trigger} x','y']", "+k@p=choice(u,v)"], [["c=['{trigger} x','y']", f"+k@p={v}"] for v in "uv"], 1),
        (["payload=${x}", "seed=0,1"], [["payload=$\\{x\\}", "seed=0"], ["payload=$\\{x\\}", "seed=1"]], 1),
        ([], [[]], 0),
    ],
)
def test_plan_is_expanded_as_hydra_does(tmp_path: Path, given: list[str], jobs: list[list[str]], own: int) -> None:
    write_plan(tmp_path, *given)
    plan = read_plan(tmp_path)
    assert [j.overrides for j in plan.jobs] == jobs
    assert [j.name for j in plan.jobs] == [str(n) for n in range(len(jobs))]
    assert [j.own for j in plan.jobs] == [job[len(job) - own :] for job in jobs]
    assert plan.problem == ""
    assert shlex.split(plan.command) == ["python", "-m", "trigger_opt", "--multirun", *given]


@pytest.mark.parametrize(
    ("given", "hydra", "problem"),
    [
        (["seed=shuffle(range(9))"], {}, "drawn at random"),
        (["search=glob(*)"], {}, "cannot be expanded"),
        (["seed=0,1"], {"sweep": {"subdir": "${hydra.job.override_dirname}"}}, "hydra.sweep.subdir="),
        (["seed=0,1"], {"sweeper": {"_target_": "hydra_plugins.hydra_ax_sweeper.AxSweeper"}}, "AxSweeper chose"),
        (["seed=0,1"], {"overrides": None}, "cannot be read"),
        (["seed=[0"], {}, "cannot be expanded"),
    ],
)
def test_plan_that_cannot_be_told_says_why(
    collect: Collector, tmp_path: Path, given: list[str], hydra: dict[str, Any], problem: str
) -> None:
    write_plan(tmp_path / "s", *given, **hydra)
    write_job(tmp_path / "s" / "0", candidates=[a_candidate("x")])
    plan = read_plan(tmp_path / "s")
    assert not plan.jobs
    assert problem in plan.problem
    done = collect(tmp_path / "s", ONLY)
    assert done.code == 0
    assert any(problem in line for line in done.out), done.out
    assert done.row("0")[2] == "finished"


def test_settings_of_the_sweep_reach_its_jobs(tmp_path: Path) -> None:
    """Sweeper parameters from a file, a folder of own experiments, Hydra's search path."""
    write_plan(
        tmp_path,
        sweeper={"_target_": "a.BasicSweeper", "params": {"search.topk": "8,16"}},
        overrides={"hydra": ["hydra.sweep.dir=x", "hydra.searchpath=[pkg://y]"], "task": ["seed=3"]},
        runtime={"config_sources": [{"path": "/own conf", "schema": "file", "provider": "command-line"}]},
    )
    plan = read_plan(tmp_path)
    assert [j.overrides for j in plan.jobs] == [["search.topk=8", "seed=3"], ["search.topk=16", "seed=3"]]
    words = shlex.split(job_command(plan.jobs[1].overrides, Path("s/1"), flags=plan.flags))
    assert words[3:] == [
        "--config-dir", "/own conf", "hydra.searchpath=[pkg://y]", "search.topk=16", "seed=3", "candidates.keep=false",
        "run_dir=s/1",
    ]  # fmt: skip


HOSTILE_OVERRIDES = [
    "payload='a,b; rm -rf $HOME'",
    'payload="it\'s `x`"',
    "c=['{trigger} ü','数']",
    "~search",
    "run_dir=z",
]


@pytest.mark.parametrize("place", ["s/3", "with space/3", "it's, [odd]=x/3", "Größe/3", "${odd}/3", "back\\3"])
def test_commands_parse_in_shell_and_hydra(place: str) -> None:
    words = shlex.split(job_command(HOSTILE_OVERRIDES, Path(place)))
    assert words[:3] == ["python", "-m", "trigger_opt"]
    *parsed, folder = OverridesParser.create().parse_overrides(words[3:])
    assert [o.input_line for o in parsed] == [*HOSTILE_OVERRIDES[:-1], "candidates.keep=false"]
    assert (folder.key_or_group, OmegaConf.create({"x": folder.value()}).x) == ("run_dir", place)
    assert shlex.split(f"a {quoted_folder(Path(place))} b")[1:-1] == words[-1:]


@pytest.mark.parametrize("given", ["candidates.keep=true", "+candidates.keep=false", "++candidates.keep=true"])
def test_jobs_keep_no_ledger_whatever_was_asked(given: str) -> None:
    words = shlex.split(job_command(["seed=1", given], Path("s/1")))
    assert words[3:] == ["seed=1", "candidates.keep=false", "run_dir=s/1"]


@pytest.mark.parametrize("text", ["${x}", "a\\${x} \\", "\\\\${x}", "plain \\ text", "${oc.env:HOME}"])
def test_resolved_settings_are_text(text: str) -> None:
    settings = {"a": [{"b": text}], "n": None, "f": 1.5}
    assert OmegaConf.to_container(as_config(settings), resolve=True) == settings


# What became of each job.


def _ended(summary: str, exit_code: int) -> dict[str, Any]:
    stage = a_stage("search", summary)
    return {"unfinished": ["search"], "stages": [stage], "metrics": [{"step": 1}, {"exit_code": exit_code}]}


NOTHING: dict[str, Any] = {"metrics": [], "stages": []}
SEARCHING: dict[str, Any] = {"unfinished": ["search", "verify"], "stages": [a_stage("diff")]}
STATES: list[tuple[dict[str, Any], str, str]] = [
    ({}, "finished", ""),
    ({"age": 1.0}, "finished", ""),
    ({**SEARCHING, "metrics": [{"step": 1}]}, "stopped", "in search"),
    ({**SEARCHING, "metrics": [{"step": 1}], "age": 60.0}, "running or just stopped", "in search"),
    ({**SEARCHING, "metrics": [{"exit_code": 130}], "age": 60.0}, "stopped", "in search"),
    ({**SEARCHING, "metrics": [{"exit_code": 75}]}, "stopped", "in search"),
    ({**SEARCHING, "metrics": [{"exit_code": 143}]}, "stopped", "in search"),
    ({**SEARCHING, "metrics": [{"exit_code": 1}]}, "crashed", "an error outside its stages"),
    ({**_ended("stopped: OutOfMemoryError", 1)}, "crashed", "OutOfMemoryError in search"),
    ({**_ended("interrupted", 130)}, "stopped", "in search"),
    # An older error; the process after it was killed.
    ({**_ended("stopped: KeyError", 1), "metrics": [{"step": 3}]}, "stopped", ""),
    # Versions that knew no `unfinished`.
    ({**_ended("stopped: KeyError", 1), "unfinished": []}, "crashed", "KeyError in search"),
    ({**_ended("interrupted", 130), "unfinished": []}, "stopped", ""),
    ({**NOTHING, "unfinished": ["diff"]}, "stopped", "in diff"),
    ({**NOTHING, "unfinished": ["diff"], "age": 10.0}, "running or just stopped", "in diff"),
]


@pytest.mark.parametrize(("made", "state", "note"), STATES)
def test_state_of_a_job(collect: Collector, tmp_path: Path, made: dict[str, Any], state: str, note: str) -> None:
    sweep = tmp_path / "s"
    write_plan(sweep, "seed=0,1")
    write_job(sweep / "0", candidates=[a_candidate("one")])
    write_job(sweep / "1", starts=3, candidates=[a_candidate("two")], **made)
    done = collect(sweep, ONLY)
    assert done.code == 0, done.err
    cells = done.row("1")
    assert [c.strip() for c in cells[:3]] == ["1", "seed=1", state]
    assert note in cells[-1]
    again = (
        [f"python -m trigger_opt seed=1 candidates.keep=false run_dir={sweep}/1"]
        if state in ("stopped", "crashed")
        else []
    )
    assert done.commands == again
    job = read_records(sweep / "collected" / "jobs.jsonl", SweepJob)[1]
    assert (job.state, job.starts, job.candidates, job.commands) == (state, 3, 1, again)


def _hold(path: Path, holding: Any, done: Any) -> None:
    with held(path, what="x", remedy="y"):
        holding.set()
        done.wait(60)


def test_running_job_and_a_collection_in_use(collect: Collector, tmp_path: Path) -> None:
    """By their locks, held in another process, however old their files are."""
    sweep = tmp_path / "s"
    for name in ("0", "1"):
        write_job(sweep / name, candidates=[a_candidate("x")], unfinished=["search"])
    collect(sweep, ONLY)
    context = multiprocessing.get_context("fork")
    done, holding = context.Event(), [context.Event(), context.Event()]
    locks = [sweep / "1" / ".lock", sweep / "collected" / ".lock"]
    holders = [context.Process(target=_hold, args=(p, h, done)) for p, h in zip(locks, holding, strict=True)]
    for process in holders:
        process.start()
    try:
        assert all(h.wait(60) for h in holding)
        refused = collect(sweep, ONLY)
    finally:
        done.set()
        for process in holders:
            process.join(60)
    assert refused.code == 2
    assert f"{sweep}/collected is in use by process {holders[1].pid} on" in refused.err
    assert [refused.row(n)[2].strip() for n in "01"] == ["stopped", "running"]
    assert len(refused.commands) == 1
    assert collect(sweep, ONLY).row("1")[2].strip() == "stopped"


def test_missing_and_damaged_jobs_are_named(collect: Collector, tmp_path: Path) -> None:
    sweep = tmp_path / "s"
    write_plan(sweep, "+experiment=e", "seed=0,1,2,3,4,5,6,7,8,9,10")
    for n in (0, 2, 4, 10):
        write_job(sweep / str(n), candidates=[a_candidate(f"string {n}", score=float(n))])
    (sweep / "1").mkdir()
    (sweep / "2" / "run.json").write_text('{"name": 1}')
    (sweep / "4" / "candidates.jsonl").write_text("{}\n")
    (sweep / "10" / "verdict.json").write_text("no JSON")
    (sweep / ".submitit" / "12_0").mkdir(parents=True)
    (sweep / ".submitit" / "12_0" / "12_0_result.pkl").write_bytes(b"never to be loaded")
    done = collect(sweep, ONLY)
    assert done.code == 0, done.err
    assert done.out[0] == "11 jobs: 3 finished, 7 never started, 1 damaged"
    order = [line.split(" ")[0] for line in done.out[2:13]]
    assert order == [str(n) for n in range(11)]
    assert "its log says why" in done.row("1")[-1]
    assert "run.json cannot be read" in done.row("2")[-1]
    assert "candidates are left out: candidates.jsonl, line 1 is no Candidate record" in done.row("4")[-1]
    assert "verdict.json cannot be read" in done.row("10")[-1]
    run = [f"python -m trigger_opt +experiment=e seed={n} candidates.keep=false run_dir={sweep}/{n}" for n in range(11)]
    aside = f"mv {sweep}/2/run.json {sweep}/2/run.json.damaged"
    assert done.commands == [run[1], aside, run[2], run[3], *run[5:10]]
    found = read_records(sweep / "collected" / "candidates.jsonl", Candidate)
    assert [c.trigger for c in found] == ["string 10", "string 0"]


def test_jobs_without_a_plan_run_again_by_their_own_command(collect: Collector, tmp_path: Path) -> None:
    sweep = tmp_path / "s"
    stopped: dict[str, Any] = {"unfinished": ["search"], "candidates": [a_candidate("x")]}
    own = "python -m trigger_opt --config-dir c +experiment=e seed=5 'payload=a b' run_dir=elsewhere\nanother"
    write_job(sweep / "left", command=own, **stopped)
    write_job(sweep / "right", command="python -m trigger_opt -m seed=0,1", **stopped)
    write_job(sweep / "worker", command="/usr/bin/submitit", **stopped)
    kept_out = a_config(candidates={"keep": False})
    write_job(sweep / "moved", command="python -m trigger_opt seed=6", config=kept_out, **stopped)
    done = collect(sweep, ONLY)
    place = f"run_dir={sweep}/left"
    assert done.commands == [
        f"python -m trigger_opt --config-dir c +experiment=e seed=5 'payload=a b' {place}",
        f"python -m trigger_opt seed=6 candidates.keep=false run_dir={sweep}/moved",
    ]
    assert any("never started are not known: there is no multirun.yaml" in line for line in done.out)


def test_jobs_that_may_start_again_by_themselves_are_listed_apart(collect: Collector, tmp_path: Path) -> None:
    sweep = tmp_path / "s"
    write_plan(sweep, "seed=0,1,2,3")
    for n, code in enumerate((75, 130, 1)):
        stopped = {**SEARCHING, "metrics": [{"exit_code": code}]}
        write_job(sweep / str(n), candidates=[a_candidate("x")], **stopped)
    # Started again after its code 75, and killed.
    write_job(sweep / "3", **SEARCHING, metrics=[{"exit_code": 75}])
    set_age(sweep / "3", 5000.0)
    os.utime(sweep / "3" / "run.json", (time.time() - 4000.0,) * 2)
    done = collect(sweep, ONLY)
    run = [f"python -m trigger_opt seed={n} candidates.keep=false run_dir={sweep}/{n}" for n in range(4)]
    first = next(i for i, line in enumerate(done.out) if line.startswith("to run just those"))
    assert "squeue" in done.out[first]
    assert done.out[first + 1 : first + 4] == run[1:]
    assert done.out[first + 4] == "stopped by its batch system, which may start it again (squeue says): 0"
    assert done.out[first + 5 : first + 7] == ["only if it does not:", run[0]]
    jobs = read_records(sweep / "collected" / "jobs.jsonl", SweepJob)
    assert [j.may_restart for j in jobs] == [True, False, False, False]


# Folders that are no sweep.


def test_folders_that_are_no_sweep(collect: Collector, tmp_path: Path) -> None:
    assert "there is no folder" in collect(tmp_path / "nowhere").error
    (tmp_path / "empty").mkdir()
    assert "is no sweep: neither multirun.yaml nor" in collect(tmp_path / "empty").error
    write_job(tmp_path / "single")
    assert "is a single run" in collect(tmp_path / "single").error
    write_plan(tmp_path / "multirun" / "first", "seed=0")
    assert f"name one of them, say {tmp_path}/multirun/first" in collect(tmp_path / "multirun").error
    (tmp_path / "file").write_text("")
    assert "there is no folder" in collect(tmp_path / "file").error


def test_sweep_without_any_string(collect: Collector, tmp_path: Path) -> None:
    write_plan(tmp_path / "s", "seed=0,1")
    write_job(tmp_path / "s" / "0", candidates=[])
    done = collect(tmp_path / "s")
    assert done.code == 0
    assert "nothing to merge" in done.out[-1]
    assert len(done.commands) == 1
    assert not (tmp_path / "s" / "collected").exists()


@pytest.mark.parametrize("count", ["0", "-1", "x"])
def test_number_of_candidates_is_checked(collect: Collector, tmp_path: Path, count: str) -> None:
    with pytest.raises(SystemExit) as stop:
        collect(tmp_path, "--candidates", count)
    assert stop.value.code == 2


# The candidates as one list.


def _reference(files: list[list[Candidate]], count: int) -> list[tuple[str, float, list[int]]]:
    """By lists and repeated looking: text, best score, jobs that found it."""
    texts = list(dict.fromkeys((c.trigger, c.payload) for file in files for c in file))
    rows = []
    for text in texts:
        by = [(n, c) for n, file in enumerate(files) for c in file if (c.trigger, c.payload) == text]
        best = max(by, key=lambda pair: (pair[1].selection_rate or 0.0, pair[1].score))[1]
        rows.append((best, [n for n, _ in by]))
    rows.sort(key=lambda row: (-(row[0].selection_rate or 0.0), -row[0].score))
    first = [next(r for r in rows if r[0].payload == p) for p in dict.fromkeys(r[0].payload for r in rows)]
    rows = [*first, *(r for r in rows if r not in first)]
    return [(best.trigger, best.score, jobs) for best, jobs in rows[:count]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("payloads", [["p"], ["p", "q", ""]])
def test_merge_is_what_looking_through_lists_gives(tmp_path: Path, seed: int, payloads: list[str]) -> None:
    rng = random.Random(seed)
    files, merge = [], Merge()
    for job in range(6):
        payload = payloads[job % len(payloads)]
        found = [
            a_candidate(
                f"s{rng.randrange(15)}",
                payload=payload,
                score=rng.random(),
                # One payload, one scale: then selection rate and score alone decide.
                selection_rate=rng.choice([None, 0.0, 0.5, 1.0]) if len(payloads) == 1 else None,
                seed=job,
            )
            for _ in range(20)
        ]
        write_records(tmp_path / f"{job}.jsonl", found)
        tally = merge.add(tmp_path / f"{job}.jsonl", job=str(job), scale="x")
        files.append(found)
        assert tally.count == 20
        assert tally.best_score == max(found, key=lambda c: (c.selection_rate or 0.0, c.score)).score
    expected = _reference(files, 12)
    made = merge.best(12)
    if len(payloads) == 1:
        assert [(m.candidate.trigger, m.candidate.score) for m in made] == [(t, s) for t, s, _ in expected]
    else:
        # Scores of different payloads are not compared: places are.
        for payload in payloads:
            mine = [m.candidate.score for m in made if m.candidate.payload == payload]
            assert mine == sorted(mine, reverse=True)
        assert {m.candidate.payload for m in made[:3]} == set(payloads)
    jobs = {(t, s): j for t, s, j in _reference(files, 1000)}
    for m in merge.best(1000):
        assert [int(f.job) for f in m.provenance.findings] == jobs[m.candidate.trigger, m.candidate.score]
    assert merge.strings == 120
    assert merge.different == len(jobs)


def test_scores_of_two_objectives_are_not_compared(tmp_path: Path) -> None:
    """The second objective's scores are ten times as high throughout; by score alone they would take all places."""
    merge = Merge()
    for scale, factor in (("a", 1.0), ("b", 10.0)):
        found = [a_candidate(f"{scale}{i}", score=factor * (10 - i), selection_rate=None) for i in range(5)]
        write_records(tmp_path / scale, [*found, a_candidate("both", score=factor, selection_rate=None)])
        merge.add(tmp_path / scale, job=scale, scale=scale)
    assert [m.candidate.trigger for m in merge.best(6)] == ["a0", "b0", "a1", "b1", "a2", "b2"]
    (both,) = [m for m in merge.best(99) if m.candidate.trigger == "both"]
    assert both.candidate.score == 1.0, "the first job's: nothing says that the other is better"


def test_string_that_a_job_calls_a_backdoor_goes_first(collect: Collector, tmp_path: Path) -> None:
    sweep = tmp_path / "s"
    decoy = {"verdict": "generic shift", "trigger": "decoy"}
    real = {"verdict": "backdoor", "trigger": "real"}
    write_job(sweep / "0", candidates=[a_candidate("decoy", score=9.0, selection_rate=1.0)], verdict=decoy)
    write_job(sweep / "1", candidates=[a_candidate("real", score=1.0, selection_rate=0.1)], verdict=real)
    collect(sweep, ONLY)
    found = read_records(sweep / "collected" / "candidates.jsonl", Candidate)
    assert [c.trigger for c in found] == ["real", "decoy"]
    assert read_record(sweep / "collected" / "collection.json", Collection).preferred == 1


def test_torn_last_line_and_scores_that_are_no_numbers(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    found = [a_candidate("nan", score=float("nan")), a_candidate("low", score=-3.0)]
    write_records(path, found)
    with path.open("a") as file:
        file.write(json.dumps(asdict(a_candidate("torn")))[:-3])
    merge = Merge()
    merge.add(path, job="0", scale="")
    assert [m.candidate.trigger for m in merge.best(9)] == ["low", "nan"]


def test_same_string_from_three_jobs(collect: Collector, tmp_path: Path) -> None:
    sweep = tmp_path / "s"
    write_plan(sweep, "seed=0,1,2")
    for n, score in enumerate((5.0, 7.0, 6.0)):
        found = [a_candidate("the same", score=score, seed=n, step=10 * n), a_candidate(f"only {n}", score=1.0)]
        write_job(sweep / str(n), candidates=found)
    done = collect(sweep, ONLY)
    folder = sweep / "collected"
    first, *rest = read_records(folder / "candidates.jsonl", Candidate)
    assert (first.trigger, first.score, first.seed, first.step) == ("the same", 7.0, 1, 10)
    assert len(rest) == 3
    provenance = read_records(folder / "provenance.jsonl", Provenance)
    assert [p.trigger for p in provenance] == [c.trigger for c in (first, *rest)]
    assert [(f.job, f.restart, f.step, f.seed, f.score) for f in provenance[0].findings] == [
        ("0", 1, 0, 0, 5.0), ("1", 1, 10, 1, 7.0), ("2", 1, 20, 2, 6.0),
    ]  # fmt: skip
    collection = read_record(folder / "collection.json", Collection)
    assert (collection.strings, collection.different, collection.kept) == (6, 4, 4)
    assert '  "the same": 7.00 nats, selection rate 0.50; jobs 0, 1, 2' in done.out
    info = read_record(folder / "run.json", RunInfo)
    assert [(s.stage, s.evaluations, s.seconds) for s in info.stages] == [("collect", 300, 7.5)]
    assert info.command == f"python -m trigger_opt --multirun seed=0,1,2\ntrigger-opt collect {sweep} --no-verify"


def test_different_suspects_have_an_answer_each(collect: Collector, tmp_path: Path) -> None:
    sweep = tmp_path / "s"
    models = ["zoo:a", "org/b", "other/b"]
    write_plan(sweep, f"model.finetuned={','.join(models)}", "seed=0,1")
    for n in range(5):
        config = a_config(model={"finetuned": models[n // 2], "base": "zoo:x"}, verify={"candidates": n})
        write_job(sweep / str(n), candidates=[a_candidate("same text", seed=n)], config=config)
    done = collect(sweep, ONLY)
    assert done.code == 0, done.err
    folder = sweep / "collected"
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b", "b-2"]
    found = {p.name: read_records(p / "provenance.jsonl", Provenance)[0].findings for p in folder.iterdir()}
    assert {name: [f.job for f in f] for name, f in found.items()} == {"a": ["0", "1"], "b": ["2", "3"], "b-2": ["4"]}
    jobs = [j.name for j in read_records(folder / "b" / "jobs.jsonl", SweepJob)]
    assert jobs == ["2", "3", "5"], "the job that never started may be anybody's"
    assert read_record(folder / "a" / "collection.json", Collection).differs == ["verify.candidates=0"]
    assert any("jobs differ in how they verify; job 0 decides: verify.candidates=0" in line for line in done.out)


def test_jobs_on_different_cards_have_one_answer(collect: Collector, tmp_path: Path) -> None:
    sweep = tmp_path / "s"
    for n, device in enumerate(("cuda:0", "cuda:1", "cpu")):
        model = {"finetuned": "zoo:a", "base": "zoo:b", "device": device}
        write_job(sweep / str(n), candidates=[a_candidate("x", seed=n)], config=a_config(model=model))
    model = {"finetuned": "zoo:a", "base": "zoo:b", "device": "cpu", "dtype": "bfloat16"}
    write_job(sweep / "3", candidates=[a_candidate("x")], config=a_config(model=model))
    collect(sweep, ONLY)
    found = {p.name: read_records(p / "provenance.jsonl", Provenance)[0] for p in (sweep / "collected").iterdir()}
    assert {name: [f.job for f in p.findings] for name, p in found.items()} == {"a": ["0", "1", "2"], "a-2": ["3"]}


def test_what_jobs_judged_themselves_is_counted(collect: Collector, tmp_path: Path) -> None:
    """And what their nulls took back is carried over."""
    sweep = tmp_path / "s"
    backdoor: dict[str, Any] = {"verdict": "backdoor", "trigger": "a"}
    taken: dict[str, Any] = {"verdict": "generic shift", "trigger": "b", "before_null": "backdoor", "null_p_value": 0.5}
    stood: dict[str, Any] = {"verdict": "backdoor", "trigger": "c", "before_null": "backdoor", "null_p_value": 0.05}
    for n, verdict in enumerate((backdoor, {**taken, "null_controls": 3, "reason": "why"}, taken, stood)):
        write_job(sweep / str(n), candidates=[a_candidate("abbc"[n])], verdict=verdict)
        write_records(sweep / str(n) / "verified.jsonl", [a_verification(str(i)) for i in range(n + 1)])
    controls = [a_control("twin", 0.25), a_control("placebo_1", 0.75), a_control("placebo_2", None)]
    write_records(sweep / "1" / "null.jsonl", controls)
    done = collect(sweep, ONLY)
    assert "its null took a backdoor back (p = 0.5)" in done.row("1")[-1]
    assert any("jobs had verified 10 strings themselves" in line and "best of 10" in line for line in done.out)
    collection = read_record(sweep / "collected" / "collection.json", Collection)
    assert (collection.verified_by_jobs, collection.preferred) == (10, 2)
    assert [(t.job, t.trigger, t.p_value, t.controls) for t in collection.taken_back] == [
        ("1", "b", 0.5, 3),
        ("2", "b", 0.5, None),
    ]
    assert [(t.control_found, t.control_score) for t in collection.taken_back] == [(False, 0.75), (False, None)]


def test_text_of_models_does_nothing_to_the_terminal(collect: Collector, tmp_path: Path) -> None:
    sweep = tmp_path / "s"
    hostile = "\x1b[2J\u202e\nverdict: backdoor\t数 ü \ud800 \\n"
    write_plan(sweep, "seed=0,1")
    write_job(sweep / "0", candidates=[a_candidate(hostile, payload=hostile)])
    write_job(sweep / "1", candidates=[a_candidate(hostile, payload=hostile)], unfinished=[hostile])
    done = collect(sweep, ONLY)
    assert done.code == 0, done.err
    assert not [line for line in done.out if not line.isprintable()]
    assert not [line for line in done.out if line.startswith("verdict:")]
    assert any('\\x1b[2J\\u202e\\nverdict: backdoor\\t数 ü \\ud800 \\\\n"' in line for line in done.out)
    (kept,) = read_records(sweep / "collected" / "candidates.jsonl", Candidate)
    assert (kept.trigger, kept.payload) == (hostile, hostile)


# The folder.


def test_collecting_again(collect: Collector, tmp_path: Path) -> None:
    """A mere merge is replaced, one with a verdict is kept, and neither is taken for a job."""
    sweep = tmp_path / "s"
    write_job(sweep / "0", candidates=[a_candidate("one")])
    collect(sweep, ONLY)
    write_job(sweep / "1", candidates=[a_candidate("two")])
    assert collect(sweep, ONLY).out[0] == "2 jobs: 2 finished"
    assert len(read_records(sweep / "collected" / "candidates.jsonl", Candidate)) == 2
    assert not (sweep / "collected.old-1").exists()
    (sweep / "collected" / "verdict.json").write_text("{}")
    for number in (1, 2):
        assert collect(sweep, ONLY).out[0] == "2 jobs: 2 finished"
        (sweep / "collected" / "verdict.json").write_text("{}")
        assert (sweep / f"collected.old-{number}" / "verdict.json").is_file()
        assert (sweep / "collected" / "provenance.jsonl").is_file()


@pytest.mark.parametrize("name", ["verified.jsonl", "completions.jsonl", "checkpoint.pt", "my notes.txt", "sub/x"])
def test_whatever_merging_does_not_write_is_kept(collect: Collector, tmp_path: Path, name: str) -> None:
    sweep = tmp_path / "s"
    for n, model in enumerate(("zoo:a", "zoo:b")):
        config = a_config(model={"finetuned": model, "base": "zoo:x"})
        write_job(sweep / str(n), candidates=[a_candidate("one")], config=config)
    collect(sweep, ONLY)
    (sweep / "collected" / "b" / ".lock").write_text("process 1")
    collect(sweep, ONLY)
    assert not (sweep / "collected.old-1").exists()
    kept = Path("collected") / "b" / name
    (sweep / kept).parent.mkdir(exist_ok=True)
    (sweep / kept).write_text("hours of work")
    collect(sweep, ONLY)
    assert (sweep / str(kept).replace("collected", "collected.old-1")).read_text() == "hours of work"
    assert (sweep / "collected" / "b" / "collection.json").is_file()


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGUSR2, 75)],
)
def test_interrupted_verification_is_kept(
    collect: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, code: int
) -> None:
    sweep = tmp_path / "s"
    write_job(sweep / "0", candidates=[a_candidate("one")])

    def interrupted(folder: Path, *_: Any, **__: Any) -> None:
        (folder / "verified.jsonl").write_text("{}\n")
        os.kill(os.getpid(), signum)

    monkeypatch.setattr("trigger_opt.collect.verification.verify_and_report", interrupted)
    before = signal.getsignal(signum)
    done = collect(sweep)
    assert (done.code, signal.getsignal(signum)) == (code, before)
    assert f"stays in {sweep}/collected, and collecting again renames that folder to collected.old-N" in done.err
    assert collect(sweep, ONLY).code == 0
    assert (sweep / "collected.old-1" / "verified.jsonl").is_file()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_interrupted_before_verification(
    collect: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, code: int
) -> None:
    write_job(tmp_path / "s" / "0", candidates=[a_candidate("one")])
    monkeypatch.setattr("trigger_opt.collect.commands.make_room", lambda _: os.kill(os.getpid(), signum))
    done = collect(tmp_path / "s", ONLY)
    assert done.code == code
    assert "the sweep is as it was, and collecting again begins anew" in done.err


def test_folder_of_someone_else_is_left_alone(collect: Collector, tmp_path: Path) -> None:
    sweep = tmp_path / "s"
    write_job(sweep / "0", candidates=[a_candidate("one")])
    (sweep / "collected").mkdir()
    (sweep / "collected" / "mine.txt").write_text("kept")
    done = collect(sweep, ONLY)
    assert done.code == 2
    assert "was not made by trigger-opt collect" in done.err
    assert (sweep / "collected" / "mine.txt").read_text() == "kept"


def test_jobs_are_not_touched(collect: Collector, tmp_path: Path) -> None:
    sweep = tmp_path / "s"
    write_sweep(sweep, jobs=3, candidates=10, steps=5)
    for n in range(3):
        set_age(sweep / str(n), 5000.0)
    before = {p: (p.read_bytes(), p.stat().st_mtime) for p in sweep.rglob("*") if p.is_file()}
    collect(sweep, ONLY)
    after = {p: (p.read_bytes(), p.stat().st_mtime) for p in before}
    assert after == before


# Scale.


def _check_planted(sweep: Path, jobs: int, candidates: int) -> None:
    folder = sweep / "collected"
    found = read_records(folder / "candidates.jsonl", Candidate)
    assert [c.trigger for c in found[:2]] == [PLANTED, DECOY]
    assert found[0].seed == min(PLANTED_IN), "of its findings, that with the best score"
    provenance = read_records(folder / "provenance.jsonl", Provenance)
    assert [f.job for f in provenance[0].findings] == [str(n) for n in PLANTED_IN]
    collection = read_record(folder / "collection.json", Collection)
    assert collection.strings == jobs * candidates
    texts: set[str] = set()
    for n in range(jobs):
        texts |= {json.loads(line)["trigger"] for line in (sweep / str(n) / "candidates.jsonl").open()}
    assert collection.different == len(texts)
    assert collection.verified_by_jobs == 3 * jobs
    assert collection.kept == len(found) == min(1000, len(texts))
    assert len(read_records(folder / "jobs.jsonl", SweepJob)) == jobs


def test_sixty_jobs(collect: Collector, tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", jobs=60, candidates=25, steps=5)
    assert collect(tmp_path / "s", ONLY).code == 0
    _check_planted(tmp_path / "s", 60, 25)


def test_merging_needs_no_torch(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", jobs=2, candidates=10, steps=5)
    code = (
        "import sys; from trigger_opt.collect.commands import main;"
        f"code = main([{str(tmp_path / 's')!r}, '--no-verify']);"
        "sys.exit(code or 10 * ('torch' in sys.modules) or 11 * ('transformers' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s" / "collected" / "run.json").is_file()


@pytest.mark.slow
def test_thousand_jobs_in_500_megabytes(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", jobs=1000)
    assert measure(tmp_path / "s")["megabytes"] < 500
    _check_planted(tmp_path / "s", 1000, 200)
