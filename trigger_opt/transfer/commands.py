"""`trigger-opt transfer status | resume | cancel | attach | export`: the ledger from the command line."""

import argparse
import asyncio
import csv
import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, cast

from trigger_opt.errors import UserError
from trigger_opt.progress import say, stage_progress
from trigger_opt.transfer.budget import Budget
from trigger_opt.transfer.client import BatchClient
from trigger_opt.transfer.clients import open_client
from trigger_opt.transfer.job import ledger_path
from trigger_opt.transfer.ledger import EXPORTED, Batch, Ledger
from trigger_opt.transfer.ledger_file import open_ledger, read_ledger
from trigger_opt.transfer.resume import job_of, resume
from trigger_opt.transfer.runner import Runner, lost_line
from trigger_opt.transfer.settings import BATCH_CLIENTS, TransferSettings
from trigger_opt.transfer.words import outcome_lines

_MEANING = {
    "uploading": "being prepared",
    "submitting": "being submitted",
    "submitted": "at the server",
    "lost": "nobody knows whether the server took them",
    "answered": "answered",
    "failed": "failed at the server",
    "missing": "left out by the server",
    "stored": "answered",
    "ended": "given up by the server",
    "dropped": "not sent",
    "released": "free to be asked again",
}


def main(arguments: list[str]) -> int:
    """Exit code: 0, 2 for a mistake of the user or what the server refused, 130 after Ctrl-C."""
    given = _parser().parse_args(arguments)
    try:
        _COMMANDS[given.command](given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; the ledger knows where to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `… export | head`: whoever read has enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = error.filename or "the run folder"
        print(f"error: no space left on the disk of {where}; nothing is lost", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trigger-opt transfer", description="Look at the transfer ledger, or go on.")
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "status": "what was sent, answered, lost, and what it cost",
        "resume": "go on with the latest plan: fetch, send what was never sent, judge",
        "cancel": "ask the server to stop all batches it has",
        "attach": "give a lost batch the id under which the server has it",
        "export": "every question with its answer, as JSON Lines or CSV",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--ledger", type=Path, default=None, help="SQLite file (default: the user's own)")
        if name == "resume":
            command.add_argument("--resubmit-lost", action="store_true", help="submit lost batches again")
            command.add_argument("--resubmit-failed", action="store_true", help="ask again what the server failed")
        if name == "attach":
            command.add_argument("label")
            command.add_argument("id", help="the server's id of the batch")
        if name == "export":
            command.add_argument("--format", choices=["jsonl", "csv"], default="jsonl")
            command.add_argument("--out", type=Path, default=None, help="file (default: the terminal)")
    return parser


def _path(given: argparse.Namespace) -> Path:
    return given.ledger or ledger_path(TransferSettings())


@contextmanager
def _existing(given: argparse.Namespace) -> Iterator[Ledger]:
    """The ledger to write in; none is made where there is none."""
    with read_ledger(_path(given)):
        pass
    with open_ledger(_path(given)) as ledger:
        yield ledger


def _status(given: argparse.Namespace) -> None:
    with read_ledger(_path(given)) as ledger:
        latest = ledger.last_plan()
        say(f"ledger: {ledger.path}")
        if latest is not None:
            plan, server, run_dir, _ = latest
            total, unsent = len(ledger.questions(plan)), len(ledger.unsent(plan))
            say(f"latest plan: {total:,} questions to {server}, {unsent:,} still to be sent; run folder {run_dir}")
            day, ever = ledger.spent(server=server, last_day=True), ledger.spent(server=server)
            say(f"tokens at {server}: {ever:,}, of them {day:,} in the last 24 hours (what is under way is estimated)")
        for server, model, state, count in ledger.counts():
            say(f"{count:>8,}  {_MEANING[state]}  ({model} at {server})")
        for batch in ledger.batches("state IN ('submitted', 'submitting', 'uploading')"):
            say(_batch_line(batch))
        for batch in ledger.batches("state = 'lost'"):
            say(lost_line(batch, ledger))


def _batch_line(batch: Batch) -> str:
    since = datetime.fromtimestamp(batch.submitted or batch.created).astimezone().isoformat(timespec="seconds")
    return f"batch {batch.label}: {batch.lines:,} questions to {batch.model}, {_MEANING[batch.state]} since {since}" + (
        f" as {batch.remote_id}" if batch.remote_id else ""
    )


def _resume(given: argparse.Namespace) -> None:
    with _existing(given) as ledger, stage_progress("transfer", unit="answer") as bar:
        bar.note(_going_on(ledger))
        outcomes = resume(
            ledger,
            say=bar.note,
            on_progress=lambda done, total: bar.update(done, total=total),
            resubmit_lost=given.resubmit_lost,
            resubmit_failed=given.resubmit_failed,
        )
    say(*outcome_lines(outcomes))


def _going_on(ledger: Ledger) -> str:
    plan, job = job_of(ledger)
    server = ledger.questions(plan)[0].line.request.server
    return f"going on with the plan of {job.folder}: {len(ledger.unsent(plan)):,} questions to send to {server}"


def _cancel(given: argparse.Namespace) -> None:
    with _existing(given) as ledger:
        _, job = job_of(ledger)
        if job.settings.client not in BATCH_CLIENTS or job.settings.emulator:
            raise UserError(
                f"client {job.settings.client!r} of the latest plan keeps no batches that could be cancelled"
            )
        stopped = asyncio.run(_cancel_all(ledger, job.settings))
        say(*(f"asked the server to stop {b.label} ({b.remote_id})" for b in stopped))
        say(f"{len(stopped)} batches; `{ledger.command('resume')}` fetches what they had answered")
        for other in {b.server for b in ledger.batches("state = 'submitted' AND server != ?", _server(ledger))}:
            say(f"not touched: batches at {other}, which is not the latest plan's server")


def _server(ledger: Ledger) -> str:
    latest = ledger.last_plan()
    assert latest is not None
    return latest[1]


async def _cancel_all(ledger: Ledger, settings: TransferSettings) -> list[Batch]:
    client = cast(BatchClient, open_client(settings))
    budget = Budget(settings, client.server)
    try:
        return await Runner(ledger, client, settings, budget, say, lambda done, total: None).cancel()
    finally:
        await client.close()


def _attach(given: argparse.Namespace) -> None:
    with _existing(given) as ledger:
        batch = ledger.batch(given.label)
        if batch.state not in ("lost", "submitting", "submitted"):
            raise UserError(f"batch {batch.label} is {_MEANING[batch.state]}; only a lost one can be attached")
        if batch.file_id is None:
            raise UserError(f"batch {batch.label} was never a file at the server, so there is nothing to attach")
        if not given.id.strip():
            raise UserError("the id is empty; give the one the server shows for this batch")
        ledger.submitted(batch, given.id.strip())
        say(f"batch {given.label} is {given.id.strip()} at the server; `{ledger.command('resume')}` fetches it")


def _export(given: argparse.Namespace) -> None:
    with read_ledger(_path(given)) as ledger, _output(given.out) as out:
        if given.format == "jsonl":
            for row in ledger.rows():
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            return
        writer = csv.DictWriter(out, EXPORTED)
        writer.writeheader()
        for row in ledger.rows():
            writer.writerow({**row, "messages": json.dumps(row["messages"], ensure_ascii=False)})


@contextmanager
def _output(path: Path | None) -> Iterator[IO[str]]:
    if path is None:
        yield sys.stdout
        return
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as out:
            yield out
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another --out") from None


_COMMANDS = {"status": _status, "resume": _resume, "cancel": _cancel, "attach": _attach, "export": _export}
