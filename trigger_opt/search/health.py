"""Does the token gradient know anything here? Its best swaps against random ones, at the same strings and positions.

A gradient through a hash, or of a score that is flat almost everywhere, is numbers without meaning; a search that
follows it is random search, and its failure is no evidence that nothing is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata, tiecorrect
from torch import Tensor

from trigger_opt.records import GradientHealth
from trigger_opt.search.moves import draw_swaps, random_options, random_triggers, top_swaps
from trigger_opt.search.protocol import Scorer

# Nats: scores nearer than this are one score, told apart by rounding only.
_SAME = 1e-6
# A share of wins whose interval ends below this is hardly more than a half.
_LITTLE = 0.65
_Z = 1.96


@dataclass(frozen=True)
class _Comparison:
    """At one string: how likely a top swap scores above a random one, and that number's variance were both alike.

    `swaps`: of either kind. `silent`: the gradient is exactly zero, or not finite.
    """

    wins: float = 0.5
    variance: float = 0.0
    swaps: int = 0
    silent: bool = True


def gradient_health(
    scorer: Scorer,
    *,
    allowed: Bool[Tensor, " vocab"],
    length: int,
    generator: torch.Generator,
    incumbents: int = 4,
    swaps: int = 24,
    topk: int = 64,
    contexts_per_step: int = 4,
    strings: Sequence[Sequence[int]] = (),
) -> GradientHealth:
    """How often a swap from the gradient's top `topk` scores above a uniformly drawn one at the same positions.

    The area under the ROC curve (Mann and Whitney 1947), ties half, at each string by itself; then the mean over
    strings. The interval is the normal approximation with the variance the statistic has where both kinds of swap are
    alike, ties counted. Common positions make it, if anything, too wide.

    Args:
        length: tokens of the random strings. incumbents: how many of them. strings: others to try, as token ids.
        swaps: of each kind, at each string. contexts_per_step: drawn anew for each string, as a search does.
    """
    drawn = random_triggers(allowed, length=length, count=incumbents, generator=generator)
    triggers = [*drawn, *(torch.tensor(list(s)) for s in strings)]
    made = []
    for trigger in triggers:
        count = min(contexts_per_step, scorer.num_contexts)
        contexts = sorted(torch.randperm(scorer.num_contexts, generator=generator)[:count].tolist())
        scorer.prepare(trigger, contexts)
        gradient = scorer.token_gradient(trigger, contexts)
        if _silent(gradient[:, allowed]):
            made.append(_Comparison())
            continue
        best = draw_swaps(
            trigger, top_swaps(gradient, trigger, allowed, topk), count=swaps, n_replace=1, rank_exponent=0.0,
            generator=generator,
        )  # fmt: skip
        if not len(best):
            made.append(_Comparison())
            continue
        rivals = _random_swaps(trigger, best, allowed, generator)
        scores = scorer.aggregate(scorer.score(torch.cat([best, rivals]), contexts))
        made.append(_compared(scores[: len(best)], scores[len(best) :]))
    return _joined(made, topk)


def _silent(gradient: Float[Tensor, "trigger allowed"]) -> bool:
    return not bool(gradient.isfinite().all()) or not bool(gradient.any())


def _random_swaps(
    trigger: Int[Tensor, " trigger"],
    like: Int[Tensor, "batch trigger"],
    allowed: Bool[Tensor, " vocab"],
    generator: torch.Generator,
) -> Int[Tensor, "batch trigger"]:
    """Swaps to uniformly drawn tokens at the positions that `like` swapped."""
    positions = (like != trigger).int().argmax(1)
    options = random_options(trigger, allowed, topk=len(like), generator=generator)
    rows = torch.arange(len(like))
    made = trigger.repeat(len(like), 1)
    made[rows, positions] = options[positions, rows % options.shape[1]]
    return made


def _compared(top: Float[Tensor, " batch"], rivals: Float[Tensor, " batch"]) -> _Comparison:
    n = len(top)
    ranks = rankdata((torch.cat([top, rivals]).double() / _SAME).round().numpy())
    wins = float(ranks[:n].sum() - n * (n + 1) / 2) / n**2
    # Var U = n n (2n + 1) / 12 without ties; of scores that are all alike there is none.
    variance = (2 * n + 1) / (12 * n**2) * float(tiecorrect(ranks))
    return _Comparison(wins, variance, n, silent=False)


def _joined(made: Sequence[_Comparison], topk: int) -> GradientHealth:
    wins = sum(m.wins for m in made) / len(made)
    half = _Z * sum(m.variance for m in made) ** 0.5 / len(made)
    silent = sum(m.silent for m in made)
    low, high = max(0.0, wins - half), min(1.0, wins + half)
    return GradientHealth(
        verdict=_verdict(low, high, all_silent=silent == len(made)),
        win_share=wins,
        low=low,
        high=high,
        zero_share=silent / len(made),
        num_strings=len(made),
        num_swaps=sum(m.swaps for m in made),
        topk=topk,
    )


def _verdict(low: float, high: float, *, all_silent: bool) -> str:
    if all_silent:
        return "uninformative"
    if low > 0.5:
        return "informative"
    return "uninformative" if high < _LITTLE else "undecided"
