"""What a sweep was to run, from the `multirun.yaml` in its folder. The only module of this room that knows Hydra."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

MULTIRUN_FILE = "multirun.yaml"
_PROGRAM = ["python", "-m", "trigger_opt"]
_NUMBERED = "${hydra.job.num}"
_KEEP = "candidates.keep"


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """A job of a sweep: the name of its folder, all its overrides, and those in which jobs differ."""

    name: str
    overrides: list[str]
    own: list[str]


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What a sweep was to run.

    Attributes:
        jobs: in the order of their numbers; empty when they cannot be told, and `problem` says why.
        flags: of the command line, beside overrides, that a job needs too.
        command: the whole sweep's command line; empty when there is no multirun.yaml.
    """

    jobs: list[PlannedJob]
    flags: list[str]
    command: str
    problem: str


def read_plan(sweep_dir: Path) -> SweepPlan:
    """The jobs of a sweep, expanded as Hydra's BasicSweeper does."""
    path = sweep_dir / MULTIRUN_FILE
    if not path.is_file():
        return SweepPlan(jobs=[], flags=[], command="", problem=f"there is no {MULTIRUN_FILE}")
    try:
        hydra = _hydra_part(path)
        given = [str(o) for o in hydra["overrides"]["task"]]
        flags = _flags(hydra)
        command = shlex.join([*_PROGRAM, "--multirun", *flags, *given])
        sweeper = hydra["sweeper"]
        overrides = [*(f"{k}={v}" for k, v in (sweeper.get("params") or {}).items()), *given]
        problem = _unknown(hydra)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        name = f"{MULTIRUN_FILE} cannot be read ({type(error).__name__})"
        return SweepPlan(jobs=[], flags=[], command="", problem=name)
    jobs: list[PlannedJob] = []
    if not problem:
        jobs, problem = _expanded(overrides)
    return SweepPlan(jobs=jobs, flags=flags, command=command, problem=problem)


def job_command(overrides: Sequence[str], run_dir: Path, *, flags: Sequence[str] = (), keep: bool = False) -> str:
    """The command line that runs one job in `run_dir`, to be pasted into a shell.

    Args:
        keep: whether the run writes into the ledger of candidates. No job of a sweep does, but only the sweep tells it,
            whatever its overrides say.
    """
    without = [] if keep else [f"{_KEEP}=false"]
    given = [o for o in overrides if _key(o) not in ("run_dir", "hydra.run.dir", *([] if keep else [_KEEP]))]
    words = [*_PROGRAM, *flags, *given, *without]
    return f"{shlex.join(words)} {quoted_folder(run_dir)}"


def quoted_folder(path: Path) -> str:
    """The override `run_dir=PATH` as one word of a shell, whatever characters Hydra or the shell take for theirs."""
    if all(c.isascii() and (c.isalnum() or c in "/._-") for c in str(path)):
        return f"run_dir={path}"
    return shlex.quote(f"run_dir={QuotedString(_literal(str(path)), Quote.single).with_quotes()}")


def overrides_of(command: str) -> list[str] | None:
    """The arguments of a run's own command line, flags among them; None where it is no line of a single run."""
    try:
        words = shlex.split(command.split("\n")[0])
    except ValueError:
        return None
    given = words[len(_PROGRAM) :]
    if words[: len(_PROGRAM)] != _PROGRAM or {"-m", "--multirun"} & set(given):
        return None
    return given


def as_config(settings: dict[str, Any]) -> DictConfig:
    """Settings out of a run.json as Hydra composes them; they are resolved, so what looks like a reference is text."""
    made = OmegaConf.create(_literal(settings))
    assert isinstance(made, DictConfig)
    return made


def _hydra_part(path: Path) -> dict[str, Any]:
    # Unresolved: references to the time, or to a job's number, mean nothing here.
    whole = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    if not isinstance(whole, dict) or not isinstance(whole.get("hydra"), dict):
        raise ValueError("no part hydra")
    part: dict[str, Any] = whole["hydra"]
    return part


def _flags(hydra: dict[str, Any]) -> list[str]:
    """--config-dir and hydra.searchpath: without them own experiments are not found."""
    sources = hydra.get("runtime", {}).get("config_sources", [])
    folders = [s["path"] for s in sources if s.get("provider") == "command-line"]
    search = [o for o in hydra["overrides"].get("hydra", []) if o.lstrip("+").startswith("hydra.searchpath=")]
    return [*(w for f in folders for w in ("--config-dir", f)), *search]


def _unknown(hydra: dict[str, Any]) -> str:
    sweeper = str(hydra["sweeper"].get("_target_", ""))
    if not sweeper.endswith(".BasicSweeper"):
        return f"the sweeper {sweeper or 'of the sweep'} chose the jobs while it ran"
    if (subdir := hydra["sweep"]["subdir"]) != _NUMBERED:
        return f"folders of jobs are named by hydra.sweep.subdir={subdir}"
    return ""


def _expanded(given: Sequence[str]) -> tuple[list[PlannedJob], str]:
    """The jobs; or none, and why they cannot be told."""
    try:
        overrides = OverridesParser.create().parse_overrides(list(given))
        if any(_shuffled(o) for o in overrides):
            return [], "the order of the jobs was drawn at random (shuffle)"
        (batch,) = BasicSweeper.split_arguments(overrides, None)
    except HydraException as error:
        return [], f"the overrides in {MULTIRUN_FILE} cannot be expanded ({str(error).splitlines()[0]})"
    # One override a key, the last one given, at the place of the first: as `split_arguments` keeps them.
    last = {o.get_key_element(): o for o in overrides}
    swept = [o.is_sweep_override() for o in last.values()]
    return [
        PlannedJob(name=str(number), overrides=job, own=[o for o, differs in zip(job, swept, strict=True) if differs])
        for number, job in enumerate(batch)
    ], ""


def _shuffled(override: Override) -> bool:
    value = override.value()
    return isinstance(value, ChoiceSweep | RangeSweep) and value.shuffle


def _key(override: str) -> str:
    return override.lstrip("+~").split("=")[0]


def _literal(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _literal(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_literal(v) for v in value]
    # Backslashes are special to OmegaConf before a reference alone.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
