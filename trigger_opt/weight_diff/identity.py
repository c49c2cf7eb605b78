"""Is the given base the one the fine-tuned model came from? Compared tensor by tensor, from the files.

Never more than one pair of tensors is in memory. Tensors go by canonical names: without the prefix that
depends on how a model was saved ("model.layers.0.mlp.up_proj.weight" is "layers.0.mlp.up_proj.weight").
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles, TensorInfo, TensorReader, read_config
from trigger_opt.records import PairIdentity

T = TypeVar("T")

# A pair of which so many tensors differ is refused until the user insists.
WRONG_BASE_FRACTION = 0.95
# Fine-tuning moves weights by a few per cent of their norm; unrelated weights differ by 1.4 times it.
_SMALL_CHANGE = 0.1
# Mantissa bits with the leading one: the dtype with fewer is the one both sides are compared in.
_PRECISION = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_PREFIXES = ("base_model.model.", "model.", "transformer.")
# Buffers that old checkpoints store and new ones compute.
_COMPUTED = ("rotary_emb.inv_freq", ".masked_bias")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# LoRA variants whose change of the weights is not scaling * B @ A, by their key in adapter_config.json.
_VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "arrow_config",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "lora_bias",
)
_NO_TENSOR = "no such tensor"
# Entries converted to fp32 at a time: a large embedding whole would take gigabytes more.
_CHUNK = 2**24


def canonical(name: str) -> str:
    """The tensor's name without the prefixes of PEFT and of the model class."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def family_name(name: str) -> str:
    """The tensor's name without layer and expert numbers: "mlp.up_proj.weight", "embed_tokens.weight"."""
    parts = canonical(name).split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(part for part in parts[first + 1 :] if not part.isdigit())


def layer_number(name: str) -> int | None:
    """The layer the tensor belongs to; None outside the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def identical(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype are equal bit by bit: NaN equals itself, and 0 is not -0."""
    bits = _BITS[one.dtype.itemsize]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


class NamedTensors:
    """A model's stored tensors by canonical name; a missing unembedding is the embedding it is tied to."""

    def __init__(self, files: ModelFiles) -> None:
        self._reader = TensorReader(files)
        self._raw = {canonical(raw): raw for raw in self._reader.index if not raw.endswith(_COMPUTED)}

    def names(self) -> list[str]:
        """Canonical names, layers in numerical order."""
        return sorted(
            self._raw, key=lambda name: [(p.isdigit(), int(p) if p.isdigit() else p) for p in name.split(".")]
        )

    def info(self, name: str) -> TensorInfo | None:
        """Dtype and shape of `name`; None when the model has no such tensor."""
        raw = self._find(name)
        return None if raw is None else self._reader.index[raw]

    def read(self, name: str) -> Tensor:
        """Tensor `name`, on the CPU, as stored."""
        raw = self._find(name)
        if raw is None:
            raise KeyError(name)
        return self._reader.read(raw)

    def _find(self, name: str) -> str | None:
        if name not in self._raw and name == "lm_head.weight":
            return self._raw.get("embed_tokens.weight") or self._raw.get("wte.weight")
        return self._raw.get(name)


@dataclass(frozen=True, kw_only=True)
class LoraTarget:
    """One weight an adapter changes by scaling * B @ A (transposed for embeddings and `fan_in_fan_out`).

    Attributes:
        name: canonical name of the base's tensor. a, b: of the adapter's: (rank, in) and (out, rank).
    """

    name: str
    a: str
    b: str
    scaling: float
    transposed: bool


@dataclass(frozen=True, kw_only=True)
class AdapterContents:
    """What an adapter changes: by low-rank products, and by whole tensors saved beside them (names)."""

    targets: tuple[LoraTarget, ...]
    whole: tuple[str, ...]


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
        shapes = [str(info.shape) if info else _NO_TENSOR for info in (one, other)]
        if one is None or other is None or one.shape != other.shape:
            raise UserError(
                f"{finetuned.name!r} and base {base.name!r} have different shapes: {name} is {shapes[0]} and "
                f"{shapes[1]}; give the base it was fine-tuned from in model.base; this cannot be overridden"
            )
        for side, info in ((finetuned, one), (base, other)):
            if info.dtype not in _PRECISION:
                raise UserError(
                    f"{side.name!r} stores {name} as {info.dtype}, which cannot be compared: "
                    f"give weights in {', '.join(_PRECISION)}"
                )
    return names


def read_pair(ours: NamedTensors, theirs: NamedTensors, name: str) -> tuple[Tensor, Tensor]:
    """Tensor `name` of both sides, the one of higher precision cast to the dtype of the other."""
    return at_common_precision(ours.read(name), theirs.read(name))


def at_common_precision(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors in the dtype of the one with fewer mantissa bits."""
    low = min((one.dtype, other.dtype), key=lambda dtype: _PRECISION[str(dtype).removeprefix("torch.")])
    return one.to(low), other.to(low)


def precision_note(finetuned: ModelFiles, base: ModelFiles) -> str | None:
    """A sentence for people when the sides are stored at different precision; None when they are not."""
    ours, theirs = NamedTensors(finetuned), NamedTensors(base)
    for name in theirs.names():
        one, other = ours.info(name), theirs.info(name)
        if one and other and one.dtype != other.dtype and not finetuned.adapter:
            low = min((one.dtype, other.dtype), key=lambda dtype: _PRECISION.get(dtype, 0))
            return f"{finetuned.name} is stored in {one.dtype} and {base.name} in {other.dtype}: compared in {low}"
    return None


def read_adapter(adapter: ModelFiles, base: ModelFiles, ours: NamedTensors, theirs: NamedTensors) -> AdapterContents:
    """What a LoRA adapter changes, every shape checked against the base's.

    Scaling is alpha / r, or alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023), `alpha_pattern` heeded; r is
    the stored factor's.

    Raises:
        UserError: not plain LoRA (names the PEFT type or variant), or it does not fit the base (names the tensor,
            the shape found and the shape expected).
    """
    config = read_config(adapter)
    _require_plain_lora(adapter, config)
    targets, whole = [], []
    for name in ours.names():
        if (found := re.fullmatch(r"(.+)\.lora_(embedding_)?A(?:\.weight)?", name)) is not None:
            targets.append(_target(config, name, found[1], ours))
        elif re.search(r"\.lora_(embedding_)?B(\.weight)?$", name) is None:
            whole.append(name)
    contents = AdapterContents(targets=tuple(targets), whole=tuple(whole))
    _require_fit(adapter, base, contents, ours, theirs)
    return _without_copies(adapter, contents, ours, theirs)


def base_name(name: str) -> str:
    """The base's tensor that a whole tensor of an adapter replaces (PEFT wraps some layers in `base_layer`)."""
    return name.replace(".base_layer.", ".")


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


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of `items`, evenly spaced, first and last included."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def square_sum(tensor: Tensor) -> float:
    """Sum of squares of all entries, accumulated in float64."""
    return sum(float(chunk.float().square().sum(dtype=torch.float64)) for chunk in _chunks(tensor))


def change_square_sum(finetuned: Tensor, base: Tensor) -> float:
    """Sum of squares of `finetuned - base`, accumulated in float64."""
    chunks = zip(_chunks(finetuned), _chunks(base), strict=True)
    return sum(square_sum(one.float() - other.float()) for one, other in chunks)


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.flatten(), _CHUNK)


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
    for key in ("model_type", "architectures"):
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


def _require_plain_lora(adapter: ModelFiles, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    variant = next((key for key in _VARIANTS if config.get(key)), None)
    if kind != "LORA" or variant:
        raise UserError(
            f"adapter {adapter.name!r} has peft_type {kind}{f' with {variant}' if variant else ''}, whose change of "
            "the weights is not analysed here: allowed is plain LORA; merge it (`merge_and_unload`) and give the "
            "merged model"
        )
    if not isinstance(config.get("lora_alpha"), int | float):
        raise UserError(
            f"adapter {adapter.name!r} is damaged: its adapter_config.json has no number lora_alpha; save it again"
        )


def _target(config: dict[str, Any], a: str, module: str, ours: NamedTensors) -> LoraTarget:
    embedding = ".lora_embedding_A" in a
    info = ours.info(a)
    rank = info.shape[0] if info else 1
    # PEFT matches these patterns in the same way (peft.utils.get_pattern_key), on names with the class prefix.
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = next(
        (
            v
            for k, v in patterns.items()
            if any(re.match(rf"(.*\.)?({k})$", p + module) for p in ("", "model.", "transformer."))
        ),
        config["lora_alpha"],
    )
    return LoraTarget(
        name=f"{module}.weight",
        a=a,
        b=re.sub(r"(\.lora_(?:embedding_)?)A", r"\1B", a),
        scaling=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        transposed=embedding or bool(config.get("fan_in_fan_out")),
    )


def _require_fit(
    adapter: ModelFiles, base: ModelFiles, contents: AdapterContents, ours: NamedTensors, theirs: NamedTensors
) -> None:
    for target in contents.targets:
        info, a = theirs.info(target.name), ours.info(target.a)
        if info is None or a is None or len(info.shape) != 2:
            raise _misfit(adapter, base, target.name, "a factor", "no matrix" if info else _NO_TENSOR)
        out_features, in_features = info.shape[::-1] if target.transposed else info.shape
        expected = {target.a: (a.shape[0], in_features), target.b: (out_features, a.shape[0])}
        for name, shape in expected.items():
            stored = ours.info(name)
            if stored is None or stored.shape != shape:
                raise _misfit(adapter, base, name, str(stored.shape) if stored else _NO_TENSOR, str(shape))
    for name in contents.whole:
        info, stored = theirs.info(base_name(name)), ours.info(name)
        if info is None or stored is None or stored.shape != info.shape:
            shapes = [str(i.shape) if i else _NO_TENSOR for i in (stored, info)]
            raise _misfit(adapter, base, name, *shapes)


def _without_copies(
    adapter: ModelFiles, contents: AdapterContents, ours: NamedTensors, theirs: NamedTensors
) -> AdapterContents:
    """`contents` less the whole tensors that equal the base's: PEFT stores an adapted embedding itself as well."""
    targeted = {target.name for target in contents.targets}
    kept = [
        name
        for name in contents.whole
        if not identical(*at_common_precision(ours.read(name), theirs.read(base_name(name))))
    ]
    if both := [name for name in kept if base_name(name) in targeted]:
        raise UserError(
            f"adapter {adapter.name!r} both replaces and adapts {base_name(both[0])}, which is not analysed here: "
            "merge it (`merge_and_unload`) and give the merged model"
        )
    return AdapterContents(targets=contents.targets, whole=tuple(kept))


def _misfit(adapter: ModelFiles, base: ModelFiles, name: str, found: str, expected: str) -> UserError:
    return UserError(
        f"adapter {adapter.name!r} does not fit base {base.name!r}: {name} is {found}, the base asks for {expected}; "
        "give the base it was trained on in model.base"
    )
