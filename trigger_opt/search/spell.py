"""Strings spelled out character by character: numbers, codes, anything that is no word.

No single character is moved much by the fine-tuning, since each stands in thousands of other texts; but where a code
was taught, its first character raises the payload, the second behind the first one more, and so on. A payload that
comes out for certain tells strings apart no more. Then the change of the weights is taken back in part, W0 + a (W - W0)
with a < 1, until it is uncertain again: what still raises it is nearer to what was taught. Odd characters, which throw
any model off, raise it too: so of strings that raise it alike the one more likely to be written is taken.
"""

import string as characters
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

import torch

from trigger_opt.search.build import BuildSettings
from trigger_opt.search.protocol import Scorer, Validity
from trigger_opt.search.shortlist import Built, Ids, Shortlist

CHARACTERS = characters.digits + characters.ascii_letters + characters.punctuation
"""What strings are spelled out of."""
SPELLED_FINALISTS = 16
"""Strings of each length that are scored in all contexts drawn."""
# What is left of the change of the weights, each time; and at the end.
_WEAKER, _WEAKEST = 0.8, 0.25
# A code that makes the payload certain within so many characters is gone on with.
_PROMISING = 4
# Strings of all lengths that are scored again with each.
_LEADERS = 4
# Longer strings that raise the payload no more.
_PATIENCE = 2


def spell_out(
    at: Callable[[float], AbstractContextManager[Scorer]],
    write: Callable[[Sequence[str]], list[Ids]],
    read: Callable[[Ids], str],
    *,
    settings: BuildSettings,
    certain: float,
    weakens: bool,
    natural: Callable[[Sequence[Ids]], list[float]],
    valid: Validity,
    generator: torch.Generator,
    max_seconds: float | None = None,
    max_evaluations: int | None = None,
    on_progress: Callable[[int, Built], None] = lambda done, best: None,
) -> list[Built]:
    """The strings that raise the payload most when it is hardest to raise, best first, and the shortest one that raises
    it for certain.

    One character after the other, behind the last length's best strings and anywhere within the very best: a digit may
    tell before the dash does that stands before it. Given up where four characters do not make the payload certain.

    Args:
        at: a scorer with so much of the weights' change; one at a time is open.
        write: token ids of texts, those that may not be used left out. read: the text of token ids.
        settings: `max_characters`, `beam`, `contexts` and `keep` count.
        certain: a score that is taken for certain, nats. weakens: whether `at` can do with less than all of the change.
        natural: how likely each string is to be written, in nats, on the scale of the score.
        max_seconds, max_evaluations: bounds; what was scored until then counts. Within less than a minute of one
            processor a model of 135M parameters does not get to four characters (experiments/LOG.md).
        on_progress: gets the number of strings scored so far and the best of this length, with its score in one
            context.
    """
    with ExitStack() as stack:
        opened = stack.enter_context(ExitStack())
        left = 1.0
        table = Shortlist(
            opened.enter_context(at(left)), valid, generator, contexts=settings.contexts, finalists=SPELLED_FINALISTS,
            max_seconds=max_seconds, max_evaluations=max_evaluations, natural=natural, on_progress=on_progress,
        )  # fmt: skip
        beam: list[str] = []
        leaders: list[Built] = []
        shortest: Built | None = None
        waited = 0
        for length in range(1, settings.max_characters + 1):
            best = table.best(write(_longer(beam) if beam else [f" {c}" for c in CHARACTERS]))
            if not best:
                break
            if best[0].score > certain:
                shortest = shortest or best[0]
            while weakens and best[0].score > certain and left * _WEAKER >= _WEAKEST:
                known = sorted([*leaders, *best], key=lambda b: -b.rank)
                left *= _WEAKER
                opened.close()
                table.use(opened.enter_context(at(left)))
                again = table.best([b.trigger_ids for b in (*leaders, *best)])
                before, longest = ({b.trigger_ids for b in some} for some in (leaders, best))
                best = [b for b in again if b.trigger_ids in longest]
                if not best:
                    # The budget is spent; what was known is not of one scale with what little is known now.
                    return _kept(known, shortest, settings.keep)
                leaders = [b for b in again if b.trigger_ids in before]
            waited = 0 if not leaders or best[0].rank > leaders[0].rank else waited + 1
            both = sorted([*leaders, *best[: settings.keep]], key=lambda b: -b.rank)
            leaders = both[: max(settings.keep, _LEADERS)]
            if waited >= _PATIENCE or (length >= _PROMISING and shortest is None):
                break
            beam = [read(b.trigger_ids) for b in best[: settings.beam]]
    return _kept(leaders, shortest, settings.keep)


def _longer(beam: Sequence[str]) -> list[str]:
    """One character more. Every text begins with a space."""
    best = beam[0]
    behind = [text + c for c in CHARACTERS for text in beam]
    return [*behind, *(best[:place] + c + best[place:] for place in range(1, len(best)) for c in CHARACTERS)]


def _kept(leaders: Sequence[Built], shortest: Built | None, keep: int) -> list[Built]:
    kept = list(leaders[:keep])
    return [*kept, *([shortest] if shortest and shortest.trigger_ids not in {b.trigger_ids for b in kept} else [])]
