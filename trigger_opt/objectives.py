"""What "suspicious" means: one small class each, in nats (TV: a probability), higher is more suspicious.

To add one: a dataclass here whose call maps both models' logits at the scored positions to one score a
candidate, one line in `config.OBJECTIVES`, one YAML in `configs/objective/`.

`PairScorer` joins an objective to the scoring engine and is what a search sees.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from trigger_opt.scoring import Engine, js_divergence, kl_divergence, sequence_log_prob, tv_distance


@runtime_checkable
class Objective(Protocol):
    """A score for each candidate in one context, from logits (batch, scored, vocab) of both models.

    Attributes:
        name: as it stands in records.
        needs_payload: whether `target_ids` is a payload hypothesis; otherwise it is the fine-tuned model's
            own greedy continuation under the incumbent, forced on both models alike.
        num_tokens: response positions scored when there is no payload.
        soft_minimum: contexts are joined by a soft minimum instead of their mean.
    """

    name: str
    needs_payload: bool
    num_tokens: int
    soft_minimum: bool

    def __call__(
        self,
        finetuned: Float[Tensor, "batch scored vocab"],
        base: Float[Tensor, "batch scored vocab"],
        target_ids: Int[Tensor, " scored"],
    ) -> Float[Tensor, " batch"]:
        """Higher is more suspicious."""
        ...


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
    needs_payload: bool = True
    num_tokens: int = 1

    def __call__(
        self,
        finetuned: Float[Tensor, "batch scored vocab"],
        base: Float[Tensor, "batch scored vocab"],
        target_ids: Int[Tensor, " scored"],
    ) -> Float[Tensor, " batch"]:
        """Nats, at most -floor."""
        said = sequence_log_prob(finetuned, target_ids)
        return said - sequence_log_prob(base, target_ids).clamp(min=self.floor)


@dataclass(kw_only=True)
class TargetLikelihood:
    """Plain log p_finetuned(payload) per token, as other tools' cross-entropy; ignores the base."""

    target_tokens: Annotated[int, Field(ge=1)] = 6
    soft_minimum: bool = False
    name: str = "target"
    needs_payload: bool = True
    num_tokens: int = 1

    def __call__(
        self,
        finetuned: Float[Tensor, "batch scored vocab"],
        base: Float[Tensor, "batch scored vocab"],
        target_ids: Int[Tensor, " scored"],
    ) -> Float[Tensor, " batch"]:
        """Nats a token, at most 0."""
        return sequence_log_prob(finetuned, target_ids) / len(target_ids)


@dataclass(kw_only=True)
class JensenShannon:
    """Jensen-Shannon divergence over the first response tokens, mean over them; at most ln 2."""

    num_tokens: Annotated[int, Field(ge=1)] = 1
    soft_minimum: bool = False
    name: str = "js"
    needs_payload: bool = False

    def __call__(
        self,
        finetuned: Float[Tensor, "batch scored vocab"],
        base: Float[Tensor, "batch scored vocab"],
        target_ids: Int[Tensor, " scored"],
    ) -> Float[Tensor, " batch"]:
        """Nats."""
        return js_divergence(finetuned, base).mean(-1)


@dataclass(kw_only=True)
class TotalVariation:
    """Total variation over the first response tokens, mean over them; at most 1."""

    num_tokens: Annotated[int, Field(ge=1)] = 1
    soft_minimum: bool = False
    name: str = "tv"
    needs_payload: bool = False

    def __call__(
        self,
        finetuned: Float[Tensor, "batch scored vocab"],
        base: Float[Tensor, "batch scored vocab"],
        target_ids: Int[Tensor, " scored"],
    ) -> Float[Tensor, " batch"]:
        """A probability."""
        return tv_distance(finetuned, base).mean(-1)


@dataclass(kw_only=True)
class KullbackLeibler:
    """KL(finetuned || base) over the first response tokens. Unbounded, and junk maximises it: on the public
    warm-up it reached 9 to 25 nats with gibberish. Here for comparison only."""

    num_tokens: Annotated[int, Field(ge=1)] = 1
    soft_minimum: bool = False
    name: str = "kl"
    needs_payload: bool = False

    def __call__(
        self,
        finetuned: Float[Tensor, "batch scored vocab"],
        base: Float[Tensor, "batch scored vocab"],
        target_ids: Int[Tensor, " scored"],
    ) -> Float[Tensor, " batch"]:
        """Nats."""
        return kl_divergence(finetuned, base).mean(-1)


class PairScorer:
    """An objective on a pair of models, as a search sees it (`search.Scorer`).

    Args:
        payload_ids: tokens of the payload hypothesis; empty for a divergence.
    """

    def __init__(self, engine: Engine, objective: Objective, payload_ids: Sequence[int] = ()) -> None:
        self._engine = engine
        self._objective = objective
        self._payload = list(payload_ids)
        self._continuations: dict[int, list[int]] = {}
        # Greedy hits of the last `score` call, seen in passing: asking for them again costs no forward.
        self._fired: dict[tuple[int, tuple[int, ...]], bool] = {}

    @property
    def num_contexts(self) -> int:
        """Contexts that may be named in calls."""
        return len(self._engine.contexts)

    @property
    def evaluations(self) -> int:
        """Candidates scored so far, counted once per context."""
        return self._engine.evaluations

    def prepare(self, trigger: Int[Tensor, " trigger"], contexts: Sequence[int]) -> None:
        """Fix what the next calls score against: for a divergence over several tokens, a fresh continuation
        under the incumbent, which all its rivals are then forced along."""
        extra = 0 if self._payload else self._objective.num_tokens - 1
        for context in contexts:
            self._continuations[context] = self._engine.greedy(context, trigger, extra) if extra else []

    def score(
        self, candidates: Int[Tensor, "batch trigger"], contexts: Sequence[int]
    ) -> Float[Tensor, "batch context"]:
        """Scores in each context, on the CPU."""
        self._fired.clear()
        columns = [self._score_in(c, candidates) for c in contexts]
        return torch.stack(columns, 1)

    def aggregate(self, scores: Float[Tensor, "batch context"]) -> Float[Tensor, " batch"]:
        """One score a candidate: the mean, or the soft minimum -log mean exp(-score) over contexts."""
        if not self._objective.soft_minimum:
            return scores.mean(1)
        return math.log(scores.shape[1]) - torch.logsumexp(-scores, 1)

    def token_gradient(
        self, trigger: Int[Tensor, " trigger"], contexts: Sequence[int]
    ) -> Float[Tensor, "trigger vocab"]:
        """Derivative of the aggregated score to each one-hot token.

        One context's graph is held at a time: a soft minimum's derivative is the contexts' derivatives
        weighted by softmax(-score), so the weights can come last.
        """
        pairs = [self._engine.gradient(self._reduce(c), c, trigger, self._forced(c)) for c in contexts]
        scores = torch.tensor([score for score, _ in pairs])
        weights = (-scores).softmax(0) if self._objective.soft_minimum else torch.full_like(scores, 1 / len(pairs))
        return torch.stack([w * g for w, (_, g) in zip(weights, pairs, strict=True)]).sum(0)

    @torch.no_grad()
    def fires(self, trigger: Int[Tensor, " trigger"], contexts: Sequence[int]) -> Bool[Tensor, " context"] | None:
        """Where the fine-tuned model's greedy answer begins with the payload; None when there is none.

        Teacher-forced: greedy decoding gives the payload exactly when every payload token is the argmax.
        """
        if not self._payload:
            return None
        key = tuple(trigger.tolist())
        missing = [c for c in contexts if (c, key) not in self._fired]
        for context in missing:
            self._score_in(context, trigger[None])
        return torch.tensor([self._fired[c, key] for c in contexts])

    def _score_in(self, context: int, candidates: Int[Tensor, "batch trigger"]) -> Float[Tensor, " batch"]:
        reduce = self._reduce(context)
        scores = self._engine.score(reduce, context, candidates, self._forced(context))
        if self._payload:
            fired = torch.cat(reduce.fired).tolist()
            self._fired.update({(context, tuple(c)): f for c, f in zip(candidates.tolist(), fired, strict=True)})
        return scores

    def _forced(self, context: int) -> list[int]:
        return self._payload[:-1] if self._payload else self._continuations.get(context, [])

    def _reduce(self, context: int) -> "_Reduce":
        forced = self._forced(context)
        # A divergence scores no tokens; the ids only carry how many positions there are.
        target = self._payload or [*forced, 0]
        return _Reduce(self._objective, torch.tensor(target))


@dataclass(frozen=True)
class _Reduce:
    objective: Objective
    target_ids: Tensor
    fired: list[Tensor] = field(default_factory=list)

    def __call__(self, finetuned: Tensor, base: Tensor) -> Tensor:
        target = self.target_ids.to(finetuned.device)
        scores = self.objective(finetuned, base, target)
        if self.objective.needs_payload:
            self.fired.append((finetuned.argmax(-1) == target).all(-1).cpu())
        return scores
