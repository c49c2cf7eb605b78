"""The folder `collected` of a sweep: the merged records, as a run folder in which the stages verify and report run."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trigger_opt.collect.jobs import COLLECTION_FILE
from trigger_opt.collect.merge import Merged
from trigger_opt.collect.suspects import Suspect
from trigger_opt.errors import UserError
from trigger_opt.locks import holder
from trigger_opt.records import StageRun, write_record, write_records
from trigger_opt.report.jobs import Collection
from trigger_opt.run_folder import machine, now, versions

COLLECTED = "collected"
# What is made again by merging again, and the empty file that guards it.
_MERGED = ("candidates.jsonl", "provenance.jsonl", "jobs.jsonl", COLLECTION_FILE, "run.json", ".lock")
KEPT = 1000
"""Strings that are kept of all; a report with all of them could not be opened, and the jobs' folders have them."""


def make_room(sweep_dir: Path) -> Path:
    """The folder to collect into, free of what an earlier collection left: one that merely merged is deleted, one
    that holds anything else is renamed to collected.old-N.

    Raises:
        UserError: something else lies there, or a run in it is under way.
    """
    root = sweep_dir / COLLECTED
    if not root.exists():
        return root
    parts = _parts(root)
    if not parts:
        raise UserError(f"{root} is there and was not made by trigger-opt collect; move it out of the way")
    for part in parts:
        if by := holder(part / ".lock"):
            raise UserError(f"{part} is in use by {by}; wait for it")
    if _more_than_merged(root):
        number = 1
        while (aside := sweep_dir / f"{COLLECTED}.old-{number}").exists():
            number += 1
        root.rename(aside)
    else:
        shutil.rmtree(root)
    return root


def kept(sweep_dir: Path) -> Path | None:
    """The folder of an earlier collection that `make_room` would rename; None where there is none."""
    root = sweep_dir / COLLECTED
    return root if root.is_dir() and _more_than_merged(root) else None


def _parts(root: Path) -> list[Path]:
    return [p for p in (root, *root.glob("*")) if (p / COLLECTION_FILE).is_file()]


def _more_than_merged(root: Path) -> bool:
    parts = _parts(root)
    files = [p for p in root.rglob("*") if p.is_symlink() or not p.is_dir()]
    return any(file.parent not in parts or file.name not in _MERGED for file in files)


def judge_settings(suspect: Suspect, folder: Path, *, candidates: int | None) -> dict[str, Any]:
    """The configuration of the merged run: the first job's, for the stages verify and report.

    What the ledger of candidates holds as refuted is judged all the same: one judge is to hear all.
    """
    config = suspect.info.config
    verify = dict(config.get("verify", {}))
    if candidates is not None:
        verify["candidates"] = candidates
    ledger = {**config.get("candidates", {}), "keep": True, "skip": False}
    return {**config, "stages": ["verify", "report"], "run_dir": str(folder), "verify": verify, "candidates": ledger}


def write_collection(
    suspect: Suspect, best: Sequence[Merged], folder: Path, settings: dict[str, Any], *, sweep: str, command: str
) -> None:
    """All merged records of one suspect, in a folder that is made for them.

    Args:
        best: the strings to keep. sweep: name of its folder. command: for run.json.
    """
    folder.mkdir(parents=True)
    merge = suspect.merge
    write_records(folder / "candidates.jsonl", [m.candidate for m in best])
    write_records(folder / "provenance.jsonl", [m.provenance for m in best])
    write_records(folder / "jobs.jsonl", suspect.jobs)
    collection = Collection(
        sweep=sweep,
        strings=merge.strings,
        different=merge.different,
        kept=len(best),
        preferred=min(merge.preferred, len(best)),
        differs=suspect.differs,
        settings_of=suspect.first,
        verified_by_jobs=suspect.verified,
        taken_back=suspect.taken_back,
    )
    write_record(folder / COLLECTION_FILE, collection)
    # What the jobs spent, for the string was found with it.
    merged = StageRun(
        stage="collect",
        started=now(),
        seconds=suspect.seconds,
        evaluations=suspect.evaluations,
        summary=f"{merge.different:,} different strings of {len(suspect.jobs):,} jobs; time and evaluations are theirs",
    )
    info = replace(
        suspect.info,
        command=command,
        started=merged.started,
        machine=machine(),
        config=settings,
        versions=versions(),
        plan=[],
        stages=[merged],
        unfinished=[],
        starts=1,
    )
    write_record(folder / "run.json", info)
