"""Reads W&B's offline files: blocks of a LevelDB log that hold protobuf records.

wandb 0.31 no longer has a Python reader (`wandb.sdk.internal.datastore` is gone). Format: a 7-byte header, then blocks
of 32 KB with chunks (crc u32, length u16, kind u8, data); a record is one chunk or first, middle..., last.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768
_HEADER = 7
_FULL, _FIRST, _LAST = 1, 2, 4


@dataclass(frozen=True, kw_only=True)
class OfflineArtifact:
    """An artifact as it will be uploaded: its name, type and the names of its files."""

    name: str
    kind: str
    files: list[str]


@dataclass(kw_only=True)
class OfflineRun:
    """What one session of a run left on disk.

    Attributes:
        history: logged rows without W&B's own keys, each with its "_step". times: when each was logged, Unix seconds.
        system: samples of the machine's use, names as W&B's ("cpu", "proc.memory.rssMB", …).
        exit_code: None when the session was killed.
    """

    run_id: str = ""
    project: str = ""
    group: str = ""
    job_type: str = ""
    name: str = ""
    host: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    system: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[OfflineArtifact] = field(default_factory=list)
    exit_code: int | None = None


def sessions(run_dir: Path) -> list[Path]:
    """The offline sessions of a run folder, oldest first (`latest-run` is a link to one of them)."""
    return sorted((run_dir / "wandb").glob("offline-run-*"))


def read_run(session: Path) -> OfflineRun:
    """The run in one offline session folder."""
    (path,) = session.glob("run-*.wandb")
    run = OfflineRun()
    for record in _records(path):
        _add(run, record)
    return run


def read_table(session: Path, name: str) -> dict[str, Any]:
    """The logged table `name`: its "columns" and "data"."""
    (path,) = (session / "files" / "media" / "table").glob(f"{name}_*.table.json")
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return table


def _add(run: OfflineRun, record: Any) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        about = record.run
        run.run_id, run.project, run.group = about.run_id, about.project, about.run_group
        run.name, run.host, run.tags = about.display_name, about.host, list(about.tags)
        run.job_type = about.job_type
        run.config.update({k: v for k, v in _items(about.config.update).items() if k != "_wandb"})
    elif kind == "history":
        row = _items(record.history.item)
        own = {"_timestamp", "_runtime", "_wandb"}
        run.history.append({k: v for k, v in row.items() if k not in own} | {"_step": record.history.step.num})
        run.times.append(row["_timestamp"])
    elif kind == "stats":
        run.system.append(_items(record.stats.item))
    elif kind == "summary":
        run.summary.update(_items(record.summary.update))
    elif kind == "artifact":
        files = [entry.path for entry in record.artifact.manifest.contents]
        run.artifacts.append(OfflineArtifact(name=record.artifact.name, kind=record.artifact.type, files=files))
    elif kind == "exit":
        run.exit_code = record.exit.exit_code


def _items(items: Any) -> dict[str, Any]:
    """Keys and JSON values; a nested key becomes "outer.inner"."""
    return {item.key or ".".join(getattr(item, "nested_key", ())): json.loads(item.value_json) for item in items}


def _records(path: Path) -> Iterator[Any]:
    buffer = b""
    for kind, data in _chunks(path.read_bytes()):
        buffer = data if kind in (_FULL, _FIRST) else buffer + data
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(buffer)
            yield record


def _chunks(data: bytes) -> Iterator[tuple[int, bytes]]:
    if data[:4] != b":W&B" or data[4:6] != b"\xe1\xbe":
        raise ValueError("not a .wandb file")
    at = _HEADER
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        _crc, size, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        if left < _HEADER or (kind == 0 and size == 0):
            at += left
            continue
        end = at + _HEADER + size
        if end > len(data):
            return  # a killed run tears its last record
        yield kind, data[at + _HEADER : end]
        at = end
