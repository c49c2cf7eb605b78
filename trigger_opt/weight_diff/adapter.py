"""What a LoRA adapter changes, read from its files, every shape checked against the base's."""

import math
import re
from dataclasses import dataclass
from typing import Any

from trigger_opt.errors import UserError
from trigger_opt.models.files import ModelFiles, read_config
from trigger_opt.weight_diff.tensors import NO_TENSOR, NamedTensors, at_common_precision, identical

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
            raise _misfit(adapter, base, target.name, "a factor", "no matrix" if info else NO_TENSOR)
        out_features, in_features = info.shape[::-1] if target.transposed else info.shape
        expected = {target.a: (a.shape[0], in_features), target.b: (out_features, a.shape[0])}
        for name, shape in expected.items():
            stored = ours.info(name)
            if stored is None or stored.shape != shape:
                raise _misfit(adapter, base, name, str(stored.shape) if stored else NO_TENSOR, str(shape))
    for name in contents.whole:
        info, stored = theirs.info(base_name(name)), ours.info(name)
        if info is None or stored is None or stored.shape != info.shape:
            shapes = [str(i.shape) if i else NO_TENSOR for i in (stored, info)]
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
