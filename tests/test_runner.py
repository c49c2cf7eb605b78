"""The runner against a server in memory: what is sent, what is fetched, and who decides after a lost answer."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.test_ledger import plan, questions
from trigger_opt.transfer.backoff import Backoff
from trigger_opt.transfer.budget import Budget
from trigger_opt.transfer.client import (
    BatchStatus,
    BudgetError,
    DamagedResultsError,
    RefusedError,
    RetryLaterError,
    TransferError,
    UnclearError,
    UnknownBatchError,
)
from trigger_opt.transfer.direct import DirectRunner
from trigger_opt.transfer.ledger import Ledger
from trigger_opt.transfer.ledger_file import open_ledger
from trigger_opt.transfer.requests import Answer, Line
from trigger_opt.transfer.runner import Runner
from trigger_opt.transfer.settings import TransferSettings

SERVER = "a server"
SETTINGS = TransferSettings(models=["m"], batch_size=3, poll_seconds=0.001, max_wait_seconds=0.004, max_errors=4)


@dataclass
class Server:
    """Answers every line by its own identifier. `faults`: call -> errors raised by the next calls; `after`: those
    raised once the work is done.

    Attributes:
        batches: remote id -> lines, as submitted. labels: label -> remote id. calls: in order. ends: how batches end.
    """

    server: str = SERVER
    keeps_labels: bool = False
    faults: dict[str, list[Exception]] = field(default_factory=dict)
    after: dict[str, list[Exception]] = field(default_factory=dict)
    uploads: dict[str, list[str]] = field(default_factory=dict)
    batches: dict[str, list[str]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    ends: list[BatchStatus] = field(default_factory=list)
    looks: int = 1

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.faults.get(name):
            raise self.faults[name].pop(0)

    def _done(self, name: str) -> None:
        if self.after.get(name):
            raise self.after[name].pop(0)

    @property
    def submitted(self) -> list[str]:
        return [line for lines in self.batches.values() for line in lines]

    def encode(self, line: Line) -> str:
        return json.dumps(line.custom_id)

    async def upload(self, file: Path) -> str:
        self._call("upload")
        self.uploads[file.name] = [json.loads(text) for text in file.read_text().splitlines()]
        self._done("upload")
        return file.name

    async def submit(self, file_id: str, *, model: str, endpoint: str, label: str) -> str:
        self._call("submit")
        remote = f"remote-{len(self.batches)}"
        self.batches[remote] = self.uploads[file_id]
        self.labels[label] = remote
        self._done("submit")
        return remote

    async def find(self, label: str) -> str | None:
        self._call("find")
        return self.labels.get(label)

    async def status(self, batch_id: str) -> BatchStatus:
        self._call("status")
        if self.calls.count("status") <= self.looks:
            return BatchStatus(state="running", detail="in progress", done=1)
        if self.ends:
            return self.ends.pop(0)
        return BatchStatus(state="completed", detail="completed", results=(batch_id,))

    async def download(self, status: BatchStatus, into: Path) -> None:
        self._call("download")
        into.write_text(json.dumps(self.batches[status.results[0]]))

    def read(self, file: Path, *, on_damaged: Callable[[str], None] | None = None) -> Iterator[Answer]:
        self._call("read")
        for custom_id in json.loads(file.read_text()):
            yield Answer(custom_id=custom_id, text=f"answer to {custom_id}")

    async def cancel(self, batch_id: str) -> None:
        self._call("cancel")

    async def close(self) -> None:
        self._call("close")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with open_ledger(tmp_path / "ledger.sqlite") as opened:
        yield opened


def run(ledger: Ledger, server: Server, number: int, settings: TransferSettings = SETTINGS) -> list[str]:
    """Lines said to the user; errors pass."""
    said: list[str] = []
    budget = Budget(settings, SERVER)
    asyncio.run(Runner(ledger, server, settings, budget, said.append, lambda done, total: None).run(number))
    return said


def texts(ledger: Ledger, number: int) -> list[str | None]:
    """Answers of a plan in its order; None where there is none."""
    asked = ledger.questions(number)
    found = ledger.answers(q.line.request.key for q in asked)
    return [found[k].text if (k := q.line.request.key) in found and found[k].error is None else None for q in asked]


def all_answered(count: int) -> list[str]:
    return [f"answer to q{n}" for n in range(count)]


def test_everything_is_sent_once_in_batches_and_answered(ledger: Ledger) -> None:
    number = plan(ledger, questions(7))
    server = Server()
    progress: list[tuple[int, int]] = []
    budget = Budget(SETTINGS, SERVER)
    said: list[str] = []
    runner = Runner(ledger, server, SETTINGS, budget, said.append, lambda done, total: progress.append((done, total)))
    asyncio.run(runner.run(number))
    assert texts(ledger, number) == all_answered(7)
    assert [len(lines) for lines in server.batches.values()] == [3, 3, 1]
    assert progress[0] == (0, 7)
    assert progress[-1] == (7, 7)
    assert list(ledger.files.iterdir()) == []
    # Asked again, the ledger answers.
    again = Server()
    run(ledger, again, plan(ledger, questions(7)))
    assert again.calls == []


RETRIED = [
    *(("upload", error) for error in (RetryLaterError("429", 0.002), UnclearError("cut off"))),
    ("submit", RetryLaterError("503")),
    *(("status", error) for error in (RetryLaterError("429"), UnclearError("html"))),
    *(("download", error) for error in (RetryLaterError("expired"), DamagedResultsError("short"))),
    ("read", DamagedResultsError("crc")),
]


@pytest.mark.parametrize(("call", "error"), RETRIED)
def test_what_may_be_repeated_is_repeated(ledger: Ledger, call: str, error: Exception) -> None:
    number = plan(ledger, questions(2))
    server = Server(faults={call: [error, error]})
    run(ledger, server, number)
    assert texts(ledger, number) == all_answered(2)
    assert server.submitted == ["q0", "q1"]
    assert server.calls.count(call) >= 3


@pytest.mark.parametrize(("call", "error"), RETRIED)
def test_what_keeps_failing_ends_in_one_line_and_goes_on_later(ledger: Ledger, call: str, error: Exception) -> None:
    number = plan(ledger, questions(2))
    server = Server(faults={call: [error] * 4})
    with pytest.raises(TransferError, match=r"4 failures in a row, the last: .*nothing is lost, start again later"):
        run(ledger, server, number)
    run(ledger, server, number)
    assert texts(ledger, number) == all_answered(2)
    assert server.submitted == ["q0", "q1"]


def test_a_lost_submission_is_the_users_to_decide(ledger: Ledger) -> None:
    number = plan(ledger, questions(2))
    server = Server(after={"submit": [UnclearError("connection lost")]})
    with pytest.raises(TransferError, match=r"may or may not have been taken .*transfer.resubmit_lost=true"):
        run(ledger, server, number)
    # Nobody decided: nothing is sent, and the line is said again.
    said = run(ledger, server, number)
    assert server.submitted == ["q0", "q1"]
    assert "transfer attach" in said[0]
    (lost,) = ledger.batches("state = 'lost'")
    ledger.submitted(lost, "remote-0")
    run(ledger, server, number)
    assert texts(ledger, number) == all_answered(2)
    assert server.submitted == ["q0", "q1"]


def test_a_lost_submission_is_sent_again_with_consent(ledger: Ledger) -> None:
    number = plan(ledger, questions(2))
    server = Server(after={"submit": [UnclearError("connection lost")]})
    with pytest.raises(TransferError):
        run(ledger, server, number)
    run(ledger, server, number, replace(SETTINGS, resubmit_lost=True))
    assert texts(ledger, number) == all_answered(2)
    assert server.submitted == ["q0", "q1"] * 2


@pytest.mark.parametrize("taken", [True, False])
def test_a_server_that_keeps_labels_is_asked(ledger: Ledger, taken: bool) -> None:
    number = plan(ledger, questions(2))
    lost: dict[str, list[Exception]] = {"submit": [UnclearError("connection lost")]}
    server = Server(keeps_labels=True, after=lost if taken else {}, faults={} if taken else lost)
    if taken:
        run(ledger, server, number)
    else:
        # Not listed yet is not known to be untaken: the user decides.
        with pytest.raises(TransferError, match="may or may not have been taken"):
            run(ledger, server, number)
        run(ledger, server, number)
        assert server.submitted == []
        run(ledger, server, number, replace(SETTINGS, resubmit_lost=True))
    assert texts(ledger, number) == all_answered(2)
    assert server.submitted == ["q0", "q1"]


@pytest.mark.parametrize("state", ["uploading", "submitting", "submitted"])
def test_a_start_after_a_crash_goes_on_where_it_stopped(ledger: Ledger, state: str) -> None:
    number = plan(ledger, questions(2))
    server = Server(uploads={"f": ["q0", "q1"]}, batches={"remote-0": ["q0", "q1"]} if state == "submitted" else {})
    batch = ledger.begin(ledger.unsent(number))
    if state != "uploading":
        ledger.submitting(batch, "f")
    if state == "submitted":
        ledger.submitted(batch, "remote-0")
    said = run(ledger, server, number)
    if state == "submitting":
        assert server.submitted == []
        assert "stopped while it was being submitted" in said[0]
    else:
        assert texts(ledger, number) == all_answered(2)
        assert server.submitted == ["q0", "q1"]


def test_a_refused_submission_frees_its_lines_and_others_are_still_fetched(ledger: Ledger) -> None:
    number = plan(ledger, questions(9))
    server = Server(faults={"submit": [RefusedError("413: too large; choose a smaller transfer.batch_size")]})
    with pytest.raises(RefusedError, match=r"smaller transfer\.batch_size"):
        run(ledger, server, number)
    assert len(server.batches) <= 2
    assert ledger.batches("state IN ('submitted', 'submitting', 'uploading', 'lost')") == []
    run(ledger, server, number)
    assert texts(ledger, number) == all_answered(9)
    assert sorted(server.submitted) == sorted(f"q{n}" for n in range(9))


def test_a_batch_the_server_does_not_know_is_the_users_to_decide_and_stops_nothing(ledger: Ledger) -> None:
    number = plan(ledger, questions(6))
    server = Server(faults={"status": [UnknownBatchError("404: no such batch")]})
    said = run(ledger, server, number)
    assert sum(a is not None for a in texts(ledger, number)) == 3
    assert any("404: no such batch" in line and "transfer attach" in line for line in said)
    (lost,) = ledger.batches("state = 'lost'")
    ledger.submitted(lost, server.labels[lost.label])
    run(ledger, server, number)
    assert texts(ledger, number) == all_answered(6)
    assert len(server.submitted) == 6


def test_results_of_another_batch_are_not_taken_for_missing_answers(ledger: Ledger) -> None:
    number = plan(ledger, questions(2))
    server = Server(batches={"other": ["x1", "x2"], "right": ["q0", "q1"]})
    batch = ledger.begin(ledger.unsent(number))
    ledger.submitting(batch, "f")
    ledger.submitted(batch, "other")
    said = run(ledger, server, number)
    assert any("results as other answer none of its questions, the first is for 'x1'" in line for line in said)
    ledger.submitted(ledger.batch(batch.label), "right")
    run(ledger, server, number)
    assert texts(ledger, number) == all_answered(2)


def test_what_stays_damaged_is_left_out_of_the_last_try(ledger: Ledger) -> None:
    number = plan(ledger, questions(2))

    class Damaged(Server):
        def read(self, file: Path, *, on_damaged: Callable[[str], None] | None = None) -> Iterator[Answer]:
            yield Answer(custom_id="q0", text="whole")
            if on_damaged is None:
                raise DamagedResultsError("member 1.json is no JSON")
            on_damaged("member 1.json")

    said = run(ledger, Damaged(), number)
    assert texts(ledger, number) == ["whole", None]
    assert any("member 1.json in its results cannot be read and is left out" in line for line in said)


def test_a_defect_in_one_batch_does_not_cost_the_others_their_answers(ledger: Ledger) -> None:
    number = plan(ledger, questions(9))
    server = Server(faults={"read": [ZeroDivisionError("a defect")]})
    with pytest.raises(ZeroDivisionError):
        run(ledger, server, number)
    assert sum(a is not None for a in texts(ledger, number)) == 6
    run(ledger, server, number)
    assert texts(ledger, number) == all_answered(9)


def test_cancelling_goes_on_after_a_refusal(ledger: Ledger) -> None:
    number = plan(ledger, questions(9))
    server = Server(faults={"cancel": [RefusedError("409: it has ended")]})
    for n, lines in enumerate((ledger.unsent(number)[:3], ledger.unsent(number)[3:6])):
        batch = ledger.begin(lines)
        ledger.submitting(batch, "f")
        ledger.submitted(batch, f"remote-{n}")
    said: list[str] = []
    runner = Runner(ledger, server, SETTINGS, Budget(SETTINGS, SERVER), said.append, lambda done, total: None)
    assert [b.remote_id for b in asyncio.run(runner.cancel())] == ["remote-1"]
    assert "was not cancelled: 409: it has ended" in said[0]


def test_of_two_errors_the_second_is_said(ledger: Ledger) -> None:
    number = plan(ledger, questions(6))
    server = Server(after={"submit": [UnclearError("first cut"), UnclearError("second cut")]})
    said: list[str] = []
    runner = Runner(ledger, server, SETTINGS, Budget(SETTINGS, SERVER), said.append, lambda done, total: None)
    with pytest.raises(TransferError, match="first cut"):
        asyncio.run(runner.run(number))
    assert any("second cut" in line for line in said)


def test_no_balance_means_stop(ledger: Ledger) -> None:
    number = plan(ledger, questions(2))
    server = Server(faults={"submit": [BudgetError("428: Negative project balance")]})
    with pytest.raises(BudgetError, match="Negative project balance"):
        run(ledger, server, number)
    assert server.calls.count("submit") == 1


def test_a_batch_the_server_gives_up_is_said_and_not_repeated(ledger: Ledger) -> None:
    number = plan(ledger, questions(2))
    server = Server(ends=[BatchStatus(state="ended", detail="expired after 24 h")])
    (_, ended) = run(ledger, server, number)
    assert "given up by the server: expired after 24 h; to ask again: transfer.resubmit_failed=true" in ended
    run(ledger, server, number)
    assert texts(ledger, number) == [None, None]
    assert len(server.batches) == 1


def test_caps_cut_a_batch_and_say_what_is_spent(ledger: Ledger) -> None:
    number = plan(ledger, questions(5), tokens=26)
    # A question of 10 characters in one message, and its answer: 10 + 4 + 12 tokens.
    settings = replace(SETTINGS, characters_per_token=1.0, answer_tokens=12, max_tokens=110)
    server = Server()
    with pytest.raises(BudgetError, match=r"over the budget: spent .* of 110 in all \(transfer.max_tokens\)"):
        run(ledger, server, number, settings)
    assert len(server.submitted) == 4
    assert ledger.spent(server=SERVER) == 104
    with pytest.raises(BudgetError, match="in the last 24 hours"):
        run(ledger, server, number, replace(settings, max_tokens=None, max_tokens_per_day=30))
    run(ledger, server, number, replace(settings, max_tokens=None))
    assert sorted(server.submitted) == [f"q{n}" for n in range(5)]


def test_ctrl_c_waits_for_a_submission_under_way(ledger: Ledger) -> None:
    number = plan(ledger, questions(2))

    class Slow(Server):
        async def submit(self, file_id: str, *, model: str, endpoint: str, label: str) -> str:
            remote = await super().submit(file_id, model=model, endpoint=endpoint, label=label)
            await asyncio.sleep(0.05)
            return remote

    server = Slow()

    async def interrupted() -> None:
        budget = Budget(SETTINGS, SERVER)
        task = asyncio.ensure_future(Runner(ledger, server, SETTINGS, budget, print, lambda d, t: None).run(number))
        while not server.batches:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(interrupted())
    (batch,) = ledger.batches()
    assert (batch.state, batch.remote_id) == ("submitted", "remote-0")


def test_pauses_double_are_random_and_honour_the_server() -> None:
    backoff = Backoff(first=1.0, longest=60.0, max_errors=9, say=print, jitter=random.Random(0))
    for errors, plain in ((1, 1.0), (2, 2.0), (5, 16.0), (30, 60.0)):
        pauses = {backoff.seconds(errors, None) for _ in range(20)}
        assert len(pauses) > 10
        assert all(0.8 * plain <= p <= 1.2 * plain for p in pauses)
    assert all(backoff.seconds(1, 300.0) >= 300.0 for _ in range(20))
    assert backoff.seconds(5, 0.0) >= 12.8


@dataclass
class Chat:
    """A server that answers at once; the first calls fail after so many answers with the error given."""

    server: str = SERVER
    free: bool = False
    at_once: int = 2
    faults: list[tuple[int, Exception]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    async def answers(self, lines: Sequence[Line]) -> AsyncIterator[Answer]:
        count, error = self.faults.pop(0) if self.faults else (len(lines), None)
        for line in lines[:count]:
            self.asked.append(line.custom_id)
            yield Answer(custom_id=line.custom_id, text=f"answer to {line.custom_id}", input_tokens=1, output_tokens=1)
        if error is not None:
            raise error

    async def close(self) -> None:
        pass


def ask(ledger: Ledger, chat: Chat, number: int, settings: TransferSettings = SETTINGS) -> list[str]:
    said: list[str] = []
    runner = DirectRunner(ledger, chat, settings, Budget(settings, SERVER), said.append, lambda done, total: None)
    asyncio.run(runner.run(number))
    return said


def test_direct_answers_are_kept_as_they_come(ledger: Ledger) -> None:
    number = plan(ledger, questions(5))
    chat = Chat(faults=[(1, RetryLaterError("429")), (1, RetryLaterError("429"))])
    ask(ledger, chat, number)
    assert texts(ledger, number) == all_answered(5)
    assert chat.asked == [f"q{n}" for n in range(5)]


@pytest.mark.parametrize(
    ("error", "check"),
    [
        (UnclearError("cut off"), "paid for without the answers"),
        (BudgetError("428"), "428"),
        (RefusedError("401"), "401"),
    ],
)
def test_direct_answers_survive_what_comes_after_them(ledger: Ledger, error: Exception, check: str) -> None:
    number = plan(ledger, questions(5))
    chat = Chat(faults=[(2, None), (1, error)])  # type: ignore[list-item]
    with pytest.raises(TransferError, match=check):
        ask(ledger, chat, number)
    assert texts(ledger, number) == [*all_answered(3), None, None]
    unclear = isinstance(error, UnclearError)
    said = ask(ledger, chat, number)
    # The line that may have been answered waits for the user; the others do not.
    assert texts(ledger, number)[3:] == ([None, "answer to q4"] if unclear else ["answer to q3", "answer to q4"])
    assert bool(said) == unclear
    ask(ledger, chat, number, replace(SETTINGS, resubmit_lost=True))
    assert texts(ledger, number) == all_answered(5)


def test_a_full_disk_does_not_free_questions_under_way(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    number = plan(ledger, questions(4))
    chat = Chat()

    def full(*arguments: object, **named: object) -> None:
        raise TransferError("no space left on the disk of the ledger")

    with monkeypatch.context() as disk:
        disk.setattr(ledger, "store_one", full)
        with pytest.raises(TransferError, match="no space left"):
            ask(ledger, chat, number)
    said = ask(ledger, chat, number)
    assert "paid for without the answers reaching us" in said[0]
    assert texts(ledger, number) == [None, None, "answer to q2", "answer to q3"]


def test_a_free_server_is_simply_asked_again(ledger: Ledger) -> None:
    number = plan(ledger, questions(3))
    ledger.begin(ledger.unsent(number)[:2], state="submitting")
    chat = Chat(free=True, faults=[(1, UnclearError("cut off"))])
    ask(ledger, chat, number)
    assert texts(ledger, number) == all_answered(3)
