"""trigger_opt as a timed engine: its own search loop and scorer, begun from the task's trigger."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from benchmarks.speed.rescoring import Rescorer
from benchmarks.speed.worker import Prompt, Run, Task, differences, measured, serve
from trigger_opt.api import load_pair, pair_scorer
from trigger_opt.models.pair import LoadOptions
from trigger_opt.objectives import TargetLikelihood
from trigger_opt.pair_scorer import PairScorer
from trigger_opt.prompts import Context, decode, encode, round_trips, tokenize_context
from trigger_opt.search import GCG, Step
from trigger_opt.search.loop import Searcher
from trigger_opt.tokens import TokenPolicy, allowed_ids

# Steps between scorings on all contexts, and steps in a search: so many that neither ever comes.
_NEVER = 10**9


class _EnoughError(Exception):
    """Ends a search from inside its step callback, before what the loop does in its last step only."""


class Ours:
    """See `worker.SearchEngine`."""

    def load(self, folder: str, dtype: str, attention: str) -> None:
        """One network for both sides of the pair; the package chooses the attention itself."""
        self._folder = folder
        pair = load_pair(folder, base=folder, options=LoadOptions(dtype=dtype))
        self._pair, self._model, self._tokenizer = pair, pair.finetuned, pair.tokenizer

    def prepare(self, task: Task) -> None:
        """Scorer, allowed tokens and settings; the incumbent competes besides `task.width` new strings."""
        self._task = task
        self._contexts = [tokenize_context(self._tokenizer, Context(user=u)) for u in task.users]
        trigger, target = encode(self._tokenizer, [task.trigger, task.target])
        first = self._contexts[0]
        self._prompt = Prompt(before=list(first.left), trigger=trigger, after=list(first.right), target=target)
        self._plan = GCG(
            trigger_length=len(trigger), num_steps=_NEVER, num_restarts=1, search_width=task.width + 1,
            topk=task.topk, buffer_size=1, contexts_per_step=len(task.users), check_every=_NEVER, stop_rate=2.0,
        )  # fmt: skip
        self._allowed = allowed_ids(self._tokenizer, TokenPolicy(), self._model.vocab_size)

    def steps(self, count: int, warm: int) -> Run:
        """See `worker.SearchEngine.steps`; the same strings as others' engines score, none joined."""
        return self._search(lambda done: len(done) == count + warm, replace(self._plan, join=1), warm=warm)

    def rescore(self, trigger: str) -> dict[str, float]:
        """fp32 losses of a string, nats a token; see `Rescorer`."""
        rescorer = self._rescorer()
        return {"searched": rescorer.searched(trigger), "typed": rescorer.typed(trigger)}

    def until(self, loss: float, limit: int) -> dict[str, object]:
        """Search until the best string's fp32 loss is at most `loss`, or for `limit` steps.

        Rescoring is not counted as time; it happens when the best string has changed.
        """
        rescorer = self._rescorer()
        exact: list[float] = []

        def reached(done: Sequence[Step]) -> bool:
            changed = len(done) == 1 or done[-1].trigger_ids != done[-2].trigger_ids
            exact.append(rescorer.searched(decode(self._tokenizer, done[-1].trigger_ids)) if changed else exact[-1])
            return exact[-1] <= loss or len(done) == limit

        run = self._search(reached, self._plan, warm=0)
        return {**asdict(run), "rescored": exact, "reached": exact[-1] <= loss}

    def _new_scorer(self) -> PairScorer:
        target = self._prompt.target
        pair = replace(self._pair, finetuned=self._model, base=self._model)
        return pair_scorer(pair, self._contexts, TargetLikelihood(target_tokens=len(target)), target)

    def _rescorer(self) -> Rescorer:
        (user,) = self._task.users
        return Rescorer(self._folder, user, self._task.target)

    def _search(self, enough: Callable[[Sequence[Step]], bool], plan: GCG, *, warm: int) -> Run:
        # A scorer remembers its scores: kept from a run with the same seed, it would have nothing left to do.
        self._scorer = self._new_scorer()
        clock = _Clock()
        done: list[Step] = []
        generator = torch.Generator().manual_seed(self._task.seed)

        def propose(trigger: Tensor, contexts: Sequence[int], count: int) -> Int[Tensor, "batch trigger"]:
            # Before its first step the loop scores the initial trigger: set-up, not a step.
            if not done:
                clock.start()
            options = plan.options(self._scorer, trigger, contexts, allowed=self._allowed, generator=generator)
            return plan.draw(trigger, options, count=count, generator=generator)

        def on_step(step: Step) -> None:
            clock.lap()
            done.append(step)
            if enough(done):
                raise _EnoughError
            clock.start()

        first_loss = self._first_loss()
        searcher = Searcher(self._scorer, settings=plan, valid=self._valid, generator=generator, on_step=on_step)
        with suppress(_EnoughError):
            searcher.restart(0, torch.tensor([self._prompt.trigger]), propose, 1.0)
        return measured(
            clock.laps,
            self._new_strings(done),
            [-s.score for s in done],
            warm=warm,
            trigger=decode(self._tokenizer, done[-1].trigger_ids),
            first_loss=first_loss,
            prompt=self._prompt,
        )

    def _first_loss(self) -> float:
        everywhere = range(len(self._contexts))
        trigger = torch.tensor([self._prompt.trigger])
        self._scorer.prepare(trigger[0], everywhere)
        return -float(self._scorer.aggregate(self._scorer.score(trigger, everywhere))[0])

    def _new_strings(self, done: Sequence[Step]) -> list[int]:
        """Strings scored in each step; the incumbent's score is remembered and not among them."""
        spent = [0, *(s.evaluations for s in done)]
        return [int(scored) // len(self._contexts) for scored in differences(spent)]

    def _valid(self, candidates: Int[Tensor, "batch trigger"]) -> Bool[Tensor, " batch"]:
        if not self._task.retokenise:
            return torch.ones(len(candidates), dtype=torch.bool)
        return torch.tensor(round_trips(self._tokenizer, self._contexts, candidates.tolist()), dtype=torch.bool)


class _Clock:
    """Seconds of each lap; stands still between `lap` and `start`."""

    def __init__(self) -> None:
        self.laps: list[float] = []
        self._since = 0.0

    def start(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> None:
        self.laps.append(time.perf_counter() - self._since)


if __name__ == "__main__":
    ours = Ours()
    serve(ours, {"rescore": ours.rescore, "until": ours.until})
