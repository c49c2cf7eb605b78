"""Which two models are these? One hash of a pair, the same wherever its folders lie, in about a second."""

import hashlib
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trigger_opt.errors import UserError
from trigger_opt.models.files import ADAPTER_CONFIG, CONFIG, ModelFiles, validate_weights

SAMPLED_BYTES = 12 * 2**20
# What a disk reads at once.
_BLOCK = 4096
_SETTINGS = (CONFIG, ADAPTER_CONFIG, "generation_config.json")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# Settings that say where a model lay and what wrote it.
_PLACES = ("_name_or_path", "name_or_path", "base_model_name_or_path", "transformers_version", "peft_version")


@dataclass(frozen=True)
class Span:
    """The bytes of one tensor in its file."""

    start: int
    size: int


def pair_fingerprint(finetuned: ModelFiles, base: ModelFiles) -> str:
    """Hex SHA-256 of a fine-tuned model, or adapter, and its base: of weight file names, their sizes, headers and a
    sample of every tensor, of both configurations, of code that lies with a model and builds it, and of the base's
    tokenizer, which the pair uses.

    Of each model at most SAMPLED_BYTES (12 MiB) of tensors are read, beside them its headers and small files: two
    models of 14 GB take 25 MB and their tokenizer, 64 MB with the largest there are. What has no more than 12 MiB, as
    most adapters, is read whole. Of a larger model each tensor is read at its beginning, its end and evenly between
    (about 40 KiB of each in a 7B model).

    Two pairs that differ only outside the samples get one fingerprint, and what refuted a string on one is then
    believed of the other. Training moves far too many weights for that; single weights edited by hand may escape.
    The same weights in other shards, or under other file names, are another pair.

    Raises:
        UserError: a weight file or a configuration is damaged.
        ValueError: the files were found without their weights.
    """
    digest = hashlib.sha256()
    for side, files in (("finetuned", finetuned), ("base", base)):
        _feed(digest, side, model_fingerprint(files).encode())
    for name in _TOKENIZER:
        _feed_small(digest, base.folder / name)
    return digest.hexdigest()


def model_fingerprint(files: ModelFiles, *, sampled_bytes: int = SAMPLED_BYTES) -> str:
    """Hex SHA-256 of one model without its tokenizer; see `pair_fingerprint`."""
    if not files.weights:
        raise ValueError(f"{files.name!r} was found without its weights; use find_model(…, weights=True)")
    validate_weights(files)
    digest = hashlib.sha256()
    for name in _SETTINGS:
        _feed_small(digest, files.folder / name)
    for path in sorted(files.folder.rglob("*.py")) if files.own_code else ():
        _feed_small(digest, path)
    layouts = [_layout(path) for path in files.weights]
    sizes = [span.size for _, spans in layouts for span in spans]
    shares = iter(_shares(sizes, sampled_bytes))
    for path, (header, spans) in zip(files.weights, layouts, strict=True):
        _feed(digest, f"{path.name} {path.stat().st_size}", header)
        with path.open("rb", buffering=0) as file:
            for span in spans:
                for piece in _pieces(span, next(shares)):
                    file.seek(piece.start)
                    digest.update(file.read(piece.size))
    return digest.hexdigest()


def _feed(digest: Any, label: str, data: bytes) -> None:
    # With its length: what belongs to one label must not pass for the next.
    digest.update(f"{label}\n{len(data)}\n".encode() + data)


def _feed_small(digest: Any, path: Path) -> None:
    if not path.is_file():
        return
    data = path.read_bytes()
    if path.name.endswith("config.json"):
        try:
            kept = {k: v for k, v in dict(json.loads(data)).items() if k not in _PLACES}
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is no JSON object ({error}): download or save the model again") from None
        data = json.dumps(kept, sort_keys=True).encode()
    _feed(digest, path.name, data)


def _layout(path: Path) -> tuple[bytes, list[Span]]:
    """A weight file's header, and where its tensors lie."""
    return _safetensors_layout(path) if path.suffix == ".safetensors" else _pickle_layout(path)


def _safetensors_layout(path: Path) -> tuple[bytes, list[Span]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    tensors = {name: info for name, info in json.loads(header).items() if name != "__metadata__"}
    offsets = sorted(info["data_offsets"] for info in tensors.values())
    return header, [Span(8 + length + begin, end - begin) for begin, end in offsets]


def _pickle_layout(path: Path) -> tuple[bytes, list[Span]]:
    # PyTorch's pickles are uncompressed archives with one entry for each tensor's storage.
    with zipfile.ZipFile(path) as archive:
        entries = sorted(archive.infolist(), key=lambda e: e.header_offset)
    header = json.dumps([(e.filename, e.file_size, e.CRC) for e in entries]).encode()
    starts = [e.header_offset for e in entries]
    ends = [*starts[1:], path.stat().st_size]
    return header, [Span(start, end - start) for start, end in zip(starts, ends, strict=True)]


def _shares(sizes: Sequence[int], budget: int) -> list[int]:
    """Bytes of each tensor to read: as equal as can be, with what small tensors leave over given to the larger."""
    shares = [0] * len(sizes)
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    for left, i in zip(range(len(sizes), 0, -1), order, strict=True):
        shares[i] = min(sizes[i], budget // left)
        budget -= shares[i]
    return shares


def _pieces(span: Span, share: int) -> Iterator[Span]:
    """`share` bytes of a tensor: all of it, or blocks at its beginning, its end and evenly between."""
    if share >= span.size:
        yield span
        return
    count = max(2, share // _BLOCK)
    size = share // count
    for i in range(count):
        yield Span(span.start + i * (span.size - size) // (count - 1), size)
