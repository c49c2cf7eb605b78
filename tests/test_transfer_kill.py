"""SIGKILL at any moment, the server's too: in the end the ledger is that of a run nobody disturbed."""

import json
import random
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.transfer_setup import MANY, add_plan, contents, questions, settle
from tests.zygote import KILLED, Zygote, zygote
from trigger_opt.transfer.ledger_file import open_ledger

SUBMIT = "POST /api/v1/batches"


@dataclass
class World:
    """One ledger and one emulator, both killed and started again.

    Attributes:
        cut_off: submissions the emulator began and did not live, or hear, to their end.
    """

    processes: Zygote
    folder: Path
    faults: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    emulator: int = 0
    cut_off: int = 0

    def begin(self, chats: int, activations: int) -> None:
        with open_ledger(self.folder / "ledger.sqlite") as ledger:
            add_plan(ledger, questions(chats, models=MANY.models, activations=activations))
        (self.folder / "faults.json").write_text(json.dumps(self.faults))
        self.start_emulator()

    def start_emulator(self) -> None:
        log = self.folder / "emulator.log"
        log.unlink(missing_ok=True)
        given = ["--model", "echo", "--polls", "2", "--state", str(self.folder / "state")]
        given += ["--port", self.url.rpartition(":")[2] or "0", "--faults", str(self.folder / "faults.json")]
        self.emulator = self.processes.start(log, what="emulator", given=given)
        while not (log.is_file() and log.read_text().endswith("\n")):
            time.sleep(0.005)
        said = log.read_text()
        assert said.startswith("listening on "), said
        self.url = said.removeprefix("listening on ").strip()

    def restart_emulator(self) -> None:
        self.kill_emulator()
        self.start_emulator()
        self.cut_off = self._cut_off()

    def kill_emulator(self) -> None:
        if self.emulator:
            self.processes.stop(self.emulator)
            self.emulator = 0

    def start(self, die: tuple[str, str, int] | None = None) -> int:
        given = {"ledger": str(self.folder / "ledger.sqlite"), "url": self.url, "die": die}
        return self.processes.start(self.folder / "transfer.log", what="transfer", given=given)

    def settle(self) -> None:
        """As a user would, with the program dead."""
        for _ in range(20):
            if self._cut_off() == self.cut_off:
                break
            # What the dead client had sent last is still being taken.
            time.sleep(0.05)
        self.cut_off = self._cut_off()
        with open_ledger(self.folder / "ledger.sqlite") as ledger:
            settle(ledger, self.get("batches"))

    def finish(self) -> dict[str, Any]:
        """Of the ledger, after a last undisturbed start."""
        code = self.processes.wait(self.start())
        assert code == 0, (self.folder / "transfer.log").read_text()
        with open_ledger(self.folder / "ledger.sqlite") as ledger:
            return contents(ledger)

    def get(self, what: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/emulator/{what}") as answer:
            return json.load(answer)

    def _cut_off(self) -> int:
        counts = self.get("counts")
        return int(counts["calls"].get(SUBMIT, 0) - counts["batches"])


@pytest.fixture(scope="module")
def processes() -> Iterator[Zygote]:
    with zygote("tests.transfer_setup", {}) as made:
        yield made


@pytest.fixture
def world(processes: Zygote, tmp_path: Path) -> Iterator[World]:
    made = World(processes, tmp_path)
    yield made
    made.kill_emulator()


def undisturbed(processes: Zygote, folder: Path, chats: int, activations: int) -> dict[str, Any]:
    """What the ledger holds when nothing was killed."""
    world = World(processes, folder)
    world.begin(chats, activations)
    try:
        found = world.finish()
        counts = world.get("counts")
    finally:
        world.kill_emulator()
    wanted = 2 * (chats + activations)
    assert len(found["answers"]) == counts["lines"] == counts["distinct"] == wanted
    assert set(map(tuple, found["states"].values())) == {("answered",)}
    assert len(found["files"]) == 2 * activations
    return found


@pytest.fixture(scope="module")
def few(processes: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return undisturbed(processes, tmp_path_factory.mktemp("few"), 10, 2)


@pytest.fixture(scope="module")
def many(processes: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return undisturbed(processes, tmp_path_factory.mktemp("many"), 57, 3)


def require_same(world: World, wanted: dict[str, Any]) -> None:
    """The ledger is the undisturbed one, and nothing was submitted twice."""
    found = world.finish()
    for name, value in wanted.items():
        assert found[name] == value, name
    counts = world.get("counts")
    assert counts["lines"] == counts["distinct"] == len(wanted["requests"])


STEPS = ("begin", "upload", "submitting", "submit", "submitted", "status", "download", "add", "store")


def moments() -> Iterator[Any]:
    """Before and after each step, alone and with the server; each once by default, the other half is slow."""
    for number, (step, when, server_too) in enumerate(product(STEPS, ("before", "after"), (False, True))):
        name = f"{when} {step}, {'both' if server_too else 'client'}"
        turn = (number // 2 + number // 4) % 2 == server_too
        yield pytest.param(step, when, server_too, id=name, marks=[] if turn else [pytest.mark.slow])


@pytest.mark.parametrize(("step", "when", "server_too"), moments())
def test_killed_at_a_step(world: World, few: dict[str, Any], step: str, when: str, server_too: bool) -> None:
    world.begin(10, 2)
    # The first call, then a later one: with other batches in other states around it.
    for number in (1, 3):
        code = world.processes.wait(world.start((step, when, number)))
        if number == 1:
            assert code == KILLED
        if server_too:
            world.restart_emulator()
    world.settle()
    require_same(world, few)


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(world: World, many: dict[str, Any], seed: int) -> None:
    """Five each: twenty in all."""
    generator = random.Random(seed)
    # The server needs longer for its answers than all five lives last.
    world.faults = [{"kind": "slow", "seconds": 0.012, "times": None}]
    world.begin(57, 3)
    killed = 0
    for life in range(5):
        pid = world.start()
        time.sleep(generator.uniform(0.0, 0.2))
        server_too = (life + seed) % 2 == 1
        if server_too and generator.random() < 0.5:
            world.kill_emulator()
        killed += world.processes.stop(pid) == KILLED
        if server_too:
            world.restart_emulator()
        # A user may look, or just start again.
        if generator.random() < 0.5:
            world.settle()
    world.settle()
    assert killed > 0
    require_same(world, many)
