"""Every fault of the batch server, with the real client and a real ledger: nothing lost, nothing asked twice."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.transfer_setup import (
    SETTINGS,
    add_plan,
    client_of,
    echo,
    found_answers,
    questions,
    require_clear,
    runner_of,
    settle,
)
from trigger_opt.transfer.archive import ArchiveLimits, read_archive
from trigger_opt.transfer.client import TransferError
from trigger_opt.transfer.clients import server_of
from trigger_opt.transfer.clients.jsinfer import JsinferClient
from trigger_opt.transfer.emulator import KEY, Emulator, parse_rules
from trigger_opt.transfer.ledger import Ledger
from trigger_opt.transfer.ledger_file import open_ledger
from trigger_opt.transfer.requests import Request
from trigger_opt.transfer.settings import TransferSettings

UPLOAD, SUBMIT, POLL, DOWNLOAD = "POST /api/v1/files", "POST /api/v1/batches", "GET /api/v1/batches", "GET /results"
ROUTES = {"upload": UPLOAD, "submit": SUBMIT, "poll": POLL, "download": DOWNLOAD}
COUNT = 6
Rules = list[dict[str, Any]]


@dataclass(kw_only=True)
class Scene:
    """One ledger and one emulator, and what the user reads.

    Attributes:
        said: lines of the latest run. pauses: seconds the runner wanted to wait, all shortened.
    """

    ledger: Ledger
    emulator: Emulator
    plan: int
    text: Callable[[Request], str] = echo
    said: list[str] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)

    @property
    def server(self) -> str:
        latest = self.ledger.last_plan()
        assert latest is not None
        return latest[1]

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        assert len(self.pauses) < 200, "it waits for ever"
        await asyncio.sleep(min(seconds, 0.005))

    async def run(self, client: JsinferClient | None = None, **changes: Any) -> str:
        """What ended it; "" when it went through. Whatever the user reads is clear."""
        self.said.clear()
        settings: TransferSettings = replace(SETTINGS, **changes)
        if settings.resubmit_failed:
            self.ledger.release_failed(self.plan)
        client = client or client_of(self.emulator.url, self.server)
        runner = runner_of(self.ledger, client, settings, self.said.append, self.pause)
        try:
            await runner.run(self.plan)
        except TransferError as error:
            require_clear(str(error))
            return str(error)
        finally:
            for line in self.said:
                assert "\n" not in line
                assert KEY not in line
        return ""

    def check(self, answered: int, *, twice: int = 0) -> None:
        """So many right answers are in the ledger, and so many lines were submitted a second time."""
        found = found_answers(self.ledger, self.plan)
        assert {i: answer.text for i, (_, answer) in found.items()} == {i: self.text(r) for i, (r, _) in found.items()}
        assert len(found) == answered
        counts = self.emulator.counts()
        assert counts["lines"] - counts["distinct"] == twice
        assert counts["distinct"] <= COUNT

    def clear(self) -> None:
        """The server is well again."""
        self.emulator.faults.rules = []


@asynccontextmanager
async def scene(folder: Path, rules: Rules | None = None, more: str = "", **options: Any) -> AsyncIterator[Scene]:
    with open_ledger(folder / "ledger.sqlite") as ledger:
        latest = ledger.last_plan()
        plan = add_plan(ledger, questions(COUNT, more=more)) if latest is None else latest[0]
        async with Emulator(folder / "state", faults=parse_rules(rules or []), **options) as emulator:
            yield Scene(ledger=ledger, emulator=emulator, plan=plan)


def play(folder: Path, check: Callable[[Scene], Awaitable[None]], rules: Rules | None = None, **options: Any) -> None:
    async def inside() -> None:
        async with scene(folder, rules, **options) as s:
            await asyncio.wait_for(check(s), 60)

    asyncio.run(inside())


@dataclass(frozen=True, kw_only=True)
class Case:
    """A fault, and what comes of it.

    Attributes:
        rules: cleared after the first run, but for what belongs to a batch. reads: what ends the first run; "" for
            nothing. says: in a line said by the first run. answered: lines after the first run, after the second, and
            after a third with consent (when there are three). twice: lines submitted again, with consent.
        text: of an answer. options: of the emulator.
    """

    name: str
    rules: Rules
    reads: str = ""
    says: str = ""
    answered: tuple[int, ...] = (COUNT, COUNT)
    twice: int = 0
    text: Callable[[Request], str] = echo
    options: dict[str, Any] = field(default_factory=dict)


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("drop", {"kind": "drop"}, "lost|no connection"),
    ("drop after the work", {"kind": "drop_after"}, "lost|no connection"),
    ("html", {"kind": "html"}, "no JSON|damaged"),
    ("html after the work", {"kind": "html", "done": True}, "no JSON|damaged"),
    *((str(n), {"kind": "status", "status": n}, str(n)) for n in (408, 429, 500, 503)),
    ("500 after the work", {"kind": "status", "status": 500, "done": True}, "500"),
]
IN_A_ROW = r"^{what} trigger_opt-\w+: 3 failures in a row, the last: .*({why}).*; nothing is lost, start again later"
WHAT = {"upload": "upload of", "poll": "looking at", "download": "results of"}


def repeatable() -> list[Case]:
    """What may be done again: a short fault goes unnoticed, a long one ends the run and nothing more."""
    cases = []
    for route in ("upload", "poll", "download"):
        for name, rule, why in FAULTS:
            # Work that changes nothing: with or without it is the same.
            if route != "upload" and rule.get("done"):
                continue
            aimed = rule | {"match": ROUTES[route]}
            # A dropped GET is asked again by aiohttp itself, once.
            times = 3 if rule["kind"].startswith("drop") and route != "upload" else 2
            cases.append(Case(name=f"{route}: {name}", rules=[aimed | {"times": times}]))
            reads, lasting = IN_A_ROW.format(what=WHAT[route], why=why), [aimed | {"times": None}]
            cases.append(Case(name=f"{route}: {name}, lasting", rules=lasting, reads=reads, answered=(0, COUNT)))
    return cases


LOST = (
    r"^batch trigger_opt-\w+ \(3 questions to dormant-model-1\) may or may not have been taken by the server \(.+\); "
    r"look for an input file of that name there, then either `trigger-opt transfer attach .*trigger_opt-\w+ ID` or "
    r"submit it again with transfer.resubmit_lost=true"
)


def submissions() -> list[Case]:
    """What costs: never done again unless it certainly was not done."""
    at = {"match": SUBMIT}
    taken: list[tuple[str, dict[str, Any], int]] = [
        ("drop", {"kind": "drop"}, 0),
        ("drop after the work", {"kind": "drop_after"}, 3),
        ("html", {"kind": "html"}, 0),
        ("html after the work", {"kind": "html", "done": True}, 3),
        *((str(n), {"kind": "status", "status": n}, 0) for n in (500, 502, 504)),
        ("500 after the work", {"kind": "status", "status": 500, "done": True}, 3),
    ]
    cases = [
        Case(name=f"submit: {name}", rules=[rule | at], reads=LOST, answered=(0, 3, COUNT), twice=twice)
        for name, rule, twice in taken
    ]
    for status in (408, 429, 503):
        rule = {"kind": "status", "status": status} | at
        reads, lasting = IN_A_ROW.format(what="submission of", why=status), [rule | {"times": None}]
        cases.append(Case(name=f"submit: {status}", rules=[rule | {"times": 2}]))
        cases.append(Case(name=f"submit: {status}, lasting", rules=lasting, reads=reads, answered=(0, COUNT)))
    return cases


REFUSALS = {
    401: r"refuses the key \(401.*check the environment variable JSINFER_API_KEY",
    403: r"refuses the key \(403.*check the environment variable JSINFER_API_KEY",
    413: r"too large \(413.*choose a smaller transfer.batch_size",
    428: r"no tokens left for this key \(428.*resume when it grants more",
}


def refusals() -> list[Case]:
    """What the server will not do: said at once, and once."""
    return [
        Case(
            name=f"{route}: {status}",
            rules=[{"kind": "status", "status": status, "match": ROUTES[route]}],
            reads=reads,
            answered=(0, COUNT),
        )
        for route in ("upload", "submit", "poll")
        for status, reads in REFUSALS.items()
        if not (route == "poll" and status == 413)
    ]


AGAIN = "; to ask again: transfer.resubmit_failed=true"


def endings() -> list[Case]:
    """What comes back, or does not."""
    given_up = [
        Case(
            name=f"batch {ending}",
            rules=[{"kind": "end", "ending": ending}],
            says=rf"3 questions to dormant-model-1\) was given up by the server: {ending}: .*injected.*{AGAIN}$",
            answered=(3, 3, COUNT),
            twice=3,
        )
        for ending in ("failed", "cancelled", "expired")
    ]
    damaged: list[tuple[str, dict[str, Any], str]] = [
        ("URL that expired", {"kind": "expired_url"}, r"results address expired \(403\)"),
        ("403 at the download", {"kind": "status", "status": 403, "match": DOWNLOAD}, r"results address expired"),
        ("zip cut short", {"kind": "truncate_length"}, "results broke off"),
        ("zip cut short, well framed", {"kind": "truncate_close"}, "are damaged"),
        ("zip bomb", {"kind": "zip_bomb"}, "holds more than 1048576 bytes uncompressed"),
    ]
    cases = given_up + [Case(name=name, rules=[rule | {"times": 2}]) for name, rule, _ in damaged]
    cases += [
        Case(
            name=f"{name}, lasting",
            rules=[rule | {"times": None}],
            reads=IN_A_ROW.format(what="results of", why=why),
            answered=(0, COUNT),
        )
        for name, rule, why in damaged
    ]
    some: dict[str, Any] = {"lines": [1]}
    return [
        *cases,
        Case(name="completed without URL", rules=[{"kind": "no_url", "times": 2}]),
        Case(
            name="completed without URL, lasting",
            rules=[{"kind": "no_url", "times": None}],
            reads=IN_A_ROW.format(what="looking at", why="without an address of its results"),
            answered=(0, COUNT),
        ),
        Case(name="nested zip", rules=[], options={"nested": True}),
        Case(name="polls too often", rules=[{"kind": "poll_gap", "seconds": 0.008}], options={"polls": 2}),
        Case(name="zip with .. members", rules=[{"kind": "zip_traversal"}], says="3 answers, 5 answers to nothing we"),
        Case(
            name="duplicate lines",
            rules=[{"kind": "duplicate_lines", **some}],
            says="3 answers, 1 answered twice, the first counts$",
        ),
        Case(
            name="missing line",
            rules=[{"kind": "omit_lines", **some}],
            says=f"2 answers, 1 left out by the server{AGAIN}$",
            answered=(5, 5, COUNT),
            twice=1,
        ),
        Case(
            name="failed line",
            rules=[{"kind": "fail_lines", **some}],
            says=f"2 answers, 1 failed at the server{AGAIN}$",
            answered=(5, 5, COUNT),
            twice=1,
        ),
        Case(name="extra keys in a message", rules=[{"kind": "extra_keys", "times": None}]),
        Case(name="empty answers", rules=[{"kind": "empty_answers", "times": None}], text=lambda request: ""),
    ]


CASES = [*repeatable(), *submissions(), *refusals(), *endings()]


@pytest.fixture(autouse=True)
def _small_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bomb is one from 1 MB on."""
    small = partial(read_archive, limits=ArchiveLimits(member_bytes=1 << 20))
    monkeypatch.setattr("trigger_opt.transfer.clients.jsinfer.read_archive", small)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fault(tmp_path: Path, case: Case) -> None:
    async def check(s: Scene) -> None:
        s.text = case.text
        read = await s.run()
        assert bool(read) == bool(case.reads), read
        assert re.search(case.reads, read), read
        assert re.search(case.says, "\n".join(s.said), re.M), s.said
        s.check(case.answered[0])
        s.clear()
        assert await s.run() == ""
        s.check(case.answered[1])
        if case.reads == LOST:
            assert re.search(LOST, s.said[0])
        if len(case.answered) > 2:
            assert await s.run(resubmit_lost=True, resubmit_failed=True) == ""
            s.check(case.answered[2], twice=case.twice)
        assert list(s.ledger.files.iterdir()) == []

    play(tmp_path, check, case.rules, **case.options)
    assert [p for p in tmp_path.parent.rglob("*escaped*") if p.is_file()] == []
    assert not Path("/escaped.json").exists()


def in_100_seconds() -> str:
    """A date of HTTP; from when it is asked for, which may be minutes after tests were collected."""
    return format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("status", "asked", "least"),
    [(429, 3, 3.0), (503, "7.5", 7.5), (429, in_100_seconds, 30.0), (503, "soon", 0.0)],
    ids=["seconds", "fractions", "date", "nonsense"],
)
def test_retry_after_is_honoured(tmp_path: Path, route: str, status: int, asked: object, least: float) -> None:
    wish = asked() if callable(asked) else asked
    rule = {"kind": "status", "status": status, "match": ROUTES[route], "retry_after": wish}

    async def check(s: Scene) -> None:
        assert await s.run() == ""
        s.check(COUNT)
        # Never more than the server's wish and a little, whatever max_wait_seconds says.
        assert least <= max(s.pauses) <= max(0.03, least * 4)
        told = [line for line in s.said if f"({status}" in line]
        assert [re.search(r"; next try in \d+ s$", line) is not None for line in told] == [True] * (least > 5)

    play(tmp_path, check, [rule])


def test_lost_submissions_are_settled_by_what_the_provider_shows(tmp_path: Path) -> None:
    async def check(s: Scene) -> None:
        for _ in range(2):
            assert re.search(LOST, await s.run())
        s.check(0)
        assert len(settle(s.ledger, s.emulator.state.listing())) == 2
        assert await s.run() == ""
        s.check(COUNT)
        assert s.emulator.counts()["lines"] == COUNT

    play(tmp_path, check, [{"kind": kind, "match": SUBMIT} for kind in ("drop", "drop_after")])


def test_no_balance_stops_and_goes_on_when_there_is_some(tmp_path: Path) -> None:
    async def check(s: Scene) -> None:
        for _ in range(2):
            assert re.search(r"\(428: .*Negative project balance: -1.*\); resume when it grants more", await s.run())
            s.check(3)

    async def richer(s: Scene) -> None:
        assert await s.run() == ""
        s.check(COUNT)

    play(tmp_path, check, balance=2)
    play(tmp_path, richer)


def test_server_that_is_not_there(tmp_path: Path) -> None:
    async def check(s: Scene) -> None:
        async with Emulator(tmp_path / "other") as gone:
            pass
        reads = IN_A_ROW.format(what="upload of", why="no connection to the server")
        assert re.search(reads, await s.run(client_of(gone.url)))
        assert await s.run() == ""
        s.check(COUNT)

    play(tmp_path, check)


@pytest.mark.parametrize("at_a_time", [1, 3])
def test_everything_at_once(tmp_path: Path, at_a_time: int) -> None:
    """Faults that pass, several on every route."""
    kinds: Rules = [{"kind": "drop"}, {"kind": "status", "status": 503}, {"kind": "html"}]
    passing = [
        rule | {"match": ROUTES[r], "after": n}
        for r in ("upload", "poll", "download")
        for n in range(4)
        for rule in kinds
    ]
    submit = [{"kind": "status", "status": 429, "match": SUBMIT, "after": n, "retry_after": 0} for n in range(3)]
    batches: Rules = [{"kind": kind, "times": None} for kind in ("extra_keys", "duplicate_lines")]
    damaged: Rules = [
        {"kind": k} for k in ("truncate_length", "truncate_close", "expired_url", "no_url", "zip_traversal")
    ]

    async def check(s: Scene) -> None:
        assert await s.run(max_errors=99, batch_size=1, open_batches=at_a_time) == ""
        s.check(COUNT)

    play(tmp_path, check, [*passing, *submit, *batches, *damaged], polls=3, nested=True)


BOMB = """
import asyncio, resource, sys
from pathlib import Path
from tests.transfer_setup import client_of
from trigger_opt.transfer.client import BatchStatus, DamagedResultsError

async def main():
    client = client_of("http://127.0.0.1:1")
    await client.download(BatchStatus(state="completed", detail="", results=(sys.argv[1],)), Path("bomb.zip"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = list(client.read(Path("bomb.zip")))
    except DamagedResultsError as error:
        print(error.reason)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)

asyncio.run(main())
"""


def test_zip_bomb_costs_little_memory(tmp_path: Path) -> None:
    """With the limits as they are: 2 GB in 2 MB."""

    async def check(s: Scene) -> None:
        await s.run()
        (first, *_) = s.emulator.state.batches
        url = s.emulator._results_url(first, 60.0)
        s.emulator.faults.rules = parse_rules([{"kind": "zip_bomb"}])
        program = await asyncio.create_subprocess_exec(
            sys.executable, "-c", BOMB, url, cwd=tmp_path, stdout=subprocess.PIPE, env=_environment()
        )
        out, _ = await program.communicate()
        reason, megabytes = out.decode().splitlines()
        assert reason == f"the member 'bomb.json' holds more than {256 << 20} bytes uncompressed"
        assert int(megabytes) < 300

    play(tmp_path, check)


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "JSINFER_API_KEY": KEY}


@pytest.mark.parametrize("days", [3.0, -3.0])
def test_clock_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    """The clock of this machine jumps at every look at it; nothing waits longer, and nothing is forgotten."""
    jumps = [0.0]

    def jumping() -> float:
        jumps[0] += days * 24 * 3600
        return time.time() + jumps[0]

    for module in ("ledger", "results"):
        monkeypatch.setattr(f"trigger_opt.transfer.{module}.time", SimpleNamespace(time=jumping))

    async def check(s: Scene) -> None:
        s.emulator.faults.rules = parse_rules([{"kind": "drop_after", "match": SUBMIT, "after": 1}])
        assert re.search(LOST, await s.run())
        s.check(3)
        settle(s.ledger, s.emulator.state.listing())
        assert await s.run() == ""
        s.check(COUNT)
        assert max(s.pauses) <= SETTINGS.poll_seconds * 1.2
        spent = s.ledger.spent(server=s.server)
        answers = [answer for _, answer in found_answers(s.ledger, s.plan).values()]
        assert spent == sum((a.input_tokens or 0) + (a.output_tokens or 0) for a in answers) > 0

    play(tmp_path, check, polls=3)
    assert jumps[0] / days > 0


# --- the disk is full


def _full_after(s: Scene, call: str, client: JsinferClient) -> JsinferClient:
    """The ledger's disk has no page left once this call of the client is done."""
    done = getattr(client, call)

    async def filling(*given: Any, **named: Any) -> Any:
        answer = await done(*given, **named)
        pages = s.ledger._db.execute("PRAGMA page_count").fetchone()[0]
        s.ledger._db.execute(f"PRAGMA max_page_count = {pages}")
        return answer

    setattr(client, call, filling)
    return client


def test_disk_of_the_ledger_is_full_when_answers_come(tmp_path: Path) -> None:
    async def check(s: Scene) -> None:
        read = await s.run(_full_after(s, "download", client_of(s.emulator.url)))
        assert read == (
            f"no space left on the disk of the ledger {s.ledger.path}; free some and start again: nothing is lost"
        )
        s.check(0)
        s.ledger._db.execute("PRAGMA max_page_count = 1000000")
        assert await s.run() == ""
        s.check(COUNT)

    # So that the answers do not fit into pages that are there.
    play(tmp_path, check, more=" word" * 1000)


def test_disk_of_the_ledger_is_full_before_anything_is_sent(tmp_path: Path) -> None:
    async def check(s: Scene) -> None:
        s.ledger._db.execute("PRAGMA query_only = ON")
        assert "cannot be written" in await s.run()
        assert s.emulator.state.calls.total() == 0
        s.ledger._db.execute("PRAGMA query_only = OFF")
        assert await s.run() == ""
        s.check(COUNT)

    play(tmp_path, check)


def test_id_that_could_not_be_written_down_is_told(tmp_path: Path) -> None:
    async def check(s: Scene) -> None:
        client = client_of(s.emulator.url)
        submit = client.submit

        async def then_stuck(*given: Any, **named: Any) -> str:
            remote = await submit(*given, **named)
            s.ledger._db.execute("PRAGMA query_only = ON")
            return remote

        client.submit = then_stuck  # type: ignore[method-assign]
        read = await s.run(client)
        s.ledger._db.execute("PRAGMA query_only = OFF")
        (batch,) = s.ledger.batches()
        (remote,) = s.emulator.state.batches
        assert re.search(rf"`trigger-opt transfer attach .*{batch.label} {remote}`", read)
        assert await s.run() == ""
        assert re.search(LOST, s.said[0])
        s.check(3)
        s.ledger.submitted(batch, remote)
        assert await s.run() == ""
        s.check(COUNT)

    play(tmp_path, check)


@pytest.mark.parametrize("suffix", [".jsonl", ".results.part"])
def test_no_room_for_a_file(tmp_path: Path, suffix: str) -> None:
    """The input file, or the results: /dev/full stands where they are to be written."""

    async def check(s: Scene) -> None:
        begin = s.ledger.begin

        def then_full(*given: Any, **named: Any) -> Any:
            batch = begin(*given, **named)
            (s.ledger.files / f"{batch.label}{suffix}").symlink_to("/dev/full")
            return batch

        s.ledger.begin = then_full  # type: ignore[method-assign]
        read = await s.run()
        assert "cannot be written" in read
        assert "No space left on device" in read
        s.check(0)
        s.ledger.begin = begin  # type: ignore[method-assign]
        assert await s.run() == ""
        s.check(COUNT)
        assert list(s.ledger.files.iterdir()) == []

    play(tmp_path, check)


# --- Ctrl-C


async def _interrupted(ledger: Path, until: Callable[[], bool]) -> tuple[int | None, str]:
    """`trigger-opt transfer resume`, with a SIGINT as soon as `until` holds: exit code, and all it wrote."""
    command = [sys.executable, "-m", "trigger_opt", "transfer", "resume", "--ledger", str(ledger)]
    program = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_environment()
    )
    while not until() and program.returncode is None:
        await asyncio.sleep(0.01)
    if program.returncode is None:
        program.send_signal(signal.SIGINT)
    out, _ = await program.communicate()
    return program.returncode, out.decode()


@pytest.mark.parametrize(
    ("route", "rules"),
    [
        ("GET /api/v1/batches/{id}", []),
        ("POST /api/v1/batches", [{"kind": "hang", "seconds": 0.2, "match": SUBMIT}]),
        ("POST /api/v1/files", [{"kind": "hang", "seconds": 0.2, "match": UPLOAD}]),
    ],
    ids=["poll", "submit", "upload"],
)
def test_ctrl_c(tmp_path: Path, route: str, rules: Rules) -> None:
    async def interrupted() -> None:
        # This server never ends a batch.
        options: dict[str, Any] = {"faults": parse_rules(rules), "polls": 1_000_000}
        async with Emulator(tmp_path / "state", **options) as emulator:
            with open_ledger(tmp_path / "ledger.sqlite") as ledger:
                # Both batches at a time: of two submissions, the second waits for the first.
                settings = asdict(replace(SETTINGS, base_url=emulator.url, open_batches=2))
                written = {"settings": settings, "payloads": {}, "seed": 0}
                asked = questions(COUNT, server=server_of(replace(SETTINGS, base_url=emulator.url)))
                add_plan(ledger, asked, run_dir=str(tmp_path), settings=written)
            begun = _interrupted(ledger.path, lambda: emulator.state.calls[route] > 0)
            code, out = await asyncio.wait_for(begun, 60)
            if route == SUBMIT:
                assert emulator.counts()["lines"] == 3, "sent after Ctrl-C"
            assert code == 130, out
            assert out.splitlines()[-1] == "error: interrupted; the ledger knows where to go on"
            assert "Traceback" not in out
            assert KEY not in out

    async def finish(s: Scene) -> None:
        s.check(0)
        assert await s.run() == ""
        s.check(COUNT)

    asyncio.run(interrupted())
    play(tmp_path, finish)


@pytest.mark.slow
def test_a_batch_of_10000_lines(tmp_path: Path) -> None:
    async def check() -> None:
        with open_ledger(tmp_path / "ledger.sqlite") as ledger:
            plan = add_plan(ledger, questions(10_000))
            async with Emulator(tmp_path / "state") as emulator:
                s = Scene(ledger=ledger, emulator=emulator, plan=plan)
                assert await s.run(batch_size=10_000) == ""
                assert {a.text for _, a in found_answers(ledger, plan).values()} == {
                    echo(q.line.request) for q in questions(10_000)
                }
                assert emulator.counts()["lines"] == emulator.counts()["distinct"] == 10_000

    asyncio.run(check())


@pytest.mark.slow
def test_the_benchmark_counts_the_servers_time(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.transfer", "--requests", "40", "--batch", "10", "--seconds", "2"]
    root = Path(__file__).parents[1]
    subprocess.run(
        [*command, "--poll-seconds", "0.1", "--out", str(tmp_path)], cwd=root, env=_environment(), check=True
    )
    slow = json.loads((tmp_path / "results.json").read_text())["slow"]
    assert slow["answers"] == 40
    # The worker waits 2 s in all; however busy the machine, it is not done sooner.
    assert 2.0 <= slow["server_seconds"] <= slow["seconds"]
    assert slow["peak_mb"] < 300
    assert "| slow |" in (tmp_path / "RESULTS.md").read_text()
