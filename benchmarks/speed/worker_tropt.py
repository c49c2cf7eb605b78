"""tropt 0.1.1 as a timed engine: its own `GCGOptimizer`, watched through its tracker.

Runs in tropt's interpreter; imports nothing of trigger_opt.
"""

# ruff: noqa: E402 (tropt cannot be imported before dataclasses are told about slices)

import logging
import time
from typing import Any

from transformers import set_seed

from benchmarks.speed.hashable_slices import allow_slice_defaults
from benchmarks.speed.worker import Prompt, Run, Task, differences, measured, only_user, serve

allow_slice_defaults()

from tropt.common import OPTIMIZED_TRIGGER_PLACEHOLDER, Targets  # type: ignore[import-not-found]
from tropt.loss import PrefillCELoss  # type: ignore[import-not-found]
from tropt.model.huggingface.lm import LMHFModel  # type: ignore[import-not-found]
from tropt.optimizer.gcg_optimizer import GCGOptimizer  # type: ignore[import-not-found]
from tropt.optimizer.utils.token_constraints import TokenConstraints  # type: ignore[import-not-found]
from tropt.tracker import BaseTracker  # type: ignore[import-not-found]


class Tropt:
    """See `worker.SearchEngine`."""

    def load(self, folder: str, dtype: str, attention: str) -> None:
        """As tropt's GCG recipe loads it: with the prefix cache."""
        logging.getLogger("tropt").setLevel(logging.ERROR)
        self._model = LMHFModel(
            model_name=folder,
            device="cpu",
            dtype=dtype,
            use_prefix_cache=True,
            use_eager_attention=attention == "eager",
        )

    def prepare(self, task: Task) -> None:
        """The settings of tropt's GCG recipe, but for what the task says."""
        self._task = task
        self._constraints = TokenConstraints(disallow_non_ascii=True, disallow_special_tokens=True)

    def steps(self, count: int, warm: int) -> Run:
        """See `worker.SearchEngine.steps`."""
        watch = _Watch(self._model, self._task.trigger)
        optimizer = GCGOptimizer(
            model=self._model,
            loss=PrefillCELoss(),
            tracker=watch,
            # Seeded below: its own seed also turns on torch's deterministic mode, which only costs time.
            seed=None,
            num_steps=count + warm,
            n_candidates=self._task.width,
            sample_topk=self._task.topk,
            token_constraints=self._constraints,
            use_retokenize=self._task.retokenise,
        )
        set_seed(self._task.seed)
        result = optimizer.optimize_trigger(
            templates=[only_user(self._task, OPTIMIZED_TRIGGER_PLACEHOLDER)],
            targets=Targets(target_response_strs=[self._task.target]),
            initial_trigger=self._task.trigger,
        )
        return measured(
            differences(watch.stamps),
            [int(scored) for scored in differences(watch.samples)],
            watch.losses[1:],
            warm=warm,
            trigger=result.best_trigger_str,
            first_loss=watch.losses[0],
            prompt=watch.prompt,
        )


class _Watch(BaseTracker):  # type: ignore[misc]
    """Stamps every log line: one for the initial trigger, then one at the end of each step."""

    def __init__(self, model: Any, trigger: str) -> None:
        super().__init__()
        self._model = model
        self._trigger = trigger
        self.stamps: list[float] = []
        self.samples: list[int] = []
        self.losses: list[float] = []

    def _init(self, config: Any = None) -> None:
        pass

    def _log(self, data: dict[str, Any]) -> None:
        if not self.stamps:
            # The optimiser forgets the prompt's tokens when it is done.
            seen = self._model._token_input_manager
            self.prompt = Prompt(
                before=seen.before_ids[0].tolist(),
                trigger=self._model.tokenizer.encode_trigger(self._trigger).tolist(),
                after=seen.after_ids[0].tolist(),
                target=seen.targets.target_response_toks[0].tolist(),
            )
        self.losses.append(data["loss"])
        stats = "target_model_stats"
        self.samples.append(data[f"{stats}/forward_samples"] - data[f"{stats}/grad_samples"])
        self.stamps.append(time.perf_counter())

    def _finish(self, summary: Any = None) -> None:
        pass


if __name__ == "__main__":
    serve(Tropt())
