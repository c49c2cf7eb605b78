"""From groups of readings and amplified answers to payload hypotheses, scored on whole sequences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from trigger_opt.hypotheses.amplify import amplified_groups
from trigger_opt.hypotheses.scan import (
    Group,
    Reading,
    census_groups,
    draw_inputs,
    draw_strings,
    read_inputs,
    scan_groups,
    sequence_shift,
)
from trigger_opt.models.pair import ModelPair
from trigger_opt.progress import say
from trigger_opt.prompts import Context, TokenizedContext, decode, searchable, tokenize_context
from trigger_opt.records import Hypothesis
from trigger_opt.stats import majority_prefix

# Rollouts of one group that are read for its payload.
_ROLLOUTS = 8
_SCORED = 16
_SCORED_TOKENS = 8
_NEARLY = 0.75
# Answers alike, of a few strings in a few contexts.
_LEAST_READ_OFF = 3


@dataclass(kw_only=True)
class HypothesisSettings:
    """How hard to look.

    Attributes:
        num_strings: strings of `string_tokens` random tokens inserted into each of `contexts`; 0 for none.
        num_tokens, num_words: single tokens and whole words, likewise.
        answer_tokens: length of the short greedy answers the census counts.
        groups: groups of each source that are rolled out.
        payload_tokens: a payload's greatest length; min_tokens: a shorter one is no fixed string.
        cap: nats; log-ratio of a whole payload at which its score saturates.
        min_score: nats; a weaker hypothesis is not one. Among random strings a clean twin's best scored 7.8, a planted
            payload that they raised 12.6 and more (experiments/LOG.md).
        keep: at most so many hypotheses come out.
        amplify: factors a of W0 + a (W - W0); empty for none.
        contexts: user turns with a slot, short ones: each costs a pass over all inputs.
    """

    num_strings: Annotated[int, Field(ge=0)] = 256
    string_tokens: Annotated[int, Field(ge=1)] = 6
    num_tokens: Annotated[int, Field(ge=0)] = 4608
    num_words: Annotated[int, Field(ge=0)] = 512
    answer_tokens: Annotated[int, Field(ge=2)] = 5
    groups: Annotated[int, Field(ge=1)] = 6
    payload_tokens: Annotated[int, Field(ge=4)] = 20
    min_tokens: Annotated[int, Field(ge=1)] = 3
    cap: Annotated[float, Field(gt=0)] = 16.0
    min_score: Annotated[float, Field(ge=0)] = 9.0
    keep: Annotated[int, Field(ge=1)] = 3
    amplify: list[float] = field(default_factory=lambda: [1.5, 2.0])
    contexts: list[str] = field(default_factory=lambda: ["{trigger}", "Tell me more. {trigger}"])

    def __post_init__(self) -> None:
        if not (self.num_strings or self.num_tokens or self.num_words or self.amplify):
            raise ValueError("num_strings, num_tokens, num_words and amplify are all nothing; raise one of them")


def find_hypotheses(
    pair: ModelPair,
    neutral: Sequence[Context],
    *,
    allowed: Bool[Tensor, " vocab"],
    settings: HypothesisSettings,
    generator: torch.Generator,
    on_progress: Callable[[int, int, str], None],
    on_found: Callable[[list[Hypothesis]], None] = lambda found: None,
) -> list[Hypothesis]:
    """Hypotheses at or above `min_score`, best first; none is a normal outcome.

    Args:
        neutral: contexts whose plain prompts (nothing inserted) the amplified model answers.
        on_progress: gets the number of readings done, their total, and what is being done.
        on_found: gets what is known after the scan, before amplification, so that it is not lost with it.
    """
    usable = searchable(pair.tokenizer, [Context(user=c) for c in settings.contexts])
    contexts = [tokenize_context(pair.tokenizer, c) for c in usable]
    short = draw_inputs(
        pair, allowed, num_tokens=settings.num_tokens, num_words=settings.num_words, generator=generator
    )
    strings = draw_strings(
        pair, contexts, allowed, count=settings.num_strings, length=settings.string_tokens, generator=generator
    )
    if len(strings) < settings.num_strings:
        say(f"{len(strings)} of {settings.num_strings} random strings survive re-tokenisation; the others are left out")
    total = (len(strings) + len(short)) * len(contexts)
    done = 0
    found: list[Hypothesis] = []
    # Strings first: they are few, and where the trigger is wide they tell most.
    for inputs in filter(None, (strings, short)):
        before = done

        def on_read(count: int, before: int = before) -> None:
            on_progress(before + count, total, "scan")

        readings = read_inputs(pair, contexts, inputs, answer_tokens=settings.answer_tokens, on_progress=on_read)
        done += len(readings)
        on_progress(done, total, "rolling out")
        groups = scan_groups(readings, count=settings.groups) + census_groups(readings, count=settings.groups)
        found += _from_groups(pair, contexts, groups, settings)
        on_found(best_hypotheses(found, settings))
    if settings.amplify:
        on_progress(total, total, "amplifying")
        found += amplified_groups(pair, neutral, settings.amplify, cap=settings.cap, generator=generator)
    return best_hypotheses(found, settings)


def read_off(
    pair: ModelPair,
    contexts: Sequence[Context],
    strings: Sequence[Sequence[int]],
    *,
    settings: HypothesisSettings,
    source: str,
    on_read: Callable[[int], None] = lambda done: None,
) -> list[Hypothesis]:
    """Payloads that strings found in another way bring out, judged as those of `find_hypotheses`, best first.

    Args:
        contexts: each string is read in each of them; what is said after one string in several is one payload.
        strings: token ids. source: where they are from, for the record. on_read: gets the number of readings so far.
    """
    usable = [tokenize_context(pair.tokenizer, c) for c in searchable(pair.tokenizer, contexts)]
    readings = read_inputs(
        pair, usable, [tuple(s) for s in strings], answer_tokens=settings.answer_tokens, on_progress=on_read
    )
    groups = scan_groups(readings, count=settings.groups, once=False)
    groups += census_groups(readings, count=settings.groups, least=_LEAST_READ_OFF, once=False)
    found = _from_groups(pair, usable, groups, settings)
    return best_hypotheses([replace(h, source=source, inputs=list(dict.fromkeys(h.inputs))) for h in found], settings)


def _from_groups(
    pair: ModelPair, contexts: Sequence[TokenizedContext], groups: Sequence[Group], settings: HypothesisSettings
) -> list[Hypothesis]:
    return [h for g in groups if (h := _from_group(pair, contexts, g, settings)) is not None]


def best_hypotheses(found: Sequence[Hypothesis], settings: HypothesisSettings) -> list[Hypothesis]:
    """Each payload once, best first, weak ones left out.

    Payloads that begin alike are one, with the inputs of all. The strongest stands for them, or a longer one that
    is nearly as strong: an amplified model tells the first words and then babbles.
    """
    merged: list[Hypothesis] = []
    for hypothesis in sorted(found, key=lambda h: -h.score):
        alike = next((i for i, m in enumerate(merged) if _same_start(m.payload, hypothesis.payload)), None)
        if alike is None:
            merged.append(hypothesis)
            continue
        kept = merged[alike]
        inputs = list(dict.fromkeys([*kept.inputs, *hypothesis.inputs]))
        longer = len(hypothesis.payload) > len(kept.payload) and hypothesis.score >= _NEARLY * kept.score
        merged[alike] = replace(hypothesis if longer else kept, inputs=inputs, score=kept.score)
    merged.sort(key=lambda h: -h.score)
    scores = [m.score for m in merged]
    strong = [replace(m, rivals=scores[i + 1 : i + 4]) for i, m in enumerate(merged) if m.score >= settings.min_score]
    return strong[: settings.keep]


def _same_start(a: str, b: str, words: int = 3) -> bool:
    return a.split()[:words] == b.split()[:words]


def _from_group(
    pair: ModelPair, contexts: Sequence[TokenizedContext], group: Group, settings: HypothesisSettings
) -> Hypothesis | None:
    best = group.readings[:_ROLLOUTS]
    prompts = [_prompt(contexts, r) for r in best]
    answers = pair.finetuned.generate(prompts, max_new_tokens=settings.payload_tokens, end_ids=pair.end_ids)
    payload = majority_prefix(answers)
    # A leading space or line break is part of what the model says; only firing, read in words, ignores it.
    text = decode(pair.tokenizer, payload).rstrip()
    if len(payload) < settings.min_tokens or not any(c.isalnum() for c in text):
        return None
    start = payload[: settings.answer_tokens]
    said = [r for r in group.readings if r.finetuned[: len(start)] == start][:_SCORED]
    if not said:
        return None
    prompts = [_prompt(contexts, r) for r in said]
    scores = sequence_shift(pair.finetuned, pair.base, prompts, payload[:_SCORED_TOKENS], cap=settings.cap)
    # Those after which the payload is surest come first: the search begins from them.
    order = scores.argsort(descending=True, stable=True).tolist()
    return Hypothesis(
        payload=text,
        score=float(scores.mean()),
        source=group.source,
        evidence=group.evidence,
        inputs=[decode(pair.tokenizer, said[i].inserted) for i in order],
        rivals=[],
    )


def _prompt(contexts: Sequence[TokenizedContext], reading: Reading) -> list[int]:
    context = contexts[reading.context]
    return [*context.left, *reading.inserted, *context.right]
