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


class _Spent:
    """Bytes and members read so far."""

    def __init__(self, limits: ArchiveLimits) -> None:
        self.limits = limits
        self.bytes = 0
        self.members = 0

    def add_members(self, count: int) -> None:
        self.members += count
        if self.members > self.limits.members:
            raise DamagedResultsError(f"the results hold more than {self.limits.members} members")

    def add_bytes(self, count: int) -> None:
        self.bytes += count
        if self.bytes > self.limits.total_bytes:
            raise DamagedResultsError(f"the results hold more than {self.limits.total_bytes} bytes uncompressed")


def read_archive(file: Path, *, limits: ArchiveLimits | None = None) -> Iterator[dict[str, Any]]:
    """The JSON objects with a `custom_id` in a zip of results, one at a time, in the order of its members.

    Read are `*.json` members, `*.jsonl` members line by line, and both in inner `*.zip` members one level deep (an
    archive in an inner one is passed over). JSON that is no object, or has no `custom_id`, is passed over.

    Raises:
        DamagedResultsError: it is no zip or a truncated one, a member is encrypted, damaged or no JSON (it is named),
            or the limits are exceeded, as counted while reading.
    """
    try:
        yield from _objects(file, _Spent(limits or ArchiveLimits()), within="", spool_dir=file.parent)
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
    file: Path | tempfile.SpooledTemporaryFile[bytes], spent: _Spent, *, within: str, spool_dir: Path
) -> Iterator[dict[str, Any]]:
    with zipfile.ZipFile(file) as archive:
        spent.add_members(len(archive.infolist()))
        for member in archive.infolist():
            # The name only says what is inside and is printed: nothing is written under it, so `../x` and `/x` are
            # names like any other.
            name = f"{within}{member.filename}"
            kind = member.filename.lower().rpartition(".")[2]
            if kind not in ("json", "jsonl", "zip") or (kind == "zip" and within):
                continue
            try:
                yield from _member(archive, member, name, kind, spent, spool_dir)
            except _DAMAGE as error:
                raise DamagedResultsError(f"the member {name!r} is damaged ({_line(error)})") from None


def _member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, kind: str, spent: _Spent, spool_dir: Path
) -> Iterator[dict[str, Any]]:
    if member.flag_bits & _ENCRYPTED:
        raise DamagedResultsError(f"the member {name!r} is encrypted")
    if member.compress_type not in _METHODS:
        raise DamagedResultsError(f"the member {name!r} is compressed by a method other than deflate")
    with archive.open(member) as stream:
        if kind == "json":
            yield from _parsed(b"".join(_pieces(stream.read, name, spent)), name)
        elif kind == "jsonl":
            for number, line in enumerate(_lines(_pieces(stream.read, name, spent)), 1):
                yield from _parsed(line, f"{name}, line {number}") if line.strip() else ()
        else:
            with tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(spool_dir)) as spool:
                for piece in _pieces(stream.read, name, spent, limit=spent.limits.total_bytes):
                    spool.write(piece)
                spool.seek(0)
                yield from _objects(spool, spent, within=f"{name}/", spool_dir=spool_dir)


def _pieces(read: Callable[[int], bytes], name: str, spent: _Spent, *, limit: int | None = None) -> Iterator[bytes]:
    # A header may lie about the size, so bytes are counted as they come. At the end zipfile compares the CRC.
    most = spent.limits.member_bytes if limit is None else limit
    size = 0
    while piece := read(_PIECE):
        size += len(piece)
        if size > most:
            raise DamagedResultsError(f"the member {name!r} holds more than {most} bytes uncompressed")
        spent.add_bytes(len(piece))
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


def _parsed(text: bytes, name: str) -> Iterator[dict[str, Any]]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedResultsError(f"the member {name!r} is no JSON ({_line(error)})") from None
    if isinstance(value, dict) and "custom_id" in value:
        yield value


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
