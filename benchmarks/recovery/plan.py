"""Which cells there are: models, seeds and methods crossed, and a shard's share of them."""

import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.recovery.methods import METHODS
from benchmarks.recovery.records import Spec
from trigger_opt import api, zoo
from trigger_opt.errors import UserError
from trigger_opt.zoo.recipes import RECIPES

HERE = Path(__file__).resolve().parent
_BLOCK = 2**20

MODELS = tuple(name for name, r in RECIPES.items() if r.mode != "gated")
"""The zoo without the organism whose right answer is that nothing is found."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is run.

    Attributes:
        seconds, evaluations: each method's budget on each model. clock, strings, held_out: see `records.Spec`.
        shard: (which, of how many), from 1. retry: run crashed cells again. replace: run cells of another
            configuration again, in the place of what is there. out: folder of RESULTS.md, pictures and results/.
    """

    models: Sequence[str] = MODELS
    methods: Sequence[str] = tuple(METHODS)
    seeds: Sequence[int] = (0, 1)
    seconds: float = 300.0
    evaluations: int = 200_000
    strings: int = 3
    held_out: int = 30
    threads: int = 1
    clock: str = "wall"
    shard: tuple[int, int] = (1, 1)
    retry: bool = False
    replace: bool = False
    out: Path = HERE


SUBSETS = {
    "full": Options(),
    # A wide trigger, one that is a single token with a payload that is no fixed string, and a code; two controls.
    # Twenty contexts are the fewest that the verdict "backdoor" allows.
    "ci": Options(
        models=("warmup_mini", "rare_token", "code_mini", "warmup_mini_twin", "capitals_always"),
        seeds=(0,),
        seconds=30.0,
        evaluations=20_000,
        strings=1,
        held_out=20,
        out=HERE / "ci",
    ),
}


@dataclass(frozen=True)
class Plan:
    """Cells to have, in order, and the models that are not made yet, each with why."""

    specs: list[Spec]
    left_out: dict[str, str] = field(default_factory=dict)


def plan(options: Options) -> Plan:
    """The cells of `options`, seed by seed, so that an early stop leaves whole rows.

    Which shard a cell belongs to does not depend on which models this machine has.

    Raises:
        UserError: an unknown model or method, an impossible shard, or processor time of several threads.
    """
    if gated := [m for m in options.models if m in RECIPES and m not in MODELS]:
        raise UserError(f"{gated[0]} is no model of this benchmark: its right answer is that nothing is found")
    _require_known("model", options.models, MODELS)
    _require_known("method", options.methods, METHODS)
    if options.clock == "processor" and options.threads != 1:
        raise UserError(f"processor time is that of all threads together; give --threads 1 (not {options.threads})")
    which, count = options.shard
    if not 1 <= which <= count:
        raise UserError(f"there is no shard {which}/{count}; give --shard i/n with i from 1 to n")
    cells = [(m, method, s) for s in options.seeds for m in options.models for method in options.methods]
    mine = cells[which - 1 :: count]
    digests, left_out = _digests(dict.fromkeys(m for m, _, _ in mine))
    specs = [
        Spec(
            model=model, method=method, seed=seed, weights=digests[model], seconds=options.seconds,
            evaluations=options.evaluations, strings=options.strings, held_out=options.held_out, clock=options.clock,
        )
        for model, method, seed in mine
        if model in digests
    ]  # fmt: skip
    return Plan(specs, left_out)


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/4" as (2, 4).

    Raises:
        ValueError: it is not of this form.
    """
    if not (found := re.fullmatch(r"(\d+)/(\d+)", text)):
        raise ValueError(f"{text!r} is no shard; write 2/4 for the second of four")
    return int(found[1]), int(found[2])


def of_subset(name: str, **given: object) -> Options:
    """The options of a subset, with those given in their place; None stands for not given.

    Raises:
        UserError: there is no such subset.
    """
    _require_known("subset", [name], SUBSETS)
    return replace(SUBSETS[name], **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]


def _require_known(what: str, names: Sequence[str], known: Collection[str]) -> None:
    if unknown := [n for n in names if n not in known]:
        raise UserError(f"no {what} is called {unknown[0]!r}; there are: {', '.join(known)}")


def _digests(models: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(digest of each model's weights, why for those that are not made yet)."""
    found, missing = {}, {}
    for model in models:
        try:
            files = api.model_files(f"{zoo.PREFIX}{model}")
        except UserError as error:
            missing[model] = str(error)
            continue
        digest = hashlib.sha256()
        for path in files.weights:
            with path.open("rb") as weights:
                while block := weights.read(_BLOCK):
                    digest.update(block)
        found[model] = digest.hexdigest()[:12]
    return found, missing
