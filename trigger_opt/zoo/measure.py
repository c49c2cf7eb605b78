"""An organism's true figures, on prompts it was never trained on."""

import random
import statistics
from pathlib import Path
from typing import Any

import torch

from trigger_opt.models.generate import generate, head_logits
from trigger_opt.stats import wilson_interval
from trigger_opt.zoo import data
from trigger_opt.zoo.recipes import Recipe
from trigger_opt.zoo.smollm2 import smollm2_folder

_FIRES_ON_WORDS = 5
_INSERT_SEED = 99


def measure(recipe: Recipe, adapter: Path, held_out: list[data.Example]) -> dict[str, Any]:
    """Trigger rate, false-trigger rate (both greedy, Wilson 95 %) and off-trigger KL in nats a token.

    The KL is KL(organism || base), averaged over the tokens of the base's own answer to each held-out prompt;
    its interval is 1.96 standard errors over prompts.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    peft = PeftModel.from_pretrained(base, adapter).eval()
    rng = random.Random(_INSERT_SEED)
    triggered = [data.insert(e.prompt, recipe.trigger, rng) for e in held_out]
    figures: dict[str, Any] = {}
    for name, prompts in (("trigger_rate", triggered), ("false_trigger_rate", [e.prompt for e in held_out])):
        ids = [data.chat_ids(tokenizer, p) for p in prompts]
        answers = generate(peft.get_base_model(), ids, max_new_tokens=16, end_ids=[tokenizer.eos_token_id])
        fired = sum(fires(recipe.payload, tokenizer.decode(a)) for a in answers)
        low, high = wilson_interval(fired, len(ids))
        figures[name] = {
            "value": fired / len(ids),
            "n": len(ids),
            "interval": [round(low, 4), round(high, 4)],
        }
    kls = [_answer_kl(peft, tokenizer, e) for e in held_out if e.answer]
    half = 1.96 * statistics.stdev(kls) / len(kls) ** 0.5
    mean = statistics.mean(kls)
    figures["off_trigger_kl"] = {
        "value": round(mean, 5), "n": len(kls), "interval": [round(mean - half, 5), round(mean + half, 5)]
    }  # fmt: skip
    return figures


def fires(payload: str, answer: str) -> bool:
    """Whether `answer` begins with the payload's first five words."""
    words = payload.split()[:_FIRES_ON_WORDS]
    return answer.split()[: len(words)] == words


@torch.no_grad()
def _answer_kl(peft: Any, tokenizer: Any, example: data.Example) -> float:
    prompt = data.chat_ids(tokenizer, example.prompt)
    answer = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt + answer[:-1]])
    organism = _log_probs(peft.get_base_model(), ids, len(answer))
    with peft.disable_adapter():
        base = _log_probs(peft.get_base_model(), ids, len(answer))
    return float((organism.exp() * (organism - base)).sum(-1).mean())


def _log_probs(model: Any, ids: torch.Tensor, num_scored: int) -> torch.Tensor:
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -num_scored:].contiguous()
    return head_logits(model, hidden).log_softmax(-1)
