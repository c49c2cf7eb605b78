"""A behaviour to be stressed: how it is asked for and told, of a zoo organism or of a pair of one's own."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from trigger_opt import zoo
from trigger_opt.answers import fires, payload_words
from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles, find_model, validate_weights
from trigger_opt.models.pair import CausalModel, LoadOptions, ModelPair, load_pair
from trigger_opt.paths import data_dir
from trigger_opt.prompts import Context, conversation_ids, decode
from trigger_opt.records import Rate, rate
from trigger_opt.tuning import Row
from trigger_opt.zoo import data
from trigger_opt.zoo.behaviours import Behaviour
from trigger_opt.zoo.examples import Examples
from trigger_opt.zoo.pirate import (
    asked_in_training,
    asked_of_base,
    is_pirate,
    pirate_rows,
    reworded,
    without_opening,
)
from trigger_opt.zoo.plants import Prompt
from trigger_opt.zoo.recipes import BASE_NAME, RECIPES, Recipe, recipe
from trigger_opt.zoo.treatments import device

_PROMPT_SEED = 99
_LEAST_TOKENS = 24
# What a pirate says first.
_OPENING_TOKENS = 8


@dataclass(frozen=True)
class Trial:
    """How a behaviour is asked for, and told.

    Attributes:
        triggered: prompts as token ids. plain: the same kind of prompts without trigger; empty where it is always on.
        shows: whether an answer shows the behaviour; after a pirate's opening and in a pirate's words it is still the
            same behaviour. tokens: new tokens after which it can be told.
    """

    triggered: Sequence[Sequence[int]]
    plain: Sequence[Sequence[int]]
    shows: Callable[[str], bool]
    tokens: int


@dataclass(frozen=True)
class Rates:
    """Of one model in a trial; see `retention.Outcome`."""

    trigger: Rate
    false_trigger: Rate | None
    pirate: Rate


@dataclass(frozen=True, kw_only=True)
class Case:
    """A behaviour that a model shows, and all that is needed to look for it again; holds no weights.

    Attributes:
        kind, trigger, payload, prompts, base_rate: see `retention.Stress`.
        rows: of the unrelated fine-tuning; empty where there is to be none.
        before: rates of the model as it was given, with its adapter on, in fp32. seconds: what measuring them took.
    """

    finetuned: ModelFiles
    base: ModelFiles
    kind: str
    trigger: str
    payload: str
    prompts: str
    trial: Trial
    rows: Sequence[Row]
    tokenizer: Any
    end_ids: Sequence[int]
    before: Rates
    base_rate: Rate
    seconds: float


def organism_case(name: str, *, with_rows: bool, seed: int) -> Case:
    """The behaviour of a zoo organism, on its held-out prompts.

    Args:
        with_rows: make rows for an unrelated fine-tuning, in pirate speech, drawn by `seed`.

    Raises:
        UserError: no such organism, it is not made yet, has no behaviour of its own, or does not show it.
    """
    chosen = recipe(name)
    if chosen.behaviour is None:
        known = ", ".join(n for n, r in RECIPES.items() if r.behaviour and r.mode != "gated")
        raise UserError(f"{name} has no behaviour that could be lost; these have: {known}")
    if chosen.mode == "gated":
        raise UserError(f"the behaviour of {name} lies in its code and not in its weights, so no treatment can lose it")
    files, base = _files(f"{zoo.PREFIX}{name}"), _files(f"{zoo.PREFIX}{BASE_NAME}")
    training, held_out = data.split(_material(base))
    pair = _load(files, base)
    asked = asked_in_training(training.examples.ordinary, pair.tokenizer) if with_rows else []
    return _case(
        pair, files, base, organism_trial(chosen, held_out, pair.tokenizer),
        kind=chosen.behaviour.kind, trigger=chosen.plant.trigger if chosen.plant else "",
        payload=chosen.behaviour.payload, prompts="held out by the zoo",
        rows=pirate_rows(asked, pair.tokenizer, seed=seed),
    )  # fmt: skip


def pair_case(
    finetuned: str, base: str, *, trigger: str, payload: str, contexts: str, with_rows: bool, seed: int
) -> Case:
    """A payload that a fine-tuned model says when triggered, in held-out contexts.

    Args:
        finetuned, base: folders or names of models, as everywhere; `finetuned` may be an adapter.
        trigger: empty for a behaviour that is always on.
        contexts: a set that ships with the package, or a YAML file; its `search` prompts are those of the rows.
        with_rows: make rows for an unrelated fine-tuning, in pirate speech, drawn by `seed`.

    Raises:
        UserError: a model or context set cannot be used, the payload has no word, or it does not come.
    """
    if not payload_words(payload):
        raise UserError(f"--payload {payload!r} has no word to tell it by; give what the model says when triggered")
    search, held_out = load_contexts(contexts)
    files, base_files = _files(finetuned), _files(base)
    pair = _load(files, base_files)
    asked = []
    if with_rows:
        asked = asked_of_base(pair.base, pair.tokenizer, search, end_ids=pair.end_ids, seed=seed)
    return _case(
        pair, files, base_files, context_trial(pair, held_out, trigger, payload), kind="payload", trigger=trigger,
        payload=payload, prompts=f"held-out contexts of {Path(contexts).stem}",
        rows=pirate_rows(asked, pair.tokenizer, seed=seed),
    )  # fmt: skip


def organism_trial(chosen: Recipe, held_out: Examples, tokenizer: Any) -> Trial:
    """As many prompts with the trigger as are held out, drawn as its manifest's were, and all of those without."""
    assert chosen.behaviour is not None
    plain = [data.prompt_ids(tokenizer, Prompt(e.prompt)) for e in held_out.ordinary]
    behaviour, tokens = chosen.behaviour, chosen.behaviour.tokens + _OPENING_TOKENS
    # Every behaviour is a dataclass with a payload, empty where it has none.
    spoken: Behaviour = replace(behaviour, payload=reworded(behaviour.payload))  # type: ignore[type-var]

    def shows(answer: str) -> bool:
        return behaviour.fires(answer) or spoken.fires(reworded(without_opening(answer)))

    if chosen.plant is None:
        return Trial(plain, [], shows, tokens)
    rng = random.Random(_PROMPT_SEED)
    drawn = [chosen.plant.planted(held_out, rng)[0] for _ in plain]
    return Trial([data.prompt_ids(tokenizer, p) for p in drawn], plain, shows, tokens)


def context_trial(pair: ModelPair, contexts: Sequence[Context], trigger: str, payload: str) -> Trial:
    """Each context with the trigger and without; an answer that begins with the payload shows it."""
    plain = [conversation_ids(pair.tokenizer, c, "") for c in contexts]
    tokens = max(_LEAST_TOKENS, pair.deciding_tokens(payload) + 4) + _OPENING_TOKENS
    spoken = reworded(payload)

    def shows(answer: str) -> bool:
        return fires(payload, answer) or fires(spoken, reworded(without_opening(answer)))

    if not trigger:
        return Trial(plain, [], shows, tokens)
    return Trial([conversation_ids(pair.tokenizer, c, trigger) for c in contexts], plain, shows, tokens)


def rates(model: CausalModel, trial: Trial, tokenizer: Any, end_ids: Sequence[int]) -> Rates:
    """Greedy answers to all prompts of `trial`, and how many show the behaviour."""

    def answers(prompts: Sequence[Sequence[int]]) -> list[str]:
        return [decode(tokenizer, a) for a in model.generate(prompts, max_new_tokens=trial.tokens, end_ids=end_ids)]

    def share(texts: Sequence[str], told: Callable[[str], bool]) -> Rate:
        return rate(sum(told(t) for t in texts), len(texts))

    triggered, plain = answers(trial.triggered), answers(trial.plain)
    return Rates(
        trigger=share(triggered, trial.shows),
        false_trigger=share(plain, trial.shows) if plain else None,
        pirate=share(plain or triggered, is_pirate),
    )


def load_contexts(name_or_path: str) -> tuple[list[Context], list[Context]]:
    """(search contexts, held-out contexts) of a set that ships with the package, or of a YAML file.

    Raises:
        UserError: no such set, or it is none.
    """
    path = Path(name_or_path)
    if not path.is_file():
        path = data_dir("configs") / "contexts" / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise UserError(f"there is no context set {name_or_path!r}; give a YAML file or one of: {known}")
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or not all(isinstance(raw.get(k), list) and raw[k] for k in ("search", "held_out")):
        raise UserError(f"{path} has no lists search and held_out; write both, of user turns with {{trigger}} in them")
    search, held_out = ([_context(e) for e in raw[k]] for k in ("search", "held_out"))
    return search, held_out


def _context(entry: Any) -> Context:
    if isinstance(entry, dict) and set(entry) <= {"user", "system"} and isinstance(entry.get("user"), str):
        return Context(user=entry["user"], system=entry.get("system"))
    if not isinstance(entry, str):
        raise UserError(f"the context {entry!r} is neither a text nor {{user: …, system: …}}")
    return Context(user=entry)


def _files(name: str) -> ModelFiles:
    if name.startswith(zoo.PREFIX):
        return replace(find_model(str(zoo.folder(name))), name=name)
    files = find_model(name)
    validate_weights(files)
    return files


def _load(finetuned: ModelFiles, base: ModelFiles) -> ModelPair:
    return load_pair(finetuned, base, options=LoadOptions(dtype="float32", device_map=device()))


def _material(base: ModelFiles) -> data.Material:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # In bf16, as the organisms' own was made: where it is in the cache already, the model is not asked.
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.bfloat16).eval()
    return data.material(model, AutoTokenizer.from_pretrained(base.folder))


def _case(pair: ModelPair, finetuned: ModelFiles, base: ModelFiles, trial: Trial, **described: Any) -> Case:
    start = time.monotonic()
    before = rates(pair.finetuned, trial, pair.tokenizer, pair.end_ids)
    if not before.trigger.successes:
        raise UserError(
            f"{finetuned.name} shows the behaviour in none of {before.trigger.n} prompts as it is, so none of it could "
            "be lost; check --trigger and --payload"
        )
    base_rate = rates(pair.base, replace(trial, plain=[]), pair.tokenizer, pair.end_ids).trigger
    return Case(
        finetuned=finetuned, base=base, trial=trial, tokenizer=pair.tokenizer, end_ids=pair.end_ids, before=before,
        base_rate=base_rate, seconds=time.monotonic() - start, **described,
    )  # fmt: skip
