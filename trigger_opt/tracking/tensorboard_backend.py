"""TensorBoard: numbers as scalars; words, tables and the outcome as text, in `tensorboard/` of the run folder."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from trigger_opt.errors import UserError
from trigger_opt.tracking.base import Moment

TENSORBOARD_DIR = "tensorboard"


class TensorBoardBackend:
    """One TensorBoard run, `run_dir`/tensorboard; `tensorboard --logdir` of a sweep's folder shows all of its jobs.

    A reopened folder's event files are written anew. TensorBoard keeps numbers in 32 bits, and knows no artifacts: of
    those the names are shown.

    Args:
        config: the resolved configuration, plain values; shown as text.

    Raises:
        UserError: the package tensorboard is not installed.
    """

    def __init__(self, run_dir: Path, *, config: Mapping[str, object]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"tracking.mode=tensorboard needs the package tensorboard ({error}); "
                "pip install 'trigger-opt[tensorboard]', or tracking.mode=offline for W&B's files"
            ) from error
        # All of metrics.jsonl follows, so that what a killed process did not write is back. A purged step alone would
        # leave doubles: readers purge numbers, not texts (tensorboard 2.21), and go by the clocks in the files' names.
        # A TensorBoard that is open now has read the old files, and purges.
        folder = run_dir / TENSORBOARD_DIR
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = SummaryWriter(str(folder), purge_step=0)
        self._outcome: dict[str, object] = {}
        self._last = Moment(step=0, time=time.time())
        self._text("config", "    " + json.dumps(config, indent=1, default=str).replace("\n", "\n    "), self._last)

    def log(self, at: Moment, metrics: Mapping[str, float | int | str]) -> None:
        """See Backend."""
        self._last = at
        for name, value in metrics.items():
            if isinstance(value, str):
                self._text(name, _shown(value), at)
            else:
                self._writer.add_scalar(name, value, at.step, at.time)

    def table(self, at: Moment, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """See Backend. A Markdown table."""
        self._last = at
        self._text(name, _markdown(columns, rows), at)

    def artifact(self, name: str, kind: str, files: Sequence[Path]) -> None:
        """See Backend. The files' names alone, in the run folder or elsewhere."""
        self._text(f"artifact/{name}", _markdown([kind], [[file.name] for file in files]), self._last)

    def summary(self, values: Mapping[str, object]) -> None:
        """See Backend. All of the outcome so far."""
        self._outcome |= values
        self._text("summary", _markdown(["name", "value"], list(self._outcome.items())), self._last)

    def finish(self, exit_code: int) -> None:
        """See Backend."""
        self._text("exit_code", str(exit_code), self._last)
        self._writer.close()

    def sync_hint(self) -> str | None:
        """None: there is nowhere to upload to."""
        return None

    def _text(self, name: str, markdown: str, at: Moment) -> None:
        # Model text may hold lone surrogates, which an event file cannot.
        clean = markdown.encode("utf-8", "backslashreplace").decode("utf-8")
        self._writer.add_text(name, clean, at.step, at.time)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head, *body = [[_shown(cell) for cell in row] for row in [columns, *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(columns), *body])


def _shown(value: object) -> str:
    """`value` as it stands, whatever Markdown or HTML would make of its characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return re.sub(r"[!-/:-@\[-`{-~\s]", lambda found: f"&#{ord(found[0])};" if found[0] != " " else " ", text)
