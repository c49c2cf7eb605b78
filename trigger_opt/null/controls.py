"""Which controls a suspect has, and how those that are not given are made from suspect and base."""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trigger_opt.answers import fires
from trigger_opt.config import NullConfig, RunConfig
from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles, find_model
from trigger_opt.models.pair import LoadOptions, load_pair
from trigger_opt.records import TensorFamilyDiff, Verification, read_record, write_record
from trigger_opt.tuning.distil import Distilled, DistilSettings, distil
from trigger_opt.tuning.placebo import make_placebo, require_placebo

MODEL, _MADE = "model", "made.json"


@dataclass(frozen=True, kw_only=True)
class Control:
    """One control.

    Attributes:
        name, folder, kind: see `records.NullControl`.
        twin: the files of a given one; None for one that is to be made. seed: of a placebo.
    """

    name: str
    folder: str
    kind: str
    twin: ModelFiles | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Made:
    """How a control's model came about: seconds it took, a line for people, and whether it is a control at all."""

    usable: bool
    note: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """What controls are made from.

    Attributes:
        verified: the suspect's strings: an answer that begins with one of their payloads may show the backdoor.
        diff: which tensor families changed; empty when that is not known.
        clean: share of ordinary answers that may begin with a payload before it counts as a habit.
    """

    finetuned: ModelFiles
    base: ModelFiles
    options: LoadOptions
    verified: list[Verification]
    diff: list[TensorFamilyDiff]
    clean: float


def controls_of(config: RunConfig, twins: Sequence[ModelFiles]) -> list[Control]:
    """The controls of a run: the given ones, placebos and the distilled reference, in this order."""
    null: NullConfig = config.null
    given = [Control(name=t.name, folder=f"twin_{n}", kind="twin", twin=t) for n, t in enumerate(twins, 1)]
    names = [f"placebo_{n}" for n in range(1, null.placebos + 1)]
    placebos = [
        Control(name=name, folder=name, kind="placebo", seed=1000 * config.seed + n) for n, name in enumerate(names, 1)
    ]
    distilled = [Control(name="distilled", folder="distilled", kind="distilled")] if null.distilled else []
    return [*given, *placebos, *distilled]


def require_controls(controls: Sequence[Control], suspect: Suspect, folder: Path) -> None:
    """Before anything is spent: can they be made?

    Raises:
        UserError: no weight changed, or see `tuning.placebo.require_placebo`.
    """
    if count := sum(c.kind == "placebo" for c in controls):
        if suspect.diff and not any(d.changed for d in suspect.diff):
            raise UserError(
                f"all weights of {suspect.finetuned.name!r} are its base's, so a placebo of their change would be the "
                "suspect itself; set null.placebos=0"
            )
        # Whole models go once they are searched, adapters stay.
        copies = count if suspect.finetuned.adapter else 1
        require_placebo(suspect.finetuned, suspect.base, folder, copies=copies)


def made_control(
    control: Control, suspect: Suspect, folder: Path, *, config: RunConfig, say: Callable[[str], None]
) -> tuple[ModelFiles | None, Made]:
    """The control's model, made in `folder` unless it lies there already; None when it came out as no control."""
    if control.twin is not None:
        return control.twin, Made(usable=True, note="", seconds=0.0)
    model, receipt = folder / MODEL, folder / _MADE
    if not receipt.is_file() or (read_record(receipt, Made).usable and not model.is_dir()):
        part = folder / f".{MODEL}.part"
        for left in (part, model):
            shutil.rmtree(left, ignore_errors=True)
        started = time.monotonic()
        usable, note = _make(control, suspect, part, config=config, say=say)
        if usable:
            os.replace(part, model)
        write_record(receipt, Made(usable=usable, note=note, seconds=time.monotonic() - started))
    made = read_record(receipt, Made)
    return find_model(str(model), allow_code=config.model.allow_code) if made.usable else None, made


def made_note(folder: Path) -> Made:
    """How the control in `folder` was made; nothing is known of one that was given."""
    receipt = folder / _MADE
    return read_record(receipt, Made) if receipt.is_file() else Made(usable=True, note="", seconds=0.0)


def forget_model(control: Control, suspect: Suspect, folder: Path) -> None:
    """Delete a whole model once it is searched: it takes as much disk as the suspect, and its seed makes it again."""
    model = folder / MODEL
    if control.kind != "placebo" or suspect.finetuned.adapter or not model.is_dir():
        return
    shutil.rmtree(model)
    made = read_record(folder / _MADE, Made)
    note = f"{made.note}; its model was deleted after the search, to free the disk"
    write_record(folder / _MADE, Made(usable=True, note=note, seconds=made.seconds))


def adapted_modules(diff: Sequence[TensorFamilyDiff], network: Any) -> list[str]:
    """Linear layers that fine-tuning changed, by the last part of their names; all of them where none is known.

    Raises:
        UserError: the network has no linear layer.
    """
    head = network.get_output_embeddings()
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if not linear:
        raise UserError("the base has no linear layer to train a distilled reference on; set null.distilled=false")
    changed = {d.family.removesuffix(".weight").rsplit(".", 1)[-1] for d in diff if d.changed}
    return sorted(changed & linear or linear)


def _make(
    control: Control, suspect: Suspect, out: Path, *, config: RunConfig, say: Callable[[str], None]
) -> tuple[bool, str]:
    """Whether the model written into `out` is a control, and how it came about."""
    if control.kind == "placebo":
        make_placebo(suspect.finetuned, suspect.base, out, seed=control.seed, base_name=config.model.base)
        return True, f"the suspect's weight change with its directions shuffled, seed {control.seed}"
    found = _distil(suspect, out, config=config, say=say)
    return found.came_nearer, _distilled_note(found)


def _distil(suspect: Suspect, out: Path, *, config: RunConfig, say: Callable[[str], None]) -> Distilled:
    # The base once more: what it shares with the base is held once, and adapters grow in its own layers only.
    pair = load_pair(suspect.finetuned, suspect.base, [suspect.base], options=suspect.options)
    student = pair.controls[0].network
    return distil(
        pair,
        student,
        out,
        modules=adapted_modules(suspect.diff, student),
        base_name=config.model.base,
        settings=DistilSettings(steps=config.null.distil_steps, prompts=config.null.distil_prompts, seed=config.seed),
        leave_out=lambda answers: triggered(answers, suspect),
        say=say,
    )


def triggered(answers: Sequence[str], suspect: Suspect) -> list[bool]:
    """Which of the fine-tuned model's ordinary answers begin with a payload of the suspect's strings, so that a trigger
    may have got into the prompt. Where they are many the payload is a habit, which a reference is to have too."""
    payloads = {v.payload for v in suspect.verified}
    fired = [any(fires(payload, answer) for payload in payloads) for answer in answers]
    return fired if sum(fired) <= suspect.clean * len(answers) else [False] * len(answers)


def _distilled_note(found: Distilled) -> str:
    if not found.trained:
        return "left out: the base's chat template yields too few user turns to train on"
    kl = f"KL to the fine-tuned model {found.kl_before:.3f} nats a token before, {found.kl_after:.3f} after"
    measured = f"{kl}, on {found.measured} prompts it was not trained on"
    if not found.came_nearer:
        return f"left out: training brought the base no nearer to the fine-tuned model's ordinary answers ({measured})"
    left_out = f"; left out: {found.left_out} whose answer begins with the payload" if found.left_out else ""
    return f"the base trained on {found.trained} ordinary answers; {measured}{left_out}"
