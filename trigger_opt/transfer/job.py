"""One transfer from strings to outcomes: plan, ledger, client, runner, rule."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from trigger_opt.errors import UserError
from trigger_opt.prompts import Context
from trigger_opt.records import ModuleShift, TransferAnswer, TransferOutcome, write_records
from trigger_opt.transfer.budget import Budget
from trigger_opt.transfer.client import BatchClient, Client, DirectClient
from trigger_opt.transfer.clients import open_client, server_of
from trigger_opt.transfer.direct import DirectRunner
from trigger_opt.transfer.ledger import Ledger, default_path
from trigger_opt.transfer.ledger_file import open_ledger
from trigger_opt.transfer.outcome import judge_transfer, transfer_answers
from trigger_opt.transfer.plan import Question, plan_lines, plan_questions
from trigger_opt.transfer.requests import ACTIVATIONS, CHAT
from trigger_opt.transfer.runner import OnProgress, Runner
from trigger_opt.transfer.settings import BATCH_CLIENTS, TransferSettings, model_names, stand_ins
from trigger_opt.transfer.shifts import module_shifts
from trigger_opt.transfer.stand_ins import EMULATOR_KEY, emulator, server_name

OUTCOMES, ANSWERS = "transfer.jsonl", "transfer_answers.jsonl"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be sent.

    Attributes:
        strings: to be judged, best first. payloads: string -> what the local model says to it; may lack strings.
        known_random: string -> random strings of as many tokens, where verification drew some.
        folder: of the run; outcomes and answers are written there.
    """

    settings: TransferSettings
    strings: list[str]
    payloads: Mapping[str, str]
    contexts: Sequence[Context]
    known_random: Mapping[str, Sequence[str]]
    seed: int
    folder: Path


def transfer(job: Job, *, say: Callable[[str], None], on_progress: OnProgress) -> list[TransferOutcome] | None:
    """Ask, or continue to ask, and judge; None when the settings ask for the plan alone.

    Raises:
        UserError: before anything is sent, or what stopped it; outcomes of what was answered are written all the same.
    """
    settings = job.settings
    server = server_name(stand_ins(settings)) if settings.emulator else server_of(settings)
    questions = plan_questions(
        strings=job.strings,
        contexts=job.contexts,
        models=model_names(settings),
        settings=settings,
        server=server,
        known_random=job.known_random,
        seed=job.seed,
    )
    with open_ledger(ledger_path(settings)) as ledger:
        answered = ledger.answered(q.line.request.key for q in questions)
        for line in plan_lines(questions, settings, answered):
            say(line)
        say(f"ledger: {ledger.path}")
        if settings.plan_only:
            say("nothing is sent: this was the plan; transfer.plan_only=false sends it")
            return None
        budget = Budget(settings, server)
        plan = ledger.add_plan(
            questions,
            server=server,
            run_dir=str(job.folder.absolute()),
            settings=_written(job),
            estimate=budget.expected_tokens,
        )
        return finish(ledger, plan, job, say=say, on_progress=on_progress)


def ledger_path(settings: TransferSettings) -> Path:
    """The ledger the settings name, or the user's own."""
    return Path(settings.ledger) if settings.ledger else default_path()


def finish(
    ledger: Ledger, plan: int, job: Job, *, say: Callable[[str], None], on_progress: OnProgress
) -> list[TransferOutcome]:
    """Go on with a plan of the ledger until it is done, and judge what came.

    Raises:
        UserError: what stopped it; outcomes of what was answered are written all the same.
    """
    questions = ledger.questions(plan)
    server = questions[0].line.request.server
    if job.settings.resubmit_failed and (freed := ledger.release_failed(plan)):
        say(f"{freed} questions the server failed to answer are asked again")
    try:
        with ExitStack() as stack:
            settings = job.settings
            # What is all answered needs no server and no key.
            if ledger.unsent(plan) or ledger.unsettled(server):
                if settings.emulator:
                    url = stack.enter_context(emulator(stand_ins(settings), ledger.files / "emulator"))
                    settings = replace(settings, base_url=url, api_key=EMULATOR_KEY)
                asyncio.run(_run(ledger, plan, settings, server, say=say, on_progress=on_progress))
    except BaseException:
        # What stopped it is what the user has to read, also where the disk takes no outcomes any more.
        with suppress(OSError, UserError):
            _judge(ledger, questions, job, server, say=say)
        raise
    return _judge(ledger, questions, job, server, say=say)


async def _run(
    ledger: Ledger,
    plan: int,
    settings: TransferSettings,
    server: str,
    *,
    say: Callable[[str], None],
    on_progress: OnProgress,
) -> None:
    client = open_client(settings)
    if settings.emulator:
        # Its port changes from start to start; its models do not.
        client.server = server
    if client.server != server:
        await client.close()
        raise UserError(
            f"this plan was made for {server}, and the settings and environment now name {client.server}; "
            "set transfer.base_url (or the variable it came from) as it was, or make a new plan"
        )
    budget = Budget(settings, server)
    try:
        await _runner(ledger, client, settings, budget, say, on_progress).run(plan)
    finally:
        await client.close()


def _runner(
    ledger: Ledger,
    client: Client,
    settings: TransferSettings,
    budget: Budget,
    say: Callable[[str], None],
    on_progress: OnProgress,
) -> Runner | DirectRunner:
    if settings.client in BATCH_CLIENTS:
        return Runner(ledger, cast(BatchClient, client), settings, budget, say, on_progress)
    return DirectRunner(ledger, cast(DirectClient, client), settings, budget, say, on_progress)


def _judge(
    ledger: Ledger, questions: Sequence[Question], job: Job, server: str, *, say: Callable[[str], None]
) -> list[TransferOutcome]:
    chats = [q for q in questions if q.line.request.endpoint == CHAT]
    found = ledger.answers(q.line.request.key for q in chats)
    answers = transfer_answers(chats, found)
    outcomes = judge_transfer(
        answers,
        payloads=job.payloads,
        server=server,
        thresholds=job.settings.thresholds,
        shifts=_shifts(ledger, questions, answers, job.seed, say=say),
    )
    write_records(job.folder / ANSWERS, answers)
    write_records(job.folder / OUTCOMES, outcomes)
    return outcomes


def _shifts(
    ledger: Ledger,
    questions: Sequence[Question],
    answers: Sequence[TransferAnswer],
    seed: int,
    *,
    say: Callable[[str], None],
) -> dict[tuple[str, str], list[ModuleShift]]:
    """By model and string; the controls are the random strings in the same contexts."""
    asked = [q for q in questions if q.line.request.endpoint == ACTIVATIONS]
    shifts = {}
    for model, string in dict.fromkeys((a.model, a.string) for a in answers if asked and a.kind == "trigger"):
        sides: dict[str, dict[int, Any]] = {"trigger": {}, "random": {}}
        mine = [q for q in asked if q.line.request.model == model and q.string == string and q.kind in sides]
        # One pair at a time: the arrays of all would not fit.
        found = ledger.answers(q.line.request.key for q in mine)
        for q in mine:
            answer = found.get(q.line.request.key)
            if answer is not None and answer.error is None:
                sides[q.kind].setdefault(q.context, answer.activations)
        try:
            shifts[model, string] = module_shifts(sides["trigger"], sides["random"], seed=seed)
        except UserError as error:
            # One unusable array must not keep the answers from being judged.
            say(f"activations of {model} for {string!r} are left out: {error}")
    return shifts


def _written(job: Job) -> dict[str, Any]:
    """Of a job, what `resume` needs; never the key, and no consent, which is given for one start."""
    return {
        "settings": asdict(replace(job.settings, api_key="", resubmit_lost=False, resubmit_failed=False)),
        "payloads": dict(job.payloads),
        "seed": job.seed,
    }
