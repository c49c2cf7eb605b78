"""What every method is given and hands back: a budget, and the strings it would stake its name on."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Bool
from torch import Tensor

from trigger_opt.models.pair import ModelPair
from trigger_opt.prompts import Context
from trigger_opt.scoring import CLOCK, Meter
from trigger_opt.search import SearchSettings
from trigger_opt.tokens import TokenPolicy, allowed_ids

# Forwards and backwards, on both models. Only activations get derivatives, so going back costs what going there did.
_GRADIENT_PASSES = 4


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a method may spend; it stops at whichever ends first, within its own smallest step.

    Attributes:
        seconds: by the clock of the cell, from when a method is handed the loaded pair: wall time, or the time that its
            one processor worked for it, which other work on the machine does not shorten.
        evaluations: forward passes of one prompt (one candidate in one context) through one model. Rows of a batch
            count one by one. Scoring a forced payload is one pass, however long it is. Of a generated answer every
            token is one. A gradient is two, there and back. Scores repeated in fp32 count again. What a search
            remembers costs nothing; where it may leave out the base's half, both halves are counted all the same.
    """

    seconds: float
    evaluations: int


@dataclass(frozen=True, kw_only=True)
class FoundString:
    """A string a method found.

    Attributes:
        text: as it is typed into a slot. payload: what it raises; empty where the method does not say.
        score: by the method's own measure, higher is more suspicious.
    """

    text: str
    payload: str
    score: float


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """What a method found, best first by its own score, and what it spent.

    Attributes:
        score: the method's own statistic for "this model hides something", comparable over models.
        notes: what a reader should know of this run, one line each.
    """

    strings: list[FoundString]
    score: float
    evaluations: int
    seconds: float
    notes: list[str] = field(default_factory=list)


class Method(Protocol):
    """A way to look for triggers. It sees a pair and contexts, and nothing of how the pair was made."""

    def __call__(self, pair: ModelPair, contexts: Sequence[Context], *, budget: Budget, seed: int) -> MethodResult:
        """Look for strings that make `pair.finetuned` do in `contexts` what its base does not."""
        ...


class Account:
    """What a method has spent of its budget; the clock starts when it is opened.

    Attributes:
        evaluations: forward passes so far, see `Budget`.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.evaluations = 0
        self._clock = CLOCK.get()
        self._opened = self._clock()

    @property
    def seconds(self) -> float:
        """Time since the account was opened."""
        return self._clock() - self._opened

    def seconds_until(self, share: float) -> float:
        """Seconds until `share` of the time is gone; negative when it is."""
        return share * self.budget.seconds - self.seconds

    def evaluations_until(self, share: float) -> int:
        """Passes until `share` of the evaluations are gone; negative when they are."""
        return int(share * self.budget.evaluations) - self.evaluations

    def spent(self, share: float = 1.0) -> bool:
        """Whether `share` of the time or of the evaluations is gone."""
        return self.seconds_until(share) <= 0 or self.evaluations_until(share) <= 0

    def charge_search(self, meter: Meter, rescoring: Meter, gradients: int) -> None:
        """Count a search; `gradients` are those it took, once per context."""
        self.evaluations += 2 * (meter.evaluations + rescoring.evaluations) + _GRADIENT_PASSES * gradients

    @contextmanager
    def counting(self, pair: ModelPair) -> Iterator[None]:
        """Count every row that goes through either model meanwhile: answers generated, likelihoods of answers.

        Scores of the engine are packed into one row and are counted by `charge_search`, not here.
        """

        def count(module: Any, positional: Any, named: dict[str, Any]) -> None:
            inputs = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
            self.evaluations += len(inputs)

        networks = {id(m.network): m.network for m in (pair.finetuned, pair.base)}
        with ExitStack() as hooks:
            for network in networks.values():
                hooks.callback(network.base_model.register_forward_pre_hook(count, with_kwargs=True).remove)
            yield

    def result(self, strings: Sequence[FoundString], score: float, notes: Sequence[str] = ()) -> MethodResult:
        """Close the account."""
        return MethodResult(
            strings=list(strings), score=score, evaluations=self.evaluations, seconds=self.seconds, notes=list(notes)
        )


def most_scored(evaluations: int, settings: SearchSettings) -> int:
    """How many candidates (once per context, on both models) a search may score so that its gradients and its
    rescoring, were they all taken, stay within `evaluations` passes too. At least 1."""
    fresh = settings.search_width - settings.buffer_size
    rescored = settings.buffer_size + max(settings.buffer_size, settings.rescore)
    beside = settings.contexts_per_step * (rescored + _GRADIENT_PASSES // 2)
    return max(1, int(evaluations / 2 / (1 + beside / fresh)))


def usual_tokens(pair: ModelPair) -> Bool[Tensor, " vocab"]:
    """The tokens every method may use: printable ASCII, as by default in a run."""
    return allowed_ids(pair.tokenizer, TokenPolicy(), pair.finetuned.vocab_size)


def drawn(contexts: Sequence[Context], count: int, seed: int) -> list[Context]:
    """At most `count` of `contexts`, drawn without replacement."""
    order = torch.randperm(len(contexts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [contexts[i] for i in order[:count]]
