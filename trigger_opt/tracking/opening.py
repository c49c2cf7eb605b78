"""Opens the tracker of a run folder: the record, and the one backend that was asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from trigger_opt.errors import UserError
from trigger_opt.tracking.base import Tracker
from trigger_opt.tracking.jsonl import JsonlTracker
from trigger_opt.tracking.tensorboard_backend import TensorBoardBackend
from trigger_opt.tracking.wandb_backend import WandbBackend

MODES = ("online", "offline", "tensorboard", "disabled", "off")


def open_tracker(
    run_dir: Path,
    *,
    mode: str,
    project: str,
    group: str,
    name: str,
    tags: Sequence[str],
    config: Mapping[str, object],
    job_type: str = "",
) -> Tracker:
    """The tracker of a run folder, new or continued: `metrics.jsonl` always; W&B for the modes "offline" and "online",
    TensorBoard for "tensorboard".

    With "disabled" or "off" neither is even imported.

    Args:
        group: the sweep's folder in a multirun, otherwise the experiment. job_type: see job_type_of. W&B only.

    Raises:
        UserError: the mode is unknown, W&B cannot start, TensorBoard is not installed, or `metrics.jsonl` is damaged.
    """
    if mode not in MODES:
        raise UserError(f"tracking.mode={mode} is unknown; choose one of {', '.join(MODES)}")
    tracker = JsonlTracker(run_dir)
    if mode == "tensorboard":
        tracker.attach(TensorBoardBackend(run_dir, config=config))
    elif mode in ("online", "offline"):
        backend = WandbBackend(
            run_dir,
            online=mode == "online",
            project=project,
            group=group,
            job_type=job_type,
            name=name,
            tags=tags,
            config=config,
        )
        tracker.attach(backend)
    return tracker


def job_type_of(stages: Sequence[str]) -> str:
    """What kind of job a run is, from all the stages it ran and is to run: "search" once it searches, otherwise its
    first stage, say "transfer" in a folder of its own.

    W&B keeps one job type a run, and one run folder is one run. Where it stands is the metric "stage".
    """
    return "search" if "search" in stages else next(iter(stages), "")
