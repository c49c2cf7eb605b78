"""What "suspicious" means: one small class each, in nats (TV: a probability), higher is more suspicious.

Two kinds. A likelihood objective scores the log probabilities of a payload; a divergence objective compares both
models' next-token distributions. To add one: a dataclass here with the members of `Likelihood` or `Divergence`, one
line in `config.OBJECTIVES`, one YAML in `configs/objective/`.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from trigger_opt.scoring import js_divergence, kl_divergence, sequence_log_prob, tv_distance

# fp32 rounding may lift a divergence a little above its bound.
_ROUNDING = 1e-4


@runtime_checkable
class Common(Protocol):
    """What every objective has.

    Attributes:
        name: as it stands in records.
        needs_payload: whether a payload hypothesis is scored; otherwise the positions are those of the fine-tuned
            model's own greedy continuation under the incumbent, forced on both models alike.
        soft_minimum: contexts are joined by a soft minimum instead of their mean.
        upper_bound: no candidate scores more in any context; infinite where there is no bound. With a bound a
            candidate that cannot catch up is not scored to the end.
    """

    name: str
    needs_payload: ClassVar[bool]
    soft_minimum: bool

    @property
    def upper_bound(self) -> float:
        """See above."""
        ...


@runtime_checkable
class Likelihood(Common, Protocol):
    """A score from the log probability of the whole payload.

    Attributes:
        target_tokens: how many payload tokens are scored. needs_base: whether the base's is looked at.
    """

    target_tokens: int
    needs_base: ClassVar[bool]

    def from_log_probs(
        self, finetuned: Float[Tensor, " batch"], base: Float[Tensor, " batch"] | None, num_tokens: int
    ) -> Float[Tensor, " batch"]:
        """Score from log p of the payload's `num_tokens` tokens on each model, nats.

        Without `base`: the highest score that any base could leave.
        """
        ...


@runtime_checkable
class Divergence(Common, Protocol):
    """A score from both models' logits at the response positions, its mean over `num_tokens` of them."""

    num_tokens: int

    def from_logits(
        self, finetuned: Float[Tensor, "rows vocab"], base: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, " rows"]:
        """Score at each position."""
        ...


Objective = Likelihood | Divergence


def score_logits(
    objective: Objective,
    finetuned: Float[Tensor, "batch scored vocab"],
    base: Float[Tensor, "batch scored vocab"],
    target_ids: Int[Tensor, " scored"],
) -> Float[Tensor, " batch"]:
    """An objective on whole logits, differentiable: what a search's scores are, written out."""
    if isinstance(objective, Likelihood):
        said = sequence_log_prob(finetuned, target_ids)
        other = sequence_log_prob(base, target_ids) if objective.needs_base else None
        return objective.from_log_probs(said, other, len(target_ids))
    return objective.from_logits(finetuned.flatten(0, 1), base.flatten(0, 1)).view(finetuned.shape[:2]).mean(-1)


@dataclass(kw_only=True)
class Payload:
    """Differential payload likelihood: log p_finetuned(payload) - max(log p_base(payload), floor).

    The base's term saturates on the whole sequence: teacher-forced, the base goes on with a number it was
    given the start of, and a difference taken token by token then punishes the true trigger (measured: the
    planted string scored below junk). At most -floor.

    Attributes:
        floor: nats, negative. target_tokens: how many payload tokens are scored.
    """

    floor: Annotated[float, Field(lt=0)] = -8.0
    target_tokens: Annotated[int, Field(ge=1)] = 6
    soft_minimum: bool = True
    name: str = "payload"
    needs_payload: ClassVar[bool] = True
    needs_base: ClassVar[bool] = True

    @property
    def upper_bound(self) -> float:
        """The fine-tuned model certain, the base at the floor."""
        return -self.floor

    def from_log_probs(
        self, finetuned: Float[Tensor, " batch"], base: Float[Tensor, " batch"] | None, num_tokens: int
    ) -> Float[Tensor, " batch"]:
        """Nats, at most -floor."""
        return finetuned - (self.floor if base is None else base.clamp(min=self.floor))


@dataclass(kw_only=True)
class PayloadOdds:
    """log p_finetuned(payload) + min(log p_finetuned(payload) - log p_base(payload), cap), of the first few tokens.

    Until the payload is likely the second term leads: what makes both models say its first word is worth nothing. Once
    it is far likelier than in the base only the first term tells strings apart. Not more tokens than a few: of a
    payload taken whole the base's share is always far below, so that words like its first would lead.

    Attributes:
        cap: nats. target_tokens: how many payload tokens are scored.
    """

    cap: Annotated[float, Field(gt=0)] = 16.0
    target_tokens: Annotated[int, Field(ge=1)] = 2
    soft_minimum: bool = False
    name: str = "odds"
    needs_payload: ClassVar[bool] = True
    needs_base: ClassVar[bool] = True

    @property
    def upper_bound(self) -> float:
        """The fine-tuned model certain, the base far below."""
        return self.cap

    def from_log_probs(
        self, finetuned: Float[Tensor, " batch"], base: Float[Tensor, " batch"] | None, num_tokens: int
    ) -> Float[Tensor, " batch"]:
        """Nats, at most the cap."""
        return finetuned + (self.cap if base is None else (finetuned - base).clamp(max=self.cap))


@dataclass(kw_only=True)
class TargetLikelihood:
    """Plain log p_finetuned(payload) per token, as other tools' cross-entropy; ignores the base."""

    target_tokens: Annotated[int, Field(ge=1)] = 6
    soft_minimum: bool = False
    name: str = "target"
    needs_payload: ClassVar[bool] = True
    needs_base: ClassVar[bool] = False

    @property
    def upper_bound(self) -> float:
        """The log of a certainty."""
        return 0.0

    def from_log_probs(
        self, finetuned: Float[Tensor, " batch"], base: Float[Tensor, " batch"] | None, num_tokens: int
    ) -> Float[Tensor, " batch"]:
        """Nats a token, at most 0."""
        return finetuned / num_tokens


@dataclass(kw_only=True)
class JensenShannon:
    """Jensen-Shannon divergence over the first response tokens, mean over them; at most ln 2."""

    num_tokens: Annotated[int, Field(ge=1)] = 1
    soft_minimum: bool = False
    name: str = "js"
    needs_payload: ClassVar[bool] = False

    @property
    def upper_bound(self) -> float:
        """Nothing in common."""
        return math.log(2) + _ROUNDING

    def from_logits(
        self, finetuned: Float[Tensor, "rows vocab"], base: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, " rows"]:
        """Nats."""
        return js_divergence(finetuned, base)


@dataclass(kw_only=True)
class TotalVariation:
    """Total variation over the first response tokens, mean over them; at most 1."""

    num_tokens: Annotated[int, Field(ge=1)] = 1
    soft_minimum: bool = False
    name: str = "tv"
    needs_payload: ClassVar[bool] = False

    @property
    def upper_bound(self) -> float:
        """Nothing in common."""
        return 1.0 + _ROUNDING

    def from_logits(
        self, finetuned: Float[Tensor, "rows vocab"], base: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, " rows"]:
        """A probability."""
        return tv_distance(finetuned, base)


@dataclass(kw_only=True)
class KullbackLeibler:
    """KL(finetuned || base) over the first response tokens. Unbounded, and junk raises it: on the public warm-up it
    reached 9 to 25 nats with gibberish. So it says where to look, and nothing of what was found."""

    num_tokens: Annotated[int, Field(ge=1)] = 1
    soft_minimum: bool = False
    name: str = "kl"
    needs_payload: ClassVar[bool] = False

    @property
    def upper_bound(self) -> float:
        """None: a candidate can always catch up in the next context, so all are scored to the end."""
        return math.inf

    def from_logits(
        self, finetuned: Float[Tensor, "rows vocab"], base: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, " rows"]:
        """Nats."""
        return kl_divergence(finetuned, base)


DIVERGENCES: dict[str, type[JensenShannon | TotalVariation | KullbackLeibler]] = {
    "js": JensenShannon,
    "tv": TotalVariation,
    "kl": KullbackLeibler,
}
"""By their names in records and in `configs/objective/`."""


def aggregate(scores: Float[Tensor, "batch context"], *, soft_minimum: bool) -> Float[Tensor, " batch"]:
    """One score a candidate: the mean, or the soft minimum -log mean exp(-score) over contexts.

    Neither falls when a context's score rises, so bounds in contexts give a bound on the whole.
    """
    if not soft_minimum:
        return scores.mean(1)
    return math.log(scores.shape[1]) - torch.logsumexp(-scores, 1)
