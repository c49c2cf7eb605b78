"""The ledger: what may be sent, what is held, what came back; one writer; what a broken disk or file says."""

import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trigger_opt.errors import UserError
from trigger_opt.transfer.client import DamagedResultsError, TransferError
from trigger_opt.transfer.ledger import Ledger
from trigger_opt.transfer.ledger_file import open_ledger, read_ledger
from trigger_opt.transfer.plan import Question
from trigger_opt.transfer.requests import ACTIVATIONS, CHAT, Answer, Line, Request

SERVER = "a server"


def questions(count: int, *, server: str = SERVER, endpoint: str = CHAT) -> list[Question]:
    """Different questions to one model."""
    return [
        Question(
            line=Line(
                custom_id=f"q{n}",
                request=Request(
                    server=server,
                    model="m",
                    endpoint=endpoint,
                    messages=({"role": "user", "content": f"question {n}"},),
                    module_names=("layer",) if endpoint == ACTIVATIONS else (),
                ),
            ),
            kind="trigger", string="s", inserted="s", context=n, prompt=f"question {n}",
        )
        for n in range(count)
    ]  # fmt: skip


def plan(ledger: Ledger, asked: list[Question], tokens: int = 10) -> int:
    """The number of a plan of them, so many tokens each."""
    return ledger.add_plan(asked, server=SERVER, run_dir="/run", settings={"x": 1}, estimate=lambda r: tokens)


def words(text: str) -> int:
    return len(text.split())


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with open_ledger(tmp_path / "ledger.sqlite") as opened:
        yield opened


def test_requests_are_the_same_when_everything_that_decides_the_answer_is() -> None:
    (question,) = questions(1)
    request = question.line.request
    assert request.key == replace(request).key
    changes: list[dict[str, object]] = [
        {"server": "b"}, {"model": "n"}, {"endpoint": ACTIVATIONS}, {"messages": ()}, {"options": {"max_tokens": 3}},
        {"module_names": ("x",)}, {"repeat": 1},
    ]  # fmt: skip
    keys = {replace(request, **change).key for change in changes}  # type: ignore[arg-type]
    assert len(keys | {request.key}) == len(changes) + 1


def test_a_plan_is_read_back_as_it_was_made(ledger: Ledger) -> None:
    asked = questions(3)
    number = plan(ledger, asked)
    assert ledger.questions(number) == asked
    assert ledger.last_plan() == (number, SERVER, "/run", {"x": 1})
    assert ledger.unsent(number) == [q.line for q in asked]


def test_lines_are_held_from_the_moment_they_are_meant_until_they_are_free(ledger: Ledger) -> None:
    asked = questions(4)
    number = plan(ledger, asked)
    lines = [q.line for q in asked]
    batch = ledger.begin(lines[:2])
    assert ledger.unsent(number) == lines[2:]
    ledger.submitting(batch, "file")
    assert ledger.unsent(number) == lines[2:]
    ledger.lost(batch, "cut off")
    assert ledger.unsent(number) == lines[2:]
    ledger.submitted(batch, "remote")
    assert ledger.unsent(number) == lines[2:]
    assert ledger.batch(batch.label).remote_id == "remote"
    ledger.release(ledger.batch(batch.label))
    assert ledger.unsent(number) == lines
    again = ledger.begin(lines[:1])
    ledger.drop(again, "no connection")
    assert ledger.unsent(number) == lines


def test_an_equal_request_of_another_plan_is_held_too(ledger: Ledger) -> None:
    first, second = plan(ledger, questions(2)), plan(ledger, questions(3))
    batch = ledger.begin(ledger.unsent(first))
    assert [line.custom_id for line in ledger.unsent(second)] == ["q2"]
    ledger.submitting(batch, "f")
    ledger.submitted(batch, "r")
    ledger.store(batch, [Answer(custom_id="q0", text="a"), Answer(custom_id="q1", text="b")], count_tokens=words)
    assert [line.custom_id for line in ledger.unsent(second)] == ["q2"]
    keys = [q.line.request.key for q in ledger.questions(second)]
    assert ledger.answered(keys) == set(keys[:2])


def test_results_are_sorted_into_answered_failed_missing_repeated_and_unknown(ledger: Ledger) -> None:
    asked = questions(5)
    number = plan(ledger, asked)
    keys = [q.line.request.key for q in asked]
    batch = ledger.begin(ledger.unsent(number))
    stored = ledger.store(
        batch,
        [
            Answer(custom_id="q0", text="first"),
            Answer(custom_id="q0", text="second"),
            Answer(custom_id="q1", error="overloaded"),
            Answer(custom_id="q2", error="overloaded"),
            Answer(custom_id="q2", text="after all", input_tokens=7, output_tokens=2),
            Answer(custom_id="q3", text=""),
            Answer(custom_id="q3", error="late"),
            Answer(custom_id="other", text="?"),
        ],
        count_tokens=words,
    )
    assert (stored.answered, stored.failed, stored.missing, stored.repeated) == (3, 1, 1, 2)
    assert stored.unknown == ["other"]
    found = ledger.answers(keys)
    assert [found[k].text for k in (keys[0], keys[2], keys[3])] == ["first", "after all", ""]
    assert (found[keys[2]].input_tokens, found[keys[2]].output_tokens) == (7, 2)
    # "question 0" counts two words, and four for the message around it.
    assert (found[keys[0]].input_tokens, found[keys[0]].output_tokens) == (6, 1)
    assert found[keys[1]].error == "overloaded"
    assert found[keys[4]].error == "the server left it out"


def test_what_failed_is_asked_again_only_when_the_user_says_so(ledger: Ledger) -> None:
    number = plan(ledger, questions(3))
    batch = ledger.begin(ledger.unsent(number))
    ledger.store(batch, [Answer(custom_id="q0", text="a"), Answer(custom_id="q1", error="no")], count_tokens=words)
    assert ledger.unsent(number) == []
    assert ledger.release_failed(number) == 2
    assert [line.custom_id for line in ledger.unsent(number)] == ["q1", "q2"]
    gone = ledger.begin(ledger.unsent(number))
    ledger.end(gone, "expired")
    assert ledger.unsent(number) == []
    assert {a.error for k, a in ledger.answers(q.line.request.key for q in questions(3)).items() if a.error} == {
        "expired"
    }
    assert ledger.release_failed(number) == 2


def test_half_a_surrogate_pair_is_stored_as_a_question_mark(ledger: Ledger) -> None:
    number = plan(ledger, questions(2))
    batch = ledger.begin(ledger.unsent(number))
    odd = [
        Answer(custom_id="q0", text="cut \ud83d", input_tokens=2**80, output_tokens=-1),
        Answer(custom_id="q1", error="\udc00"),
    ]
    assert ledger.store(batch, odd, count_tokens=words).answered == 1
    found = ledger.answers(q.line.request.key for q in questions(2))
    assert sorted(str(a.error or a.text) for a in found.values()) == ["?", "cut ?"]


def test_damaged_results_write_nothing(ledger: Ledger) -> None:
    number = plan(ledger, questions(2))
    batch = ledger.begin(ledger.unsent(number))

    def broken() -> Iterator[Answer]:
        yield Answer(custom_id="q0", text="a")
        raise DamagedResultsError("cut off")

    with pytest.raises(DamagedResultsError):
        ledger.store(batch, broken(), count_tokens=words)
    assert ledger.answered(q.line.request.key for q in questions(2)) == set()
    assert ledger.batch(batch.label).state == "uploading"


def test_activations_are_kept_beside_the_ledger(ledger: Ledger) -> None:
    asked = questions(1, endpoint=ACTIVATIONS)
    batch = ledger.begin([asked[0].line]) if plan(ledger, asked) else None
    assert batch is not None
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    ledger.store(batch, [Answer(custom_id="q0", activations={"layer": array})], count_tokens=words)
    key = asked[0].line.request.key
    np.testing.assert_array_equal(ledger.answers([key])[key].activations["layer"], array)
    assert ledger.answers([key], activations=False)[key].activations == {}


def test_spending_counts_answers_and_estimates_what_is_under_way(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = plan(ledger, questions(6))
    lines = ledger.unsent(number)
    done, running, lost, free = (ledger.begin(lines[a:b]) for a, b in ((0, 1), (1, 3), (3, 4), (4, 6)))
    ledger.store(done, [Answer(custom_id="q0", text="x", input_tokens=100, output_tokens=3)], count_tokens=words)
    ledger.submitting(running, "f")
    ledger.submitted(running, "r")
    ledger.lost(lost, "?")
    ledger.drop(free, "no")
    assert ledger.spent(server=SERVER) == 103 + 20 + 10
    assert ledger.spent(server="another") == 0
    # What is asked again may have been answered, and paid for, the first time.
    ledger.release(ledger.batch(lost.label))
    assert ledger.spent(server=SERVER) == 103 + 20 + 10
    now = time.time()
    monkeypatch.setattr("trigger_opt.transfer.ledger.time.time", lambda: now + 2 * 86400)
    assert ledger.spent(server=SERVER, last_day=True) == 0
    # A clock set back makes old spending look like tomorrow's: it still counts.
    monkeypatch.setattr("trigger_opt.transfer.ledger.time.time", lambda: now - 2 * 86400)
    assert ledger.spent(server=SERVER, last_day=True) == 133


def test_exports_hold_each_question_once_with_what_became_of_it(ledger: Ledger) -> None:
    first = plan(ledger, questions(3))
    plan(ledger, questions(4))
    batch = ledger.begin(ledger.unsent(first)[:2])
    ledger.store(batch, [Answer(custom_id="q0", text="yes")], count_tokens=words)
    rows = list(ledger.rows())
    assert [(r["custom_id"], r["answer"], r["error"]) for r in rows] == [
        ("q0", "yes", None), ("q1", None, "the server left it out"), ("q2", None, None), ("q3", None, None),
    ]  # fmt: skip
    assert rows[0]["messages"] == [{"role": "user", "content": "question 0"}]


def test_one_writer_at_a_time_and_readers_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with open_ledger(path) as ledger:
        plan(ledger, questions(2))
        code = (
            "import sys; from pathlib import Path; from trigger_opt.transfer.ledger_file import open_ledger\n"
            "from trigger_opt.errors import UserError\n"
            "try:\n  with open_ledger(Path(sys.argv[1])): pass\nexcept UserError as e: print(e)"
        )
        said = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        assert "in use by process" in said.stdout
        assert "transfer.ledger" in said.stdout
        with read_ledger(path) as reader:
            assert reader.last_plan() == ledger.last_plan()
            with pytest.raises(TransferError):
                reader.begin(ledger.unsent(1))
    with open_ledger(path) as ledger:
        assert len(ledger.unsent(1)) == 2


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but long enough to be looked at as one" * 20)
    with pytest.raises(UserError, match=r"notes\.txt is no ledger"), open_ledger(text):
        pass
    other = tmp_path / "other.sqlite"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE meta (version INTEGER)")
    connection.execute("INSERT INTO meta VALUES (99)")
    connection.commit()
    connection.close()
    with pytest.raises(UserError, match="version 99, this program writes version 1"), open_ledger(other):
        pass
    with pytest.raises(UserError, match="there is no ledger"), read_ledger(tmp_path / "none.sqlite"):
        pass
    assert not (tmp_path / "none.sqlite").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), open_ledger(tmp_path / "file" / "ledger.sqlite"):
        pass


def test_a_full_disk_is_one_line_and_loses_nothing(ledger: Ledger) -> None:
    number = plan(ledger, questions(2))
    batch = ledger.begin(ledger.unsent(number))
    pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    long = [Answer(custom_id=f"q{n}", text="x" * 100_000) for n in range(2)]
    with pytest.raises(TransferError, match="no space left on the disk of the ledger"):
        ledger.store(batch, long, count_tokens=words)
    assert ledger.batch(batch.label).state == "uploading"
    ledger._db.execute("PRAGMA max_page_count = 100000")
    assert ledger.store(batch, long, count_tokens=words).answered == 2
