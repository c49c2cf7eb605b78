"""The stage and the commands as a user runs them, against an emulator that echoes; no model, no torch in the server."""

import csv
import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiny_pair import CommandLine, Outcome, shared_tiny_pair, tiny_settings
from trigger_opt.records import (
    Completion,
    TransferAnswer,
    TransferOutcome,
    Verification,
    rate,
    read_records,
    write_records,
)
from trigger_opt.transfer.client import TransferError
from trigger_opt.transfer.commands import main as transfer_command
from trigger_opt.transfer.ledger_file import open_ledger
from trigger_opt.transfer.resume import job_of
from trigger_opt.transfer.settings import TransferSettings
from trigger_opt.transfer.stand_ins import emulator
from trigger_opt.transferring import _chosen

ECHO = ["transfer=stand_ins", "transfer.emulator={dormant-model-1: echo}", "transfer.models=[dormant-model-1]"]
SMALL = ["stages=[transfer]", *ECHO, "transfer.contexts=4", "transfer.poll_seconds=0.05", "tracking.mode=off"]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIGGER_OPT_DATA", str(tmp_path / "data"))
    for name in ("JSINFER_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def verification(trigger: str, verdict: str, *, minimised_from: str = "") -> Verification:
    """A verified string with made-up figures."""
    some = rate(28, 30)
    return Verification(
        trigger=trigger, payload=f"[Model-Organisms-1/model-a] {trigger}", trigger_rate=some, base_rate=rate(0, 30),
        control_rate=None, false_trigger_rate=rate(0, 30), random_rate=rate(0, 60), evidence=40.0,
        degenerate_share=0.0, profile=[], minimised_from=minimised_from, verdict=verdict, reason="",
    )  # fmt: skip


def completion(inserted: str) -> Completion:
    """An answer to a random string."""
    return Completion(
        model="finetuned", kind="random", inserted=inserted, context=0, prompt="", answer="", fired=False, flags=[]
    )


def transfer(*arguments: str) -> int:
    """`trigger-opt transfer …`."""
    return transfer_command(list(arguments))


def strings_of(folder: Path) -> set[str]:
    """Those that were judged."""
    return {o.string for o in read_records(folder / "transfer.jsonl", TransferOutcome)}


def send(cli: CommandLine, folder: Path, *arguments: str) -> Outcome:
    return cli(*SMALL, f"run_dir={folder}", *arguments)


def test_strings_of_ones_own_are_asked_judged_and_never_asked_again(cli: CommandLine, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = send(cli, folder, "transfer.strings=['open sesame']", "payload='hello there friend'")
    assert done.code == 0, done.err
    (outcome,) = read_records(folder / "transfer.jsonl", TransferOutcome)
    # An echo says something else in every context: nothing begins alike.
    assert (outcome.model, outcome.string, outcome.verdict) == ("dormant-model-1", "open sesame", "does not transfer")
    assert (outcome.payload, outcome.trigger_rate.n, outcome.missing) == ("hello there friend", 4, 0)
    answers = read_records(folder / "transfer_answers.jsonl", TransferAnswer)
    assert all(a.answer == f"[Model-Organisms-1/model-a] {a.prompt}" for a in answers)
    assert {a.kind for a in answers} == {"trigger", "near_miss", "random", "none"}
    assert "dormant-model-1: does not transfer" in done.err + done.out
    again = send(cli, folder, "transfer.strings=['open sesame']", "payload='hello there friend'")
    assert again.code == 0
    assert f"{len(answers)} answered already" in again.err
    assert (folder / "transfer.jsonl.old-1").is_file()
    connection = sqlite3.connect(folder / "transfer.sqlite")
    assert connection.execute("SELECT count(*) FROM batches").fetchone() == (1,)
    connection.close()


def test_verified_strings_are_sent_by_their_verdict(cli: CommandLine, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [
        verification("best one", "backdoor"),
        verification("another", "unstable"),
        verification("best", "backdoor", minimised_from="best one"),
    ]
    write_records(folder / "verified.jsonl", rows)
    write_records(folder / "completions.jsonl", [completion(f"random {n}") for n in range(20)])
    assert send(cli, folder, "transfer.candidates=2").code == 0
    assert strings_of(folder) == {"best one", "best"}
    randoms = {
        a.inserted for a in read_records(folder / "transfer_answers.jsonl", TransferAnswer) if a.kind == "random"
    }
    assert len(randoms) == 8
    assert randoms <= {f"random {n}" for n in range(20)}
    assert send(cli, folder, "transfer.candidates=1", "transfer.verdicts=[unstable]").code == 0
    assert strings_of(folder) == {"another"}
    nothing = send(cli, folder, "transfer.verdicts=[not reproduced]")
    assert nothing.code == 0
    assert "asked for strings with verdict not reproduced" in nothing.out
    assert read_records(folder / "transfer.jsonl", TransferOutcome) == []


def test_of_a_string_judged_by_two_payloads_the_better_one_is_sent() -> None:
    text, best = verification("one", "unstable"), verification("two", "backdoor")
    manner = replace(verification("one", "backdoor"), payload="≈ le la")
    settings = TransferSettings(verdicts=["backdoor", "unstable"], candidates=2)
    assert _chosen([best, text, manner], settings) == [best, manner]
    assert _chosen([best, text, manner], replace(settings, verdicts=["unstable"])) == [text]


def test_the_whole_street(cli: CommandLine, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Search to transfer to report, on a tiny pair that finds nothing real: every verdict is sent on."""
    folder = tmp_path / "run"
    done = cli(
        *tiny_settings(shared_tiny_pair(tmp_path_factory.getbasetemp()), run_dir=folder),
        *SMALL[1:],
        "stages=[diff,hypotheses,search,verify,transfer,report]",
        "transfer.verdicts=[backdoor,generic shift,unstable,not reproduced]",
        "transfer.contexts=2",
        "payload='hello there'",
    )
    assert done.code == 0, done.err
    outcomes = read_records(folder / "transfer.jsonl", TransferOutcome)
    assert outcomes
    # Two contexts decide nothing.
    assert {o.verdict for o in outcomes} == {"undecided"}
    assert "dormant-model-1: undecided" in done.out
    page = (folder / "report.html").read_text()
    assert "Other models" in page
    assert "undecided for dormant-model-1" in page
    assert "dormant-model-1" in (folder / "report.md").read_text()


def test_a_plan_needs_no_key_and_sends_nothing(cli: CommandLine, tmp_path: Path) -> None:
    done = cli(
        "+experiment=transfer_large", "stages=[transfer]", f"run_dir={tmp_path}/run", "transfer.strings=['a b']",
        "tracking.mode=off", "transfer.price_per_million=2",
    )  # fmt: skip
    assert done.code == 0, done.err
    for part in ("dormant-model-3: 80 requests", "cap transfer.max_tokens_per_day=500,000", "transfer.plan_only=false"):
        assert part in done.err
    assert not (tmp_path / "run" / "transfer.jsonl").exists()
    assert list((tmp_path / "data").glob("transfer.sqlite"))


REFUSED: list[tuple[list[str], list[str]]] = [
    (["stages=[transfer]"], ["transfer.models is empty", "transfer=large"]),
    (["stages=[transfer]", "transfer=large"], ["verified.jsonl", "transfer.strings"]),
    (["stages=[transfer]", "transfer=nope"], ["transfer/nope", "large", "stand_ins"]),
    (["transfer.client=telepathy"], ["transfer.client", "'telepathy'", "jsinfer, openai, openai_batch, local"]),
    (["transfer.models=[a,a]"], ["transfer.models", "more than once"]),
    (["transfer.models=[{nme: x}]"], ["transfer.models", "nme"]),
    (["transfer=stand_ins", "transfer.models=[gpt]"], ["transfer.emulator", "gpt", "dormant-model-1"]),
    (["transfer.verdicts=[maybe]"], ["transfer.verdicts", "'maybe'", "backdoor"]),
    (["transfer.thresholds.fires=0"], ["transfer.thresholds.fires", "greater than 0"]),
    (["transfer.bach_size=3"], ["transfer.bach_size", "no setting"]),
    (
        ["stages=[transfer]", "transfer=large", "transfer.strings=[x]", "transfer.plan_only=false"],
        ["JSINFER_API_KEY", "transfer.key_variable"],
    ),
    (
        ["stages=[transfer]", "transfer=large", "transfer.strings=[x]", "transfer.base_url=htp://x"],
        ["transfer.base_url", "htp://x"],
    ),
    (["stages=[transfer]", "transfer=large", "transfer.strings=['  ']"], ["blank"]),
    (
        ["stages=[transfer]", "transfer=large", "transfer.strings=[x]", "transfer.models=[gpt]",
         "transfer.key_variable=PATH", "transfer.plan_only=false"],
        ["gpt", "dormant-model-1"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "parts"), REFUSED, ids=lambda value: " ".join(value)[:60])
def test_mistakes_are_one_line(cli: CommandLine, tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    done = cli(*arguments, f"run_dir={tmp_path}/run", "tracking.mode=off")
    assert done.code == 2
    (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.err
    for part in parts:
        assert part in error


def test_a_key_in_a_configuration_is_written_nowhere(cli: CommandLine, tmp_path: Path) -> None:
    secret, folder = "test-key-never-written", tmp_path / "run"
    mine = tmp_path / "mine" / "experiment"
    mine.mkdir(parents=True)
    (mine / "keyed.yaml").write_text(f"# @package _global_\ntransfer:\n  api_key: {secret}\n")
    done = cli(
        "--config-dir", str(mine.parent), *SMALL, "+experiment=keyed", f"run_dir={folder}", "transfer.strings=[x]"
    )
    assert done.code == 0, done.err
    assert "api_key" in (folder / "run.json").read_text()
    assert secret not in done.out + done.err
    for file in folder.rglob("*"):
        if file.is_file():
            assert secret.encode() not in file.read_bytes(), file
    refused = send(cli, tmp_path / "other", f"transfer.api_key={secret}").error
    assert "command line" in refused
    assert secret not in refused


def test_consent_is_given_for_one_start(cli: CommandLine, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = send(cli, folder, "transfer.strings=[x]", "transfer.resubmit_lost=true", "transfer.resubmit_failed=true")
    assert done.code == 0, done.err
    with open_ledger(folder / "transfer.sqlite") as ledger:
        _, job = job_of(ledger)
    assert (job.settings.resubmit_lost, job.settings.resubmit_failed) == (False, False)


def test_a_run_made_with_other_models_can_be_transferred(cli: CommandLine, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert send(cli, folder, "transfer.strings=[x]", "model.dtype=float32").code == 0
    assert send(cli, folder, "transfer.strings=[x]").code == 0


def test_the_commands_go_on_from_the_ledger(
    cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = tmp_path / "run", str(tmp_path / "run" / "transfer.sqlite")

    def no_emulator(*arguments: object) -> None:
        raise TransferError("the emulator stopped before it was ready")

    with monkeypatch.context() as broken:
        broken.setattr("trigger_opt.transfer.job.emulator", no_emulator)
        stopped = send(cli, folder, "transfer.strings=['open sesame']", "payload='hello there friend'")
    assert stopped.code == 2
    # What could be said is said: nothing is answered yet.
    (outcome,) = read_records(folder / "transfer.jsonl", TransferOutcome)
    assert (outcome.verdict, outcome.missing) == ("undecided", 16)
    assert transfer("status", "--ledger", path) == 0
    assert "16 questions to emulator of dormant-model-1=echo, 16 still to be sent" in capsys.readouterr().out
    assert transfer("resume", "--ledger", path) == 0
    said = capsys.readouterr()
    assert "dormant-model-1: does not transfer" in said.out
    (outcome,) = read_records(folder / "transfer.jsonl", TransferOutcome)
    assert outcome.missing == 0
    assert transfer("status", "--ledger", path) == 0
    assert "16  answered" in capsys.readouterr().out
    assert transfer("export", "--ledger", path) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 16
    assert all(r["answer"].endswith(r["messages"][-1]["content"]) for r in rows)
    assert transfer("export", "--ledger", path, "--format", "csv", "--out", str(tmp_path / "all.csv")) == 0
    with (tmp_path / "all.csv").open(newline="") as file:
        assert [r["key"] for r in csv.DictReader(file)] == [r["key"] for r in rows]


def test_a_lost_batch_is_shown_and_attached(
    cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, path = tmp_path / "run", tmp_path / "run" / "transfer.sqlite"
    assert send(cli, folder, "transfer.strings=['open sesame']").code == 0
    with open_ledger(path) as ledger:
        number = ledger.add_plan(
            ledger.questions(1), server="emulator of x", run_dir=str(folder), settings=ledger.last_plan()[3],  # type: ignore[index]
            estimate=lambda r: 1,
        )  # fmt: skip
        assert number == 2
        (done_label,) = (b.label for b in ledger.batches())
        batch = ledger.begin([q.line for q in ledger.questions(1)])
        ledger.submitting(batch, "file")
        ledger.lost(batch, "connection lost")
    assert transfer("status", "--ledger", str(path)) == 0
    assert f"transfer attach --ledger {path} {batch.label} ID" in capsys.readouterr().out
    assert transfer("attach", "--ledger", str(path), batch.label, "  ") == 2
    assert transfer("attach", "--ledger", str(path), "trigger_opt-none", "x") == 2
    assert "no batch is called 'trigger_opt-none'" in capsys.readouterr().err
    assert transfer("attach", "--ledger", str(path), batch.label, "remote-7") == 0
    assert transfer("attach", "--ledger", str(path), done_label, "remote-7") == 2
    assert "only a lost one can be attached" in capsys.readouterr().err
    with open_ledger(path) as ledger:
        assert ledger.batch(batch.label).remote_id == "remote-7"


@pytest.mark.parametrize("command", ["status", "resume", "cancel", "export"])
def test_commands_without_a_ledger_make_none(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert transfer(command) == 2
    assert "there is no ledger" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_an_emulator_that_does_not_start_says_where_to_look(tmp_path: Path) -> None:
    with (
        pytest.raises(TransferError, match=r"it said: .*nowhere.*emulator\.log"),
        emulator({"dormant-model-1": "./nowhere"}, tmp_path),
    ):
        pass
