"""What a run takes from the ledger of earlier runs on its pair, and what it leaves there."""

from pathlib import Path

from tests.tiny_pair import CommandLine, TinyPair, tiny_settings
from trigger_opt.candidates import CandidateLedger, Judged, default_path
from trigger_opt.records import Candidate, Verification, read_records

VERIFY = "stages=[verify,report]"


def verified(run: Path) -> list[str]:
    """Strings verified as the search found them."""
    return [v.trigger for v in read_records(run / "verified.jsonl", Verification) if not v.minimised_from]


def test_what_was_refuted_is_not_verified_again(cli: CommandLine, tiny: TinyPair, tmp_path: Path) -> None:
    run = tmp_path / "first"
    settings = [*tiny_settings(tiny, run_dir=run), "payload=hello there", "verify.candidates=1"]
    done = cli(*settings)
    assert done.code == 0, done.err
    tried = verified(run)
    found = [c.trigger for c in read_records(run / "candidates.jsonl", Candidate)]
    assert 0 < len(tried) < len(found), "nothing would be left to try"
    ledger = CandidateLedger(default_path())
    (pair,) = ledger.pairs()
    assert {j.trigger for j in ledger.refuted(pair)} >= set(tried)

    again = cli(*settings, VERIFY)
    assert again.code == 0, again.err
    assert f"{len(tried)} of {len(found)} strings were refuted before, in first; others" in again.out
    assert not set(verified(run)) & set(tried)
    known = read_records(run / "known.jsonl", Judged)
    assert {j.trigger for j in known} == set(tried)
    assert {j.run for j in known} == {"first"}
    for page in ("report.md", "report.html"):
        assert "Refuted by earlier runs" in (run / page).read_text()


def test_another_question_is_asked_anew(cli: CommandLine, tiny: TinyPair, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [*tiny_settings(tiny, run_dir=run), "payload=hello there", "verify.candidates=1"]
    assert cli(*settings).code == 0
    tried = verified(run)
    for change in ("verify.thresholds.clean=0.2", "verify.random_strings=3", "candidates.keep=false"):
        done = cli(*settings, VERIFY, change)
        assert done.code == 0, done.err
        assert "refuted before" not in done.out, change
        assert verified(run) == tried, change


def test_where_all_was_refuted_it_is_verified_again(cli: CommandLine, tiny: TinyPair, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # As few strings as are verified in one run.
    settings = [
        *tiny_settings(tiny, run_dir=run),
        "payload=hello there",
        "build.max_tokens=0",
        "build.max_characters=0",
    ]
    assert cli(*settings).code == 0
    tried = verified(run)
    done = cli(*settings, VERIFY)
    assert done.code == 0, done.err
    assert "none is left, so they are verified again" in done.out
    assert sorted(verified(run)) == sorted(tried)


def test_a_file_that_is_no_ledger_stops_before_anything_is_verified(
    cli: CommandLine, tiny: TinyPair, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (tmp_path / "other.sqlite").write_text("no database at all, but long enough to be looked at " * 10)
    done = cli(*tiny_settings(tiny, run_dir=run), "payload=hello there", f"candidates.ledger={tmp_path}/other.sqlite")
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert "other.sqlite" in done.err
    assert not (run / "candidates.jsonl").exists(), "it searched first"
