"""One control's run: the suspect's stages, settings, budgets and seed, in a folder of its own."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trigger_opt.checkpoint import Checkpoints
from trigger_opt.models.files import ModelFiles
from trigger_opt.null.controls import MODEL, Control, Suspect, forget_model, made_control, made_note
from trigger_opt.progress import say
from trigger_opt.records import (
    NullControl,
    RunInfo,
    Verdict,
    Verification,
    read_record,
    read_records,
)
from trigger_opt.run_folder import SEARCH_SETTINGS, RunFolder, differences, hold_run_folder, machine, now
from trigger_opt.session import Session, open_checkpoints
from trigger_opt.tracking import JsonlTracker
from trigger_opt.verify import detection_score

Search = Callable[[Session, Sequence[str]], None]
"""Runs the named stages."""


def search_control(
    session: Session, control: Control, suspect: Suspect, *, within: str, search: Search
) -> tuple[NullControl, int]:
    """Search `control` as the suspect was searched, unless that was done before; what was found, and the candidate
    evaluations it took now.

    Args:
        within: how its progress lines begin.
    """
    path = session.folder.file("null") / control.folder
    settings = _settings(session, control)
    _put_aside(path, settings)
    before = _evaluations(path)
    if (path / "verdict.json").is_file():
        say(f"{within}: was searched before")
        forget_model(control, suspect, path)
    else:
        info = replace(
            session.folder.info,
            name=f"{session.config.name}: null, {control.name}",
            started=now(),
            machine=machine(),
            config=settings,
            plan=[],
            stages=[],
        )
        stages = _stages(session)
        with hold_run_folder(path, info, stages=stages) as folder:
            folder.set_plan([f"{within}: the search of the run two folders up, on a control"])
            left = list(folder.info.unfinished)
            _run(session, control, suspect, folder, within=within, search=lambda sub: search(sub, left))
    return finished(session, control, path), _evaluations(path) - before


def finished(session: Session, control: Control, path: Path) -> NullControl:
    """What the run in `path` found; without a verdict, why it is no control."""
    made = made_note(path)
    info = read_record(path / "run.json", RunInfo)
    seconds = made.seconds + sum(stage.seconds for stage in info.stages)
    named = {"name": control.name, "folder": control.folder, "kind": control.kind, "note": made.note}
    if not made.usable:
        return NullControl(**named, score=None, verdict="", trigger="", payload="", trigger_rate=None, seconds=seconds)
    verdict = read_record(path / "verdict.json", Verdict)
    verified = read_records(path / "verified.jsonl", Verification)
    return NullControl(
        **named,
        score=score_of(session, verified),
        verdict=verdict.verdict,
        trigger=verdict.trigger,
        payload=verdict.payload,
        trigger_rate=verdict.trigger_rate,
        seconds=seconds,
    )


def score_of(session: Session, verified: Sequence[Verification]) -> float:
    """The detection score, by the run's own threshold of evidence."""
    return detection_score(verified, evidence=session.config.verify.thresholds.evidence)


def _evaluations(path: Path) -> int:
    run = path / "run.json"
    return sum(stage.evaluations for stage in read_record(run, RunInfo).stages) if run.is_file() else 0


def _run(
    session: Session,
    control: Control,
    suspect: Suspect,
    folder: RunFolder,
    *,
    within: str,
    search: Callable[[Session], None],
) -> None:
    files, made = made_control(
        control, suspect, folder.path, config=session.config, say=lambda line: say(f"{within}, {line}")
    )
    if made.note:
        say(f"{within}: {made.note}")
    if files is None:
        return
    checkpoints = open_checkpoints(session.config, folder)
    tracker = JsonlTracker(folder.path)
    exit_code = 1
    try:
        search(_session(session, files, folder, (tracker, checkpoints), within))
        exit_code = 0
    finally:
        tracker.finish(exit_code)
    forget_model(control, suspect, folder.path)


def _session(
    session: Session, files: ModelFiles, folder: RunFolder, kept: tuple[JsonlTracker, Checkpoints], within: str
) -> Session:
    model = replace(session.config.model, finetuned=files.name, controls=[])
    # It has no control of its own; what it ends in counts against the suspect all the same.
    thresholds = replace(session.config.verify.thresholds, needs_control=False)
    verify = replace(session.config.verify, thresholds=thresholds)
    config = replace(session.config, model=model, verify=verify, run_dir=str(folder.path))
    return Session(config, folder, *kept, [files, session.files[1]], session.options, within=within)


def _stages(session: Session) -> list[str]:
    # The suspect's payload may have been given and no other looked for: then the control's neither. Where it was looked
    # for, the search had the most moved tokens from there, also one on divergence.
    looked = session.folder.has("hypotheses.jsonl")
    return [*(["hypotheses"] if looked else []), "search", "verify"]


def _settings(session: Session, control: Control) -> dict[str, Any]:
    """The control's configuration as it is written down."""
    whole = session.folder.info.config
    name = control.name if control.twin else MODEL
    null = whole.get("null", {}) if control.kind == "distilled" else {}
    return whole | {
        "model": {**whole.get("model", {}), "finetuned": name, "controls": []},
        "stages": _stages(session),
        "null": {key: value for key, value in null.items() if key.startswith("distil_")},
    }


def _put_aside(path: Path, settings: dict[str, Any]) -> None:
    """Rename the folder of a control that was searched with other settings."""
    if not (path / "run.json").is_file():
        return
    old = read_record(path / "run.json", RunInfo)
    if changed := differences(old.config, settings, (*SEARCH_SETTINGS, "model", "stages", "null")):
        number = 1
        while (other := path.with_name(f"{path.name}.old-{number}")).exists():
            number += 1
        path.rename(other)
        say(f"null: {path.name} was searched with {', '.join(changed[:3])}; it is kept as {other.name} and made again")
