"""Going on with the latest plan of a ledger, from nothing but the ledger."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter

from trigger_opt.errors import UserError
from trigger_opt.records import TransferOutcome
from trigger_opt.transfer.job import Job, finish
from trigger_opt.transfer.ledger import Ledger
from trigger_opt.transfer.runner import OnProgress
from trigger_opt.transfer.settings import TransferSettings


def resume(
    ledger: Ledger,
    *,
    say: Callable[[str], None],
    on_progress: OnProgress,
    resubmit_lost: bool = False,
    resubmit_failed: bool = False,
) -> list[TransferOutcome]:
    """Fetch what is at the server, send what was never sent, and judge, into the run folder of that plan.

    Raises:
        UserError: there is no plan, its run folder is gone; or see `job.finish`.
    """
    plan, job = job_of(ledger)
    job = replace(job, settings=replace(job.settings, resubmit_lost=resubmit_lost, resubmit_failed=resubmit_failed))
    return finish(ledger, plan, job, say=say, on_progress=on_progress)


def job_of(ledger: Ledger) -> tuple[int, Job]:
    """Number and job of the latest plan; its questions are in the ledger, so it holds no strings or contexts.

    Raises:
        UserError: there is no plan, or its run folder is gone.
    """
    latest = ledger.last_plan()
    if latest is None:
        raise UserError(f"the ledger {ledger.path} holds no plan; send something first (stages=[transfer])")
    plan, _, run_dir, written = latest
    folder = Path(run_dir)
    if not folder.is_dir():
        raise UserError(f"the run folder {folder} of the latest plan is gone; make it again, empty, to go on")
    return plan, Job(
        settings=TypeAdapter(TransferSettings).validate_python(written["settings"]),
        strings=[],
        payloads=written["payloads"],
        contexts=[],
        known_random={},
        seed=written["seed"],
        folder=folder,
    )
