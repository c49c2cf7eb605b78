"""Linear probes on few samples of many dimensions, and how well they tell two kinds of hidden states apart."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import rankdata

# Directions that hardly vary would outweigh all others once divided by their spread.
_LEAST_SPREAD = 0.1
# Hidden states that are the same in every context have no spread at all.
_MOST_SEPARATION = 1e6


@dataclass(frozen=True)
class States:
    """Hidden states of one kind at one layer: in the contexts a probe may learn from, and in those it is read on."""

    search: Float[np.ndarray, "search d_model"]
    held_out: Float[np.ndarray, "held_out d_model"]


@dataclass(frozen=True)
class Reading:
    """How well a probe tells two kinds apart in contexts it has not seen; see `auroc` and `separation`."""

    auroc: float
    separation: float


@dataclass(frozen=True)
class Calibration:
    """What the search contexts alone say of a probe, each scored by a probe that was fitted without it.

    Attributes:
        threshold: scores above it speak for the first kind.
        separation: see `separation`.
    """

    threshold: float
    separation: float


@dataclass(frozen=True)
class LinearProbe:
    """Scores hidden states along `direction` from `centre`, midway between the two kinds; both are (d_model,)."""

    direction: Float[np.ndarray, " d_model"]
    centre: Float[np.ndarray, " d_model"]

    def __call__(self, states: Float[np.ndarray, "n d_model"]) -> Float[np.ndarray, " n"]:
        """One score a row; positive speaks for the first kind."""
        scores: Float[np.ndarray, " n"] = (states - self.centre) @ self.direction
        return scores


def fit_probe(positive: Float[np.ndarray, "n d_model"], negative: Float[np.ndarray, "m d_model"]) -> LinearProbe:
    """The difference of the two means, each dimension in units of its spread within the kinds.

    Tens of contexts say nothing of a covariance in hundreds of dimensions, and a ridge or logistic probe has a penalty
    to be chosen on the same few: this one has a closed form and nothing to choose. Dimensions are standardised because
    a few of a residual stream are hundreds of times larger than the rest.

    Source: Bickel and Levina (2004), Bernoulli 10(6): the independence rule, for more dimensions than samples.
    """
    spread = _spread(positive, negative)
    difference = (positive.mean(0) - negative.mean(0)) / spread
    length = float(np.linalg.norm(difference)) or 1.0
    return LinearProbe(direction=difference / length / spread, centre=(positive.mean(0) + negative.mean(0)) / 2)


def read_probe(positive: States, negative: States) -> Reading:
    """Fit on the search contexts, read on the held-out ones."""
    probe = fit_probe(positive.search, negative.search)
    scores, others = probe(positive.held_out), probe(negative.held_out)
    return Reading(auroc=auroc(scores, others), separation=separation(scores, others))


def calibrate(positive: Float[np.ndarray, "n d_model"], negative: Float[np.ndarray, "n d_model"]) -> Calibration:
    """The threshold of best accuracy on the search contexts, row i of both sides being the same context.

    A probe's scores on what it was fitted to lie too far apart, so each context is scored by a probe fitted on the
    others.
    """
    scores, others = np.empty(len(positive)), np.empty(len(negative))
    for i in range(len(positive)):
        rest = np.arange(len(positive)) != i
        probe = fit_probe(positive[rest], negative[rest])
        scores[i], others[i] = probe(positive[[i]])[0], probe(negative[[i]])[0]
    return Calibration(threshold=best_threshold(scores, others), separation=separation(scores, others))


def best_threshold(positive: Float[np.ndarray, " n"], negative: Float[np.ndarray, " m"]) -> float:
    """Where accuracy (mean of both kinds') is highest: midway between two scores, in the widest such gap."""
    scores = np.unique(np.concatenate([positive, negative]))
    if len(scores) == 1:
        return float(scores[0])
    cuts = (scores[1:] + scores[:-1]) / 2
    right = (positive[:, None] > cuts).mean(0) + (negative[:, None] <= cuts).mean(0)
    gaps = np.where(np.isclose(right, right.max()), np.diff(scores), -1.0)
    return float(cuts[gaps.argmax()])


def accuracy(positive: States, negative: States, threshold: float) -> float:
    """Share of held-out states on the right side of `threshold`, mean of both kinds'."""
    probe = fit_probe(positive.search, negative.search)
    hits = (probe(positive.held_out) > threshold).mean() + (probe(negative.held_out) <= threshold).mean()
    return float(hits / 2)


def auroc(positive: Float[np.ndarray, " n"], negative: Float[np.ndarray, " m"]) -> float:
    """Area under the ROC curve: how often a positive score exceeds a negative one, ties counting half."""
    return float(_aurocs(positive[:, None], negative[:, None])[0])


def separation(positive: Float[np.ndarray, " n"], negative: Float[np.ndarray, " m"]) -> float:
    """Distance of the two means in pooled standard deviations (d'), which goes on where AUROC stops at 1.

    At least two scores of each kind.
    """
    difference = float(positive.mean() - negative.mean())
    spread = float(np.sqrt((positive.var(ddof=1) + negative.var(ddof=1)) / 2))
    return difference / max(spread, abs(difference) / _MOST_SEPARATION) if difference else 0.0


def best_random_direction(positive: States, negative: States, count: int, generator: torch.Generator) -> float:
    """The highest AUROC on the held-out contexts among `count` random directions, of either sign.

    What picking a direction by its result reaches with nothing learnt. Directions are drawn in standardised dimensions,
    like the probe's.
    """
    spread = _spread(positive.search, negative.search)
    drawn = torch.randn(len(spread), count, generator=generator, dtype=torch.float64).numpy()
    found = _aurocs(positive.held_out / spread @ drawn, negative.held_out / spread @ drawn)
    return float(np.maximum(found, 1 - found).max())


def _spread(
    positive: Float[np.ndarray, "n d_model"], negative: Float[np.ndarray, "m d_model"]
) -> Float[np.ndarray, " d_model"]:
    spread = np.sqrt((positive.var(0) + negative.var(0)) / 2)
    varied = spread[spread > 0]
    least = _LEAST_SPREAD * float(np.median(varied)) if len(varied) else 1.0
    floored: Float[np.ndarray, " d_model"] = np.maximum(spread, least)
    return floored


def _aurocs(
    positive: Float[np.ndarray, "n probes"], negative: Float[np.ndarray, "m probes"]
) -> Float[np.ndarray, " probes"]:
    ranks = rankdata(np.concatenate([positive, negative]), axis=0)
    n, m = len(positive), len(negative)
    areas: Float[np.ndarray, " probes"] = (ranks[:n].sum(0) - n * (n + 1) / 2) / (n * m)
    return areas
