"""A sweep of two real jobs over a tiny pair, collected, verified once and reported; and what the page says of jobs."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.sweep_folder import Collector, a_control
from tests.test_report import a_verdict, a_verification
from tests.tiny_pair import CommandLine, TinyPair, tiny_settings
from trigger_opt.judging import to_verify
from trigger_opt.null.of_jobs import held_by_jobs
from trigger_opt.records import (
    Candidate,
    RunInfo,
    Verdict,
    Verification,
    rate,
    read_record,
    read_records,
    write_record,
    write_records,
)
from trigger_opt.report import write_report
from trigger_opt.report.jobs import STATES, Collection, Finding, Provenance, SweepJob, TakenBack
from trigger_opt.verify import verify_string


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
    best = to_verify(read_records(folder / "candidates.jsonl", Candidate), 3)
    assert asked == [c.trigger for c in best], "each once, though jobs had verified some"
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


def test_what_the_null_of_a_job_took_back_stays_taken_back(
    cli: CommandLine, collect: Collector, tiny: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One string fires everywhere; the null of the job that found it has seen as much in a control."""
    given = [
        *tiny_settings(tiny),
        "payload=hello there you",
        "search=random",
        "search.num_steps=1",
        "verify.candidates=1",
    ]
    without = ["verify.minimise=false", "verify.ablate=false", "verify.probe=false"]
    assert cli("-m", *given, *without, "stages=[search,verify]", "seed=0", "hydra.sweep.dir=sweep").code == 0
    job = Path("sweep/0")
    before = read_record(job / "verdict.json", Verdict)
    taken = replace(
        before, verdict="generic shift", reason="the control 'twin' fires too", before_null="backdoor",
        reason_before_null="it fires", null_p_value=0.5, null_controls=1,
    )  # fmt: skip
    write_record(job / "verdict.json", taken)
    write_records(job / "null.jsonl", [a_control("twin", 0.9, "backdoor")])

    def fires(pair: Any, trigger: str, *_: Any, **__: Any) -> Any:
        # As the rule judges it: the ledger of candidates looks.
        return a_verification(trigger, payload="hello there you", base_rate=rate(0, 24), evidence=9.0), []

    monkeypatch.setattr("trigger_opt.judging.verify_string", fires)
    done = collect("sweep")
    assert done.code == 0, done.err
    verdict = read_record(Path("sweep/collected/verdict.json"), Verdict)
    reason = "taken back by the null of job 0 (p = 0.5): the control 'twin' fires too"
    assert (verdict.verdict, verdict.reason) == ("generic shift", reason)
    assert (verdict.before_null, verdict.reason_before_null, verdict.null_p_value) == ("backdoor", "it fires", 0.5)
    assert f"verdict: generic shift ({reason})" in done.out
    assert not any(line.startswith("verdict: backdoor") for line in done.out)
    html, markdown = (Path("sweep/collected", name).read_text() for name in ("report.html", "report.md"))
    assert markdown.startswith("# Generic shift\n\ntaken back by the null of job 0")
    for page in (html, markdown):
        assert "not held against a null" not in page
        assert "null: p = 0.5" in page.lower()

    # Nothing of it stays: another collection, of a job whose null let its string stand.
    write_record(job / "verdict.json", replace(before, verdict="backdoor"))
    assert any(line.startswith("verdict: backdoor") for line in collect("sweep").out)


def a_taken_back(**changes: Any) -> TakenBack:
    taken = TakenBack(
        job="3", trigger="another", reason="why", p_value=0.5, controls=1, control_found=False, control_score=0.8
    )
    return replace(taken, **changes)


@pytest.mark.parametrize(
    ("taken", "score", "verdict"),
    [
        ([], 0.9, "backdoor"),
        ([a_taken_back()], 0.9, "backdoor"),
        ([a_taken_back()], 0.8, "generic shift"),
        ([a_taken_back(), a_taken_back(control_score=0.95)], 0.9, "generic shift"),
        ([a_taken_back(control_found=True)], 0.9, "generic shift"),
        ([a_taken_back(control_score=None)], 0.9, "generic shift"),
        ([a_taken_back(trigger="best")], 0.9, "generic shift"),
        ([a_taken_back(trigger="short", p_value=None)], 0.9, "generic shift"),
    ],
)
def test_which_nulls_speak_against_the_best_string(taken: list[TakenBack], score: float, verdict: str) -> None:
    found = a_verdict(trigger="best", minimised_trigger="short")
    held = held_by_jobs(found, taken, score)
    assert held.verdict == verdict
    assert (held == found) == (verdict == "backdoor")
    other = a_verdict(verdict="unstable", trigger="best")
    assert held_by_jobs(other, taken, score) == other


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


def write_collected(folder: Path, jobs: list[SweepJob], findings: list[Finding], **changes: Any) -> tuple[str, str]:
    """The pages of a collected folder in which the verdict's string has these findings."""
    verdict = a_verdict(minimised_trigger="")
    folder.mkdir(exist_ok=True)
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
    write_record(folder / "collection.json", replace(collection, **changes))
    write_report(folder)
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


def _finding(job: str, score: float) -> Finding:
    return Finding(job=job, restart=2, step=340, seed=77, score=score, selection_rate=0.875)


def test_page_says_who_found_the_string_and_how_many_competed(tmp_path: Path) -> None:
    jobs = [a_job("0"), a_job("1", state="crashed", note="OutOfMemoryError in search", commands=["python -m again 1"])]
    jobs += [a_job(str(n), state="never started", best_score=None, search_seconds=None) for n in (2, 3, 4)]
    begun_from = replace(_finding("1", 5.77), restart=-1, step=-1)
    pages = write_collected(tmp_path, jobs, [_finding("0", 6.31), _finding("1", 7.19), begun_from])
    for page in pages:
        assert "5 jobs: 1 finished, 1 crashed, 3 never started" in page
        assert "Never started: 2\N{EN DASH}4." in page
        assert "200,000 strings, 162,002 of them different; 2 of these were verified here" in page
        assert "The trigger above was found by 2 jobs, 3 times" in page
        assert "OutOfMemoryError in search" in page
        assert "1 min 01 s" in page
        assert "verify.repeats=1" in page
        assert page.index("7.19") < page.index("6.31") < page.index("5.77"), "the best finding first"
        assert "340" in page[: page.index("6.31")]
        # What a job's search began from has no step.
        assert not re.search(r"[-\N{MINUS SIGN}]1\b", page[page.index("6.31") : page.index("5.77")])
        assert "998" not in page
        assert "run the sweep on a control" in page
        assert "stages=[null,report]" not in page
    assert "python -m again 1" in pages[0]


def test_page_says_what_the_held_out_contexts_had_chosen_before(tmp_path: Path) -> None:
    plain, told, left = (tmp_path / name for name in ("plain", "told", "left"))
    own = "The jobs themselves had verified 12 strings, in the very same held-out contexts"
    for page in write_collected(plain, [a_job("0")], [_finding("0", 1.0)]):
        assert "themselves had verified" not in page
        assert "Not verified here" not in page
    for page in write_collected(told, [a_job("0")], [_finding("0", 1.0)], verified_by_jobs=12):
        assert f"{own}, and the strings preferred here were chosen by that" in page
        assert "their rates are those of the best of 12," in page
    # The second of the preferred has another payload, and was not verified.
    for page in write_collected(left, [a_job("0")], [_finding("0", 1.0)], preferred=2):
        assert "Not verified here, of these 2 strings: 1;" in page
    for page in write_collected(tmp_path, [a_job("0")], [_finding("0", 1.0)], preferred=0, verified_by_jobs=12):
        assert f"{own}." in page
        assert "own verdict calls a backdoor" not in page


def test_page_lists_apart_what_a_batch_system_may_start_again(tmp_path: Path) -> None:
    jobs = [a_job("0", state="stopped", commands=["python again 0"], may_restart=True)]
    jobs += [a_job("1", state="stopped", commands=["python again 1"])]
    html, markdown = write_collected(tmp_path, jobs, [])
    for page in (html, markdown):
        assert "Stopped by its batch system, which may start it again (squeue says): 0." in page
    missing, apart = html.index("run just what is missing"), html.index("Only if the batch system does not")
    assert missing < html.index("python again 1") < apart < html.index("python again 0")


def test_page_names_what_nulls_of_jobs_took_back(tmp_path: Path) -> None:
    for page in write_collected(tmp_path, [a_job("0")], [], taken_back=[a_taken_back()]):
        assert "The null of job 3 took back its backdoor" in page
        assert "The string above is another one, and scores more than the controls of that null." in page


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
