"""The story: plan, check the base, then diff, hypotheses, search, verify, null, transfer, report, each from the records
of the one before.

Every arrow is a file in the run folder, so any stage can be run alone, or again.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from trigger_opt import __version__, api
from trigger_opt.config import RunConfig
from trigger_opt.errors import UserError
from trigger_opt.interrupts import Interrupted
from trigger_opt.models.files import ModelFiles
from trigger_opt.models.pair import ModelPair, load_pair
from trigger_opt.planning import load_options, plan_run
from trigger_opt.progress import say
from trigger_opt.prompts import Context, searchable
from trigger_opt.records import RunInfo, write_record
from trigger_opt.run_folder import RunFolder, has_ended, hold_run_folder, loads_models, machine, now, run_name, versions
from trigger_opt.scoring import Group
from trigger_opt.session import Session, open_checkpoints
from trigger_opt.stages import STAGES, closing_lines, require_records
from trigger_opt.tracking import Tracker, job_type_of, open_tracker
from trigger_opt.weight_diff import identify


def run(
    config: RunConfig, *, run_dir: Path, command: str, settings: dict[str, Any], sweep: str = "", again: bool = False
) -> None:
    """One run in `run_dir`. Records written so far stay whatever happens.

    Args:
        command: the exact command line, for the report. settings: the resolved configuration, for the records.
        sweep: name of the sweep this is a job of. again: whether it may have been started before by someone who does
            not know what became of it; then nothing is done where it has ended.

    Raises:
        UserError: see each stage; nothing has been spent when the plan or the base is wrong.
    """
    if sweep:
        config, settings = _without_ledger(config, settings)
    info = RunInfo(
        name=config.name, command=command, seed=config.seed, started=now(), machine=machine(), config=settings,
        versions=versions(), plan=[], stages=[],
    )  # fmt: skip
    if again and has_ended(run_dir, info, stages=config.stages):
        say(f"the run in {run_dir} has ended before; nothing was done")
        Group().announce(None)
        return
    with hold_run_folder(run_dir, info, stages=config.stages) as folder:
        say(f"trigger_opt {__version__}: {config.name}, seed {config.seed}, in {run_dir}")
        if folder.goes_on:
            say(f"goes on with the run in {run_dir}, which was interrupted in stage {folder.goes_on!r}")
        # First: what is written from here on belongs to this start.
        checkpoints = open_checkpoints(config, folder)
        files = _checked_models(config, folder) if loads_models(folder.info.unfinished) else []
        tracker = _tracker(config, folder, settings, group=sweep or config.name)
        with _finishing(tracker):
            _walk(Session(config, folder, tracker, checkpoints, files, load_options(config)))
        if hint := tracker.sync_hint():
            say(f"to upload to W&B: {hint}")
        say(*closing_lines(folder))
        say(str(run_dir))


def _walk(session: Session) -> None:
    """Every stage that is left, once each finds what it starts from."""
    stages = list(session.folder.info.unfinished)
    for stage in stages:
        require_records(session, stage)
    session.folder.begin()
    for stage in stages:
        STAGES[stage](session)
    Group().announce(None)


def _without_ledger(config: RunConfig, settings: dict[str, Any]) -> tuple[RunConfig, dict[str, Any]]:
    """A sweep's job, whatever was asked for: what it verifies would depend on which others ended before it; and a
    thousand of them, on many machines, would write into one SQLite file."""
    kept = {**settings.get("candidates", {}), "keep": False}
    return replace(config, candidates=replace(config.candidates, keep=False)), {**settings, "candidates": kept}


def _tracker(config: RunConfig, folder: RunFolder, settings: dict[str, Any], *, group: str) -> Tracker:
    info = folder.info
    return open_tracker(
        folder.path,
        mode=config.tracking.mode,
        project=config.tracking.project,
        group=config.tracking.group or group,
        job_type=job_type_of([*(s.stage for s in info.stages), *info.unfinished]),
        name=run_name(folder.path),
        tags=config.tracking.tags,
        config=settings,
    )


@contextmanager
def _finishing(tracker: Tracker) -> Iterator[None]:
    """Close the tracker in the end, with the exit code that the program will have."""
    exit_code = 1
    try:
        yield
        exit_code = 0
    except KeyboardInterrupt as stop:
        exit_code = stop.exit_code if isinstance(stop, Interrupted) else 130
        raise
    finally:
        tracker.finish(exit_code)


def _checked_models(config: RunConfig, folder: RunFolder) -> list[ModelFiles]:
    """Files of fine-tuned model, base and controls, once they are there, fit, and belong together."""
    planned = plan_run(config)
    folder.set_plan(planned.lines)
    say(*planned.lines)
    identity = identify(planned.files[0], planned.files[1], allow_wrong_base=config.model.allow_wrong_base)
    write_record(folder.file("identity.json"), identity)
    say(
        f"base: {identity.identical} of {identity.tensors} tensors are the base's, bit for bit; "
        f"changed: {', '.join(identity.changed_families[:4]) or 'none'}"
    )
    return planned.files


def assist(config: RunConfig, group: Group) -> None:
    """On every process of a torchrun job but the first: score candidates with it, search by search, until it is done.

    The first alone keeps the run folder.
    """
    asked: tuple[tuple[str, str], bool] | None = None
    loaded: tuple[ModelPair, list[Context]] | None = None
    while (call := group.listen()) is not None:
        if (call.names, call.plain) != asked or loaded is None:
            # The pair before goes first: two need not fit.
            loaded = None
            loaded, asked = _loaded(config, call.names, plain=call.plain), (call.names, call.plain)
        # The first process says what went wrong; all of them see the same.
        with suppress(UserError):
            call.search.run(*loaded)


def _loaded(config: RunConfig, names: tuple[str, str], *, plain: bool) -> tuple[ModelPair, list[Context]]:
    files = [
        api.model_files(n, allow_pickle=config.model.allow_pickle, allow_code=config.model.allow_code) for n in names
    ]
    pair = load_pair(files[0], files[1], options=replace(load_options(config), plain=plain))
    search, _ = api.context_sets(config.contexts.search, config.contexts.held_out)
    return pair, searchable(pair.tokenizer, search)
