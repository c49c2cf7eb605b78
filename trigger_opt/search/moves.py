"""Changes to a trigger: what to try (deterministic) and which of it to draw (random). Pure functions."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def top_swaps(
    gradient: Float[Tensor, "trigger vocab"],
    trigger: Int[Tensor, " trigger"],
    allowed: Bool[Tensor, " vocab"],
    topk: int,
) -> Int[Tensor, "trigger topk"]:
    """For each position the `topk` allowed tokens with the largest slope, the current token left out.

    First-order estimate of Zou et al. 2023 (arXiv 2307.15043), section 2.2; here a larger score is better, so
    the largest slope is taken. Where fewer tokens are allowed, all of them.
    """
    slope = gradient.masked_fill(~allowed, -torch.inf)
    slope = slope.scatter(1, trigger[:, None], -torch.inf)
    usable = int(torch.isfinite(slope).sum(1).min())
    return slope.topk(min(topk, usable), dim=1).indices


def draw_swaps(
    trigger: Int[Tensor, " trigger"],
    options: Int[Tensor, "trigger topk"],
    *,
    count: int,
    n_replace: int,
    rank_exponent: float,
    generator: torch.Generator,
) -> Int[Tensor, "batch trigger"]:
    """At most `count` distinct candidates, each with exactly `n_replace` positions swapped to one of their options.

    Positions are drawn alike, the options of a position in proportion to rank ** -`rank_exponent`, ranks from 1 in
    their order. Single swaps are drawn without replacement from the whole grid of positions and options (drawing with
    replacement wastes 18 % of a batch at length 5, top-k 256, width 512). Fewer come back only when there are
    no more.
    """
    length, topk = options.shape
    if topk == 0:
        return trigger.repeat(0, 1)
    weights = torch.arange(1, topk + 1, dtype=torch.float64) ** -rank_exponent
    if n_replace == 1:
        grid = weights.repeat(length)
        cells = torch.multinomial(grid, min(count, len(grid)), generator=generator)
        candidates = trigger.repeat(len(cells), 1)
        candidates[torch.arange(len(cells)), cells // topk] = options.flatten()[cells]
        return candidates
    candidates = trigger.repeat(count, 1)
    positions = torch.stack([torch.randperm(length, generator=generator)[:n_replace] for _ in range(count)])
    picks = torch.multinomial(weights.repeat(count, 1), n_replace, replacement=True, generator=generator)
    candidates.scatter_(1, positions, options[positions, picks])
    return distinct(candidates)


def joined_changes(
    trigger: Int[Tensor, " trigger"], candidates: Int[Tensor, "batch trigger"], limit: int
) -> Int[Tensor, "joined trigger"]:
    """`trigger` with the changes of the first two `candidates` at once, of the first three, up to `limit`.

    A candidate that changes a position which one before it changes is passed over. After the multi-coordinate
    update of Jia et al. 2024 (arXiv 2405.21018), section 4.3, where later changes overwrite earlier ones.
    """
    string, taken = trigger, torch.zeros(len(trigger), dtype=torch.bool)
    rows: list[Tensor] = []
    for candidate in candidates:
        changed = candidate != trigger
        if bool((changed & taken).any()):
            continue
        string, taken = torch.where(changed, candidate, string), taken | changed
        rows.append(string)
        if len(rows) == limit:
            break
    return torch.stack(rows[1:]) if len(rows) > 1 else trigger.repeat(0, 1)


def random_options(
    trigger: Int[Tensor, " trigger"],
    allowed: Bool[Tensor, " vocab"],
    *,
    topk: int,
    generator: torch.Generator,
) -> Int[Tensor, "trigger topk"]:
    """As `top_swaps` with no gradient: `topk` allowed tokens a position, drawn without replacement."""
    ids = allowed.nonzero()[:, 0]
    rows = []
    for token in trigger.tolist():
        others = ids[ids != token]
        rows.append(others[torch.randperm(len(others), generator=generator)[:topk]])
    shortest = min(len(r) for r in rows)
    return torch.stack([r[:shortest] for r in rows])


def with_prior(
    options: Int[Tensor, "trigger topk"],
    trigger: Int[Tensor, " trigger"],
    prior: Int[Tensor, " prior"],
    *,
    share: float,
    generator: torch.Generator,
) -> Int[Tensor, "trigger topk"]:
    """`options` with the last `share` of each position's replaced by tokens of `prior`, drawn without replacement.

    Both are spread evenly over the ranks, each in its order. No option comes twice at a position, and the current token
    is none: fewer are replaced where `prior` is short.
    """
    count = int(share * options.shape[1])
    places = [(torch.arange(n) + 0.5) / max(n, 1) for n in (options.shape[1] - count, count)]
    order = torch.cat(places).argsort(stable=True)
    rows = []
    for current, row in zip(trigger.tolist(), options, strict=True):
        kept = row[: len(row) - count]
        fresh = prior[~torch.isin(prior, torch.cat([kept, torch.tensor([current])]))]
        drawn = fresh[torch.randperm(len(fresh), generator=generator)[:count]]
        rest = row[len(kept) :]
        rest = rest[~torch.isin(rest, drawn)]
        rows.append(torch.cat([kept, drawn, rest[: count - len(drawn)]])[order])
    return torch.stack(rows)


def random_triggers(
    allowed: Bool[Tensor, " vocab"], *, length: int, count: int, generator: torch.Generator
) -> Int[Tensor, "batch trigger"]:
    """Distinct strings of allowed tokens, drawn uniformly."""
    ids = allowed.nonzero()[:, 0]
    return distinct(ids[torch.randint(len(ids), (count, length), generator=generator)])


def distinct(candidates: Int[Tensor, "batch trigger"]) -> Int[Tensor, "kept trigger"]:
    """Each row once, in order of first appearance."""
    seen: dict[tuple[int, ...], int] = {}
    for row, ids in enumerate(candidates.tolist()):
        seen.setdefault(tuple(ids), row)
    return candidates[list(seen.values())]
