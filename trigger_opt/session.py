"""What every stage shares: configuration, run folder, tracker, contexts, and the models once loaded."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from trigger_opt import api
from trigger_opt.checkpoint import Checkpoints
from trigger_opt.config import RunConfig
from trigger_opt.models.files import ModelFiles
from trigger_opt.models.pair import LoadOptions, ModelPair, load_pair
from trigger_opt.progress import Progress, say, stage_progress
from trigger_opt.prompts import Context, chat_text, searchable
from trigger_opt.records import INTERRUPTED, STOPPED, StageRun
from trigger_opt.run_folder import GROWING, RunFolder, code_versions, now, timed
from trigger_opt.scoring import Meter
from trigger_opt.tokens import allowed_ids
from trigger_opt.tracking import Tracker


@dataclass
class StageOutcome:
    """Filled in by a stage while it runs.

    Attributes:
        state: what an earlier start of this stage kept; see `Session.keep`. seconds_before: what that took.
        meter, rescoring: what scores and their repetition in fp32 cost. matmul_rate: the machine's when the stage
            began. began: a reading of the monotonic clock.
    """

    state: dict[str, Any] = field(default_factory=dict)
    evaluations: int = 0
    summary: str = ""
    meter: Meter = field(default_factory=Meter)
    rescoring: Meter = field(default_factory=Meter)
    matmul_rate: float = 0.0
    began: float = field(default_factory=time.monotonic)
    seconds_before: float = 0.0

    def spend(self, meter: Meter, rescoring: Meter) -> None:
        """Count what one search cost."""
        self.meter.add(meter)
        self.rescoring.add(rescoring)


@dataclass(frozen=True)
class PairCall:
    """A search that the other processes of a torchrun job join, and the pair it runs on: names of fine-tuned model and
    base, and whether it is scored plainly, which a control may be the cause of."""

    names: tuple[str, str]
    plain: bool
    search: api.SearchCall


@dataclass
class Session:
    """What every stage needs: the configuration, the folder, the tracker, and the models once loaded.

    Attributes:
        within: what these stages are a part of, as progress lines begin; empty for the run itself.
    """

    config: RunConfig
    folder: RunFolder
    tracker: Tracker
    checkpoints: Checkpoints
    files: list[ModelFiles]
    options: LoadOptions
    within: str = ""
    _pair: ModelPair | None = None
    search_contexts: list[Context] = field(init=False)
    held_out: list[Context] = field(init=False)

    def __post_init__(self) -> None:
        self.search_contexts, self.held_out = api.context_sets(
            self.config.contexts.search, self.config.contexts.held_out
        )

    def pair(self, *, fresh: bool = False) -> ModelPair:
        """The models, loaded when first asked for; `fresh` loads them anew, so that nothing a search did to them
        or remembered of them reaches a verdict."""
        if fresh:
            self._pair = None
        if self._pair is None:
            say(self.title("loading the models …"))
            self._pair = load_pair(self.files[0], self.files[1], self.files[2:], options=self.options)
            self.search_contexts = self.usable(self.search_contexts, "search contexts")
            for context in self.held_out:
                # A template that refuses one would end the run after the search.
                chat_text(self._pair.tokenizer, context.messages(""))
        return self._pair

    def release(self) -> None:
        """Forget the models, so that their memory serves others."""
        self._pair = None
        gc.collect()
        if torch.cuda.is_available():
            # What torch holds for later counts as taken where memory is asked for.
            torch.cuda.empty_cache()

    def title(self, stage: str) -> str:
        """How a line about `stage` begins."""
        return f"{self.within}, {stage}" if self.within else stage

    def progress(
        self, stage: str, *, total: int | None = None, unit: str = "", seconds: float | None = None
    ) -> Progress:
        """The progress of a stage; see `progress.stage_progress`."""
        return stage_progress(self.title(stage), total=total, unit=unit, seconds=seconds)

    def call(self, search: api.SearchCall) -> PairCall:
        """What other processes need in order to join `search`."""
        return PairCall((self.files[0].name, self.files[1].name), self.pair().plain, search)

    def usable(self, contexts: list[Context], what: str) -> list[Context]:
        """The contexts a search can use with this chat template; says how many are left out."""
        usable = searchable(self.pair().tokenizer, contexts)
        if left_out := len(contexts) - len(usable):
            say(
                f"{left_out} of {len(contexts)} {what} are left out: this chat template trims turns, so that a string "
                "at their start could not be told from its surroundings, or refuses them"
            )
        return usable

    def allowed(self) -> torch.Tensor:
        """Token ids the search may use."""
        pair = self.pair()
        return allowed_ids(pair.tokenizer, self.config.tokens, pair.finetuned.vocab_size)

    @contextmanager
    def stage(self, name: str) -> Iterator[StageOutcome]:
        """Time a stage, keep what an earlier run of it left, and write down what it found.

        A stage that was interrupted goes on in its own files, from what it kept.
        """
        state = self.checkpoints.begun(name)
        if state is None:
            self.folder.put_aside(name)
        if not state:
            # In this order: a later start cuts the row off and writes it again.
            self.checkpoints.save(name, {})
            self.tracker.log({"stage": name})
        outcome = StageOutcome(state=state or {})
        started = now()
        try:
            with timed() as seconds:
                yield outcome
        except BaseException as error:
            # What it spent counts: later stages may go on from what it left.
            outcome.summary = (
                INTERRUPTED if isinstance(error, KeyboardInterrupt) else f"{STOPPED}{type(error).__name__}"
            )
            self._note(name, started, seconds[0], outcome, ended=False)
            raise
        self._note(name, started, seconds[0], outcome, ended=True)
        self.checkpoints.forget()

    def keep(self, name: str, state: dict[str, Any]) -> None:
        """For a later start of this stage, should it be interrupted: plain values and tensors."""
        self.checkpoints.save(name, state)

    def _note(self, name: str, started: str, measured: float, outcome: StageOutcome, *, ended: bool) -> None:
        seconds = measured + outcome.seconds_before
        done = StageRun(
            stage=name, started=started, seconds=seconds, evaluations=outcome.evaluations, summary=outcome.summary
        )
        # In this order: killed in between, the stage's end is done again, and this row cut off before it. Only once it
        # has ended: online, rows of a later start at the same step would be dropped.
        if ended:
            self.tracker.log({f"{name}/seconds": seconds, f"{name}/evaluations": done.evaluations})
        self.folder.add_stage(done, ended=ended)
        say(f"{self.title(name)}: {outcome.summary} ({seconds:.0f} s)")


def open_checkpoints(config: RunConfig, folder: RunFolder) -> Checkpoints:
    """The checkpoints of a run, asked for before anything is written into its folder: of a run that goes on, what it
    wrote after its last one is cut off.

    Raises:
        UserError: see `Checkpoints.find`.
    """
    made = Checkpoints(
        folder.path,
        grows=GROWING,
        versions=code_versions(),
        exact=["search"],
        every_steps=config.checkpoint.every_steps,
        every_seconds=config.checkpoint.every_seconds,
    )
    made.find(folder.goes_on)
    return made
