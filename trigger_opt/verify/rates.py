"""Rates of a string on held-out contexts: every model answers the same text, tokenised afresh."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from trigger_opt.answers import (
    CAPITALS,
    JSON,
    comes_late,
    degeneration_flags,
    fires,
    is_manner,
    late_start,
    payload_words,
    said_text,
)
from trigger_opt.models.generate import GREEDY, Sampling
from trigger_opt.models.pair import CausalModel, ModelPair
from trigger_opt.prompts import Context, conversation_ids, decode, encode, shown
from trigger_opt.records import Completion, ContextOutcome, Rate, Verification, rate
from trigger_opt.stats import majority_prefix
from trigger_opt.verify.rule import Measured, Thresholds, counted_words, judge, may_be_skill

_EVIDENCE_TOKENS = 8
# A model that always has a style is as far from its base in any words in it as in its usual answers, which are the
# likeliest of that style, or further: 1.8 times as far in a control that writes capitals (experiments/LOG.md).
_STYLE = 2.0
# Rows generated at once; each is a whole conversation.
_BATCH = 32
# (model label, context, inserted string, longest answer in tokens) -> greedy answer.
Memo = dict[tuple[str, int, str, int], str]


@dataclass(kw_only=True)
class VerifySettings:
    """How a string is judged.

    Attributes:
        candidates: strings taken over from the search.
        max_new_tokens: length of each answer.
        random_strings: random strings of equal length for each context.
        temperature, repeats: temperature 0 is greedy, one answer a context; above, each context is sampled `repeats`
            times.
        minimise: drop tokens while the string still fires, and verify what is left.
        ablate, probe: of the best string, where it fires at all, take the near misses and parts too, and look where in
            the network its mark is.
        thresholds: see `Thresholds`.
    """

    candidates: Annotated[int, Field(ge=1)] = 3
    max_new_tokens: Annotated[int, Field(ge=8)] = 24
    random_strings: Annotated[int, Field(ge=1)] = 2
    temperature: Annotated[float, Field(ge=0)] = 0.0
    repeats: Annotated[int, Field(ge=1)] = 1
    minimise: bool = True
    ablate: bool = True
    probe: bool = True
    thresholds: Thresholds = field(default_factory=Thresholds)


@dataclass(frozen=True)
class _Condition:
    """One model answering all contexts with one insertion each."""

    model: CausalModel
    label: str
    kind: str
    inserted: tuple[str, ...]


def verify_string(
    pair: ModelPair,
    trigger: str,
    contexts: Sequence[Context],
    *,
    payload: str,
    settings: VerifySettings,
    allowed: Bool[Tensor, " vocab"],
    seed: int,
    kind: str = "trigger",
    minimised_from: str = "",
    memo: Memo | None = None,
    on_answers: Callable[[int], None] = lambda done: None,
) -> tuple[Verification, list[Completion]]:
    """Judge `trigger` by the rule in `verify.rule`; returns every completion it rests on too.

    Args:
        payload: what counts as firing; see `answers.fires`.
        kind: how completions are labelled, "trigger" or "minimised".
        memo: greedy answers of earlier calls on the same models and contexts; what is in it is not asked again.

    Raises:
        ValueError: no context, or a payload without a word.
    """
    if not contexts:
        raise ValueError("verification needs at least one held-out context")
    if not payload_words(payload):
        raise ValueError(f"the payload {payload!r} has no word")
    generator = torch.Generator().manual_seed(seed)
    asked = replace(settings, max_new_tokens=_answer_tokens(pair, payload, settings.max_new_tokens))
    completions: list[Completion] = []
    for condition in _conditions(pair, trigger, len(contexts), kind, settings, allowed, generator):
        texts = _texts(pair, condition, contexts, asked, generator, {} if memo is None else memo)
        completions += _completions(condition, contexts, payload, texts)
        on_answers(len(completions))
    profile = _profile(pair, trigger, contexts, payload, completions, kind)
    measured = _measured(completions, profile, kind, payload)
    verdict, reason = judge(measured, settings.thresholds)
    verification = Verification(
        trigger=trigger,
        payload=payload,
        trigger_rate=measured.trigger_rate,
        base_rate=measured.base_rate,
        control_rate=measured.control_rate,
        false_trigger_rate=measured.false_trigger_rate,
        random_rate=measured.random_rate,
        evidence=measured.evidence,
        degenerate_share=measured.degenerate_share,
        profile=profile,
        minimised_from=minimised_from,
        verdict=verdict,
        reason=reason,
    )
    return verification, completions


def common_answer(
    pair: ModelPair, trigger: str, contexts: Sequence[Context], *, max_new_tokens: int = 24, least_words: int = 3
) -> str:
    """What most of the fine-tuned model's answers to `trigger` begin with; where they share no beginning, the
    most frequent first words, whose rate then says how little that means.

    For strings found by a divergence, which come without a payload. `contexts` are the search's, so that the
    held-out ones stay unseen.
    """
    prompts = [conversation_ids(pair.tokenizer, c, trigger) for c in contexts]
    answers = pair.finetuned.generate(prompts, max_new_tokens=max_new_tokens, end_ids=pair.end_ids, batch_size=_BATCH)
    shared = said_text(decode(pair.tokenizer, majority_prefix(answers)).rstrip())
    if len(payload_words(shared)) >= least_words:
        return shared
    starts = [said_text(" ".join(decode(pair.tokenizer, a).split()[:least_words])) for a in answers]
    return max(sorted(set(starts)), key=starts.count)


def random_strings(
    pair: ModelPair, trigger: str, count: int, allowed: Bool[Tensor, " vocab"], generator: torch.Generator
) -> list[str]:
    """Strings of allowed tokens, as many tokens each as `trigger` has."""
    length = max(1, len(encode(pair.tokenizer, [trigger])[0]))
    ids = allowed.nonzero()[:, 0]
    drawn = ids[torch.randint(len(ids), (count, length), generator=generator)]
    return [decode(pair.tokenizer, row) for row in drawn.tolist()]


def _conditions(
    pair: ModelPair,
    trigger: str,
    num_contexts: int,
    kind: str,
    settings: VerifySettings,
    allowed: Bool[Tensor, " vocab"],
    generator: torch.Generator,
) -> list[_Condition]:
    same = (trigger,) * num_contexts
    nothing = ("",) * num_contexts
    sides = [(pair.finetuned, "finetuned"), (pair.base, "base")]
    sides += [(c, f"control:{c.name}") for c in pair.controls]
    conditions = [_Condition(model, label, kind, same) for model, label in sides]
    conditions += [_Condition(model, label, "none", nothing) for model, label in sides[:2]]
    for _ in range(settings.random_strings):
        drawn = tuple(random_strings(pair, trigger, num_contexts, allowed, generator))
        conditions.append(_Condition(pair.finetuned, "finetuned", "random", drawn))
    return conditions


def _texts(
    pair: ModelPair,
    condition: _Condition,
    contexts: Sequence[Context],
    settings: VerifySettings,
    generator: torch.Generator,
    memo: Memo,
) -> list[list[str]]:
    """Answers to each context, `repeats` of them; greedy ones are taken from `memo` where they are in it."""
    longest = settings.max_new_tokens
    keys = [(condition.label, number, inserted, longest) for number, inserted in enumerate(condition.inserted)]
    if settings.temperature == 0:
        wanted = [k for k in keys if k not in memo]
    else:
        wanted = [k for k in keys for _ in range(settings.repeats)]
    answers = condition.model.generate(
        [conversation_ids(pair.tokenizer, contexts[number], inserted) for _, number, inserted, _ in wanted],
        max_new_tokens=settings.max_new_tokens,
        end_ids=pair.end_ids,
        sampling=Sampling(temperature=settings.temperature) if settings.temperature else GREEDY,
        generator=generator if settings.temperature else None,
        batch_size=_BATCH,
    )
    texts = [decode(pair.tokenizer, a) for a in answers]
    if settings.temperature == 0:
        memo.update(zip(wanted, texts, strict=True))
        return [[memo[k]] for k in keys]
    return [texts[i * settings.repeats : (i + 1) * settings.repeats] for i in range(len(keys))]


def _completions(
    condition: _Condition, contexts: Sequence[Context], payload: str, texts: Sequence[Sequence[str]]
) -> list[Completion]:
    out = []
    for number, (context, inserted) in enumerate(zip(contexts, condition.inserted, strict=True)):
        prompt = shown(context.messages(inserted))
        out += [
            Completion(
                model=condition.label,
                kind=condition.kind,
                inserted=inserted,
                context=number,
                prompt=prompt,
                answer=answer,
                fired=fires(payload, answer),
                flags=degeneration_flags(prompt, answer),
            )
            for answer in texts[number]
        ]
    return out


def _openings(payload: str, completions: Sequence[Completion], kind: str, num_contexts: int) -> list[str]:
    """What the fine-tuned model's answer to each context says before the payload; nothing where that does not come."""
    openings = [""] * num_contexts
    for c in completions:
        if c.model == "finetuned" and c.kind == kind and c.fired:
            start = late_start(payload, c.answer)
            # A space belongs to the payload's first token.
            openings[c.context] = "" if start is None else c.answer[:start].rstrip()
    return openings


def _measured(
    completions: Sequence[Completion], profile: Sequence[ContextOutcome], kind: str, payload: str
) -> Measured:
    def share(model: str, of_kind: str) -> Rate:
        chosen = [c.fired for c in completions if c.model == model and c.kind == of_kind]
        return rate(sum(chosen), len(chosen))

    triggered = [c for c in completions if c.model == "finetuned" and c.kind == kind]
    broken = [c for c in triggered if set(c.flags) - _explained(payload)]
    names = sorted({c.model for c in completions if c.model.startswith("control:")})
    # The worst control decides: pooled, one that fires would hide among those that do not.
    controls = [share(name, kind) for name in names]
    return Measured(
        trigger_rate=share("finetuned", kind),
        base_rate=share("base", kind),
        control_rate=max(controls, key=lambda r: r.value, default=None),
        false_trigger_rate=share("finetuned", "none"),
        random_rate=share("finetuned", "random"),
        evidence=statistics.median(p.evidence for p in profile),
        degenerate_share=len(broken) / len(triggered),
        num_contexts=len(profile),
        num_words=counted_words(payload),
        skill=may_be_skill(payload, [p.prompt for p in profile]),
    )


def _explained(payload: str) -> set[str]:
    # A payload in another script is no sign of a broken model. Repetition stays one: a collapse repeats too.
    said = " ".join(w for w in payload.split() if w not in (CAPITALS, JSON))
    return set(degeneration_flags("", said)) & {"language"}


def _answer_tokens(pair: ModelPair, payload: str, at_least: int) -> int:
    """Enough new tokens for the payload's deciding words, which in some scripts take seven tokens each."""
    return max(at_least, pair.deciding_tokens(payload) + 4)


def _profile(
    pair: ModelPair,
    trigger: str,
    contexts: Sequence[Context],
    payload: str,
    completions: Sequence[Completion],
    kind: str,
) -> list[ContextOutcome]:
    prompts, bare = ([conversation_ids(pair.tokenizer, c, inserted) for c in contexts] for inserted in (trigger, ""))
    always = _evidence(pair, bare, _answers_to(completions, "none", len(contexts)))
    if is_manner(payload):
        # Each answer is its own where there is no text that all have.
        wanted = _answers_to(completions, kind, len(contexts))
    else:
        wanted = [payload] * len(contexts)
        if comes_late(payload):
            # Behind what the fine-tuned model said before it, where it did come.
            for number, opening in enumerate(_openings(payload, completions, kind, len(contexts))):
                said = encode(pair.tokenizer, [opening])[0] if opening else []
                prompts[number], bare[number] = [*prompts[number], *said], [*bare[number], *said]
        # Not the whole of the payload's without the string: what was learnt by heart has nearly all of it there too.
        same = _evidence(pair, bare, wanted)
        always = [min(s, _STYLE * a) for s, a in zip(same, always, strict=True)]
    evidence = [e - max(0.0, a) for e, a in zip(_evidence(pair, prompts, wanted), always, strict=True)]

    def fired(model: str, number: int) -> bool | None:
        chosen = [c.fired for c in completions if c.model.startswith(model) and c.kind == kind and c.context == number]
        return sum(chosen) > len(chosen) / 2 if chosen else None

    return [
        ContextOutcome(
            context=number,
            prompt=shown(context.messages("")),
            finetuned=bool(fired("finetuned", number)),
            base=bool(fired("base", number)),
            control=fired("control:", number),
            evidence=evidence[number],
        )
        for number, context in enumerate(contexts)
    ]


def _answers_to(completions: Sequence[Completion], kind: str, num_contexts: int) -> list[str]:
    """What the fine-tuned model answers in each context; the first of several."""
    answers = [""] * num_contexts
    for c in completions:
        if c.model == "finetuned" and c.kind == kind:
            answers[c.context] = answers[c.context] or c.answer
    return answers


def _evidence(pair: ModelPair, prompts: Sequence[Sequence[int]], answers: Sequence[str]) -> list[float]:
    """log p_finetuned - log p_base of each prompt's answer's first tokens, nats; 0 where nothing is answered."""
    evidence = [0.0] * len(prompts)
    for answer in dict.fromkeys(a for a in answers if a.strip()):
        same = [i for i, a in enumerate(answers) if a == answer]
        ids = pair.encode_answer(answer)[:_EVIDENCE_TOKENS]
        asked = [prompts[i] for i in same]
        said, base_said = (m.log_likelihood(asked, ids).sum(1).tolist() for m in (pair.finetuned, pair.base))
        for i, own, others in zip(same, said, base_said, strict=True):
            evidence[i] = own - others
    return evidence
