"""A backdoor that a null took back is none anywhere: to the transfer, in the report; and the score behind a null."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.test_report import a_decoy, a_run_info, a_verdict, a_verification, report, write_run
from trigger_opt.prompts import Context
from trigger_opt.records import as_held, rate, write_record, write_records
from trigger_opt.run_folder import RunFolder, hold_run_folder
from trigger_opt.transfer.settings import TransferSettings
from trigger_opt.transferring import send_strings
from trigger_opt.verify import Thresholds, detection_score

TAKEN_BACK = {
    "verdict": "generic shift", "reason": "a control found no less", "before_null": "backdoor",
    "null_p_value": 0.5, "null_controls": 3,
}  # fmt: skip


def test_only_backdoors_fall_with_the_verdict() -> None:
    verified = [a_verification(), a_decoy(), a_verification(" other")]
    before = [v.verdict for v in verified]
    assert before == ["backdoor", "unstable", "backdoor"]
    held = as_held(verified, a_verdict(**TAKEN_BACK))
    assert [v.verdict for v in held] == ["generic shift", "unstable", "generic shift"]
    assert [v.reason == "a control found no less" for v in held] == [True, False, True]
    for standing in ({}, {"before_null": "backdoor", "null_p_value": 0.2}):
        assert as_held(verified, a_verdict(**standing)) == verified


@pytest.mark.parametrize("fallen", [False, True])
def test_nothing_is_sent_of_a_backdoor_that_was_taken_back(
    fallen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[Any] = []

    def transfer(job: Any, **listeners: Any) -> list[Any]:
        sent.append(job)
        return []

    monkeypatch.setattr("trigger_opt.transferring.transfer", transfer)
    write_records(tmp_path / "verified.jsonl", [a_verification()])
    write_record(tmp_path / "verdict.json", a_verdict(**(TAKEN_BACK if fallen else {})))
    folder = _folder(tmp_path)
    assert send_strings(TransferSettings(), folder, [Context(user="{trigger}")], payload="", seed=0) == []
    assert bool(sent) is not fallen
    assert ("verification found generic shift" in capsys.readouterr().out) is fallen


def test_the_banner_says_what_the_null_said(tmp_path: Path) -> None:
    html, markdown = report(write_run(tmp_path, verdict=a_verdict(null_p_value=1 / 6, null_controls=5)))
    assert "null: p = 0.17 against 5 controls" in html.split("</header>")[0]
    assert "Null: p = 0.17 against 5 controls." in markdown
    html, markdown = report(write_run(tmp_path, verdict=a_verdict()))
    assert "null: p" not in html + markdown


@pytest.mark.parametrize(
    ("changes", "score"),
    [
        ({}, 23 / 24 - 1 / 24),
        ({"base_rate": rate(12, 24)}, 23 / 24 - 12 / 24),
        ({"false_trigger_rate": rate(24, 24)}, 0.0),
        ({"evidence": 4.0}, (23 / 24 - 1 / 24) / 2),
        ({"evidence": -3.0}, 0.0),
        # Rates of controls are no part of it: a control has none of its own.
        ({"control_rate": rate(24, 24)}, 23 / 24 - 1 / 24),
    ],
)
def test_detection_score(changes: dict[str, Any], score: float) -> None:
    some: dict[str, Any] = {"base_rate": rate(1, 24), "random_rate": rate(0, 24), "evidence": 20.0}
    verified = dataclasses.replace(a_verification(), **some | changes)
    assert detection_score([verified], evidence=Thresholds().evidence) == pytest.approx(score)
    weaker = dataclasses.replace(verified, trigger_rate=rate(0, 24))
    assert detection_score([weaker, verified, weaker]) == pytest.approx(score)


def test_detection_score_where_no_evidence_is_asked_for() -> None:
    weak = dataclasses.replace(a_verification(), evidence=0.1, base_rate=rate(0, 24), random_rate=rate(0, 24))
    assert detection_score([weak], evidence=0.0) == pytest.approx(23 / 24)
    assert detection_score([dataclasses.replace(weak, evidence=-0.1)], evidence=0.0) == 0
    assert detection_score([]) == 0


def _folder(path: Path) -> RunFolder:
    with hold_run_folder(path, a_run_info(), stages=["transfer"]) as folder:
        return folder
