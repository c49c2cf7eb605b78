"""Where a run's numbers go: `metrics.jsonl` in the run folder always; Weights & Biases or TensorBoard when asked.

`metrics.jsonl` is the record. The others are backends that show it: each opening of a run folder gives them everything
the file holds once more, so that what they lost when a process was killed is back.
"""

from trigger_opt.tracking.base import Backend, Moment, NullTracker, Tracker
from trigger_opt.tracking.jsonl import METRICS_FILE, JsonlTracker, read_metrics
from trigger_opt.tracking.opening import MODES, job_type_of, open_tracker
from trigger_opt.tracking.tensorboard_backend import TensorBoardBackend
from trigger_opt.tracking.wandb_backend import WANDB_ID_FILE, WandbBackend

__all__ = [
    "METRICS_FILE",
    "MODES",
    "WANDB_ID_FILE",
    "Backend",
    "JsonlTracker",
    "Moment",
    "NullTracker",
    "TensorBoardBackend",
    "Tracker",
    "WandbBackend",
    "job_type_of",
    "open_tracker",
    "read_metrics",
]
