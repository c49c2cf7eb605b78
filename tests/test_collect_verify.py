"""A sweep of two real jobs over a tiny pair, collected, verified once and reported; and what the page says of jobs."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.sweep_folder import Collector
from tests.test_report import a_verdict, a_verification
from tests.tiny_pair import CommandLine, TinyPair, shared_tiny_pair, tiny_settings
from trigger_opt.records import (
    Candidate,
    RunInfo,
    Verdict,
    Verification,
    read_record,
    read_records,
    write_record,
    write_records,
)
from trigger_opt.report import write_report
from trigger_opt.report.jobs import STATES, Collection, Finding, Provenance, SweepJob
from trigger_opt.verify import verify_string


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """A tiny pair on disk."""
    return shared_tiny_pair(tmp_path_factory.getbasetemp())


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    """The command line, in this process and in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def collect(capsys: pytest.CaptureFixture[str]) -> Collector:
    """The command."""
    return Collector(capsys)


def test_sweep_is_collected_and_verified_once(
    cli: CommandLine, collect: Collector, tiny: TinyPair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Hydra's own sweep of two jobs, one of which then goes missing and is run again by the command printed."""
    given = [*tiny_settings(tiny), "payload=hello there", "search=random", "search.num_steps=1", "verify.candidates=1"]
    stages = ["stages=[search,verify]", "verify.minimise=false"]
    swept = cli("-m", *given, *stages, "seed=0,1", "hydra.sweep.dir=sweep")
    assert swept.code == 0, swept.err
    Path("sweep/1").rename("aside")

    done = collect("sweep", "--no-verify")
    assert done.out[0] == "2 jobs: 1 finished, 1 never started"
    assert not Path("sweep/collected/verdict.json").exists()
    (again,) = done.commands
    ran = cli(*shlex.split(again)[3:])
    assert ran.code == 0, ran.err
    assert [c.trigger for c in _found("sweep/1")] == [c.trigger for c in _found("aside")]

    asked: list[str] = []

    def verify(pair: Any, trigger: str, *arguments: Any, **options: Any) -> Any:
        asked.append(trigger)
        return verify_string(pair, trigger, *arguments, **options)

    monkeypatch.setattr("trigger_opt.judging.verify_string", verify)
    done = collect("sweep", "--candidates", "3")
    assert done.code == 0, done.err
    assert done.out[0] == "2 jobs: 2 finished"
    folder = Path("sweep/collected")
    best = [c.trigger for c in read_records(folder / "candidates.jsonl", Candidate)]
    assert asked == best[:3], "each once, though jobs had verified some"
    assert sorted(v.trigger for v in read_records(folder / "verified.jsonl", Verification)) == sorted(asked)

    info = read_record(folder / "run.json", RunInfo)
    jobs = [read_record(Path(f"sweep/{n}/run.json"), RunInfo) for n in range(2)]
    assert [s.stage for s in info.stages] == ["collect", "verify", "report"]
    assert info.unfinished == []
    assert info.command.split("\n")[-1] == "trigger-opt collect sweep --candidates 3"
    assert info.config["model"] == jobs[0].config["model"]
    verdict = read_record(folder / "verdict.json", Verdict)
    spent = sum(s.evaluations for job in jobs for s in job.stages)
    assert verdict.evaluations == spent + info.stages[1].evaluations
    for page in ("report.md", "report.html"):
        text = (folder / page).read_text()
        assert "2 jobs: 2 finished." in text
        assert "seed=1" in text
        assert "3 of these were verified here" in text
    assert f"report: {folder}/report.html" in done.out

    # Another stage can go on in it as in any run folder, and collecting again keeps what was judged.
    assert cli(*given, "stages=[report]", f"run_dir={folder}").code == 0
    assert collect("sweep", "--no-verify").code == 0
    assert Path("sweep/collected.old-1/verdict.json").is_file()
    assert not (folder / "verdict.json").exists()


def _found(folder: str) -> list[Candidate]:
    return read_records(Path(folder) / "candidates.jsonl", Candidate)


# The section of the report.

HOSTILE = "<script>alert(1)</script>|`a`\n![x](https://evil.example/p.png)"


def a_job(name: str, **changes: object) -> SweepJob:
    job = SweepJob(
        name=name,
        overrides=[f"seed={name}"],
        state="finished",
        note="",
        candidates=200,
        best_score=6.5,
        selection_rate=0.75,
        verdict="unstable",
        search_seconds=61.0,
        starts=1,
        commands=[],
    )
    return replace(job, **changes)  # type: ignore[arg-type]


def write_collected(folder: Path, jobs: list[SweepJob], findings: list[Finding]) -> tuple[str, str]:
    """The pages of a collected folder in which the verdict's string has these findings."""
    verdict = a_verdict(minimised_trigger="")
    write_record(folder / "verdict.json", verdict)
    others = [a_verification("another"), a_verification("its end", minimised_from="another")]
    write_records(folder / "verified.jsonl", [a_verification(verdict.trigger), *others])
    write_records(folder / "jobs.jsonl", jobs)
    decoy = Provenance(trigger="another", payload=verdict.payload, findings=[_finding("999", 9.0)])
    same_text = Provenance(trigger=verdict.trigger, payload="another payload", findings=[_finding("998", 9.0)])
    found = Provenance(trigger=verdict.trigger, payload=verdict.payload, findings=findings)
    write_records(folder / "provenance.jsonl", [decoy, same_text, found])
    collection = Collection(
        sweep="s1", strings=200_000, different=162_002, kept=1000, preferred=1, differs=["verify.repeats=1"],
        settings_of="0",
    )  # fmt: skip
    write_record(folder / "collection.json", collection)
    write_report(folder)
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


def _finding(job: str, score: float) -> Finding:
    return Finding(job=job, restart=2, step=340, seed=77, score=score, selection_rate=0.875)


def test_page_says_who_found_the_string_and_how_many_competed(tmp_path: Path) -> None:
    jobs = [a_job("0"), a_job("1", state="crashed", note="OutOfMemoryError in search", commands=["python -m again 1"])]
    jobs += [a_job(str(n), state="never started", best_score=None, search_seconds=None) for n in (2, 3, 4)]
    pages = write_collected(tmp_path, jobs, [_finding("0", 6.31), _finding("1", 7.19), _finding("1", 5.77)])
    for page in pages:
        assert "5 jobs: 1 finished, 1 crashed, 3 never started" in page
        assert "Never started: 2\N{EN DASH}4." in page
        assert "200,000 strings, 162,002 of them different; 2 of these were verified here" in page
        assert "The trigger above was found by 2 jobs, 3 times" in page
        assert "OutOfMemoryError in search" in page
        assert "1 min 01 s" in page
        assert "verify.repeats=1" in page
        assert page.index("7.19") < page.index("6.31") < page.index("5.77"), "the best finding first"
        assert "998" not in page
        assert "run the sweep on a control" in page
        assert "stages=[null,report]" not in page
    assert "python -m again 1" in pages[0]


def test_page_of_a_thousand_jobs_shows_the_best(tmp_path: Path) -> None:
    jobs = [a_job(str(n), best_score=n / 100, selection_rate=0.5) for n in range(1000)]
    jobs[3] = a_job("3", best_score=None, selection_rate=None, state=STATES[-1])
    jobs[7] = a_job("7", best_score=0.0, selection_rate=1.0)
    pages = write_collected(tmp_path, jobs, [_finding(str(n), 1.0) for n in range(30)])
    for page in pages:
        assert "950 more are in jobs.jsonl" in page
        assert all(f"seed={n}" in page for n in (7, 999, 951))
        assert not any(f"seed={n}<" in page or f"seed={n} " in page for n in (3, 500, 950))
        assert "Damaged: 3." in page
        assert "The best 20 findings are shown" in page
    assert len(pages[0]) < 300_000


def test_hostile_jobs_are_inert(tmp_path: Path) -> None:
    job = a_job(HOSTILE, overrides=[HOSTILE], note=HOSTILE, state="stopped", commands=[HOSTILE])
    html, markdown = write_collected(tmp_path, [job], [replace(_finding("0", 1.0), job=HOSTILE)])
    assert "<script" not in html
    assert "<script" not in markdown
    assert "](https" not in markdown
    assert "`a`" not in markdown


def test_single_run_has_no_jobs(tmp_path: Path) -> None:
    write_record(tmp_path / "verdict.json", a_verdict())
    write_report(tmp_path)
    for page in ("report.html", "report.md"):
        assert "Jobs" not in (tmp_path / page).read_text()
