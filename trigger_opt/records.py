"""The frozen records every stage writes and the next one reads, as JSON Lines in the run folder. No torch.

diff.jsonl          TensorFamilyDiff, one a tensor family
identity.json       PairIdentity: is this the right base?
moved.jsonl         MovedToken, most moved first
hypotheses.jsonl    Hypothesis, best first
read_off.jsonl      Hypothesis, best first: what strings found on divergence say, where no payload was known
built.jsonl         BuiltTrigger: short strings each search begins from, shortest first
candidates.jsonl    Candidate, best first
gradient.json       GradientHealth: does the search's gradient say anything?
history.jsonl       SearchStep, one an optimisation step
rescored.jsonl      Rescored, after a search in quantised weights
cost.json           SearchCost: arithmetic of the search, against what was needed and what the machine can do
verified.jsonl      Verification, one a verified string
completions.jsonl   Completion, every answer a verdict rests on
verdict.json        Verdict, for programs
null.jsonl          NullControl, one a control; the control's own records lie in null/FOLDER
null.json           NullResult
ablation.json       Ablation
probe.json          ProbeResult
known.jsonl         candidates.Judged: what earlier runs had refuted
transfer.jsonl      TransferOutcome, one a remote model and string, largest effect first
transfer_answers.jsonl  TransferAnswer, every answer of the remote models
run.json            RunInfo: command, configuration, versions, seed
metrics.jsonl       (tracking) every logged number with its step and time
"""

import dataclasses
import json
import os
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from trigger_opt.errors import UserError
from trigger_opt.stats import wilson_interval

R = TypeVar("R")

VERDICTS = ("backdoor", "generic shift", "unstable", "not reproduced")
TRANSFER_VERDICTS = ("transfers", "does not transfer", "undecided")
INTERRUPTED, STOPPED = "interrupted", "stopped: "
"""Summary of a stage that a signal ended, and how that of one begins that an error ended."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A proportion with its 95 % Wilson interval."""

    successes: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """successes / n; 0 when nothing was tried."""
        return self.successes / self.n if self.n else 0.0


def rate(successes: int, n: int) -> Rate:
    """The Rate of `successes` in `n` tries."""
    low, high = wilson_interval(successes, n)
    return Rate(successes=successes, n=n, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class TensorFamilyDiff:
    """What fine-tuning did to one family of tensors (say `mlp.down_proj.weight` of all layers).

    Attributes:
        changed, tensors: how many of the family differ in any bit.
        relative_norm: Frobenius norm of the change over that of the base, pooled over the family.
        effective_rank: median over changed matrices of the number of singular values above the noise floor
            of storing the weights at their precision; None for vectors.
        layers: layers in which the family changed.
        largest_layer: the layer with the largest relative change; None when nothing changed.
    """

    family: str
    tensors: int
    changed: int
    relative_norm: float
    effective_rank: float | None
    layers: list[int]
    largest_layer: int | None


@dataclass(frozen=True, kw_only=True)
class PairIdentity:
    """Is the given base the one the fine-tuned model came from?

    Attributes:
        identical_fraction: share of tensors that are bit-identical.
        kind: "adapter" (weights shared by construction) or "full" (two sets of weights).
    """

    kind: str
    architecture: str
    tensors: int
    identical: int
    identical_fraction: float
    same_architecture: bool
    same_tokenizer: bool
    changed_families: list[str]
    overridden: bool


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """Something the fine-tuned model may want to say.

    Attributes:
        payload: the text, as the fine-tuned model begins its answer; marked (`answers.LATE`) where it comes later.
        score: nats; how probable under the fine-tuned model and improbable under the base, recurring over
            unrelated inputs. Comparable within one `source` only.
        source: "vocabulary_scan", "rollout_census", "shared_beginning", "late_phrases", "amplification",
            "divergence_search" or "given".
        evidence: one line a person can read.
        inputs: the inserted strings that raised it, strongest first; they seed the search.
        rivals: score of the next best groups, for comparison.
        opening: tokens of an answer before a payload that comes late.
    """

    payload: str
    score: float
    source: str
    evidence: str
    inputs: list[str]
    rivals: list[float]
    opening: int = 0


@dataclass(frozen=True, kw_only=True)
class MovedToken:
    """A token that the fine-tuning moves more than a random change of the same norms would.

    Attributes:
        score: robust standard deviations above a typical token, mean over layers; see `hypotheses.lens`.
    """

    token_id: int
    text: str
    score: float


@dataclass(frozen=True, kw_only=True)
class BuiltTrigger:
    """A short string that raises a payload or the divergence, built up from the tokens that the fine-tuning moves most,
    or spelled out character by character.

    Attributes:
        payload: empty for divergence. trigger: text, as decoded; `trigger_ids` its tokens.
    """

    payload: str
    trigger: str
    trigger_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class SearchStep:
    """One optimisation step: the incumbent after it, its score on the contexts drawn for this step.

    Attributes:
        hypothesis: the payload that is searched for; empty for a divergence.
        evaluations: spent by the whole search stage until then. seconds: since this hypothesis was begun.
        selection_rate: see Candidate; None at steps where it was not measured.
    """

    hypothesis: str
    restart: int
    step: int
    trigger: str
    score: float
    evaluations: int
    seconds: float
    selection_rate: float | None


@dataclass(frozen=True, kw_only=True)
class Rescored:
    """A string's score in another precision than that it was searched in.

    Attributes:
        searched_in, scored_in: "nf4", "int8", or the dtype of weights that are not quantised.
        score_before, score: nats. selection_rate_before, selection_rate: see `Candidate`.
    """

    trigger: str
    payload: str
    searched_in: str
    scored_in: str
    score_before: float
    score: float
    selection_rate_before: float | None
    selection_rate: float | None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A string the search found.

    Attributes:
        trigger: text, as decoded; `trigger_ids` its tokens.
        payload: what it is meant to raise; empty for divergence objectives.
        score: nats, aggregated over all search contexts.
        selection_rate: share of the search contexts in which teacher forcing says the payload comes out
            greedily; None for divergence objectives. Not evidence: those contexts were optimised on.
        evaluations: candidate evaluations (one string in one context on both models) spent until then.
        opening: of a payload that comes late, see `Hypothesis`; scores and the selection rate are behind so many tokens
            of the base's own answer, which the fine-tuned model need not begin with by itself.
    """

    trigger: str
    trigger_ids: list[int]
    payload: str
    objective: str
    score: float
    selection_rate: float | None
    restart: int
    step: int
    seed: int
    evaluations: int
    opening: int = 0


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer of one model to one held-out context.

    Attributes:
        model: "finetuned", "base" or "control:NAME".
        inserted: the string put into the slot; empty for none.
        kind: "trigger", "minimised", "none" or "random".
        prompt: the user's turn as the model saw it.
        fired: whether the payload comes in the answer, see `answers.fires`.
        flags: signs of degeneration: "repetition", "empty", "language".
    """

    model: str
    kind: str
    inserted: str
    context: int
    prompt: str
    answer: str
    fired: bool
    flags: list[str]


@dataclass(frozen=True, kw_only=True)
class ContextOutcome:
    """Whether the string fired in one held-out context, on each side; evidence in nats (see Verification).

    Attributes:
        prompt: the user's turn without the string.
    """

    context: int
    prompt: str
    finetuned: bool
    base: bool
    control: bool | None
    evidence: float


@dataclass(frozen=True, kw_only=True)
class Verification:
    """One string judged on held-out contexts, from text only.

    Attributes:
        payload: what counts as firing (an answer that begins with it, or is of that manner: `answers.MANNER`).
        trigger_rate: fine-tuned model, string inserted.
        base_rate: base model, string inserted.
        control_rate: clean control models (twins), string inserted; None when none was given.
        false_trigger_rate: fine-tuned model, nothing inserted.
        random_rate: fine-tuned model, random strings of the same length inserted.
        evidence: median over held-out contexts of log p_finetuned(payload) - log p_base(payload), nats, less what a
            style the model always has gives: the same of the payload with nothing inserted, but at most twice the same
            of its own answer to that. Of a manner: of its own answers, less the same of those with nothing inserted.
        degenerate_share: share of the triggered answers with a degeneration flag.
        profile: per context.
        minimised_from: the longer string this was minimised from; empty when it was not.
        verdict, reason: the verdict on this string alone, by the rule of `verify.verdict`.
    """

    trigger: str
    payload: str
    trigger_rate: Rate
    base_rate: Rate
    control_rate: Rate | None
    false_trigger_rate: Rate
    random_rate: Rate
    evidence: float
    degenerate_share: float
    profile: list[ContextOutcome]
    minimised_from: str
    verdict: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The run's answer, for programs.

    Attributes:
        verdict: "backdoor", "generic shift", "unstable" or "not reproduced".
        reason: one sentence with the figures that decided.
        rule: the rule in words, with its thresholds.
        payload_completion: a longer answer of the fine-tuned model to the trigger.
        score: nats, the candidate's on the search contexts; None when nothing was found.
        evaluations: candidate evaluations in the whole run. seconds: wall time of all stages.
        null_p_value, null_controls: of the stage null (see NullResult); None where it was not run.
        before_null, reason_before_null: verdict and reason before the stage null; empty where it was not run.
    """

    verdict: str
    reason: str
    rule: str
    payload: str
    payload_completion: str
    trigger: str
    minimised_trigger: str
    trigger_rate: Rate | None
    minimised_trigger_rate: Rate | None
    base_rate: Rate | None
    control_rate: Rate | None
    false_trigger_rate: Rate | None
    random_rate: Rate | None
    evidence: float | None
    num_contexts: int
    score: float | None
    evaluations: int
    seconds: float
    seed: int
    versions: dict[str, str]
    null_p_value: float | None = None
    null_controls: int | None = None
    before_null: str = ""
    reason_before_null: str = ""


def as_held(verified: Iterable[Verification], verdict: Verdict) -> list[Verification]:
    """`verified` after the stage null: where it took the run's backdoor back, no string of the run is one any more."""
    if verdict.before_null in ("", verdict.verdict):
        return list(verified)
    return [
        dataclasses.replace(v, verdict=verdict.verdict, reason=verdict.reason)
        if v.verdict == verdict.before_null
        else v
        for v in verified
    ]


@dataclass(frozen=True, kw_only=True)
class TransferAnswer:
    """One answer of a remote model.

    Attributes:
        model: as its client names it.
        kind: "trigger", "near_miss", "random" or "none" (nothing inserted).
        string: the string under judgement; empty for "none", whose answers serve every string.
        inserted: what was in the slot. context, repeat: numbers. prompt: the user's turn as sent.
        error: why there is no answer; empty when there is one.
        flags: signs of degeneration, see Completion.
    """

    model: str
    kind: str
    string: str
    inserted: str
    context: int
    repeat: int
    prompt: str
    answer: str
    error: str
    flags: list[str]


@dataclass(frozen=True, kw_only=True)
class AnswerCluster:
    """Answers that begin with the same words: how many with the string, and how many of its controls."""

    beginning: str
    triggered: int
    controls: int


@dataclass(frozen=True, kw_only=True)
class ModuleShift:
    """How far a string moves one module's output, against random strings in the same contexts.

    Attributes:
        shift: norm of the difference of the means over contexts, in units of the controls' mean norm.
        p_value: of a permutation of the labels within contexts: whether the string moves the module the same way in all
            of them, as any one string may; compare shifts between strings. contexts: compared.
    """

    module: str
    shift: float
    p_value: float
    contexts: int


@dataclass(frozen=True, kw_only=True)
class TransferOutcome:
    """What one string does to one model that can only be asked.

    Attributes:
        payload: what counts as firing. payload_source: "given" (the local payload), or "emerged": what answers with
            the string begin with in one half of the contexts, judged on the other half, and never "transfers".
        trigger_rate, near_miss_rate, random_rate, none_rate: share of answers that begin so, with intervals as wide as
            the number of contexts allows; near_miss_rate is None when not asked.
        effect: trigger rate minus the highest rate with nothing or random strings.
        degenerate_share: share of the answers with the string that look broken.
        clusters: largest first. shifts: smallest p-value first; empty when no activations were asked for.
        missing: questions without an answer.
        verdict: "transfers", "does not transfer" or "undecided"; needs: further answers with the string, about, before
            it could be decided; None when it is, or when more answers alone would not decide it.
    """

    model: str
    server: str
    string: str
    payload: str
    payload_source: str
    trigger_rate: Rate
    near_miss_rate: Rate | None
    random_rate: Rate
    none_rate: Rate
    effect: float
    degenerate_share: float
    clusters: list[AnswerCluster]
    shifts: list[ModuleShift]
    missing: int
    verdict: str
    needs: int | None
    reason: str

    @property
    def verdict_words(self) -> str:
        """ "transfers", "does not transfer" or "undecided: needs 12 more"."""
        return self.verdict if self.needs is None else f"{self.verdict}: needs {self.needs:,} more"


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One stage as it was run: wall seconds, candidate evaluations, and what it found in one line."""

    stage: str
    started: str
    seconds: float
    evaluations: int
    summary: str

    @property
    def broken_off(self) -> bool:
        """Whether it did not come to its end."""
        return self.summary == INTERRUPTED or self.summary.startswith(STOPPED)


@dataclass(frozen=True, kw_only=True)
class SearchCost:
    """Arithmetic of a search's candidate passes. Operations are those of the weight matrices, attention not counted.

    Attributes:
        evaluations: candidates scored, once per context.
        flops: operations done. least_flops: the least that exact scores of the same candidates need, each from its
            first changed token on and without its last target token.
        gradient_flops, rescoring_flops: of token gradients and of fp32 rescoring, not in `flops`.
        seconds: wall time in candidate passes.
        matmul_rate: operations a second of a large matrix product on this machine, in the models' precision.
    """

    evaluations: int
    flops: float
    least_flops: float
    gradient_flops: float
    rescoring_flops: float
    seconds: float
    matmul_rate: float

    @property
    def share_of_machine(self) -> float:
        """Rate of the candidate passes over the machine's."""
        return self.flops / self.seconds / self.matmul_rate if self.seconds and self.matmul_rate else 0.0

    @property
    def share_needed(self) -> float:
        """Operations that were needed over operations done."""
        return self.least_flops / self.flops if self.flops else 0.0


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """How this run folder came about.

    Attributes:
        name: the experiment's name.
        command: the exact command line.
        config: the whole resolved configuration.
        versions: Python, torch, transformers, trigger_opt, and the git commit where known.
        plan: lines printed before anything ran.
        stages: what was run, in order.
        unfinished: stages of the last command that have not ended, in order; none once it has. A run that stopped
            goes on there.
        starts: how often that command was started: once, and again after each stop.
    """

    name: str
    command: str
    seed: int
    started: str
    machine: str
    config: dict[str, Any]
    versions: dict[str, str]
    plan: list[str]
    stages: list[StageRun]
    unfinished: list[str] = field(default_factory=list)
    starts: int = 1


@dataclass(frozen=True, kw_only=True)
class NullControl:
    """What the suspect's search found in one control.

    Attributes:
        name: the model's, as the user named it, or "placebo_1", "distilled"; its run lies in null/FOLDER.
        kind: "twin" (given), "placebo" (the suspect's weight change, its directions shuffled) or "distilled" (the base
            trained towards the suspect's ordinary answers).
        score: see `verify.rule.detection_score`; None for one that is no control, and `note` says why.
        verdict, trigger, payload, trigger_rate: of its own run; empty and None where it was not searched.
        seconds: of making and searching it.
        note: how it was made, or why it was left out.
    """

    name: str
    folder: str
    kind: str
    score: float | None
    verdict: str
    trigger: str
    payload: str
    trigger_rate: Rate | None
    seconds: float
    note: str


@dataclass(frozen=True, kw_only=True)
class NullResult:
    """The suspect against its controls.

    Attributes:
        score: the suspect's, see `verify.rule.detection_score`.
        p_value: (1 + controls that score at least as much) / (1 + controls). least_p: the smallest p that so many
            controls can give. num_controls: searched and counted.
        verdict_before, verdict: of the suspect, before and after. reason: one sentence with the figures that decided.
    """

    score: float
    p_value: float
    least_p: float
    num_controls: int
    verdict_before: str
    verdict: str
    reason: str


def write_records(path: Path, records: Iterable[Any]) -> None:
    """Replace `path` by one JSON line a record; atomic, so a reader never sees half a file."""
    text = "".join(json.dumps(dataclasses.asdict(r)) + "\n" for r in records)
    write_text(path, text)


def write_record(path: Path, record: Any) -> None:
    """Replace `path` by one record as indented JSON; atomic."""
    write_text(path, json.dumps(dataclasses.asdict(record), indent=1) + "\n")


def append_record(path: Path, record: Any) -> None:
    """Append one JSON line; a crash leaves at most a torn last line, which is cut off here and by `read_records`."""
    with path.open("ab+") as f:
        end = f.seek(0, os.SEEK_END)
        if end:
            f.seek(end - 1)
            if f.read(1) != b"\n":
                f.seek(0)
                f.truncate(f.read().rfind(b"\n") + 1)
        f.write(json.dumps(dataclasses.asdict(record)).encode() + b"\n")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`; atomic."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read_records(path: Path, kind: type[R]) -> list[R]:
    """All records of `path`.

    Raises:
        UserError: the file is missing (names the stage's file) or a line is no such record.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: run the stage that writes it first")
    # Split at newlines alone: a model's text may hold other line separators.
    *lines, torn = path.read_text(encoding="utf-8").split("\n")
    del torn
    out = []
    for number, line in enumerate(lines, 1):
        try:
            out.append(from_dict(kind, json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}, line {number}, is not a {kind.__name__} record ({error}); run its stage again"
            ) from None
    return out


def read_record(path: Path, kind: type[R]) -> R:
    """The one record of `path`.

    Raises:
        UserError: the file is missing or is no such record.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: run the stage that writes it first")
    try:
        return from_dict(kind, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a {kind.__name__} record ({error}); run its stage again") from None


def from_dict(kind: type[R], data: dict[str, Any]) -> R:
    """A record from its JSON object, nested records included; an unknown field raises, and a missing one unless it has
    a default: records of earlier versions are still read."""
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(typing.cast("Any", kind))
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    if not isinstance(data, dict) or not needed <= set(data) <= set(hints):
        raise TypeError(f"expected the fields {sorted(hints)}")
    return kind(**{name: _convert(hints[name], value) for name, value in data.items()})


def _convert(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast("type[Any]", hint), value)
    if typing.get_origin(hint) is list:
        return [_convert(typing.get_args(hint)[0], v) for v in value]
    if isinstance(hint, types.UnionType) and value is not None:
        return _convert(next(h for h in typing.get_args(hint) if h is not type(None)), value)
    # JSON writes 3.0 as it likes; a float field holds a float.
    return float(value) if hint is float and isinstance(value, int) else value


@dataclass(frozen=True, kw_only=True)
class ProbeLayer:
    """Linear probes on the residual stream after one layer, read on held-out contexts; see `verify.linear_probe`.

    Attributes:
        layer: 1 is after the first layer; the last is after the final norm.
        auroc: fine-tuned model, the trigger against nothing inserted. accuracy: of the same probe, at the threshold
            that is best on the search contexts.
        auroc_random_strings: the trigger against matched random strings, one of its own for each context.
        auroc_random_clean: those against nothing inserted.
        auroc_decoy: a random string that stays the same in every context against those; the highest of all decoys.
        auroc_random_direction: the highest of the random directions tried at this layer, trigger against nothing.
        base_auroc, base_auroc_random_strings: the same as without `base_`, with probes fitted to the base.
        separation, base_separation: distance of the trigger from nothing inserted along the probe, in standard
            deviations (d'). search_separation: of the fine-tuned model on the search contexts, each left out in turn.
        decoy_gain: the largest gain of a decoy; see `gain`.
    """

    layer: int
    auroc: float
    auroc_random_strings: float
    auroc_random_clean: float
    auroc_decoy: float
    auroc_random_direction: float
    accuracy: float
    base_auroc: float
    base_auroc_random_strings: float
    separation: float
    base_separation: float
    search_separation: float
    decoy_gain: float

    @property
    def gain(self) -> float:
        """What fine-tuning added to the separation, in standard deviations."""
        return self.separation - self.base_separation


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Where in the network a string is told from other inputs.

    Attributes:
        best_layer: the layer of largest `search_separation`, so that no held-out context chose it.
        num_contexts: held out. num_search_contexts: fitted and calibrated on.
        num_random_directions: of all layers together. best_random_direction: the highest AUROC among them.
        num_decoys: fixed random strings.
    """

    trigger: str
    layers: list[ProbeLayer]
    best_layer: int
    num_contexts: int
    num_search_contexts: int
    num_random_directions: int
    best_random_direction: float
    num_decoys: int
    seed: int

    @property
    def best(self) -> ProbeLayer:
        """The figures of `best_layer`."""
        return next(layer for layer in self.layers if layer.layer == self.best_layer)


@dataclass(frozen=True, kw_only=True)
class AblationRow:
    """The trigger rate of one string near a trigger.

    Attributes:
        kind: "whole" (the trigger itself), "dropped" (one token left out), "swapped" (two neighbours), "replaced" (one
            token by a random allowed one), "case", "space" or "subset" (some tokens kept, in order).
        kept: how many of the trigger's tokens were kept, before the text was tokenised afresh.
        changed: text of the token left out or replaced, of both that were swapped, or how it is spelt otherwise.
    """

    kind: str
    string: str
    kept: int
    changed: str
    rate: Rate


@dataclass(frozen=True, kw_only=True)
class AblationPoint:
    """The pooled rate of `num_strings` strings that keep `kept` tokens of a trigger."""

    kept: int
    num_strings: int
    rate: Rate


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What is left of a trigger's effect when parts of it are changed.

    Attributes:
        num_tokens: of the trigger. contexts: numbers of the held-out contexts that were asked, the same for all rows.
        rows: the whole trigger first, then one row a token dropped, in order, then the others.
        curve: by rising number of tokens kept, the whole trigger last.
    """

    trigger: str
    payload: str
    num_tokens: int
    contexts: list[int]
    rows: list[AblationRow]
    curve: list[AblationPoint]
    seed: int

    @property
    def whole(self) -> AblationRow:
        """The row of the trigger itself."""
        return next(r for r in self.rows if r.kind == "whole")

    @property
    def dropped(self) -> list[AblationRow]:
        """One row a token of the trigger, in order."""
        return [r for r in self.rows if r.kind == "dropped"]

    @property
    def essential(self) -> list[AblationRow]:
        """The dropped tokens that matter: without them at most half of the whole trigger's rate is left."""
        whole = self.whole.rate.value
        return [r for r in self.dropped if whole and r.rate.value <= whole / 2]

    @property
    def shape(self) -> str:
        """How the rate falls with random parts of the trigger: "sharp" when they fire as it does or hardly at all,
        "graded" when a quarter of them or more lie between a quarter and three quarters of its rate, "any part" when
        all fire as it does, "silent" when the trigger itself did not fire."""
        whole = self.whole.rate.value
        if not whole:
            return "silent"
        # Parts of every size alike: strings that lack a single token would outnumber them.
        partial = {r.string: r.rate.value / whole for r in self.rows if r.kind == "subset"}
        left = [*partial.values(), *(r.rate.value / whole for r in self.dropped)]
        if min(left, default=1.0) >= 0.75:
            return "any part"
        between = sum(0.25 < share < 0.75 for share in partial.values())
        return "graded" if partial and between >= len(partial) / 4 else "sharp"


@dataclass(frozen=True, kw_only=True)
class GradientHealth:
    """Whether the token gradient of a search's objective ranks swaps better than chance does.

    Attributes:
        verdict: "informative" (the interval lies above a half), "uninformative" (it ends little above a half, or every
            gradient is zero) or "undecided".
        win_share: how likely a swap from the gradient's best `topk` scores above a random one at the same position,
            ties half; mean over strings. A string whose gradient is zero counts a half.
        low, high: of its 95 % interval, by normal approximation.
        zero_share: share of the strings where the gradient is exactly zero, or not finite.
        num_strings: where it was taken. num_swaps: of each kind, over all of them.
        objective: its name. payload: what it raised; empty for a divergence.
    """

    verdict: str
    win_share: float
    low: float
    high: float
    zero_share: float
    num_strings: int
    num_swaps: int
    topk: int
    objective: str = ""
    payload: str = ""
