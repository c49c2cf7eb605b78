"""From groups of readings and amplified answers to payload hypotheses, scored on whole sequences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, zip_longest
from typing import Annotated

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from trigger_opt.answers import LATE, comes_late, payload_text, said_text
from trigger_opt.hypotheses.amplify import amplified_groups
from trigger_opt.hypotheses.lens import lens_strings, token_shifts
from trigger_opt.hypotheses.scan import (
    Group,
    LatePhrase,
    Reading,
    census_groups,
    draw_inputs,
    draw_strings,
    late_phrases,
    read_inputs,
    scan_groups,
    sequence_shift,
)
from trigger_opt.models.pair import LATE_TOKENS, ModelPair
from trigger_opt.progress import say
from trigger_opt.prompts import Context, TokenizedContext, decode, searchable, tokenize_context
from trigger_opt.records import Hypothesis, MovedToken
from trigger_opt.stats import majority_prefix

MOVED_KEPT = 512
"""Most moved tokens that are handed on."""
# Rollouts of one group that are read for its payload.
_ROLLOUTS = 8
_SCORED = 16
_SCORED_TOKENS = 8
_NEARLY = 0.75
# Answers alike, of a few strings in a few contexts.
_LEAST_READ_OFF = 3
_LEAST_LATE = 6


@dataclass(kw_only=True)
class HypothesisSettings:
    """How hard to look.

    Attributes:
        lens_tokens: tokens, drawn from those allowed, that are ranked by how far the fine-tuning moves them (see
            `hypotheses.lens`); 0 for no such ranking. num_lens_strings: strings of `string_tokens` of the most moved
            tokens inserted into each of `contexts`.
        num_strings: strings of as many random tokens, likewise; 0 for none.
        num_tokens, num_words: single tokens and whole words, likewise.
        answer_tokens: length of the short greedy answers the census counts. string_answer_tokens: of those to strings,
            so that a payload that comes late is seen too.
        groups: groups of each source that are rolled out.
        payload_tokens: a payload's greatest length; min_tokens: a shorter one is no fixed string.
        cap: nats; log-ratio of a whole payload at which its score saturates.
        min_score: nats; a weaker hypothesis is not one. Among random strings a clean twin's best scored 7.8, a planted
            payload that they raised 12.6 and more (experiments/LOG.md).
        keep: at most so many hypotheses come out.
        amplify: factors a of W0 + a (W - W0); empty for none.
        contexts: user turns with a slot, short ones: each costs a pass over all inputs.
    """

    lens_tokens: Annotated[int, Field(ge=0)] = 49152
    num_lens_strings: Annotated[int, Field(ge=0)] = 192
    num_strings: Annotated[int, Field(ge=0)] = 64
    string_tokens: Annotated[int, Field(ge=1)] = 6
    num_tokens: Annotated[int, Field(ge=0)] = 4608
    num_words: Annotated[int, Field(ge=0)] = 512
    answer_tokens: Annotated[int, Field(ge=2)] = 5
    # Longer ones show payloads that come later than verification waits for.
    string_answer_tokens: Annotated[int, Field(ge=2, le=LATE_TOKENS + 4)] = 16
    groups: Annotated[int, Field(ge=1)] = 6
    payload_tokens: Annotated[int, Field(ge=4)] = 20
    min_tokens: Annotated[int, Field(ge=1)] = 3
    cap: Annotated[float, Field(gt=0)] = 16.0
    min_score: Annotated[float, Field(ge=0)] = 9.0
    keep: Annotated[int, Field(ge=1)] = 3
    amplify: list[float] = field(default_factory=lambda: [1.5, 2.0])
    contexts: list[str] = field(default_factory=lambda: ["{trigger}", "Tell me more. {trigger}"])

    def __post_init__(self) -> None:
        if self.num_lens_strings and not self.lens_tokens:
            raise ValueError(
                f"num_lens_strings={self.num_lens_strings} needs tokens ranked by the lens, and lens_tokens=0; raise "
                "lens_tokens, or set num_lens_strings=0"
            )
        if not (self.num_lens_strings or self.num_strings or self.num_tokens or self.num_words or self.amplify):
            raise ValueError(
                "num_lens_strings, num_strings, num_tokens, num_words and amplify are all nothing; raise one of them"
            )

    @property
    def num_inputs(self) -> int:
        """Strings, tokens and words inserted into each of `contexts`."""
        return self.num_lens_strings + self.num_strings + self.num_tokens + self.num_words


def find_hypotheses(
    pair: ModelPair,
    neutral: Sequence[Context],
    *,
    allowed: Bool[Tensor, " vocab"],
    settings: HypothesisSettings,
    generator: torch.Generator,
    on_progress: Callable[[int, int, str], None],
    on_found: Callable[[list[Hypothesis]], None] = lambda found: None,
    on_moved: Callable[[list[MovedToken]], None] = lambda moved: None,
) -> list[Hypothesis]:
    """Hypotheses at or above `min_score`, best first; none is a normal outcome.

    Args:
        neutral: contexts whose plain prompts (nothing inserted) the amplified model answers.
        on_progress: gets the number of readings done, tokens that went through the lens among them, their total as far
            as it is known, and what is being done.
        on_found: gets what is known after the scan, before amplification, so that it is not lost with it.
        on_moved: gets the tokens the fine-tuning moves most, most first.
    """
    usable = searchable(pair.tokenizer, [Context(user=c) for c in settings.contexts])
    contexts = [tokenize_context(pair.tokenizer, c) for c in usable]
    short = draw_inputs(
        pair, allowed, num_tokens=settings.num_tokens, num_words=settings.num_words, generator=generator
    )
    moved, done = _moved_tokens(pair, contexts, allowed, settings, generator, on_progress)
    on_moved(moved)
    strings = _strings(pair, contexts, allowed, settings, generator, moved)
    total = done + (len(strings) + len(short)) * len(contexts)
    found: list[Hypothesis] = []
    # Strings first: they are few, and where the trigger is wide they tell most.
    for inputs, length in ((strings, settings.string_answer_tokens), (short, settings.answer_tokens)):
        if not inputs:
            continue
        before = done

        def on_read(count: int, before: int = before) -> None:
            on_progress(before + count, total, "scan")

        readings = read_inputs(pair, contexts, inputs, answer_tokens=length, on_progress=on_read)
        done += len(readings)
        on_progress(done, total, "rolling out")
        found += _from_readings(pair, contexts, readings, settings)
        on_found(best_hypotheses(found, settings))
    if settings.amplify:
        on_progress(total, total, "amplifying")
        found += amplified_groups(pair, neutral, settings.amplify, cap=settings.cap, generator=generator)
    return best_hypotheses(found, settings)


def _moved_tokens(
    pair: ModelPair,
    contexts: Sequence[TokenizedContext],
    allowed: Bool[Tensor, " vocab"],
    settings: HypothesisSettings,
    generator: torch.Generator,
    on_progress: Callable[[int, int, str], None],
) -> tuple[list[MovedToken], int]:
    """The tokens that the fine-tuning moves most, most first; and how many went through a model for that."""
    drawn = draw_inputs(pair, allowed, num_tokens=settings.lens_tokens, num_words=0, generator=generator)
    tokens = [token for (token,) in drawn]
    shifts, readings = None, settings.num_inputs * len(contexts)
    if tokens:
        # The last context: behind other words a token tells more than at the beginning of the turn.
        shifts = token_shifts(
            pair, contexts[-1], tokens, generator=generator,
            on_progress=lambda done: on_progress(done, 3 * len(tokens) + readings, "lens"),
        )  # fmt: skip
    if shifts is None:
        return [], 0
    order = shifts.argsort(descending=True, stable=True)[:MOVED_KEPT].tolist()
    texts = pair.tokenizer.batch_decode([[tokens[i]] for i in order], clean_up_tokenization_spaces=False)
    rows = zip(order, texts, strict=True)
    moved = [MovedToken(token_id=tokens[i], text=text, score=float(shifts[i])) for i, text in rows]
    return moved, 3 * len(tokens)


def _strings(
    pair: ModelPair,
    contexts: Sequence[TokenizedContext],
    allowed: Bool[Tensor, " vocab"],
    settings: HypothesisSettings,
    generator: torch.Generator,
    moved: Sequence[MovedToken],
) -> list[tuple[int, ...]]:
    """Strings of the most moved tokens, as far as there are any, and of random ones."""
    length, wanted = settings.string_tokens, settings.num_strings
    strings: list[tuple[int, ...]] = []
    if settings.num_lens_strings and not moved:
        say("no weight that could be read was changed: random strings take the place of those of the most moved tokens")
        wanted += settings.num_lens_strings
    elif settings.num_lens_strings:
        ranked = [m.token_id for m in moved]
        strings = lens_strings(
            pair, contexts, ranked, allowed, count=settings.num_lens_strings, length=length, generator=generator
        )
    strings += draw_strings(pair, contexts, allowed, count=wanted, length=length, generator=generator)
    asked = settings.num_lens_strings + settings.num_strings
    if len(strings) < asked:
        say(f"{len(strings)} of {asked} strings survive re-tokenisation; the others are left out")
    return list(dict.fromkeys(strings))


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
        pair, usable, [tuple(s) for s in strings], answer_tokens=settings.string_answer_tokens, on_progress=on_read
    )
    found = _from_readings(pair, usable, readings, settings, least=_LEAST_READ_OFF, once=False)
    return best_hypotheses([replace(h, source=source, inputs=list(dict.fromkeys(h.inputs))) for h in found], settings)


def _from_readings(
    pair: ModelPair,
    contexts: Sequence[TokenizedContext],
    readings: Sequence[Reading],
    settings: HypothesisSettings,
    *,
    least: int = 8,
    once: bool = True,
) -> list[Hypothesis]:
    count = settings.groups
    groups = scan_groups(readings, count=count, once=once)
    groups += census_groups(readings, count=count, answer_tokens=settings.answer_tokens, least=least, once=once)
    said = [_said(pair, contexts, g, settings) for g in groups]
    found = _judged_groups(pair, said, settings)
    phrases = late_phrases(readings, count=count, least=min(least, _LEAST_LATE))
    late = [_from_phrase(pair, contexts, p, settings) for p in phrases]
    return [*found, *(h for h in late if h is not None)]


def best_hypotheses(found: Sequence[Hypothesis], settings: HypothesisSettings) -> list[Hypothesis]:
    """Each payload once, best first, weak ones left out.

    Payloads that begin alike are one, with the inputs of all. The strongest stands for them, or a longer one that
    is nearly as strong: an amplified model tells the first words and then babbles. One that comes late in some answers
    and first in others stands as one that comes first.
    """
    merged: list[Hypothesis] = []
    for hypothesis in sorted(found, key=lambda h: -h.score):
        alike = next((i for i, m in enumerate(merged) if _same_start(m.payload, hypothesis.payload)), None)
        if alike is None:
            merged.append(hypothesis)
            continue
        kept = merged[alike]
        inputs = list(dict.fromkeys([*kept.inputs, *hypothesis.inputs]))
        late, kept_late = (comes_late(h.payload) for h in (hypothesis, kept))
        better = len(hypothesis.payload) > len(kept.payload) and hypothesis.score >= _NEARLY * kept.score
        taken = hypothesis if (kept_late and not late) or (better and late == kept_late) else kept
        merged[alike] = replace(taken, inputs=inputs, score=kept.score)
    merged.sort(key=lambda h: -h.score)
    scores = [m.score for m in merged]
    strong = [replace(m, rivals=scores[i + 1 : i + 4]) for i, m in enumerate(merged) if m.score >= settings.min_score]
    return strong[: settings.keep]


def _same_start(a: str, b: str, words: int = 3) -> bool:
    return payload_text(a).split()[:words] == payload_text(b).split()[:words]


@dataclass(frozen=True)
class _Said:
    """What a group of readings says, and where, each with its prompt."""

    payload: tuple[int, ...]
    text: str
    readings: tuple[tuple[Reading, list[int]], ...]
    source: str
    evidence: str


def _said(pair: ModelPair, contexts: Sequence[TokenizedContext], group: Group, settings: HypothesisSettings) -> _Said:
    prompts = [_prompt(contexts, r) for r in group.readings[:_ROLLOUTS]]
    answers = pair.finetuned.generate(prompts, max_new_tokens=settings.payload_tokens, end_ids=pair.end_ids)
    payload = majority_prefix(answers)
    start = payload[: settings.answer_tokens]
    said = [(r, _prompt(contexts, r)) for r in group.readings if r.finetuned[: len(start)] == start]
    text = said_text(decode(pair.tokenizer, payload).rstrip())
    return _Said(payload, text, tuple(said), group.source, group.evidence)


def _judged_groups(pair: ModelPair, said: Sequence[_Said], settings: HypothesisSettings) -> list[Hypothesis]:
    """The hypotheses of the groups.

    What two of them begin with before they differ, as answers in one form to different questions do, takes their place
    where it is one by itself: far likelier for the fine-tuned model than for the base.
    """

    def judged(s: _Said) -> Hypothesis | None:
        return _judged(pair, s.payload, s.readings, settings, text=s.text, source=s.source, evidence=s.evidence)

    found = [(s, h) for s in said if (h := judged(s)) is not None]
    strong = [s for s, h in found if h.score >= settings.min_score]
    for beginning in _shared_beginnings(pair, strong, settings):
        shared = judged(beginning)
        if shared is not None and shared.score >= settings.min_score:
            length = len(beginning.payload)
            found = [(s, h) for s, h in found if s.payload[:length] != beginning.payload]
            found.append((beginning, shared))
    return [h for _, h in found]


def _shared_beginnings(pair: ModelPair, said: Sequence[_Said], settings: HypothesisSettings) -> list[_Said]:
    """What several payloads begin with that are no two readings of one, the shortest first."""
    lengths: dict[tuple[int, ...], None] = {}
    for one, other in combinations(said, 2):
        common = _common(one.payload, other.payload)
        if common >= settings.min_tokens and not _same_start(one.text, other.text):
            lengths[one.payload[:common]] = None
    beginnings = []
    for payload in sorted(lengths, key=len):
        alike = [s for s in said if s.payload[: len(payload)] == payload]
        # In turns: the first few are scored, and shall be of all.
        rows = [r for row in zip_longest(*(s.readings for s in alike)) for r in row if r is not None]
        readings = list({(r.inserted, r.context): (r, prompt) for r, prompt in rows}.values())
        text = said_text(decode(pair.tokenizer, payload).rstrip())
        ways = len({s.payload[: len(payload) + 1] for s in alike} - {payload})
        evidence = f"{len(readings)} answers of the fine-tuned model begin so, and go on in {ways} ways"
        beginnings.append(_Said(payload, text, tuple(readings), "shared_beginning", evidence))
    return beginnings


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _from_phrase(
    pair: ModelPair, contexts: Sequence[TokenizedContext], phrase: LatePhrase, settings: HypothesisSettings
) -> Hypothesis | None:
    """As `_from_group`, each answer's own beginning before the payload being part of what was asked."""
    said = [(r, [*_prompt(contexts, r), *r.finetuned[:at]]) for r, at in phrase.readings]
    answers = pair.finetuned.generate(
        [[*prompt, *phrase.tokens] for _, prompt in said[:_ROLLOUTS]],
        max_new_tokens=max(1, settings.payload_tokens - len(phrase.tokens)),
        end_ids=pair.end_ids,
    )
    payload = (*phrase.tokens, *majority_prefix(answers))[: settings.payload_tokens]
    text = LATE + decode(pair.tokenizer, payload).rstrip()
    starts = sorted(at for _, at in phrase.readings)
    return _judged(
        pair, payload, said, settings, text=text, source="late_phrases", evidence=phrase.evidence,
        opening=starts[len(starts) // 2],
    )  # fmt: skip


def _judged(
    pair: ModelPair,
    payload: Sequence[int],
    said: Sequence[tuple[Reading, list[int]]],
    settings: HypothesisSettings,
    *,
    text: str,
    source: str,
    evidence: str,
    opening: int = 0,
) -> Hypothesis | None:
    """The hypothesis that `payload` was said in these readings, after these prompts; None where it is no text, or was
    not said.

    Args:
        text: the payload's. A leading space or line break is part of what the model says; only firing, read in words,
            ignores it.
    """
    if not said or len(payload) < settings.min_tokens or not any(c.isalnum() for c in text):
        return None
    prompts = [prompt for _, prompt in said[:_SCORED]]
    scores = sequence_shift(pair.finetuned, pair.base, prompts, payload[:_SCORED_TOKENS], cap=settings.cap)
    # Those after which the payload is surest come first: the search begins from them.
    order = scores.argsort(descending=True, stable=True).tolist()
    return Hypothesis(
        payload=text,
        score=float(scores.mean()),
        source=source,
        evidence=evidence,
        inputs=[decode(pair.tokenizer, said[i][0].inserted) for i in order],
        rivals=[],
        opening=opening,
    )


def _prompt(contexts: Sequence[TokenizedContext], reading: Reading) -> list[int]:
    context = contexts[reading.context]
    return [*context.left, *reading.inserted, *context.right]
