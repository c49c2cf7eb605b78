"""A transfer to test: questions, a plan, the real client, and what a ledger holds in the end. No torch.

`python -m tests.transfer_setup` forks processes that may be killed, so that none has to import anything first.
"""

import asyncio
import itertools
import os
import re
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from tests.zygote import serve
from trigger_opt.transfer.budget import Budget
from trigger_opt.transfer.client import TransferError
from trigger_opt.transfer.clients.jsinfer import JsinferClient
from trigger_opt.transfer.emulator import ALIASES, KEY
from trigger_opt.transfer.emulator.__main__ import main as emulator_main
from trigger_opt.transfer.ledger import Batch, Ledger
from trigger_opt.transfer.ledger_file import open_ledger
from trigger_opt.transfer.plan import Question
from trigger_opt.transfer.requests import ACTIVATIONS, CHAT, Answer, Line, Request
from trigger_opt.transfer.results import ResultsWriter
from trigger_opt.transfer.runner import Runner
from trigger_opt.transfer.settings import TransferSettings

# As `Client.server`: the emulator's port changes, and the requests must stay the same.
SERVER = "the emulator"
MODEL = "dormant-model-1"
KINDS = ("trigger", "none", "random", "near_miss")
SETTINGS = TransferSettings(
    models=[MODEL], batch_size=3, open_batches=1, poll_seconds=0.01, max_wait_seconds=0.02, max_errors=3
)
_REMEDY = re.compile(r"start again|resume|attach|transfer\.\w+|give another|check|choose")


def questions(
    count: int, *, models: Sequence[str] = (MODEL,), activations: int = 0, more: str = "", server: str = SERVER
) -> list[Question]:
    """So many different chats for each model, and so many questions for activations; `more` lengthens each."""
    return [
        _question(f"question {n}{more}", n, model=model, endpoint=CHAT if n < count else ACTIVATIONS, server=server)
        for model in models
        for n in range(count + activations)
    ]


def _question(prompt: str, n: int, *, model: str, endpoint: str, server: str) -> Question:
    request = Request(
        server=server,
        model=model,
        endpoint=endpoint,
        messages=({"role": "user", "content": prompt},),
        module_names=("layer",) if endpoint == ACTIVATIONS else (),
    )
    return Question(
        line=Line(custom_id=f"q{n}-{model}", request=request),
        kind=KINDS[n % len(KINDS)], string="s", inserted="s", context=n // len(KINDS), prompt=prompt,
    )  # fmt: skip


def add_plan(
    ledger: Ledger, asked: Sequence[Question], *, run_dir: str = "/run", settings: dict[str, Any] | None = None
) -> int:
    """Its number."""
    server = asked[0].line.request.server
    return ledger.add_plan(asked, server=server, run_dir=run_dir, settings=settings or {}, estimate=lambda r: 10)


def echo(request: Request) -> str:
    """What the emulator's echo says to it."""
    return f"[{ALIASES[request.model]}] {request.messages[-1]['content']}"


def client_of(url: str, server: str = SERVER) -> JsinferClient:
    """The real client of the emulator at `url`, which requests know as `server`."""
    client = JsinferClient(KEY, url)
    client.server = server
    return client


def runner_of(
    ledger: Ledger,
    client: JsinferClient,
    settings: TransferSettings,
    say: Callable[[str], None],
    sleep: Callable[[float], Awaitable[None]],
) -> Runner:
    """A runner that tells nobody how far it is."""
    budget = Budget(settings, client.server)
    return Runner(ledger, client, settings, budget, say, lambda done, total: None, sleep=sleep)


def found_answers(ledger: Ledger, plan: int) -> dict[str, tuple[Request, Answer]]:
    """custom_id -> (request, answer) of everything in the plan that has an answer, not an error."""
    asked = ledger.questions(plan)
    found = ledger.answers(q.line.request.key for q in asked)
    return {
        q.line.custom_id: (q.line.request, answer)
        for q in asked
        if (answer := found.get(q.line.request.key)) is not None and answer.error is None
    }


def require_clear(line: str) -> None:
    """One line for the user: without the key, and with what to do."""
    assert "\n" not in line
    assert KEY not in line
    assert _REMEDY.search(line), f"no remedy in: {line}"


def settle(ledger: Ledger, listed: Sequence[dict[str, Any]]) -> list[Batch]:
    """What a user does about lost batches: attach those the provider shows under their name, let go of the others."""
    ids = {batch["name"]: batch["id"] for batch in listed}
    lost = ledger.batches("state IN ('submitting', 'lost')")
    for batch in lost:
        if remote := ids.get(f"{batch.label}.jsonl"):
            ledger.submitted(batch, remote)
        else:
            ledger.release(batch)
    return lost


def contents(ledger: Ledger) -> dict[str, Any]:
    """What a finished ledger holds, without times, labels and the server's ids."""
    keys = [q.line.request.key for q in ledger.questions(1)]
    states: dict[str, list[str]] = {key: [] for key in keys}
    for key, state in _rows(ledger, "SELECT key, lines.state FROM lines JOIN batches ON batches.id = batch "
                                    "WHERE batches.state NOT IN ('dropped', 'released')"):  # fmt: skip
        states[key].append(state)
    arrays = {k: {n: a.tolist() for n, a in v.activations.items()} for k, v in ledger.answers(keys).items()}
    return {
        "requests": _rows(ledger, "SELECT * FROM requests ORDER BY key"),
        "planned": _rows(ledger, "SELECT * FROM planned ORDER BY plan, position"),
        "answers": _rows(ledger, "SELECT key, text, activations, input_tokens, output_tokens, counted_by_server "
                                 "FROM answers ORDER BY key"),
        "states": states,
        "arrays": arrays,
        "batches": sorted({b.state for b in ledger.batches()} - {"dropped", "released"}),
        "files": sorted(str(p.relative_to(ledger.files)) for p in ledger.files.rglob("*") if p.is_file()),
    }  # fmt: skip


def _rows(ledger: Ledger, query: str) -> list[list[Any]]:
    return [list(row) for row in ledger._db.execute(query)]


# --- processes to be killed

MANY = TransferSettings(
    models=[MODEL, "dormant-model-2"], batch_size=7, open_batches=3, poll_seconds=0.01, max_wait_seconds=0.02,
    max_errors=3,
)  # fmt: skip


def transfer(ledger: str, url: str, die: Sequence[Any] | None) -> int:
    """Go on with the ledger's only plan; exit code. `die`: (step, "before" or "after", which call of it)."""
    with open_ledger(Path(ledger)) as opened:
        client = client_of(url)
        if die is not None:
            _arm(opened, client, *die)
        try:
            asyncio.run(runner_of(opened, client, MANY, print, asyncio.sleep).run(1))
        except TransferError as error:
            print(f"error: {error}")
            return 2
    return 0


def _arm(ledger: Ledger, client: JsinferClient, step: str, when: str, number: int) -> None:
    """SIGKILL to this very process at one call of a step."""
    owner: Any = (
        ResultsWriter if step == "add" else client if step in ("upload", "submit", "status", "download") else ledger
    )
    original, calls = getattr(owner, step), itertools.count(1)

    def die(moment: str, call: int) -> None:
        if (moment, call) == (when, number):
            os.kill(os.getpid(), signal.SIGKILL)

    def plain(*given: Any, **named: Any) -> Any:
        call = next(calls)
        die("before", call)
        result = original(*given, **named)
        die("after", call)
        return result

    async def awaited(*given: Any, **named: Any) -> Any:
        call = next(calls)
        die("before", call)
        result = await original(*given, **named)
        die("after", call)
        return result

    setattr(owner, step, awaited if asyncio.iscoroutinefunction(original) else plain)


def _work(order: dict[str, Any]) -> int:
    """Exit code of what is ordered."""
    given = order["given"]
    if order["what"] == "emulator":
        return emulator_main(given)
    return transfer(given["ledger"], given["url"], given["die"])


if __name__ == "__main__":
    serve(_work)
