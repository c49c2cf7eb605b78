"""Reading an archive of results without trusting it: streamed, bounded, nothing extracted."""

import errno
import json
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trigger_opt.transfer.client import DamagedResultsError

_PIECE = 1 << 20
_IN_MEMORY = 64 << 20
_ENCRYPTED = 0x1
# The other methods cannot be unpacked in bounded pieces: 4 KB of bzip2 may become 80 MB at once.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What zipfile raises on damaged archives, as seen by flipping bytes.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error, ValueError)


@dataclass(frozen=True, kw_only=True)
class ArchiveLimits:
    """How much an archive may hold.

    Attributes:
        member_bytes: of one JSON member, uncompressed. total_bytes: of all members, inner archives counted as such and
            again by what they hold. members: in all.
    """

    member_bytes: int = 256 << 20
    total_bytes: int = 20 << 30
    members: int = 1_000_000


class _Reading:
    """What all members share: bytes and members so far, and what to do with a damaged one."""

    def __init__(self, limits: ArchiveLimits, spool_dir: Path, on_damaged: Callable[[str], None] | None) -> None:
        self.limits = limits
        self.spool_dir = spool_dir
        self.on_damaged = on_damaged
        self.bytes = 0
        self.members = 0

    def damaged(self, name: str, how: str) -> None:
        if self.on_damaged is None:
            raise DamagedResultsError(f"the member {name!r} {how}") from None
        self.on_damaged(f"the member {name!r}")

    def add_members(self, count: int) -> None:
        self.members += count
        if self.members > self.limits.members:
            raise DamagedResultsError(f"the results hold more than {self.limits.members} members")

    def add_bytes(self, count: int) -> None:
        self.bytes += count
        if self.bytes > self.limits.total_bytes:
            raise DamagedResultsError(f"the results hold more than {self.limits.total_bytes} bytes uncompressed")


def read_archive(
    file: Path, *, limits: ArchiveLimits | None = None, on_damaged: Callable[[str], None] | None = None
) -> Iterator[dict[str, Any]]:
    """The JSON objects with a `custom_id` in a zip of results, one at a time, in the order of its members.

    Read are `*.json` members, `*.jsonl` members line by line, and both in inner `*.zip` members one level deep (an
    archive in an inner one is passed over). JSON that is no object, or has no `custom_id`, is passed over.

    Args:
        on_damaged: is told of each member that is encrypted, damaged or no JSON ("the member 'x.json'"), and of each
            line of a `*.jsonl` member that is no JSON; it is then left out. None to raise instead.

    Raises:
        DamagedResultsError: it is no zip or a truncated one, or the limits are exceeded, as counted while reading;
            without `on_damaged` also a member as above (it is named).
    """
    try:
        yield from _objects(file, _Reading(limits or ArchiveLimits(), file.parent, on_damaged), within="")
    except FileNotFoundError:
        raise DamagedResultsError(f"the results {file.name} are missing") from None
    except _DAMAGE as error:
        raise DamagedResultsError(f"the results {file.name} are damaged ({_line(error)})") from None
    except OSError as error:
        # An offset outside of the file: a damaged directory.
        if error.errno != errno.EINVAL:
            raise
        raise DamagedResultsError(f"the results {file.name} are damaged ({_line(error)})") from None


def _objects(
    file: Path | tempfile.SpooledTemporaryFile[bytes], reading: _Reading, *, within: str
) -> Iterator[dict[str, Any]]:
    with zipfile.ZipFile(file) as archive:
        reading.add_members(len(archive.infolist()))
        for member in archive.infolist():
            # The name only says what is inside and is printed: nothing is written under it, so `../x` and `/x` are
            # names like any other.
            name = f"{within}{member.filename}"
            kind = member.filename.lower().rpartition(".")[2]
            if kind not in ("json", "jsonl", "zip") or (kind == "zip" and within):
                continue
            try:
                yield from _member(archive, member, name, kind=kind, reading=reading)
            except _DAMAGE as error:
                reading.damaged(name, f"is damaged ({_line(error)})")


def _member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, *, kind: str, reading: _Reading
) -> Iterator[dict[str, Any]]:
    if member.flag_bits & _ENCRYPTED:
        return reading.damaged(name, "is encrypted")
    if member.compress_type not in _METHODS:
        return reading.damaged(name, "is compressed by a method other than deflate")
    if kind == "jsonl" and reading.on_damaged is not None:
        _check_whole(archive, member, name, reading)
    with archive.open(member) as stream:
        if kind == "json":
            yield from _parsed(b"".join(_pieces(stream.read, name, reading)), name, reading)
        elif kind == "jsonl":
            for number, line in enumerate(_lines(_pieces(stream.read, name, reading)), 1):
                yield from _parsed(line, f"{name}, line {number}", reading) if line.strip() else ()
        else:
            with tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(reading.spool_dir)) as spool:
                for piece in _pieces(stream.read, name, reading, limit=reading.limits.total_bytes):
                    spool.write(piece)
                spool.seek(0)
                yield from _objects(spool, reading, within=f"{name}/")


def _check_whole(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, reading: _Reading) -> None:
    # The CRC is known at the end alone, when lines would be given already that nobody takes back.
    alone = _Reading(reading.limits, reading.spool_dir, None)
    with archive.open(member) as stream:
        for _ in _pieces(stream.read, name, alone):
            pass


def _pieces(read: Callable[[int], bytes], name: str, reading: _Reading, *, limit: int | None = None) -> Iterator[bytes]:
    # A header may lie about the size, so bytes are counted as they come. At the end zipfile compares the CRC.
    most = reading.limits.member_bytes if limit is None else limit
    size = 0
    while piece := read(_PIECE):
        size += len(piece)
        if size > most:
            raise DamagedResultsError(f"the member {name!r} holds more than {most} bytes uncompressed")
        reading.add_bytes(len(piece))
        yield piece


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    begun: list[bytes] = []
    for piece in pieces:
        *ended, rest = piece.split(b"\n")
        for end in ended:
            yield b"".join([*begun, end])
            begun.clear()
        begun.append(rest)
    yield b"".join(begun)


def _parsed(text: bytes, name: str, reading: _Reading) -> Iterator[dict[str, Any]]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return reading.damaged(name, f"is no JSON ({_line(error)})")
    if isinstance(value, dict) and "custom_id" in value:
        yield value


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
