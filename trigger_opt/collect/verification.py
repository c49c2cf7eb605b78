"""The best strings of a collected sweep, judged once, by one judge; imports torch."""

from pathlib import Path
from typing import Any

from trigger_opt import pipeline
from trigger_opt.collect.overrides import as_config
from trigger_opt.config import validated, without_secrets
from trigger_opt.models.quiet import quieten_libraries


def verify_and_report(folder: Path, settings: dict[str, Any], *, command: str) -> None:
    """The stages verify and report in `folder`, which holds merged candidates.

    Raises:
        UserError: the models are not there or do not fit, or the jobs' settings are refused by this version.
    """
    quieten_libraries()
    config = validated(as_config(settings))
    pipeline.run(config, run_dir=folder, command=command, settings=without_secrets(settings))
