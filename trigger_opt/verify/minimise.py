"""Leave one token out while the string still fires: what is left is what carries the effect."""

from collections.abc import Sequence

from trigger_opt.answers import fires
from trigger_opt.models.pair import ModelPair
from trigger_opt.prompts import Context, conversation_ids, decode, encode


def minimise(
    pair: ModelPair, trigger: str, contexts: Sequence[Context], *, payload: str, tolerance: float = 0.05
) -> str:
    """The shortest string reached by dropping single tokens, never losing more than `tolerance` of the rate.

    `contexts` are the search's: choosing among shorter strings on the held-out ones would spoil them. The
    fine-tuned model answers greedily. Each round drops the token whose loss leaves the highest rate (the first,
    among equals) and stops when every drop costs more than allowed of the full string's rate.
    """
    ids = encode(pair.tokenizer, [trigger])[0]
    texts = [trigger]
    floor = _rates(pair, texts, contexts, payload)[0] - tolerance
    # At a rate within the tolerance of zero every drop would pass.
    while floor > 0 and len(ids) > 1:
        shorter = [ids[:i] + ids[i + 1 :] for i in range(len(ids))]
        texts = [decode(pair.tokenizer, s) for s in shorter]
        rates = _rates(pair, texts, contexts, payload)
        best = max(range(len(rates)), key=lambda i: (rates[i], -i))
        if rates[best] < floor or not texts[best].strip():
            break
        ids = encode(pair.tokenizer, [texts[best]])[0]
        trigger = texts[best]
    return trigger


def _rates(pair: ModelPair, triggers: Sequence[str], contexts: Sequence[Context], payload: str) -> list[float]:
    target = pair.deciding_tokens(payload)
    prompts = [conversation_ids(pair.tokenizer, c, t) for t in triggers for c in contexts]
    answers = pair.finetuned.generate(prompts, max_new_tokens=target + 2, end_ids=pair.end_ids)
    fired = [fires(payload, decode(pair.tokenizer, a)) for a in answers]
    n = len(contexts)
    return [sum(fired[i * n : (i + 1) * n]) / n for i in range(len(triggers))]
