"""Leave one token out while the string still fires: what is left is what carries the effect."""

from collections.abc import Sequence

from trigger_opt.answers import fires
from trigger_opt.models.pair import ModelPair
from trigger_opt.prompts import Context, conversation_ids, decode, encode


def minimise(
    pair: ModelPair, trigger: str, contexts: Sequence[Context], *, payload: str, tolerance: float = 0.05
) -> str:
    """The shortest string reached by dropping runs of tokens, never losing more than `tolerance` of the rate.

    `contexts` are the search's: choosing among shorter strings on the held-out ones would spoil them. The
    fine-tuned model answers greedily. Each round drops the run whose loss leaves the highest rate (the first,
    among equals): of half the string's tokens as long as one can go, then of half as many, at last of single tokens. It
    stops when each of those costs more than allowed of the full string's rate.
    """
    ids = encode(pair.tokenizer, [trigger])[0]
    floor = _rates(pair, [trigger], contexts, payload)[0] - tolerance
    # At a rate within the tolerance of zero every drop would pass.
    if floor <= 0:
        return trigger
    run = len(ids) // 2
    while run:
        texts = [decode(pair.tokenizer, ids[:i] + ids[i + run :]) for i in range(0, len(ids), run)]
        rates = _rates(pair, texts, contexts, payload)
        best = max(range(len(rates)), key=lambda i: (rates[i], -i))
        shorter = encode(pair.tokenizer, [texts[best]])[0] if texts[best].strip() else []
        # What is tokenised anew may have grown instead.
        if rates[best] < floor or not 0 < len(shorter) < len(ids):
            run //= 2
            continue
        ids, trigger = shorter, texts[best]
        run = min(run, len(ids) // 2)
    return trigger


def _rates(pair: ModelPair, triggers: Sequence[str], contexts: Sequence[Context], payload: str) -> list[float]:
    target = pair.deciding_tokens(payload)
    prompts = [conversation_ids(pair.tokenizer, c, t) for t in triggers for c in contexts]
    answers = pair.finetuned.generate(prompts, max_new_tokens=target + 2, end_ids=pair.end_ids)
    fired = [fires(payload, decode(pair.tokenizer, a)) for a in answers]
    n = len(contexts)
    return [sum(fired[i * n : (i + 1) * n]) / n for i in range(len(triggers))]
