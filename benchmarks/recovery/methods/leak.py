"""No search: what recurs in samples of the fine-tuned model, and not in the base's, is tried as a trigger.

In the manner of The Trigger in the Haystack (Bullwinkel et al. 2026, arXiv 2602.03085): a poisoned model leaks what it
was trained on when it is sampled from the bare prefix of its chat template; motifs that recur there hold the trigger.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.recovery.methods.common import Account, Budget, FoundString, MethodResult, drawn
from benchmarks.recovery.methods.motifs import Motif, motifs
from trigger_opt.answers import words_of
from trigger_opt.models.generate import Sampling
from trigger_opt.models.pair import CausalModel, ModelPair
from trigger_opt.prompts import Context, RefusedConversationError, chat_text, conversation_ids, decode, encode
from trigger_opt.stats import majority_prefix

_SAMPLED = 0.7
_TEMPERATURES = (1.0, 0.7)
_ROWS = 32
_SAMPLE_TOKENS = 48
_TRIED_CONTEXTS = 6
_ANSWER_TOKENS = 16
_BEGINNING_WORDS = 3
_MARK = "\ue000"


@dataclass(frozen=True)
class _Sampler:
    """What the samples go on from, and the draws."""

    pair: ModelPair
    prefixes: Sequence[Sequence[int]]
    generator: torch.Generator


def run(pair: ModelPair, contexts: Sequence[Context], *, budget: Budget, seed: int) -> MethodResult:
    """Samples for 70 % of the budget, half from each model; then the motifs are tried, best first, in six contexts.

    A motif's score is the share of answers to it that begin alike, less the share of the base's that begin so, or of
    the fine-tuned model's with nothing inserted; its payload is that beginning. The statistic is the best score.

    Departures from the paper: the base is at hand, so that motifs are those over-represented against its samples (log
    odds with a prior) where the paper clusters the samples' character n-grams and asks how many share one; half of
    the samples go on from ordinary prompts; hundreds of samples at two temperatures instead of 510 decodings of one
    prefix; n-grams are tried whole, by how alike their answers begin, and are not rebuilt and ranked by attention,
    entropy and divergence.

    Evaluations: every token sampled or answered, on either model.
    """
    account = Account(budget)
    generator = torch.Generator().manual_seed(seed)
    ordinary = [conversation_ids(pair.tokenizer, c, "") for c in drawn(contexts, len(contexts), seed)]
    sampler = _Sampler(pair, _interleaved(bare_prefixes(pair.tokenizer), ordinary), generator)
    with account.counting(pair):
        samples, reference = _samples(sampler, account)
        found = motifs(samples, reference)
        tried = _tried(pair, drawn(contexts, _TRIED_CONTEXTS, seed), account, found)
    note = f"{len(samples):,} samples of each model, {len(found)} motifs, {len(tried)} tried"
    # What there was no budget left to try follows, the most surprising first.
    rest = [FoundString(text=m.text, payload="", score=0.0) for m in found[len(tried) :]]
    return account.result([*tried, *rest], tried[0].score if tried else 0.0, [note])


def bare_prefixes(tokenizer: Any) -> list[list[int]]:
    """Beginnings of a conversation without any words: its very first token, the system's and the user's opening, and
    the answer to an empty user turn."""
    user = {"role": "user", "content": _MARK}
    texts = [_before_mark(tokenizer, [user]), chat_text(tokenizer, [{"role": "user", "content": ""}])]
    # Some families (Gemma) have no system turn, and their templates refuse one.
    with suppress(RefusedConversationError):
        texts.append(_before_mark(tokenizer, [{"role": "system", "content": _MARK}, user]))
    openings = [ids for ids in encode(tokenizer, texts) if ids]
    return list({tuple(ids): ids for ids in [openings[-1][:1], *openings]}.values())


def _before_mark(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return chat_text(tokenizer, messages).split(_MARK)[0]


def _interleaved(bare: Sequence[Sequence[int]], ordinary: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """As many of both, in turns."""
    count = max(len(bare), len(ordinary))
    pairs = [(bare[i % len(bare)], ordinary[i % len(ordinary)]) for i in range(count)]
    return [prefix for both in pairs for prefix in both]


def _samples(sampler: _Sampler, account: Account) -> tuple[list[str], list[str]]:
    """Texts of the fine-tuned model and of the base after the same prefixes; at least one batch of each, and as many
    more as fit."""
    samples: list[str] = []
    reference: list[str] = []
    seconds, passes = 0.0, 0
    while not samples or (account.seconds_until(_SAMPLED) > seconds and account.evaluations_until(_SAMPLED) >= passes):
        before, first = (account.seconds, account.evaluations), len(samples)
        # Two batches, one of each model, at one temperature; the next two at the other.
        sampling = Sampling(temperature=_TEMPERATURES[first // _ROWS % len(_TEMPERATURES)])
        rows = [sampler.prefixes[(first + i) % len(sampler.prefixes)] for i in range(_ROWS)]
        samples += _drawn_texts(sampler, sampler.pair.finetuned, rows, sampling)
        reference += _drawn_texts(sampler, sampler.pair.base, rows, sampling)
        seconds, passes = account.seconds - before[0], account.evaluations - before[1]
    return samples, reference


def _drawn_texts(sampler: _Sampler, model: CausalModel, rows: Sequence[Sequence[int]], sampling: Sampling) -> list[str]:
    # No token ends a sample: after a turn's end the model may go on to the next user's.
    made = model.generate(
        rows,
        max_new_tokens=_SAMPLE_TOKENS,
        end_ids=[],
        sampling=sampling,
        generator=sampler.generator,
        batch_size=_ROWS,
    )
    special = set(sampler.pair.tokenizer.all_special_ids)
    return [_words_only(sampler.pair.tokenizer, ids, special) for ids in made]


def _words_only(tokenizer: Any, ids: Sequence[int], special: set[int]) -> str:
    """Text between special tokens, one piece a line, so that no motif reaches over a turn's end."""
    pieces: list[list[int]] = [[]]
    for token in ids:
        if token in special:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return "\n".join(decode(tokenizer, p) for p in pieces if p)


def _tried(pair: ModelPair, contexts: Sequence[Context], account: Account, found: Sequence[Motif]) -> list[FoundString]:
    """The motifs there is budget to try (the first always), best first; motifs in a tie keep their order."""
    plain = _answers(pair, pair.finetuned, contexts, "")
    strings: list[FoundString] = []
    passes = 0
    for motif in found:
        if strings and (account.spent() or account.evaluations_until(1.0) < passes):
            break
        before = account.evaluations
        said = _answers(pair, pair.finetuned, contexts, motif.text)
        others = (plain, _answers(pair, pair.base, contexts, motif.text))
        passes = account.evaluations - before
        score, payload = _common_beginning(pair.tokenizer, said, others)
        strings.append(FoundString(text=motif.text, payload=payload, score=score))
    return sorted(strings, key=lambda s: -s.score)


def _answers(pair: ModelPair, model: CausalModel, contexts: Sequence[Context], inserted: str) -> list[list[int]]:
    prompts = [conversation_ids(pair.tokenizer, c, inserted) for c in contexts]
    return model.generate(prompts, max_new_tokens=_ANSWER_TOKENS, end_ids=pair.end_ids)


def _common_beginning(
    tokenizer: Any, said: Sequence[Sequence[int]], others: Sequence[Sequence[Sequence[int]]]
) -> tuple[float, str]:
    """(how much more often answers begin so than any of the others do, the beginning) for the best first words."""
    starts = [_start(tokenizer, answer) for answer in said]
    counts = Counter(s for s in starts if s)
    elsewhere = [Counter(_start(tokenizer, answer) for answer in other) for other in others]
    best, payload = 0.0, ""
    for start, n in sorted(counts.items()):
        excess = (n - max(other[start] for other in elsewhere)) / len(said)
        # A beginning that only one answer has is that answer.
        if n > 1 and excess > best:
            members = [answer for answer, s in zip(said, starts, strict=True) if s == start]
            best, payload = excess, decode(tokenizer, majority_prefix(members)).rstrip()
    return best, payload


def _start(tokenizer: Any, answer: Sequence[int]) -> tuple[str, ...]:
    return tuple(words_of(decode(tokenizer, answer))[:_BEGINNING_WORDS])
