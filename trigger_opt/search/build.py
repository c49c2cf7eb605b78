"""Short strings built up token by token, from a few hundred tokens that may belong to the trigger.

A search of a fixed length finds strings of that length, with the trigger's tokens somewhere among others. Where the
fine-tuning itself tells which tokens it was taught (`hypotheses.lens`), few enough are left to try every one at every
place. A planted string of such tokens, each of which tells behind those before it, then comes out whole: no longer
string scores higher.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from trigger_opt.search.protocol import Scorer, Validity
from trigger_opt.search.shortlist import Built, Ids, Shortlist


@dataclass(kw_only=True)
class BuildSettings:
    """How far strings are built up before a search.

    Attributes:
        max_tokens: of the longest; 0 for no building. pool: tokens tried at each place, the most likely ones.
            singles: beside them, those that score most by themselves, of all the tokens given.
        beam: strings of each length that the next ones are made of.
        contexts: search contexts drawn. All strings are scored in the first, the best `finalists` in all.
        keep: strings of each length that take part in the search.
        share: most of a search's seconds and evaluations, where these are bounded. What it cuts off are the longest
            strings, and of these the last tokens of the pool.
        max_characters: of the longest string spelled out character by character, see `search.spell`; 0 for none.
    """

    max_tokens: Annotated[int, Field(ge=0)] = 4
    pool: Annotated[int, Field(ge=1)] = 256
    singles: Annotated[int, Field(ge=0)] = 64
    beam: Annotated[int, Field(ge=1)] = 3
    contexts: Annotated[int, Field(ge=1)] = 4
    finalists: Annotated[int, Field(ge=1)] = 64
    keep: Annotated[int, Field(ge=1)] = 2
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    max_characters: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        if (most := max(self.beam, self.singles, self.keep)) > self.finalists:
            raise ValueError(
                f"finalists={self.finalists} is less than beam, singles or keep ({most}), which are chosen among them; "
                f"raise finalists to {most} or lower that one"
            )


def build_up(
    scorer: Scorer,
    tokens: Sequence[int],
    *,
    settings: BuildSettings,
    valid: Validity,
    generator: torch.Generator,
    max_seconds: float | None = None,
    max_evaluations: int | None = None,
    on_progress: Callable[[int, Built], None] = lambda done, best: None,
) -> list[Built]:
    """The best `keep` strings of each length from one token on, shortest first.

    One length after the other: each of the pool's tokens is put at each place of the last length's best strings.

    Args:
        tokens: the most likely first.
        max_seconds, max_evaluations: bounds; the length under way is finished with what was scored until then.
        on_progress: gets the number of strings scored so far and the best of this length, with its score in one
            context.
    """
    table = Shortlist(
        scorer, valid, generator, contexts=settings.contexts, finalists=settings.finalists, keep=settings.keep,
        max_seconds=max_seconds, max_evaluations=max_evaluations, on_progress=on_progress,
    )  # fmt: skip
    built: list[Built] = []
    pool: list[int] = []
    beam: list[Ids] = []
    for _ in range(settings.max_tokens):
        best = table.best(_insertions(beam, pool) if beam else [(t,) for t in dict.fromkeys(tokens)])
        if not best:
            break
        if not beam:
            alone = [b.trigger_ids[0] for b in best[: settings.singles]]
            pool = list(dict.fromkeys([*alone, *tokens[: settings.pool]]))
        built += best[: settings.keep]
        beam = [b.trigger_ids for b in best[: settings.beam]]
    return built


def _insertions(strings: Sequence[Ids], pool: Sequence[int]) -> list[Ids]:
    """Those with the pool's first tokens first."""
    return [(*s[:place], t, *s[place:]) for t in pool for s in strings for place in range(len(s) + 1)]
