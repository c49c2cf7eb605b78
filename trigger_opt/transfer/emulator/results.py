"""The zip of results: one JSON a line, flat or in zips within the zip, and its hostile versions."""

import io
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from trigger_opt.transfer.emulator.state import Batch, State
from trigger_opt.transfer.requests import CHAT, Answer, Line

_PER_PART = 50
_ZEROS = 1 << 31
# CRC-32 of 2**31 zero bytes.
_CRC_OF_ZEROS = 0x4DBDF21C
_BLOCK = 1 << 20

Member = tuple[str, str]


def record(line: Line, answer: Answer) -> dict[str, Any]:
    """An answer as the results hold it."""
    made: dict[str, Any] = {"custom_id": line.custom_id}
    if answer.error is not None:
        # guess: the shape of a failed line is not known.
        return made | {"error": {"code": "server_error", "message": answer.error}}
    if line.request.endpoint == CHAT:
        return made | {"messages": [{"role": "assistant", "content": answer.text}]}
    return made | {"activations": {name: array.tolist() for name, array in answer.activations.items()}}


def write_zip(state: State, batch: Batch, *, nested: bool) -> None:
    """Write the results of an answered batch, with the faults that belong to it."""
    part = state.part()
    with state.answers_path(batch.id).open(encoding="utf-8") as answers:
        members = _members(batch, answers)
        with ZipFile(part, "w", ZIP_DEFLATED, compresslevel=1) as archive:
            for name, content in _nested(members) if nested else members:
                archive.writestr(name, content)
    os.replace(part, state.zip_path(batch.id))


def hostile_zip(state: State, batch_id: str, kind: str) -> Path:
    """The results with members that lead out of the folder (`zip_traversal`), or that inflate to 2 GB (`zip_bomb`)."""
    path = state.zip_path(batch_id, kind)
    if not path.is_file():
        part = state.part()
        shutil.copyfile(state.zip_path(batch_id), part)
        _add_traversal(part) if kind == "zip_traversal" else _add_bomb(part)
        os.replace(part, path)
    return path


def _members(batch: Batch, answers: Iterable[str]) -> Iterator[Member]:
    for number, text in enumerate(answers):
        made = json.loads(text)
        kinds = {r.kind for r in batch.rules if r.strikes(number, made["custom_id"])}
        if "omit_lines" in kinds:
            continue
        content = json.dumps(_spoilt(made, kinds))
        # guess: the names of members; jsinfer reads every top-level *.json.
        yield f"result_{number:06d}.json", content
        if "duplicate_lines" in kinds:
            yield f"result_{number:06d}_again.json", content


def _spoilt(made: dict[str, Any], kinds: set[str]) -> dict[str, Any]:
    if "fail_lines" in kinds:
        return {"custom_id": made["custom_id"], "error": {"code": "server_error", "message": "injected"}}
    for message in made.get("messages", ()):
        if "empty_answers" in kinds:
            message["content"] = ""
        if "extra_keys" in kinds:
            message["finish_reason"] = "stop"
    return made


def _nested(members: Iterator[Member]) -> Iterator[tuple[str, bytes]]:
    number = 0
    while group := list(islice(members, _PER_PART)):
        inner = io.BytesIO()
        with ZipFile(inner, "w", ZIP_DEFLATED, compresslevel=1) as archive:
            for name, content in group:
                archive.writestr(name, content)
        yield f"part_{number:04d}.zip", inner.getvalue()
        number += 1


def _add_traversal(path: Path) -> None:
    content = json.dumps({"custom_id": "escaped", "messages": [{"role": "assistant", "content": "escaped"}]})
    with ZipFile(path, "a", ZIP_DEFLATED) as archive:
        for name in (
            "../escaped.json",
            "../../escaped.json",
            "/escaped.json",
            "a/../../escaped.json",
            "..\\escaped.json",
        ):
            archive.writestr(name, content)


def _add_bomb(path: Path) -> None:
    """A member of 2 GB of zeros in 2 MB, without compressing 2 GB: one compressed block, repeated."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = squeeze.compress(bytes(_BLOCK)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    data = block * (_ZEROS // _BLOCK) + squeeze.flush(zlib.Z_FINISH)
    info = ZipInfo("bomb.json")
    with ZipFile(path, "a", ZIP_STORED) as archive:
        archive.writestr(info, data)
        info.compress_type, info.file_size, info.CRC = ZIP_DEFLATED, _ZEROS, _CRC_OF_ZEROS
        fp: Any = archive.fp
        end = fp.tell()
        fp.seek(info.header_offset)
        fp.write(info.FileHeader(zip64=False))
        fp.seek(end)
