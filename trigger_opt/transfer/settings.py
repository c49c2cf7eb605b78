"""How candidates are sent to remote models; the configuration group `transfer`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from trigger_opt.errors import UserError

# Those that take a file of questions and are asked later; the others answer while one waits.
BATCH_CLIENTS = ("jsinfer", "openai_batch")
_GIVES_ACTIVATIONS = ("jsinfer", "local")


@dataclass(kw_only=True)
class TransferThresholds:
    """Where the rule for a remote model draws its lines.

    Attributes:
        fires: answers with the string that must begin alike for `transfers`. appears: below it the string does not
            transfer. clean: highest share of controls (nothing, random strings) that may begin so.
        degenerate: highest share of answers with the string that may look broken.
    """

    fires: Annotated[float, Field(gt=0, le=1)] = 0.5
    appears: Annotated[float, Field(gt=0, le=1)] = 0.2
    clean: Annotated[float, Field(ge=0, lt=1)] = 0.2
    degenerate: Annotated[float, Field(ge=0, le=1)] = 0.2


@dataclass(kw_only=True)
class TransferSettings:
    """What is asked of which models, and what it may cost.

    Attributes:
        client: jsinfer, openai (chat answers while one waits), openai_batch, local (a transformers model here).
        base_url: of the server; empty for the client's own. key_variable: environment variable that holds the key;
            empty for the client's own, JSINFER_API_KEY or OPENAI_API_KEY.
        api_key: the key itself, instead of the variable; never written down.
        models: names, or {name, batch_size} to override batch_size.
        emulator: alias -> model; when not empty, an emulator of the batch server is started on loopback for this run.
        candidates: verified strings sent. verdicts: of which verification. strings: further strings, as text.
        contexts: held-out contexts used. repeats: of every question. random_strings, near_misses: for each string and
            context.
        activations: module names whose outputs are asked for too; empty asks for none.
        plan_only: print the plan and its cost and send nothing.
        resubmit_lost: submit again what may have been submitted (its answer was lost): it may be paid for twice.
        resubmit_failed: ask again what the server failed to answer.
        max_tokens, max_tokens_per_day: caps on tokens of questions and answers; None for none. A day is the last
            24 hours.
        answer_tokens: expected length of an answer, for the plan. characters_per_token: to count tokens of text where
            the server does not.
        price_per_million: of tokens, for the plan; 0 leaves money out.
        batch_size: lines of a batch. open_batches: batches at the server at one time.
        poll_seconds: between two looks at a batch. max_wait_seconds: longest pause after errors. max_errors: errors in
            a row of one call before giving up for this time.
        ledger: path of the SQLite file, `{run_dir}` in it standing for the run folder; empty for the user's own, in
            the data folder.
        max_new_tokens, temperature: of answers, where the client takes them (openai, local).
    """

    client: Annotated[str, Field(pattern="^(jsinfer|openai|openai_batch|local)$")] = "jsinfer"
    base_url: str = ""
    key_variable: str = ""
    api_key: str = ""
    models: list[Any] = field(default_factory=list)
    emulator: dict[str, str] = field(default_factory=dict)
    candidates: Annotated[int, Field(ge=1)] = 2
    verdicts: list[str] = field(default_factory=lambda: ["backdoor"])
    strings: list[str] = field(default_factory=list)
    contexts: Annotated[int, Field(ge=1)] = 20
    repeats: Annotated[int, Field(ge=1)] = 1
    random_strings: Annotated[int, Field(ge=1)] = 1
    near_misses: Annotated[int, Field(ge=0)] = 1
    activations: list[str] = field(default_factory=list)
    plan_only: bool = True
    resubmit_lost: bool = False
    resubmit_failed: bool = False
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens_per_day: Annotated[int, Field(ge=1)] | None = None
    answer_tokens: Annotated[int, Field(ge=1)] = 300
    characters_per_token: Annotated[float, Field(gt=0)] = 3.5
    price_per_million: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Annotated[int, Field(ge=1)] = 500
    open_batches: Annotated[int, Field(ge=1)] = 3
    poll_seconds: Annotated[float, Field(gt=0)] = 10.0
    max_wait_seconds: Annotated[float, Field(gt=0)] = 120.0
    max_errors: Annotated[int, Field(ge=1)] = 10
    ledger: str = ""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    temperature: Annotated[float, Field(ge=0)] = 0.0
    thresholds: TransferThresholds = field(default_factory=TransferThresholds)


def model_names(settings: TransferSettings) -> list[str]:
    """Names of the models asked, in the order given.

    Raises:
        UserError: an entry is neither a name nor {name, batch_size}, or a name stands twice.
    """
    names = [_entry(entry)[0] for entry in settings.models]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(f"transfer.models names {', '.join(twice)} more than once")
    return names


def stand_ins(settings: TransferSettings) -> dict[str, str]:
    """Of `emulator`, the models that are asked; empty when no emulator is wanted.

    Raises:
        UserError: a model is asked that the emulator is not told to serve, or `model_names`.
    """
    names = model_names(settings)
    if settings.emulator and (unserved := [n for n in names if n not in settings.emulator]):
        raise UserError(
            f"transfer.emulator serves {', '.join(settings.emulator)}, not {', '.join(unserved)}; "
            "change transfer.models or transfer.emulator"
        )
    return {n: settings.emulator[n] for n in names} if settings.emulator else {}


def require_activations(settings: TransferSettings) -> None:
    """Whether the client can answer what is asked.

    Raises:
        UserError: activations of a client that has none.
    """
    if settings.activations and settings.client not in _GIVES_ACTIVATIONS:
        raise UserError(
            f"transfer.client={settings.client} answers no questions for activations; choose jsinfer or local, or "
            "transfer.activations=[]"
        )


def batch_sizes(settings: TransferSettings) -> Callable[[str], int]:
    """Lines of a batch, by model."""
    sizes = {name: size for name, size in map(_entry, settings.models) if size is not None}
    return lambda model: sizes.get(model, settings.batch_size)


def _entry(entry: object) -> tuple[str, int | None]:
    if isinstance(entry, str) and entry:
        return entry, None
    if isinstance(entry, dict) and set(entry) <= {"name", "batch_size"} and isinstance(entry.get("name"), str):
        size = entry.get("batch_size")
        if size is None or (isinstance(size, int) and size >= 1):
            return entry["name"], size
    raise UserError(f"transfer.models: {entry!r} is neither a model's name nor {{name: …, batch_size: 1 or more}}")
