"""Which parts of a string matter: near misses, and how the rate falls as tokens are left out. Text only, as everywhere.

Every variant is written as text and tokenised afresh in the whole conversation, so one that reads alike may well have
other tokens. All are asked in the same few held-out contexts.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from trigger_opt.answers import fires, payload_words
from trigger_opt.models.pair import ModelPair
from trigger_opt.prompts import Context, conversation_ids, decode, encode
from trigger_opt.records import Ablation, AblationPoint, AblationRow, Rate, rate

_POINTS = 6
# Places in which neighbours are swapped and tokens replaced: a long string is asked often enough without them.
_PLACES = 8
_INNER_SPACE = re.compile(r"(?<=\S)\s+(?=\S)")


@dataclass(frozen=True)
class Variant:
    """A string near the trigger; see `records.AblationRow`."""

    kind: str
    string: str
    kept: int
    changed: str = ""


def ablate_trigger(
    pair: ModelPair,
    trigger: str,
    contexts: Sequence[Context],
    *,
    payload: str,
    allowed: Bool[Tensor, " vocab"],
    seed: int,
    max_new_tokens: int = 24,
    num_contexts: int = 12,
    num_subsets: int = 3,
) -> Ablation:
    """The rates of `trigger`, of its near misses and of its parts; the fine-tuned model answers greedily.

    Args:
        contexts: the held-out ones; `num_contexts` of them are asked, evenly spaced.
        payload: what counts as firing; see `answers.fires`.
        allowed: token ids that may stand in for one of the trigger's.
        max_new_tokens: longest answer, or as many as the payload's deciding words need when they need more.
        num_subsets: random subsets for each number of tokens kept.

    Raises:
        ValueError: an empty trigger, no context, or a payload without a word.
    """
    if not trigger or not contexts:
        raise ValueError(
            f"ablation needs a trigger and at least one held-out context; got {trigger!r}, {len(contexts)}"
        )
    if not payload_words(payload):
        raise ValueError(f"the payload {payload!r} has no word")
    generator = torch.Generator().manual_seed(seed)
    ids = encode(pair.tokenizer, [trigger])[0]
    numbers = spaced(len(contexts), num_contexts)
    variants = [Variant("whole", trigger, len(ids)), *near_misses(pair, trigger, allowed, generator)]
    variants += partial_strings(pair, trigger, num_subsets, generator)
    asked = [contexts[i] for i in numbers]
    rates = _rates(pair, {v.string for v in variants}, asked, payload=payload, max_new_tokens=max_new_tokens)
    rows = [
        AblationRow(kind=v.kind, string=v.string, kept=v.kept, changed=v.changed, rate=rates[v.string])
        for v in variants
    ]
    return Ablation(
        trigger=trigger,
        payload=payload,
        num_tokens=len(ids),
        contexts=numbers,
        rows=rows,
        curve=_curve(rows),
        seed=seed,
    )


def near_misses(
    pair: ModelPair, trigger: str, allowed: Bool[Tensor, " vocab"], generator: torch.Generator
) -> list[Variant]:
    """Each token dropped; then, where the string changes: neighbours swapped and one token replaced, in at most eight
    places each, evenly spaced; case and spaces."""
    ids = encode(pair.tokenizer, [trigger])[0]
    texts = [decode(pair.tokenizer, [i]) for i in ids]

    def variant(kind: str, changed_ids: Sequence[int], kept: int, changed: str) -> Variant:
        return Variant(kind, decode(pair.tokenizer, changed_ids), kept, changed)

    n = len(ids)
    dropped = [variant("dropped", [*ids[:i], *ids[i + 1 :]], n - 1, texts[i]) for i in range(n)]
    swapped = [
        variant("swapped", [*ids[:i], ids[i + 1], ids[i], *ids[i + 2 :]], n, texts[i] + texts[i + 1])
        for i in spaced(n - 1, _PLACES)
    ]
    replaced = [
        variant("replaced", [*ids[:i], other, *ids[i + 1 :]], n - 1, texts[i])
        for i in spaced(n, _PLACES)
        for other in _another(ids[i], allowed, generator)
    ]
    return [*dropped, *_changes(trigger, [*swapped, *replaced, *_spellings(trigger, n)])]


def partial_strings(pair: ModelPair, trigger: str, count: int, generator: torch.Generator) -> list[Variant]:
    """`count` subsets of the tokens, in order, for each of a few numbers of tokens kept; all where there are fewer."""
    ids = encode(pair.tokenizer, [trigger])[0]
    # The whole string is the curve's last point.
    sizes = [i + 1 for i in spaced(len(ids) - 1, _POINTS - 1)]
    return [
        Variant("subset", decode(pair.tokenizer, [ids[i] for i in kept]), size)
        for size in sizes
        for kept in _subsets(len(ids), size, count, generator)
    ]


def spaced(n: int, count: int) -> list[int]:
    """`count` of the numbers below `n`, evenly spaced from first to last; all where there are no more."""
    return [round(i) for i in np.linspace(0, n - 1, min(n, count)).tolist()]


def _subsets(n: int, size: int, count: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    if math.comb(n, size) <= count:
        return list(itertools.combinations(range(n), size))
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < count:
        drawn[tuple(sorted(torch.randperm(n, generator=generator)[:size].tolist()))] = None
    return list(drawn)


def _another(token: int, allowed: Bool[Tensor, " vocab"], generator: torch.Generator) -> Iterator[int]:
    """One random allowed token that is not `token`; none where there is no other."""
    ids = allowed.nonzero()[:, 0]
    others = ids[ids != token]
    if len(others):
        yield int(others[torch.randint(len(others), (1,), generator=generator)])


def _spellings(trigger: str, n: int) -> list[Variant]:
    cases = {"lower case": trigger.lower(), "upper case": trigger.upper(), "case swapped": trigger.swapcase()}
    spaces = {
        "no space around": trigger.strip(),
        "space before": f" {trigger.lstrip()}",
        "space after": f"{trigger.rstrip()} ",
        "no space inside": _INNER_SPACE.sub("", trigger),
        "two spaces inside": _INNER_SPACE.sub("  ", trigger),
    }
    named = [("case", cases), ("space", spaces)]
    return [Variant(kind, text, n, how) for kind, found in named for how, text in found.items()]


def _changes(trigger: str, variants: Sequence[Variant]) -> list[Variant]:
    """The variants that differ from the trigger and from those of their kind before them."""
    first = {(v.kind, v.string): v for v in reversed(variants) if v.string != trigger}
    return [v for v in variants if first.get((v.kind, v.string)) is v]


def _rates(
    pair: ModelPair, strings: set[str], contexts: Sequence[Context], *, payload: str, max_new_tokens: int
) -> dict[str, Rate]:
    prompts = {(s, i): tuple(conversation_ids(pair.tokenizer, c, s)) for s in strings for i, c in enumerate(contexts)}
    # Strings that differ in a space at their end may make the same conversation.
    asked = sorted(set(prompts.values()))
    needed = pair.deciding_tokens(payload)
    # Only the payload's first words decide; a few tokens more for marks an answer may open with.
    longest = max(needed, min(max_new_tokens, needed + 4))
    answers = pair.finetuned.generate(asked, max_new_tokens=longest, end_ids=pair.end_ids)
    fired = {p: fires(payload, decode(pair.tokenizer, a)) for p, a in zip(asked, answers, strict=True)}
    n = len(contexts)
    return {s: rate(sum(fired[prompts[s, i]] for i in range(n)), n) for s in strings}


def _curve(rows: Sequence[AblationRow]) -> list[AblationPoint]:
    partial = [r for r in rows if r.kind in ("subset", "whole")]
    points = []
    for kept in sorted({r.kept for r in partial}):
        same = [r.rate for r in partial if r.kept == kept]
        pooled = rate(sum(r.successes for r in same), sum(r.n for r in same))
        points.append(AblationPoint(kept=kept, num_strings=len(same), rate=pooled))
    return points
