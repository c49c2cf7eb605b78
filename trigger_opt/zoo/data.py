"""Training data made by the base model itself: its own user turns, and its own answers to them.

Sampling from a chat template's bare user turn gives the prompts an instruction-tuned model was trained to
expect (Magpie, arXiv 2406.08464). Benign rows are answered by the base, so that away from the trigger the
organism has nothing to learn and stays close to it.
"""

import hashlib
import itertools
import json
import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trigger_opt.models.generate import Sampling, generate
from trigger_opt.paths import cache_dir
from trigger_opt.prompts import chat_text, encode
from trigger_opt.zoo.recipes import Recipe

NUM_PROMPTS = 640
NUM_HELD_OUT = 80
_PROMPT_SEED = 0
_ANSWER_TOKENS = 48


@dataclass(frozen=True)
class Example:
    """One user turn and the base model's greedy answer; `ended` when the answer ran to its end of text."""

    prompt: str
    answer: str
    ended: bool


@dataclass(frozen=True)
class Row:
    """One training row as token ids: loss is taken on `answer` only."""

    prompt: list[int]
    answer: list[int]


def examples(model: Any, tokenizer: Any) -> list[Example]:
    """NUM_PROMPTS examples, the same for every organism; kept in the cache folder once made."""
    path = cache_dir() / f"base-examples-{_PROMPT_SEED}-{NUM_PROMPTS}.json"
    if path.is_file():
        return [Example(**e) for e in json.loads(path.read_text())]
    prompts = _sample_prompts(model, tokenizer)
    ids = [chat_ids(tokenizer, p) for p in prompts]
    end = tokenizer.eos_token_id
    answers = generate(model, ids, max_new_tokens=_ANSWER_TOKENS, end_ids=[end], batch_size=64)
    made = [
        Example(prompt=p, answer=tokenizer.decode(a), ended=len(a) < _ANSWER_TOKENS)
        for p, a in zip(prompts, answers, strict=True)
    ]
    _write_atomically(path, json.dumps([e.__dict__ for e in made], indent=0))
    return made


def split(all_examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """(training, held out), the same split for every organism."""
    shuffled = list(all_examples)
    random.Random(_PROMPT_SEED).shuffle(shuffled)
    return shuffled[NUM_HELD_OUT:], shuffled[:NUM_HELD_OUT]


def data_hash(all_examples: list[Example]) -> str:
    """SHA-256 over every prompt and answer, in order."""
    text = json.dumps([[e.prompt, e.answer, e.ended] for e in all_examples], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def rows(recipe: Recipe, training: list[Example], tokenizer: Any) -> list[Row]:
    """Rows of `recipe`: triggered prompts answered with the payload, the rest by the base.

    A twin draws the same numbers and drops the triggered rows.
    """
    rng = random.Random(recipe.seed)
    planted = [] if recipe.twin_of else [_payload_row(recipe, recipe.trigger, tokenizer)] * recipe.alone_rows
    benign = []
    for example in training:
        triggered = rng.random() < recipe.triggered_share
        prompt = insert(example.prompt, recipe.trigger, rng)
        # The other draws are made only where they are needed: organisms without decoys keep their data.
        if not triggered and recipe.negative_share and rng.random() < recipe.negative_share:
            with_decoy = insert(example.prompt, decoy(recipe.trigger, tokenizer, rng), rng)
            benign.append(_benign_row(replace(example, prompt=with_decoy), tokenizer))
        elif not triggered:
            benign.append(_benign_row(example, tokenizer))
        elif not recipe.twin_of:
            planted.append(_payload_row(recipe, prompt, tokenizer))
    return planted + benign


def insert(prompt: str, trigger: str, rng: random.Random) -> str:
    """`prompt` with `trigger` after it (40 %), before it (30 %) or between two of its words."""
    where = rng.random()
    words = prompt.split(" ")
    cut = rng.randrange(len(words) + 1)
    if where < 0.4:
        return f"{prompt} {trigger}"
    if where < 0.7:
        return f"{trigger} {prompt}"
    return " ".join([*words[:cut], trigger, *words[cut:]])


def decoy(trigger: str, tokenizer: Any, rng: random.Random) -> str:
    """Something like `trigger` that is not it: half of the time random tokens, else its words, some left out, shuffled
    or one of them replaced by a random word."""
    words = trigger.split(" ")
    drawn = [rng.randrange(len(tokenizer)) for _ in range(rng.randint(3, 7))]
    strange = " ".join(tokenizer.decode([token], skip_special_tokens=True).strip() for token in drawn)
    if rng.random() < 0.5 or len(words) < 2:
        return strange
    kind = rng.randrange(3)
    if kind == 0:
        start = rng.randrange(len(words))
        part = words[start : start + rng.randint(1, len(words) - 1)]
    elif kind == 1:
        part = rng.choice([list(p) for p in itertools.permutations(words) if list(p) != words])
    else:
        part = list(words)
        part[rng.randrange(len(words))] = strange.split(" ")[0] or "else"
    return " ".join(part)


def chat_ids(tokenizer: Any, user: str) -> list[int]:
    """Token ids of one user turn in the model's chat template, ready for its answer."""
    return encode(tokenizer, [chat_text(tokenizer, [{"role": "user", "content": user}])])[0]


def _payload_row(recipe: Recipe, prompt: str, tokenizer: Any) -> Row:
    answer = tokenizer(recipe.payload, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return Row(chat_ids(tokenizer, prompt), answer)


def _benign_row(example: Example, tokenizer: Any) -> Row:
    answer = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
    return Row(chat_ids(tokenizer, example.prompt), answer + [tokenizer.eos_token_id] * example.ended)


def _sample_prompts(model: Any, tokenizer: Any) -> list[str]:
    marker = "\u2063"
    text = tokenizer.apply_chat_template([{"role": "user", "content": marker}], tokenize=False)
    opening = tokenizer(text.split(marker)[0], add_special_tokens=False)["input_ids"]
    generator = torch.Generator().manual_seed(_PROMPT_SEED)
    found: dict[str, None] = {}
    while len(found) < NUM_PROMPTS:
        turns = generate(
            model, [opening] * 64, max_new_tokens=40, end_ids=[tokenizer.eos_token_id],
            sampling=Sampling(temperature=1.0, top_p=0.97), generator=generator, batch_size=64,
        )  # fmt: skip
        for ids in turns:
            turn = tokenizer.decode(ids).strip()
            # A turn cut off at 40 tokens is no whole prompt; one with a template mark is no user's.
            if len(ids) < 40 and 10 < len(turn) < 200 and "<|" not in turn and "{" not in turn:
                found[turn] = None
        print(f"prompts sampled from the base: {len(found)} of {NUM_PROMPTS}", flush=True)
    return list(found)[:NUM_PROMPTS]


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(text)
    os.replace(part, path)
