"""How much of a behaviour survives unrelated fine-tuning and rounding. Weights are changed in memory alone."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from trigger_opt.errors import UserError
from trigger_opt.models.pair import CausalModel
from trigger_opt.run_folder import machine, versions
from trigger_opt.tuning import FitSettings
from trigger_opt.zoo.cases import Case, Rates, rates
from trigger_opt.zoo.retention import Outcome, Stress, share
from trigger_opt.zoo.treatments import Treatment, cast, fine_tuned, load_merged, quantised

AFTER = ("pirate", "bf16", "fp16", "int8", "nf4")
"""What can be done to the weights."""
_ROWS_A_STEP = 6


@dataclass(frozen=True, kw_only=True)
class StressSettings:
    """What is done: treatments out of AFTER, and optimiser steps, learning rate and seed of the unrelated fine-tuning.

    At 2e-4, usual for LoRA, nine answers of ten were a pirate's and the miniature warm-up's trigger still worked in 31
    of 32 prompts; at 1e-3, as many were a pirate's and it worked in one.

    Raises:
        UserError: no treatment, an unknown one, one twice, no step, or no learning.
    """

    after: tuple[str, ...] = ("pirate", "bf16", "int8")
    steps: int = 60
    learning_rate: float = 2e-4
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [a for i, a in enumerate(self.after) if a not in AFTER or a in self.after[:i]]
        if wrong or not self.after:
            raise UserError(f"--after has {wrong[0] if wrong else ''!r}; give each once, out of: {', '.join(AFTER)}")
        if self.steps < 1:
            raise UserError(f"--steps is {self.steps}; give a whole number from 1")
        if not 0 < self.learning_rate <= 1:
            raise UserError(f"--learning-rate is {self.learning_rate}; give a number above 0, say 2e-4")

    def fit(self) -> FitSettings:
        """Of the unrelated fine-tuning, in which nothing holds the model where it was."""
        return FitSettings(
            steps=self.steps, learning_rate=self.learning_rate, taught=_ROWS_A_STEP, ordinary=0, seed=self.seed
        )


def treatments(case: Case, settings: StressSettings, say: Callable[[str], None]) -> dict[str, Treatment]:
    """What `settings` ask for, by name and in their order."""
    known: dict[str, Treatment] = {
        "pirate": partial(fine_tuned, rows=case.rows, settings=settings.fit(), say=say),
        "bf16": partial(cast, dtype=torch.bfloat16),
        "fp16": partial(cast, dtype=torch.float16),
        "int8": partial(quantised, kind="int8"),
        "nf4": partial(quantised, kind="nf4"),
    }
    return {name: known[name] for name in settings.after}


def outcomes(case: Case, treatments: Mapping[str, Treatment]) -> Iterator[Outcome]:
    """ "before", then what each treatment leaves of the behaviour in a fresh copy of the model."""
    yield _outcome("before", case, case.before, case.seconds)
    for name, treat in treatments.items():
        start = time.monotonic()
        network = treat(load_merged(case.finetuned, case.base))
        found = rates(CausalModel(case.finetuned.name, network), case.trial, case.tokenizer, case.end_ids)
        yield _outcome(name, case, found, time.monotonic() - start)


def record(case: Case, settings: StressSettings, done: list[Outcome]) -> Stress:
    """The record of `done`, as it is written."""
    return Stress(
        model=case.finetuned.name, base=case.base.name, kind=case.kind, trigger=case.trigger, payload=case.payload,
        prompts=case.prompts, base_rate=case.base_rate, outcomes=done, steps=settings.steps,
        learning_rate=settings.learning_rate, seed=settings.seed, machine=machine(), versions=versions(),
    )  # fmt: skip


def _outcome(name: str, case: Case, found: Rates, seconds: float) -> Outcome:
    return Outcome(
        treatment=name, trigger_rate=found.trigger, false_trigger_rate=found.false_trigger, pirate_rate=found.pirate,
        retained=share(case.before.trigger, found.trigger), seconds=round(seconds, 1),
    )  # fmt: skip
