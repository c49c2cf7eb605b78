"""The one file from which an interrupted stage goes on: written whole or not at all, read as plain values only."""

import io
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trigger_opt.errors import UserError
from trigger_opt.paths import CHECKPOINT

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A stage under way.

    Attributes:
        state: from which it goes on; empty where it begins again.
        sizes: bytes that each file that grows line by line had; what was written later is written again.
        versions: what the state was computed with.
    """

    stage: str
    state: dict[str, Any]
    sizes: dict[str, int]
    versions: dict[str, str]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint in `folder`; a crash at any moment leaves the old one or the new one."""
    part = folder / f".{CHECKPOINT}.part"
    # Not straight into the file: torch makes a RuntimeError of a full disk.
    values = io.BytesIO()
    torch.save({"format": _FORMAT, **vars(checkpoint)}, values)
    try:
        with part.open("wb") as file:
            file.write(values.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        part.replace(folder / CHECKPOINT)
    except OSError:
        # On a full disk it would keep the records of what was found from being written.
        part.unlink(missing_ok=True)
        raise


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`; None where there is none.

    Raises:
        UserError: it is damaged or of another format.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    remedy = "remove it, and its stage begins again, or give another run_dir"
    try:
        # Plain values and tensors only: a checkpoint may come from anywhere.
        values = torch.load(path, weights_only=True, map_location="cpu")
        if values.pop("format") != _FORMAT:
            raise UserError(f"{path} is a checkpoint of another format; {remedy}")
        return Checkpoint(**values)
    except UserError:
        raise
    except Exception as error:
        # A torn or foreign file raises whatever its bytes lead to.
        why = str(error).strip().split("\n")[0]
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {why}); {remedy}") from None


def cut_back(folder: Path, sizes: Mapping[str, int]) -> None:
    """Cut files that grow line by line back to these sizes; one of size 0 is removed.

    Raises:
        UserError: a file is shorter than that, so that the checkpoint is not of this run.
    """
    for name, size in sizes.items():
        path = folder / name
        there = path.stat().st_size if path.is_file() else 0
        if there < size:
            raise UserError(
                f"{path} holds {there} bytes, and the checkpoint beside it was written at {size}: they are of "
                "different runs; give another run_dir"
            )
        if size == 0:
            path.unlink(missing_ok=True)
        elif there > size:
            os.truncate(path, size)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        grows: files of the run folder that grow line by line. versions: of what computes. exact: stages that go on
            with the same versions only.
        every_steps, every_seconds: how often `due`; None is never.
    """

    def __init__(
        self,
        folder: Path,
        *,
        grows: Sequence[str],
        versions: Mapping[str, str],
        exact: Sequence[str] = (),
        every_steps: int | None = None,
        every_seconds: float | None = None,
    ) -> None:
        self._folder = folder
        self._grows = tuple(grows)
        self._versions = dict(versions)
        self._exact = tuple(exact)
        self._every_steps = every_steps
        self._every_seconds = every_seconds
        self._steps = 0
        self._saved = time.monotonic()
        self._found: Checkpoint | None = None

    def find(self, stage: str | None) -> None:
        """Before anything is written: take up the checkpoint of `stage`, the one that was interrupted, and cut back
        what was written after it; None where no run is continued. What is of another stage is removed.

        Raises:
            UserError: it cannot be read, other versions wrote it, or it is not of this run.
        """
        found = load_checkpoint(self._folder) if stage else None
        if found is None or found.stage != stage:
            self.forget()
            return
        # A stage that begins again may do so with any version.
        exact = found.state and stage in self._exact
        if exact and (changed := _changed(found.versions, self._versions)):
            raise UserError(
                f"the run in {self._folder} stopped in stage {stage!r} under {changed}; go on with that, or remove "
                f"{self._folder / CHECKPOINT}, and the stage begins again"
            )
        cut_back(self._folder, found.sizes)
        self._found = found

    def begun(self, stage: str) -> dict[str, Any] | None:
        """The state from which `stage` goes on, empty where it begins again in files that are its own; None where it
        was not begun before. Said once."""
        found, self._found = self._found, None
        return found.state if found is not None and found.stage == stage else None

    def due(self) -> bool:
        """After a step: is it time to save?"""
        self._steps += 1
        late = self._every_seconds is not None and time.monotonic() - self._saved >= self._every_seconds
        return late or (self._every_steps is not None and self._steps >= self._every_steps)

    def save(self, stage: str, state: dict[str, Any]) -> None:
        """Keep `state` for a later start."""
        sizes = {name: _on_disk(self._folder / name) for name in self._grows}
        save_checkpoint(self._folder, Checkpoint(stage=stage, state=state, sizes=sizes, versions=self._versions))
        self._steps, self._saved = 0, time.monotonic()

    def forget(self) -> None:
        """The stage has ended, and its records are written."""
        (self._folder / CHECKPOINT).unlink(missing_ok=True)


def _on_disk(path: Path) -> int:
    """The size of a file, all of which is on the disk: after a power failure no checkpoint may know of more."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    names = [n for n in {**before, **now} if before.get(n) != now.get(n)]
    return ", ".join(f"{n} {before.get(n, 'unknown')} (now {now.get(n, 'unknown')})" for n in names)
