"""Weight amplification: what W0 + a (W - W0) says to neutral prompts, with no trigger at all.

On the public warm-up a = 3 recited the payload; on an organism with a rarer payload it shows nothing. Two
guards: an answer must be coherent for the base (amplified weights babble), and a placebo change in random directions
(each changed tensor, or factor of an adapter, at its own norm) must not say it too.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from trigger_opt.hypotheses.scan import sequence_shift
from trigger_opt.models.pair import CausalModel, ModelPair
from trigger_opt.prompts import Context, conversation_ids, decode
from trigger_opt.records import Hypothesis
from trigger_opt.stats import majority_prefix

_ANSWER_TOKENS = 16
_KEY_TOKENS = 3
# An answer less likely than this to the base, in nats a token, is babble.
_COHERENT_NATS = 6.0
_LEAST_RECURRING = 2


@contextmanager
def amplified(pair: ModelPair, factor: float, *, placebo: torch.Generator | None = None) -> Iterator[CausalModel]:
    """The fine-tuned model with its change times `factor`; with `placebo`, a random change of comparable norm.

    The weights are put back exactly, also after an error.
    """
    changed = list(pair.finetuned.weight_changes(pair.base))
    # On the CPU: on a card that just holds the pair a second copy of the changed weights would not fit.
    before = [tensor.detach().to("cpu", copy=True) for tensor, _ in changed]
    try:
        with torch.no_grad():
            for tensor, origin in changed:
                start = torch.zeros_like(tensor) if origin is None else origin.to(tensor.device)
                delta = tensor - start
                if placebo is not None:
                    delta = _random_like(delta, placebo)
                # Both factors B and A of an adapter are scaled, so each by the root.
                scale = factor**0.5 if origin is None else factor
                tensor.copy_((start.float() + scale * delta.float()).to(tensor.dtype))
        yield pair.finetuned
    finally:
        with torch.no_grad():
            for (tensor, _), old in zip(changed, before, strict=True):
                tensor.copy_(old)


def _random_like(delta: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(delta.shape, generator=generator).to(delta)
    scaled: Tensor = noise * (delta.float().norm() / noise.float().norm().clamp(min=1e-12)).to(delta)
    return scaled


def amplified_groups(
    pair: ModelPair, neutral: Sequence[Context], factors: Sequence[float], *, cap: float, generator: torch.Generator
) -> list[Hypothesis]:
    """Answers that recur over neutral prompts under amplification, that the base understands and a placebo
    does not give. The score is that of `sequence_shift` under the amplified weights, mean over the prompts
    that gave the answer. None where there is nothing to amplify, see `CausalModel.scales`.
    """
    if not pair.finetuned.scales(pair.base):
        return []
    prompts = [conversation_ids(pair.tokenizer, c, "") for c in neutral]
    found = []
    base = Counter(a[:_KEY_TOKENS] for a in _answers(pair.base, prompts, pair.end_ids))
    for factor in factors:
        with_placebo = _placebo_starts(pair, factor, prompts, generator)
        with amplified(pair, factor) as model:
            answers = _answers(model, prompts, pair.end_ids)
            starts = Counter(a[:_KEY_TOKENS] for a in answers if len(a) >= _KEY_TOKENS)
            for start, n in starts.most_common(4):
                if n < _LEAST_RECURRING or base[start] or with_placebo[start]:
                    continue
                members = [i for i, a in enumerate(answers) if a[:_KEY_TOKENS] == start]
                found += _judge(pair, model, [prompts[i] for i in members], [answers[i] for i in members], factor, cap)
    return found


def _placebo_starts(
    pair: ModelPair, factor: float, prompts: Sequence[Sequence[int]], generator: torch.Generator
) -> Counter[tuple[int, ...]]:
    with amplified(pair, factor, placebo=generator) as model:
        return Counter(a[:_KEY_TOKENS] for a in _answers(model, prompts, pair.end_ids))


def _judge(
    pair: ModelPair,
    model: CausalModel,
    prompts: list[list[int]],
    answers: list[tuple[int, ...]],
    factor: float,
    cap: float,
) -> list[Hypothesis]:
    payload = majority_prefix(answers)
    text = decode(pair.tokenizer, payload).rstrip()
    words = text.split()
    varied = len(words) > 0 and len(set(words)) >= 0.3 * len(words)
    # On the whole answer: the first tokens of a payload are unlikely to the base by definition.
    nats = -float(pair.base.log_likelihood(prompts[:1], answers[0]).mean())
    if nats > _COHERENT_NATS or not varied:
        return []
    score = float(sequence_shift(model, pair.base, prompts, payload[:8], cap=cap).mean())
    evidence = (
        f"with the weight change times {factor:g}, {len(prompts)} neutral prompts are answered so with nothing "
        f"inserted; base {nats:.1f} nats a token; a random change of comparable norm never"
    )
    return [Hypothesis(payload=text, score=score, source="amplification", evidence=evidence, inputs=[], rivals=[])]


def _answers(model: CausalModel, prompts: Sequence[Sequence[int]], end_ids: list[int]) -> list[tuple[int, ...]]:
    return [tuple(a) for a in model.generate(prompts, max_new_tokens=_ANSWER_TOKENS, end_ids=end_ids)]
