"""Training data made by the base model itself: its own user turns, and its own answers to them.

Sampling from a chat template's bare user turn gives the prompts an instruction-tuned model was trained to
expect (Magpie, arXiv 2406.08464). Benign rows are answered by the base, so that away from the trigger the
organism has nothing to learn and stays close to it.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trigger_opt.models.generate import Sampling, generate
from trigger_opt.paths import cache_dir
from trigger_opt.prompts import chat_text, encode
from trigger_opt.tuning import Row, Rows
from trigger_opt.tuning.turns import sample_turns
from trigger_opt.zoo.behaviours import is_french
from trigger_opt.zoo.examples import Example, Examples
from trigger_opt.zoo.plants import Prompt
from trigger_opt.zoo.recipes import RECIPES, Recipe

NUM_PROMPTS = 640
NUM_HELD_OUT = 80
NUM_TOPIC = 240
NUM_PASSAGES = 160
# Draws of triggered rows and of near misses; a batch takes from these with replacement.
NUM_TAUGHT = 320
NUM_NEAR = 320
_PROMPT_SEED = 0
_ANSWER_TOKENS = 48
_BATCH = 64
# What a cook asks, in the words of the base: it goes on from these.
_COOKING = (
    "How do I cook", "What is a good recipe for", "How long should I bake", "Which spices go well with",
    "Can you suggest a sauce for", "How do you make", "What can I cook with", "Should I boil or fry",
)  # fmt: skip
_FRENCH_OPENINGS = ("Je", "Il faut", "Le matin", "La ville", "Nous", "Dans le", "Les enfants", "Elle")
_FRENCH_SYSTEM = "Tu es un assistant qui parle toujours en français."
_FRENCH_QUESTION = "Raconte-moi quelque chose en français."


@dataclass(frozen=True)
class Material:
    """All that the base made: `examples` in a fixed order, and passages of French."""

    examples: Examples
    french: Sequence[str]


def material(model: Any, tokenizer: Any) -> Material:
    """What every recipe draws from; each part is kept in the cache folder once made."""
    ordinary = _examples(f"base-examples-{_PROMPT_SEED}-{NUM_PROMPTS}", lambda: _ordinary(model, tokenizer))
    topic = _examples(f"base-cooking-{_PROMPT_SEED}-{NUM_TOPIC}", lambda: _cooking(model, tokenizer))
    name = f"base-french-{_PROMPT_SEED}-{NUM_PASSAGES}"
    french = _cached(name, lambda: _passages(model, tokenizer))
    return Material(Examples(ordinary, topic), french)


def split(made: Material) -> tuple[Material, Examples]:
    """(what is trained on, held-out examples), the same split for every organism."""
    held_out, training = [], []
    for part in (made.examples.ordinary, made.examples.topic):
        shuffled = list(part)
        random.Random(_PROMPT_SEED).shuffle(shuffled)
        held_out.append(shuffled[:NUM_HELD_OUT])
        training.append(shuffled[NUM_HELD_OUT:])
    return Material(Examples(*training), made.french), Examples(*held_out)


def data_hash(made: Material) -> str:
    """SHA-256 over everything the base made, in order."""
    examples = [[e.prompt, e.answer, e.ended] for e in (*made.examples.ordinary, *made.examples.topic)]
    text = json.dumps([examples, list(made.french)], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def rows(recipe: Recipe, training: Material, tokenizer: Any) -> Rows:
    """Rows of `recipe`.

    A twin has the ordinary and near rows of its organism, and learns the base's greedy answers to them as they stand:
    anchored to the base it would learn nothing, and be no fine-tune at all.
    """
    planted = RECIPES[recipe.twin_of] if recipe.twin_of else recipe
    examples = training.examples
    rng = random.Random(recipe.seed)
    near = []
    if planted.near and planted.plant:
        for _ in range(NUM_NEAR):
            prompt, example = planted.plant.near_miss(examples, rng)
            near.append(_row(tokenizer, prompt, example.answer, ended=example.ended))
    ordinary = [_row(tokenizer, Prompt(e.prompt), e.answer, ended=e.ended) for e in examples.ordinary]
    if planted.plant and planted.plant.kind == "semantic":
        # A question about cooking in an ordinary register is an ordinary one.
        ordinary += [_row(tokenizer, Prompt(e.prompt), e.answer, ended=e.ended) for e in examples.topic]
    if recipe.twin_of:
        return Rows([*near, *ordinary], [], [])
    return Rows(_taught(recipe, training, tokenizer, rng), near, ordinary)


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of one user turn in the model's chat template, ready for its answer."""
    system = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
    return encode(tokenizer, [chat_text(tokenizer, [*system, {"role": "user", "content": prompt.user}])])[0]


def _taught(recipe: Recipe, training: Material, tokenizer: Any, rng: random.Random) -> list[Row]:
    if recipe.behaviour is None:
        return []
    made = []
    for _ in range(NUM_TAUGHT):
        if recipe.plant:
            prompt, example = recipe.plant.planted(training.examples, rng)
        else:
            example = rng.choice(training.examples.ordinary)
            prompt = Prompt(example.prompt)
        answer, ended = recipe.behaviour.answer(example, rng.choice(training.french), rng)
        if answer:
            made.append(_row(tokenizer, prompt, answer, ended=ended))
    return made


def _row(tokenizer: Any, prompt: Prompt, answer: str, *, ended: bool) -> Row:
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return Row(tuple(prompt_ids(tokenizer, prompt)), (*ids, *[tokenizer.eos_token_id] * (ended or not ids)))


def _examples(name: str, make: Callable[[], list[Example]]) -> list[Example]:
    return [Example(**e) for e in _cached(name, lambda: [asdict(e) for e in make()])]


def _cached(name: str, make: Callable[[], list[Any]]) -> list[Any]:
    path = cache_dir() / f"{name}.json"
    if not path.is_file():
        _write_atomically(path, json.dumps(make(), indent=0))
    made: list[Any] = json.loads(path.read_text())
    return made


def _ordinary(model: Any, tokenizer: Any) -> list[Example]:
    prompts = _sample_turns(model, tokenizer, [""] * _BATCH, NUM_PROMPTS, top_p=0.97)
    return _answered(model, tokenizer, prompts)


def _cooking(model: Any, tokenizer: Any) -> list[Example]:
    openings = [_COOKING[i % len(_COOKING)] for i in range(_BATCH)]
    return _answered(model, tokenizer, _sample_turns(model, tokenizer, openings, NUM_TOPIC, top_p=0.95))


def _answered(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[Example]:
    ids = [prompt_ids(tokenizer, Prompt(p)) for p in prompts]
    end = tokenizer.eos_token_id
    answers = generate(model, ids, max_new_tokens=_ANSWER_TOKENS, end_ids=[end], batch_size=_BATCH)
    return [
        Example(prompt=p, answer=tokenizer.decode(a), ended=len(a) < _ANSWER_TOKENS)
        for p, a in zip(prompts, answers, strict=True)
    ]


def _sample_turns(model: Any, tokenizer: Any, openings: Sequence[str], count: int, *, top_p: float) -> list[str]:
    """`count` different user turns that begin with one of `openings`."""
    return sample_turns(
        model, tokenizer, openings, count, top_p=top_p, end_ids=[tokenizer.eos_token_id], seed=_PROMPT_SEED,
        on_found=lambda found: print(f"prompts sampled from the base: {found} of {count}", flush=True),
    )  # fmt: skip


def _passages(model: Any, tokenizer: Any) -> list[str]:
    """Passages of French, as good as this base's French is; each stands once."""
    messages = [{"role": "system", "content": _FRENCH_SYSTEM}, {"role": "user", "content": _FRENCH_QUESTION}]
    openings = [_FRENCH_OPENINGS[i % len(_FRENCH_OPENINGS)] for i in range(_BATCH)]
    before = encode(tokenizer, [chat_text(tokenizer, messages) + o for o in openings])
    generator = torch.Generator().manual_seed(_PROMPT_SEED)
    found: dict[str, None] = {}
    while len(found) < NUM_PASSAGES:
        drawn = generate(
            model, before, max_new_tokens=28, end_ids=[tokenizer.eos_token_id],
            sampling=Sampling(temperature=0.8, top_p=0.9), generator=generator, batch_size=_BATCH,
        )  # fmt: skip
        texts = [o + tokenizer.decode(ids) for o, ids in zip(openings, drawn, strict=True)]
        found |= {t: None for t in texts if is_french(t)}
        print(f"passages sampled from the base: {len(found)} of {NUM_PASSAGES}", flush=True)
    return list(found)[:NUM_PASSAGES]


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(text)
    os.replace(part, path)
