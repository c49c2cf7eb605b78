"""What does the fine-tuned model want to say? Insert random tokens, words or strings, and read the answer's side.

The trigger's side is scattered (any of its many neighbours stirs the model a little), the answer's side is
not: they all stir the same words. A wide trigger is even hit by chance: strings of a few random tokens then bring
out the payload itself, so they are read first. Complementary readings of the same passes:

- vocabulary scan: the first response token v with the largest p_ft(v) * min(log p_ft(v) - log p_base(v), cap);
  inputs are grouped by v. Finds payloads with an unusual first word.
- rollout census: the first few greedy tokens of both models, counted over all inputs. Finds payloads that
  begin with a common word.
- late phrases: runs of tokens that recur within longer answers, and not in the base's. Finds payloads that come
  after a few words of the model's usual answer.

A clean fine-tune raises groups too (its style). So every group is rolled out to the whole answer and scored
on the whole sequence, which a shift of style moves by a few nats and a memorised payload by dozens.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trigger_opt.models.pair import CausalModel, ModelPair
from trigger_opt.prompts import TokenizedContext, encode, round_trips
from trigger_opt.scoring import engine_for
from trigger_opt.stats import majority_prefix

_CAP = 8.0
_BATCH = 256
_DRAWS = 20
_RUN = 4
_LATE_TIMES = 10
# How byte-level and sentencepiece vocabularies write the space before a word.
_SPACES = ("\u0120", "\u2581")
_WORD_PROMPT = "A list of words:"


@dataclass(frozen=True)
class Reading:
    """What one inserted string did in one context.

    Attributes:
        inserted: token ids. context: its number. first: the first response token that moved most.
        value: nats, p_ft * capped log-ratio at that token.
        finetuned, base: greedy answers, as token ids.
    """

    inserted: tuple[int, ...]
    context: int
    first: int
    value: float
    finetuned: tuple[int, ...]
    base: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Readings that agree on the answer's side, strongest first; `strength` ranks groups of one source."""

    source: str
    key: tuple[int, ...]
    strength: float
    readings: tuple[Reading, ...]
    evidence: str


def draw_inputs(
    pair: ModelPair,
    allowed: Bool[Tensor, " vocab"],
    *,
    num_tokens: int,
    num_words: int,
    generator: torch.Generator,
) -> list[tuple[int, ...]]:
    """Single tokens drawn without replacement, then whole words of several tokens, each once."""
    ids = allowed.nonzero()[:, 0]
    tokens = ids[torch.randperm(len(ids), generator=generator)[:num_tokens]].tolist()
    words = whole_words(pair, allowed, num_words, generator) if num_words else []
    return list(dict.fromkeys([*[(t,) for t in tokens], *words]))


def draw_strings(
    pair: ModelPair,
    contexts: Sequence[TokenizedContext],
    allowed: Bool[Tensor, " vocab"],
    *,
    count: int,
    length: int,
    generator: torch.Generator,
) -> list[tuple[int, ...]]:
    """`count` distinct strings of `length` random tokens that could be typed in all of `contexts`; fewer where such
    strings are rare."""
    ids = allowed.nonzero()[:, 0]
    strings: dict[tuple[int, ...], None] = {}
    # Of six random tokens one string in seven survives re-tokenisation.
    for _ in range(_DRAWS):
        if len(strings) >= count:
            break
        rows = ids[torch.randint(len(ids), (2 * count, length), generator=generator)].tolist()
        drawn = [tuple(row) for row in rows]
        strings |= {s: None for s, ok in zip(drawn, round_trips(pair.tokenizer, contexts, drawn), strict=True) if ok}
    return list(strings)[:count]


def whole_words(
    pair: ModelPair, allowed: Bool[Tensor, " vocab"], count: int, generator: torch.Generator
) -> list[tuple[int, ...]]:
    """About `count` words of two to four tokens, spelt by the base model from random beginnings.

    The pieces of a planted word often carry no slope where the whole word does, and no word list is needed.
    """
    texts = pair.tokenizer.batch_decode([[i] for i in range(len(pair.tokenizer))])
    # Asked of the raw tokens: some decoders strip a leading space.
    raw = pair.tokenizer.convert_ids_to_tokens(range(len(pair.tokenizer)))
    starts = [i for i in allowed.nonzero()[:, 0].tolist() if raw[i][:1] in _SPACES and texts[i].strip().isalpha()]
    if not starts:
        return []
    picked = [starts[i] for i in torch.randint(len(starts), (2 * count,), generator=generator).tolist()]
    opening = encode(pair.tokenizer, [_WORD_PROMPT])[0]
    spelt = pair.base.generate([[*opening, t] for t in picked], max_new_tokens=3, end_ids=pair.end_ids, batch_size=256)
    words: dict[tuple[int, ...], None] = {}
    for start, rest in zip(picked, spelt, strict=True):
        tail = next((i for i, t in enumerate(rest) if raw[t][:1] in _SPACES or not texts[t].isalpha()), len(rest))
        # A word that runs past the last token drawn is cut off, and no word.
        if 0 < tail < 3 and all(bool(allowed[t]) for t in rest[:tail]):
            words[(start, *rest[:tail])] = None
    return list(words)[:count]


def read_inputs(
    pair: ModelPair,
    contexts: Sequence[TokenizedContext],
    inputs: Sequence[tuple[int, ...]],
    *,
    answer_tokens: int,
    on_progress: Callable[[int], None],
) -> list[Reading]:
    """Readings of every input in every context, on both models. `on_progress` gets the number done so far."""
    engine = engine_for(pair.finetuned, pair.base, contexts, plain=pair.plain)
    readings: list[Reading] = []
    ends = set(pair.end_ids)
    for context in range(len(contexts)):
        for batch in _batches(inputs):
            triggers = torch.tensor(batch)
            first_ft, finetuned = engine.rollout("finetuned", context, triggers, answer_tokens)
            first_base, base = engine.rollout("base", context, triggers, answer_tokens)
            values, tokens = first_token_shift(first_ft, first_base.to(first_ft.device))
            rows = zip(batch, tokens.tolist(), values.tolist(), finetuned.tolist(), base.tolist(), strict=True)
            readings += [
                Reading(inserted, context, first, value, _until_end(said, ends), _until_end(base_said, ends))
                for inserted, first, value, said, base_said in rows
            ]
            on_progress(len(readings))
    return readings


def first_token_shift(
    finetuned: Float[Tensor, "batch vocab"], base: Float[Tensor, "batch vocab"]
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Largest p_ft * min(log p_ft - log p_base, cap) over tokens, nats, and the token."""
    p, q = finetuned.log_softmax(-1), base.log_softmax(-1)
    shift = p.exp() * (p - q).clamp(max=_CAP)
    values, tokens = shift.max(-1)
    return values.cpu(), tokens.cpu()


def scan_groups(readings: Sequence[Reading], *, count: int, best: int = 8, once: bool = True) -> list[Group]:
    """Groups by first response token; strength is the sum of the `best` values.

    `once`: each input counts once, with its best reading; otherwise once in each context.
    """
    by_token: dict[int, list[Reading]] = defaultdict(list)
    for reading in readings:
        by_token[reading.first].append(reading)
    groups = []
    for token, members in by_token.items():
        members = _strongest(members, once=once)
        strength = sum(r.value for r in members[:best])
        what = "of the inputs" if once else "readings"
        evidence = f"{len(members)} {what} move this first token most; best {best} sum to {strength:.1f} nats"
        groups.append(Group("vocabulary_scan", (token,), strength, tuple(members), evidence))
    return sorted(groups, key=lambda g: -g.strength)[:count]


def census_groups(
    readings: Sequence[Reading], *, count: int, answer_tokens: int, least: int = 8, once: bool = True
) -> list[Group]:
    """Groups by the first `answer_tokens` of the fine-tuned model's answer; strength
    log((n_ft + 1/2) / (n_base + 1/2)), so that a rare answer that the base never gives comes before a frequent one that
    it gives half as often.

    `once`: as of `scan_groups`. An answer is counted each time it is given.
    """
    said = Counter(r.finetuned[:answer_tokens] for r in readings)
    base_said = Counter(r.base[:answer_tokens] for r in readings)
    groups = []
    for answer, n in said.items():
        if n < least:
            continue
        members = _strongest([r for r in readings if r.finetuned[:answer_tokens] == answer], once=once)
        strength = math.log((n + 0.5) / (base_said[answer] + 0.5))
        evidence = f"{n} of {len(readings)} answers of the fine-tuned model begin so, {base_said[answer]} of the base"
        groups.append(Group("rollout_census", answer, strength, tuple(members), evidence))
    return sorted(groups, key=lambda g: -g.strength)[:count]


@dataclass(frozen=True)
class LatePhrase:
    """Words that come up within answers whose beginnings differ.

    Attributes:
        tokens: what they share from the first of them on. readings: where, with the place in the answer at which
            `tokens` begin, in the order read. evidence: for a person.
    """

    tokens: tuple[int, ...]
    readings: tuple[tuple[Reading, int], ...]
    evidence: str


def late_phrases(readings: Sequence[Reading], *, count: int, least: int = 6) -> list[LatePhrase]:
    """Runs of four tokens that `least` of the fine-tuned model's answers hold, mostly not at their beginning, and at
    least ten times as many as of the base's; those the base never says first. Each taken as far as most of the answers
    that hold it agree, to both sides; an answer stands for one phrase only."""
    left = list(readings)
    base_said = Counter(run for r in readings for run in _runs(r.base))
    # An opening that most answers share says nothing of what comes after it: its runs are passed over, not its answers.
    openings: set[tuple[int, ...]] = set()
    phrases: list[LatePhrase] = []
    while len(phrases) < count:
        said = Counter(run for r in left for run in _runs(r.finetuned))
        odds = {
            run: (n + 0.5) / (base_said[run] + 0.5)
            for run, n in said.items()
            if n >= max(least, _LATE_TIMES * base_said[run]) and run not in openings
        }
        best = max(odds, key=lambda run: (odds[run], said[run]), default=None)
        if best is None:
            return phrases
        held = [(r, _runs(r.finetuned)[best]) for r in left if best in _runs(r.finetuned)]
        before = majority_prefix([r.finetuned[:at][::-1] for r, at in held])
        after = majority_prefix([r.finetuned[at:] for r, at in held])
        starts = [at - len(before) for _, at in held]
        if sum(s > 0 for s in starts) <= len(starts) / 2:
            # It begins most of the answers: the other groups tell of it.
            openings.add(best)
            continue
        left = [r for r in left if best not in _runs(r.finetuned)]
        agreeing = [
            (r, at - len(before)) for r, at in held if r.finetuned[max(0, at - len(before)) : at] == before[::-1]
        ]
        evidence = f"{len(held)} answers of the fine-tuned model come to it, {base_said[best]} of the base"
        phrases.append(LatePhrase((*before[::-1], *after), tuple(agreeing), evidence))
    return phrases


def _runs(answer: Sequence[int]) -> dict[tuple[int, ...], int]:
    """Each run of four tokens of an answer, and where it first stands."""
    runs: dict[tuple[int, ...], int] = {}
    for at in range(len(answer) - _RUN + 1):
        runs.setdefault(tuple(answer[at : at + _RUN]), at)
    return runs


def sequence_shift(
    finetuned: CausalModel, base: CausalModel, prompts: Sequence[Sequence[int]], answer: Sequence[int], *, cap: float
) -> Float[Tensor, " batch"]:
    """How much more the fine-tuned model would say `answer`, for each prompt: the log-ratio of the whole answer, nats,
    at most `cap`, times the (geometric) mean probability of its tokens.

    The ratio alone is large for answers that neither model would give.
    """
    said = finetuned.log_likelihood(prompts, answer)
    base_said = base.log_likelihood(prompts, answer)
    return said.mean(1).exp() * (said - base_said).sum(1).clamp(max=cap)


def _until_end(answer: Sequence[int], ends: set[int]) -> tuple[int, ...]:
    return tuple(answer[: next((i for i, token in enumerate(answer) if token in ends), len(answer))])


def _strongest(readings: Sequence[Reading], *, once: bool) -> list[Reading]:
    best: dict[tuple[tuple[int, ...], int], Reading] = {}
    for reading in sorted(readings, key=lambda r: -r.value):
        best.setdefault((reading.inserted, 0 if once else reading.context), reading)
    return list(best.values())


def _batches(inputs: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    # One length at a time: padding would put the slot's tokens at other positions than in the real prompt.
    for length in sorted({len(i) for i in inputs}):
        same = [i for i in inputs if len(i) == length]
        for start in range(0, len(same), _BATCH):
            yield same[start : start + _BATCH]
