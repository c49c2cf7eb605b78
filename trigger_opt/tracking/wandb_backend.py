"""Weights & Biases: one W&B run a run folder, online or offline."""

import contextlib
import os
import re
import shlex
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from trigger_opt.errors import UserError
from trigger_opt.tracking.base import Moment
from trigger_opt.tracking.jsonl import METRICS_FILE

WANDB_ID_FILE = "wandb_run_id.txt"


class WandbBackend:
    """One W&B run, kept in `run_dir`/wandb; a reopened folder continues the same run in a session of its own.

    Offline touches no network at all. Neither mode sends code, git state, host name or command line: what identifies
    a run is its `config`. Use of processor, memory, disk, network and GPU is recorded in both. Once the run is open, a
    failure of W&B is reported on stderr once and never raised.

    Args:
        online: upload while running; otherwise the data waits in the folder for `wandb sync`.
        job_type: what kind of run it is, say "search"; "" for none.
        name: the run's display name. config: the resolved configuration, plain values.
        patience: seconds to wait for the server when opening.

    Raises:
        UserError: W&B cannot start: no key, no server, or a name it refuses.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        online: bool,
        project: str,
        group: str,
        name: str,
        tags: Sequence[str],
        config: Mapping[str, object],
        job_type: str = "",
        patience: float = 30.0,
    ) -> None:
        self._online = online
        self._broken = False
        about = {"project": project, "group": group, "name": name, "tags": list(tags), "config": dict(config)}
        known = {"id": _run_id(run_dir), "job_type": job_type or None}
        self._run, self._failures = _start(run_dir, online, patience, known | about)
        self._session = Path(self._run.settings.sync_dir).resolve()
        # What the server has of a continued run; 0 offline. W&B drops earlier steps with a warning a row. A search that
        # goes on from its checkpoint logs the same rows once more, so nothing is missing where the file was cut back.
        # Not run.step, which is 0 after a resume (0.31.0).
        self._steps_there: int = self._run.starting_step

    def log(self, at: Moment, metrics: Mapping[str, float | int | str]) -> None:
        """See Backend."""
        self._log(at, metrics)

    def table(self, at: Moment, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """See Backend."""
        import wandb

        data = [list(row) for row in rows]
        # Mixed types: a cell is None where a control model is missing, a number elsewhere in its column.
        self._log(at, {name: wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)})

    def artifact(self, name: str, kind: str, files: Sequence[Path]) -> None:
        """See Backend. Characters W&B refuses in a name become "-". The files are copied: a rerun may change them.

        Given again in a continued run it makes no second version: W&B compares it with the latest.

        Raises:
            ValueError: a file does not exist.
        """
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", name), kind)

        def add() -> None:
            for file in files:
                artifact.add_file(str(file), name=file.name)
            self._run.log_artifact(artifact)

        self._guard(add)

    def summary(self, values: Mapping[str, object]) -> None:
        """See Backend."""
        self._guard(lambda: self._run.summary.update(dict(values)))

    def finish(self, exit_code: int) -> None:
        """See Backend. The data is on disk, and online also uploaded, when this returns.

        A lost server delays it by five minutes at most.
        """
        import wandb

        def close() -> None:
            self._run.finish(exit_code=exit_code)
            # run.finish returns some milliseconds before the file is whole (0.31.0); this waits for the writer.
            wandb.teardown(exit_code)

        self._guard(close)
        if self._broken:
            # Otherwise wandb prints a traceback about the dead connection when Python exits.
            with contextlib.suppress(*self._failures):
                wandb.teardown(exit_code)

    def sync_hint(self) -> str | None:
        """The `wandb sync` line for this session; None when online or uploaded already.

        This one alone, because it holds the whole run, and what is uploaded replaces what the server has of it. An
        earlier session is but the beginning, perhaps without its last 32 KB (those of a killed process are lost), and
        with rows that were cut back to a checkpoint since.
        """
        if self._online or list(self._session.glob("*.wandb.synced")):
            return None
        return f"wandb sync {shlex.quote(str(self._session))}"

    def _log(self, at: Moment, values: Mapping[str, object]) -> None:
        if at.step >= self._steps_there:
            # The time of then: otherwise all rows of a continued run would seem to be of its last start.
            row = {**values, "_timestamp": at.time}
            self._guard(lambda: self._run.log(row, step=at.step))

    def _guard(self, action: Callable[[], object]) -> None:
        # The one place that swallows an error on purpose: hours of search must not die with a logging service.
        if self._broken:
            return
        try:
            action()
        except self._failures as error:
            self._broken = True
            _tell(f"warning: W&B stopped ({_one_line(error)}); the run goes on and {METRICS_FILE} keeps every number")


def _run_id(run_dir: Path) -> str:
    """The W&B id kept in the run folder; made and kept on first use."""
    path = run_dir / WANDB_ID_FILE
    known = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not known:
        known = uuid.uuid4().hex[:12]
        path.write_text(known + "\n", encoding="utf-8")
    return known


def _start(
    run_dir: Path, online: bool, patience: float, about: dict[str, Any]
) -> tuple[Any, tuple[type[Exception], ...]]:
    """The open run, and the exceptions that mean W&B failed rather than its caller."""
    # Before the import: wandb's error reporting looks up its own server even offline (seen with strace, 0.31.0).
    if not online:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    failures = (wandb.errors.Error, OSError, HandleAbandonedError, MailboxClosedError)
    try:
        # Process-wide, because with show_info wandb asks for a key on a terminal and waits for ever.
        wandb.setup(settings=wandb.Settings(show_info=False))
        settings = wandb.Settings(**_settings(online, patience))
        # Offline no "resume": `wandb sync` would add the whole run, at other steps, to what was uploaded before.
        resume: Literal["allow"] | None = "allow" if online else None
        # reinit: the default would hand job 2 of a multirun the run of job 1.
        run = wandb.init(dir=str(run_dir), resume=resume, reinit="finish_previous", settings=settings, **about)
    except (*failures, ValueError) as error:
        remedy = "tracking.mode=offline needs no server; for online set WANDB_API_KEY or run `wandb login`"
        mode = "online" if online else "offline"
        raise UserError(f"W&B cannot start in tracking.mode={mode}: {_one_line(error)}; {remedy}") from error
    if online:
        _tell(f"W&B: {run.url}")
    return run, failures


def _settings(online: bool, patience: float) -> dict[str, Any]:
    """Settings for `wandb.init`."""
    return {
        "mode": "online" if online else "offline",
        "console": "off",
        "quiet": True,
        "show_info": False,
        "init_timeout": patience,
        "finish_timeout": 300.0,
        "disable_code": True,
        "disable_git": True,
        "save_code": False,
        "host": "",
        # Together these two give system metrics and nothing else of the machine. The metadata's probe may ask a cloud's
        # metadata address; without it there is no socket but W&B's own local ones (strace, 0.31.0).
        # x_disable_machine_info would switch the system metrics off as well.
        "x_disable_meta": True,
        "x_disable_stats": False,
    }


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _tell(line: str) -> None:
    # sys.stderr looked up now: a live progress bar replaces it to keep the screen in order.
    print(line, file=sys.stderr, flush=True)
