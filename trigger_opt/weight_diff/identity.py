"""Is the given base the one the fine-tuned model came from? Compared tensor by tensor, from the files.

Never more than one pair of tensors is in memory.
"""

import math
from collections.abc import Sequence
from typing import Any

from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles, read_config
from trigger_opt.records import PairIdentity
from trigger_opt.weight_diff.adapter import base_name, read_adapter
from trigger_opt.weight_diff.tensors import (
    NO_TENSOR,
    PRECISION,
    NamedTensors,
    change_square_sum,
    family_name,
    identical,
    read_pair,
    spread,
    square_sum,
)

# A pair of which so many tensors differ is refused until the user insists.
WRONG_BASE_FRACTION = 0.95
# Fine-tuning moves weights by a few per cent of their norm; unrelated weights differ by 1.4 times it.
_SMALL_CHANGE = 0.1
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def identify(finetuned: ModelFiles, base: ModelFiles, *, allow_wrong_base: bool) -> PairIdentity:
    """Check that `base` is what `finetuned` came from: architecture, shapes, tokenizer, bit-identical tensors.

    Weights stored at different precision are compared at the lower one (see `precision_note`). A tokenizer that
    only one side carries is taken for both. For an adapter the weights are shared by construction, so only its
    shapes can speak against the base; the base's name in adapter_config.json is not looked at.

    Args:
        allow_wrong_base: go on although nearly all tensors differ.

    Raises:
        UserError: other architecture, shapes or tokenizer (nothing overrides those); an adapter that does not fit
            or is no plain LoRA; at least 95 % of the tensors differ and `allow_wrong_base` is not set.
    """
    if base.adapter:
        raise UserError(f"base {base.name!r} is an adapter: give a whole model in model.base")
    mismatch = tokenizer_mismatch(finetuned, base)
    if finetuned.adapter:
        _require_same_tokenizer(finetuned, base, mismatch)
        return _identify_adapter(finetuned, base)
    architecture = _require_same_architecture(finetuned, base)
    ours, theirs = NamedTensors(finetuned), NamedTensors(base)
    names = aligned_names(finetuned, base, ours, theirs)
    changed = [name for name in names if not identical(*read_pair(ours, theirs, name))]
    found = f"{len(changed)} of {len(names)} tensors differ ({1 - len(changed) / len(names):.1%} bit-identical)"
    _require_same_tokenizer(finetuned, base, mismatch, found)
    wrong = len(changed) >= WRONG_BASE_FRACTION * len(names)
    if wrong and not allow_wrong_base:
        raise _wrong_base(finetuned, base, found, _relative_change(ours, theirs, names))
    return _record("full", architecture, names, changed, overridden=wrong)


def aligned_names(finetuned: ModelFiles, base: ModelFiles, ours: NamedTensors, theirs: NamedTensors) -> list[str]:
    """Canonical names of the tensors of a full pair, checked to be the same set, with equal shapes.

    Raises:
        UserError: names the first tensor that one side lacks, has in another shape, or stores quantised.
    """
    names = theirs.names()
    names += sorted(set(ours.names()) - set(names))
    for name in names:
        one, other = ours.info(name), theirs.info(name)
        shapes = [str(info.shape) if info else NO_TENSOR for info in (one, other)]
        if one is None or other is None or one.shape != other.shape:
            raise UserError(
                f"{finetuned.name!r} and base {base.name!r} have different shapes: {name} is {shapes[0]} and "
                f"{shapes[1]}; give the base it was fine-tuned from in model.base; this cannot be overridden"
            )
        for side, info in ((finetuned, one), (base, other)):
            if info.dtype not in PRECISION:
                raise UserError(
                    f"{side.name!r} stores {name} as {info.dtype}, which cannot be compared: "
                    f"give weights in {', '.join(PRECISION)}"
                )
    return names


def tokenizer_mismatch(finetuned: ModelFiles, base: ModelFiles) -> str | None:
    """How the two tokenizers differ, in words; None when they are equal or only one side has one.

    Equal bytes of tokenizer.json settle it; otherwise the vocabularies, added tokens included, must be equal.

    Raises:
        UserError: a tokenizer cannot be loaded.
    """
    sides = (finetuned, base)
    if not all(any((side.folder / f).is_file() for f in _TOKENIZER_FILES) for side in sides):
        return None
    files = [side.folder / "tokenizer.json" for side in sides]
    if all(f.is_file() for f in files) and files[0].read_bytes() == files[1].read_bytes():
        return None
    ours, theirs = _vocabulary(finetuned), _vocabulary(base)
    if not (different := ours.items() ^ theirs.items()):
        return None
    return f"{len(different)} entries differ, such as {min(different)[0]!r}; {len(ours)} tokens against {len(theirs)}"


def _vocabulary(files: ModelFiles) -> dict[str, int]:
    from transformers import AutoTokenizer

    try:
        vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(files.folder, local_files_only=True).get_vocab()
    except (ValueError, OSError, ImportError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"the tokenizer of {files.name!r} cannot be loaded ({reason}): download or save it again"
        ) from None
    return vocabulary


def _require_same_tokenizer(
    finetuned: ModelFiles, base: ModelFiles, mismatch: str | None, found: str | None = None
) -> None:
    if mismatch:
        raise UserError(
            f"{finetuned.name!r} and base {base.name!r} have different tokenizers ({mismatch})"
            + (f", and {found}" if found else "")
            + ": give the base it was fine-tuned from in model.base; this cannot be overridden"
        )


def _require_same_architecture(finetuned: ModelFiles, base: ModelFiles) -> str:
    ours, theirs = read_config(finetuned), read_config(base)
    # A class of a repository's own has another name than the built-in one it stands for; the shapes must agree anyhow.
    named = () if finetuned.own_code else ("architectures",)
    for key in ("model_type", *named):
        if ours.get(key) and theirs.get(key) and ours[key] != theirs[key]:
            raise UserError(
                f"{finetuned.name!r} and base {base.name!r} are different architectures ({key} {ours[key]} and "
                f"{theirs[key]}): give the base it was fine-tuned from in model.base; this cannot be overridden"
            )
    return _architecture(theirs)


def _architecture(config: dict[str, Any]) -> str:
    return str((config.get("architectures") or [config.get("model_type", "unknown")])[0])


def _relative_change(ours: NamedTensors, theirs: NamedTensors, names: list[str]) -> float:
    """Frobenius norm of the change over the base's, pooled over at most 16 tensors spread over the model."""
    change = total = 0.0
    for name in spread(names, 16):
        one, other = read_pair(ours, theirs, name)
        change += change_square_sum(one, other)
        total += square_sum(other)
    return math.sqrt(change / total) if total else math.inf


def _wrong_base(finetuned: ModelFiles, base: ModelFiles, found: str, relative: float) -> UserError:
    reading = (
        "a full fine-tune of every tensor looks like this too"
        if relative < _SMALL_CHANGE
        else "too much for a fine-tune"
    )
    return UserError(
        f"base {base.name!r} does not look like the model {finetuned.name!r} came from: {found}, relative change "
        f"{relative:.3g} ({reading}); refused when {WRONG_BASE_FRACTION:.0%} or more differ: give the right base in "
        "model.base, or set model.allow_wrong_base=true to go on"
    )


def _record(
    kind: str, architecture: str, names: Sequence[str], changed: Sequence[str], *, overridden: bool
) -> PairIdentity:
    identical = len(names) - len(changed)
    return PairIdentity(
        kind=kind,
        architecture=architecture,
        tensors=len(names),
        identical=identical,
        identical_fraction=identical / len(names),
        same_architecture=True,
        same_tokenizer=True,
        changed_families=list(dict.fromkeys(family_name(name) for name in changed)),
        overridden=overridden,
    )


def _identify_adapter(adapter: ModelFiles, base: ModelFiles) -> PairIdentity:
    ours, theirs = NamedTensors(adapter), NamedTensors(base)
    contents = read_adapter(adapter, base, ours, theirs)
    touched = {target.name for target in contents.targets} | {base_name(name) for name in contents.whole}
    names = theirs.names() + sorted(touched - set(theirs.names()))
    changed = [name for name in names if name in touched]
    return _record("adapter", _architecture(read_config(base)), names, changed, overridden=False)
