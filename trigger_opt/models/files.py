"""What lies in a model folder: finds the files of a model by name, refuses what must not be loaded, reads headers.

Nothing here builds a model. A name is a local folder or a hub repository "owner/repo".
"""

import json
import os
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trigger_opt.errors import UserError

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Pickles a trainer leaves beside the weights; nothing ever loads them here.
_TRAINER_PICKLES = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
_HUB_SECONDS = 5.0
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "tokenizer*"]
# Subfolders hold other formats or checkpoints; "consolidated" is the same weights a second time.
_HUB_IGNORED = ["*/*", "consolidated*"]
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


class HubUnreachableError(UserError):
    """A hub model is not on this machine and cannot be fetched."""


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The files of one model.

    Attributes:
        name: as the user gave it.
        folder: where they lie.
        weights: the weight files, safetensors (pickles only after `allow_pickle`); empty when they were not asked for.
        adapter: a PEFT adapter (adapter_config.json) rather than a whole model.
        own_code: the model is built by Python code that lies with it; never so unless that was allowed.
    """

    name: str
    folder: Path
    weights: tuple[Path, ...]
    adapter: bool
    own_code: bool = False


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One stored tensor: its file, dtype (torch's name, "bfloat16") and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return prod(self.shape) * dtype.itemsize


def find_model(
    name: str,
    *,
    allow_pickle: bool = False,
    allow_code: bool = False,
    token: str | None = None,
    weights: bool = True,
) -> ModelFiles:
    """The files of model `name`: a local folder when that path exists, else hub repository "owner/repo".

    A hub model is taken from the local cache, and downloaded when it is not there.

    Args:
        allow_pickle: accept pickled weights where there are no safetensors.
        allow_code: accept a repository that brings its own Python code.
        token: hub token; never printed.
        weights: False leaves the weights out (and does not download them): enough for a memory plan.

    Raises:
        UserError: no such folder or repository, no model in it, pickles or code that were not allowed, missing
            or empty files, or weights that are neither on this machine nor reachable.
    """
    folder = _local_folder(name)
    if folder is None:
        patterns = _hub_patterns(allow_pickle, allow_code, weights)
        folder = _cached_folder(name, patterns, weights) or _download(name, patterns, token)
    adapter = _is_adapter(name, folder)
    _refuse_code(name, folder, allow_code)
    found = _weight_files(name, folder, adapter, allow_pickle) if weights else ()
    own_code = not adapter and "auto_map" in _read_json(folder / CONFIG)
    return ModelFiles(name=name, folder=folder, weights=found, adapter=adapter, own_code=own_code)


def read_config(files: ModelFiles) -> dict[str, Any]:
    """The model's config.json, or the adapter's adapter_config.json.

    Raises:
        UserError: it is no JSON object.
    """
    return _read_json(files.folder / (ADAPTER_CONFIG if files.adapter else CONFIG))


def tensor_index(files: ModelFiles) -> dict[str, TensorInfo]:
    """Every stored tensor by name, from the files' headers; no tensor data is read.

    Raises:
        UserError: a file is damaged or truncated.
    """
    return {name: info for path in files.weights for name, info in _header(path).items()}


def validate_weights(files: ModelFiles) -> None:
    """Check that every header is readable and announces exactly as much data as the file holds.

    Milliseconds whatever the size: a truncated download is noticed before anything is loaded.

    Raises:
        UserError: names the damaged file.
    """
    for path in files.weights:
        _header(path)


class TensorReader:
    """Reads a model's tensors one at a time, in whatever file they are.

    Attributes:
        index: every stored tensor by name.
    """

    def __init__(self, files: ModelFiles) -> None:
        self.index = tensor_index(files)
        self._open: dict[Path, Any] = {}

    def read(self, name: str) -> Tensor:
        """Tensor `name`, on the CPU, as stored."""
        path = self.index[name].file
        if path not in self._open:
            self._open[path] = _open(path)
        opened = self._open[path]
        tensor: Tensor = opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
        return tensor


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk that holds (or would hold) `folder`."""
    probe = folder
    while not probe.exists():
        probe = probe.parent
    return shutil.disk_usage(probe).free


def _local_folder(name: str) -> Path | None:
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if not name or path.exists() or name[0] in f".~{os.sep}" or name.count(os.sep) > 1:
        raise UserError(
            f"{name!r} is no folder: give a folder with {CONFIG} and *.safetensors, or a hub name like owner/repo"
        )
    if not _is_hub_name(name):
        raise UserError(
            f"{name!r} is neither a folder here nor a hub name: give a model folder, or a name like owner/repo"
        )
    return None


def _is_hub_name(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _is_adapter(name: str, folder: Path) -> bool:
    if not (folder / ADAPTER_CONFIG).is_file():
        if not (folder / CONFIG).is_file():
            raise UserError(
                f"{name!r} is no model folder: it has neither {CONFIG} nor {ADAPTER_CONFIG}; "
                "give the folder that `save_pretrained` wrote"
            )
        return False
    if any((folder / full).exists() for full in ("model.safetensors", "model.safetensors.index.json")):
        raise UserError(
            f"{name!r} holds a whole model and an adapter: move {ADAPTER_CONFIG} or the model's weights elsewhere"
        )
    return True


def _refuse_code(name: str, folder: Path, allow_code: bool) -> None:
    for config in (CONFIG, "tokenizer_config.json"):
        path = folder / config
        if path.is_file() and "auto_map" in _read_json(path) and not allow_code:
            raise UserError(
                f"{name!r} brings its own Python code ({config} has auto_map), which would run on this machine: "
                "read it, then set model.allow_code=true, or give a model of a built-in architecture"
            )
        if path.is_file() and (elsewhere := _foreign_repository(_read_json(path).get("auto_map"))):
            raise UserError(
                f"{name!r} names code of another repository ({config}: {elsewhere}), which may change at any time: "
                "copy it into the model's folder and name it there, once you have read it"
            )


def _foreign_repository(auto_map: Any) -> str:
    """The first `owner/repo--module.Class` of an auto_map; empty where all code lies with the model."""
    named = auto_map.values() if isinstance(auto_map, dict) else []
    flat = [c for n in named for c in (n if isinstance(n, list) else [n])]
    return next((str(c) for c in flat if "--" in str(c)), "")


def _weight_files(name: str, folder: Path, adapter: bool, allow_pickle: bool) -> tuple[Path, ...]:
    found = _listed(folder, "adapter_model" if adapter else "model", ".safetensors")
    if not found:
        _refuse_pickles(name, folder, allow_pickle)
        found = _listed(folder, "adapter_model" if adapter else "pytorch_model", ".bin")
    if not found:
        raise UserError(
            f"{name!r} has no weights that transformers can load ({'adapter_model' if adapter else 'model'}"
            ".safetensors or its index): give the folder that `save_pretrained` wrote"
        )
    for path in found:
        if not path.is_file():
            raise UserError(
                f"{name!r} is incomplete: {path.name} is named in its index and missing; download the model again"
            )
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes): download the model again")
    return tuple(found)


def _refuse_pickles(name: str, folder: Path, allow_pickle: bool) -> None:
    pickles = [
        p.name for p in sorted(folder.iterdir()) if p.suffix in _PICKLES and not p.name.startswith(_TRAINER_PICKLES)
    ]
    if pickles and not allow_pickle:
        raise UserError(
            f"{name!r} has only pickled weights ({pickles[0]}), and unpickling can run code on this machine: "
            "convert them to safetensors, or set model.allow_pickle=true if you trust their author"
        )


def _listed(folder: Path, stem: str, suffix: str) -> list[Path]:
    """The single file, or the shards that the index names (whether they exist or not)."""
    single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or any(Path(str(s)).name != s for s in shards.values()):
        raise UserError(f"{index} is damaged (its weight_map names no files of this folder): download the model again")
    return [folder / shard for shard in sorted(set(shards.values()))]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): download or save the model again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is no JSON object: download or save the model again")
    return data


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            return safe_open(path, framework="pt", device="cpu")
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise _damaged(path, error) from None


def _header(path: Path) -> dict[str, TensorInfo]:
    # safe_open itself checks that the announced data covers the file exactly.
    opened = _open(path)
    if isinstance(opened, dict):
        return {
            name: TensorInfo(file=path, dtype=str(t.dtype).removeprefix("torch."), shape=tuple(t.shape))
            for name, t in opened.items()
            if isinstance(t, Tensor)
        }
    out = {}
    for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
        piece = opened.get_slice(name)
        dtype = piece.get_dtype()
        if dtype not in _DTYPES:
            raise UserError(f"{path}: tensor {name} has dtype {dtype}; allowed are {', '.join(_DTYPES)}")
        out[name] = TensorInfo(file=path, dtype=_DTYPES[dtype], shape=tuple(piece.get_shape()))
    return out


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:160]
    return UserError(
        f"{path} is damaged or truncated ({path.stat().st_size} bytes; {reason}): download it again "
        "(a git-lfs pointer needs `git lfs pull`)"
    )


def _hub_patterns(allow_pickle: bool, allow_code: bool, weights: bool) -> list[str]:
    patterns = list(_SMALL_FILES)
    if weights:
        patterns += ["*.safetensors"] + ["*.bin"] * allow_pickle
    return patterns + ["*.py"] * allow_code


def _cached_folder(name: str, patterns: list[str], weights: bool) -> Path | None:
    """The hub cache's folder of `name`; None when it is absent or something of it is missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(name, allow_patterns=patterns, ignore_patterns=_HUB_IGNORED, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None
    # transformers caches only the files it asked for, say a tokenizer, and leaves no list of the rest.
    stems = [
        ("model", ".safetensors"),
        ("adapter_model", ".safetensors"),
        ("pytorch_model", ".bin"),
        ("adapter_model", ".bin"),
    ]
    listed = next((found for stem in stems if (found := _listed(folder, *stem))), [])
    return folder if not weights or (listed and all(p.is_file() for p in listed)) else None


def _download(name: str, patterns: list[str], token: str | None) -> Path:
    """Download `name` into the hub cache, after a question with a short timeout whether the hub answers at all."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError  # type: ignore[attr-defined]

    wanted: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": _HUB_IGNORED, "token": token}
    try:
        # snapshot_download's own first request has no timeout: a silent network would hold it for minutes.
        HfApi(token=token).repo_info(name, timeout=_HUB_SECONDS)
        plan = snapshot_download(name, dry_run=True, **wanted)
        _require_room(name, Path(constants.HF_HUB_CACHE), sum(f.file_size or 0 for f in plan if f.will_download))
        return Path(snapshot_download(name, **wanted))
    except GatedRepoError:
        raise UserError(
            f"hub model {name!r} is gated: accept its licence on its page, then log in with `hf auth login` "
            "or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name!r} is neither a folder here nor a public hub model: check the spelling; a private one needs "
            "`hf auth login` or HF_TOKEN"
        ) from None
    except (HTTPError, OSError) as error:
        raise _unreachable(name, error) from None


def _unreachable(name: str, error: Exception) -> HubUnreachableError:
    return HubUnreachableError(
        f"the weights of {name!r} are not on this machine and the hub cannot be reached ({type(error).__name__}): "
        f"run `hf download {name}` on a machine with network and copy its cache folder, or give a local model folder"
    )


def _require_room(name: str, folder: Path, needed: int) -> None:
    if (free := free_bytes(folder)) < needed:
        raise UserError(
            f"no room to download {name!r} into {folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; "
            "free some space or point HF_HUB_CACHE at another disk"
        )
