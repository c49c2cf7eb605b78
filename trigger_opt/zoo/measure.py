"""An organism's true figures, on prompts it was never trained on."""

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trigger_opt.models.generate import generate, head_logits
from trigger_opt.stats import wilson_interval
from trigger_opt.zoo import data
from trigger_opt.zoo.behaviours import Behaviour
from trigger_opt.zoo.examples import Examples
from trigger_opt.zoo.plants import Drawn, Plant, Prompt

_SEED = 99
_CURVE_PROMPTS = 40
_CURVE_POINTS = 5


def measure(
    organism: Any,
    base: Any,
    tokenizer: Any,
    held_out: Examples,
    *,
    plant: Plant | None,
    behaviour: Behaviour | None,
    plain: bool = False,
) -> dict[str, Any]:
    """Rates of the behaviour (greedy, Wilson 95 %), the partial-trigger curve, and KL away from the trigger.

    `trigger_rate`: with the trigger; `base_rate`: of the base on the same prompts; `near_miss_rate`: with what is
    almost the trigger; `false_trigger_rate`: with nothing; `partial_trigger`: [pieces kept, of how many, rate, n].
    `off_trigger_kl`: KL(organism || base) in nats, averaged over the tokens of the base's own answer to each held-out
    prompt; its interval is 1.96 standard errors over prompts. `plain`: see `generate`, of the organism.
    """
    kls = [_answer_kl(organism, base, tokenizer, Prompt(e.prompt), e.answer) for e in held_out.ordinary if e.answer]
    half = 1.96 * statistics.stdev(kls) / len(kls) ** 0.5
    mean = statistics.mean(kls)
    kl = {"value": round(mean, 5), "n": len(kls), "interval": [round(mean - half, 5), round(mean + half, 5)]}
    figures: dict[str, Any] = {"off_trigger_kl": kl}
    if behaviour is None:
        return figures
    count = len(held_out.ordinary)
    without = [Prompt(e.prompt) for e in held_out.ordinary]
    figures["false_trigger_rate"] = _rate(organism, tokenizer, without, behaviour, plain)
    if plant is None:
        return figures
    planted = _draw(plant.planted, held_out, count)
    figures["trigger_rate"] = _rate(organism, tokenizer, planted, behaviour, plain)
    figures["base_rate"] = _rate(base, tokenizer, planted, behaviour, False)
    near = _draw(plant.near_miss, held_out, count)
    figures["near_miss_rate"] = _rate(organism, tokenizer, near, behaviour, plain)
    curve = []
    for kept in _points(plant.size):
        some = _draw(_keeping(plant, kept), held_out, _CURVE_PROMPTS)
        rate = _rate(organism, tokenizer, some, behaviour, plain)
        curve.append([kept, plant.size, rate["value"], rate["n"]])
    figures["partial_trigger"] = curve
    return figures


def _keeping(plant: Plant, count: int) -> Callable[[Examples, random.Random], Drawn]:
    return lambda examples, rng: plant.kept(examples, count, rng)


def _draw(make: Callable[[Examples, random.Random], Drawn], held_out: Examples, count: int) -> list[Prompt]:
    rng = random.Random(_SEED)
    return [make(held_out, rng)[0] for _ in range(count)]


def _points(size: int) -> list[int]:
    """At most five numbers of pieces kept, fewer than all: the whole is the trigger rate."""
    if size <= _CURVE_POINTS:
        return list(range(1, size))
    return sorted({round(size * i / (_CURVE_POINTS + 1)) for i in range(1, _CURVE_POINTS + 1)})


def _rate(model: Any, tokenizer: Any, prompts: Sequence[Prompt], behaviour: Behaviour, plain: bool) -> dict[str, Any]:
    ids = [data.prompt_ids(tokenizer, p) for p in prompts]
    ends = [tokenizer.eos_token_id]
    answers = generate(model, ids, max_new_tokens=behaviour.tokens, end_ids=ends, plain=plain)
    fired = sum(behaviour.fires(tokenizer.decode(a)) for a in answers)
    low, high = wilson_interval(fired, len(ids))
    return {"value": fired / len(ids), "n": len(ids), "interval": [round(low, 4), round(high, 4)]}


@torch.no_grad()
def _answer_kl(organism: Any, base: Any, tokenizer: Any, prompt: Prompt, answer: str) -> float:
    """Mean KL(organism || base) in nats over the tokens of `answer`."""
    before = data.prompt_ids(tokenizer, prompt)
    said = tokenizer(answer, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([before + said[:-1]])
    ours, theirs = (_log_probs(m, ids, len(said)) for m in (organism, base))
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


def _log_probs(model: Any, ids: torch.Tensor, num_scored: int) -> torch.Tensor:
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -num_scored:].contiguous()
    return head_logits(model, hidden).log_softmax(-1)
