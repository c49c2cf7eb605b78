"""Archives of results as servers make them, as accidents leave them, and as nobody should make them."""

import io
import json
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trigger_opt.transfer.archive import ArchiveLimits, read_archive
from trigger_opt.transfer.client import DamagedResultsError


def result(custom_id: str, text: str = "yes") -> str:
    return json.dumps({"custom_id": custom_id, "messages": [{"role": "assistant", "content": text}]})


def packed(members: Mapping[str, str | bytes], *, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def ids(file: Path, limits: ArchiveLimits | None = None) -> list[Any]:
    return [item["custom_id"] for item in read_archive(file, limits=limits)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the archive of a test lies, alone in its folder."""
    folder = tmp_path / "in" / "side"
    folder.mkdir(parents=True)
    return folder / "batch.zip"


def test_every_layout_is_read_in_the_order_of_its_members(file: Path) -> None:
    inner = packed({"deep/c.json": result("c"), "d.jsonl": f"{result('d')}\n\n{result('e')}"})
    file.write_bytes(
        packed(
            {
                "folder/": "",
                "a.json": result("a"),
                "lines.jsonl": f"{result('b')}\r\n",
                "inner.zip": inner,
                "UPPER.JSON": result("f"),
                "aggregate.json": json.dumps({"a": 1}),
                "list.json": "[]",
                "readme.txt": "no JSON",
            }
        )
    )
    assert ids(file) == ["a", "b", "c", "d", "e", "f"]
    assert next(read_archive(file))["messages"] == [{"role": "assistant", "content": "yes"}]


def test_archive_within_an_inner_one_is_passed_over(file: Path) -> None:
    innermost = packed({"x.json": result("x")})
    file.write_bytes(packed({"1.zip": packed({"2.zip": innermost, "y.json": result("y")})}))
    assert ids(file) == ["y"]


def test_names_that_lead_outside_are_read_and_write_nothing(file: Path, tmp_path: Path) -> None:
    inner = packed({"../../d.json": result("d")})
    names: dict[str, str | bytes] = {
        "../a.json": result("a"),
        "/abs/b.json": result("b"),
        "..\\c.json": result("c"),
        "../in.zip": inner,
    }
    file.write_bytes(packed(names))
    assert ids(file) == ["a", "b", "c", "d"]
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [file]


def test_large_inner_archive_leaves_nothing_behind(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trigger_opt.transfer.archive._IN_MEMORY", 100)
    file.write_bytes(packed({"in.zip": packed({f"{n}.json": result(str(n)) for n in range(50)})}))
    assert ids(file) == [str(n) for n in range(50)]
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_truncated_archive_is_noticed(file: Path, method: int, kept: float) -> None:
    whole = packed({f"{n}.json": result(str(n)) for n in range(20)}, method=method)
    file.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(DamagedResultsError, match=r"the results batch\.zip are damaged"):
        ids(file)


def test_what_is_no_zip_is_noticed(file: Path) -> None:
    with pytest.raises(DamagedResultsError, match=r"batch\.zip are missing"):
        ids(file)
    file.write_text("<html>Gateway timeout</html>")
    with pytest.raises(DamagedResultsError, match="not a zip"):
        ids(file)


def test_changed_byte_is_noticed_and_what_came_before_is_given(file: Path) -> None:
    whole = packed({"a.json": result("a"), "b.json": result("b", "unmistakable")}, method=zipfile.ZIP_STORED)
    file.write_bytes(whole.replace(b"unmistakable", b"unmistakeable"[:12]))
    read = read_archive(file)
    assert next(read)["custom_id"] == "a"
    with pytest.raises(DamagedResultsError, match=r"the member 'b\.json' is damaged \(Bad CRC-32"):
        next(read)


@pytest.mark.parametrize(("record", "field"), [(b"PK\x01\x02", 42), (b"PK\x05\x06", 16)])
@pytest.mark.parametrize("offset", [1000, 0x7FFFFFFF])
def test_damaged_offset_is_noticed(file: Path, record: bytes, field: int, offset: int) -> None:
    whole = bytearray(packed({"a.json": result("a")}))
    struct.pack_into("<I", whole, whole.index(record) + field, offset)
    file.write_bytes(whole)
    with pytest.raises(DamagedResultsError, match="damaged"):
        ids(file)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.json", "", r"'a\.json' is no JSON"),
        ("a.json", "{", r"'a\.json' is no JSON"),
        ("a.json", b"\xff\xfe\x00", r"'a\.json' is no JSON"),
        ("a.json", "[" * 200_000, r"'a\.json' is no JSON"),
        ("x/b.jsonl", f"{result('b')}\n{{", r"'x/b\.jsonl, line 2' is no JSON"),
        ("c.zip", "no archive", r"'c\.zip' is damaged"),
        ("c.zip", packed({"d.json": "no"}), r"'c\.zip/d\.json' is no JSON"),
    ],
)
def test_damaged_member_is_named(file: Path, name: str, content: str | bytes, named: str) -> None:
    file.write_bytes(packed({name: content}))
    with pytest.raises(DamagedResultsError, match=named) as caught:
        ids(file)
    assert "\n" not in caught.value.reason


def leniently(file: Path, limits: ArchiveLimits | None = None) -> tuple[list[Any], list[str]]:
    """Identifiers of what is read, and what is reported as damaged."""
    damaged: list[str] = []
    read = [item["custom_id"] for item in read_archive(file, limits=limits, on_damaged=damaged.append)]
    return read, damaged


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_members_are_left_out_when_they_are_reported(file: Path, method: int) -> None:
    members: dict[str, str | bytes] = {f"{n}.json": result(str(n)) for n in range(4)}
    members |= {"1.json": "{", "lines.jsonl": f"{result('a')}\n{{\n{result('b')}", "in.zip": "no archive"}
    members["inner.zip"] = packed({"x.json": "no", "y.json": result("y")})
    whole = packed(members, method=method)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        member = archive.getinfo("2.json")
    # Behind the header (30 bytes and the name) and a little way into the content.
    broken = bytearray(whole)
    broken[member.header_offset + 30 + len("2.json") + 20] ^= 0x15
    file.write_bytes(broken)
    read, damaged = leniently(file)
    assert read == ["0", "3", "a", "b", "y"]
    assert damaged == [
        f"the member {name!r}" for name in ("1.json", "2.json", "lines.jsonl, line 2", "in.zip", "inner.zip/x.json")
    ]


def test_lines_of_a_member_that_fails_its_crc_are_all_left_out(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In many pieces, so that the first lines come long before the CRC.
    monkeypatch.setattr("trigger_opt.transfer.archive._PIECE", 100)
    lines = "\n".join([result("a", "unmistakable"), result("b", "yes " * 5000)])
    whole = packed({"lines.jsonl": lines, "c.json": result("c")}, method=zipfile.ZIP_STORED)
    file.write_bytes(whole.replace(b"unmistakable", b"unmistakeabl"))
    assert leniently(file) == (["c"], ["the member 'lines.jsonl'"])


def test_truncated_and_too_large_archives_are_refused_also_when_damage_is_reported(file: Path) -> None:
    whole = packed({f"{n}.json": result(str(n)) for n in range(20)})
    file.write_bytes(whole)
    with pytest.raises(DamagedResultsError, match="more than 19 members"):
        leniently(file, ArchiveLimits(members=19))
    with pytest.raises(DamagedResultsError, match="holds more than 10 bytes"):
        leniently(file, ArchiveLimits(member_bytes=10))
    file.write_bytes(whole[:-30])
    with pytest.raises(DamagedResultsError, match=r"the results batch\.zip are damaged"):
        leniently(file)


def test_encrypted_member_is_named(file: Path) -> None:
    whole = bytearray(packed({"a.json": result("a")}))
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        whole[whole.index(signature) + flags] |= 1
    file.write_bytes(whole)
    with pytest.raises(DamagedResultsError, match=r"'a\.json' is encrypted"):
        ids(file)
    assert leniently(file) == ([], ["the member 'a.json'"])


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_cannot_be_bounded_are_refused(file: Path, method: int) -> None:
    file.write_bytes(packed({"a.json": result("a")}, method=method))
    with pytest.raises(DamagedResultsError, match=r"'a\.json' is compressed by a method other than deflate"):
        ids(file)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (ArchiveLimits(member_bytes=999), r"'big\.json' holds more than 999 bytes"),
        (ArchiveLimits(total_bytes=1030), "the results hold more than 1030 bytes"),
        (ArchiveLimits(members=2), "the results hold more than 2 members"),
    ],
)
def test_limits(file: Path, limits: ArchiveLimits, said: str) -> None:
    small, big = json.dumps({"custom_id": "small"}), json.dumps({"custom_id": "big"}).ljust(1000)
    file.write_bytes(packed({"small.json": small, "big.json": big, "last.json": small}))
    with pytest.raises(DamagedResultsError, match=said):
        ids(file, limits)
    exact = ArchiveLimits(member_bytes=1000, total_bytes=1000 + 2 * len(small), members=3)
    assert ids(file, exact) == ["small", "big", "small"]


def test_limits_hold_across_inner_archives(file: Path) -> None:
    one = packed({"a.json": result("a"), "b.json": result("b")})
    file.write_bytes(packed({"1.zip": one, "2.zip": one}))
    assert ids(file, ArchiveLimits(members=6)) == ["a", "b", "a", "b"]
    with pytest.raises(DamagedResultsError, match="more than 5 members"):
        ids(file, ArchiveLimits(members=5))
    with pytest.raises(DamagedResultsError, match=r"'1\.zip/a\.json' holds more than 10 bytes"):
        ids(file, ArchiveLimits(member_bytes=10))


def test_bomb_that_lies_about_its_size_is_stopped_early(file: Path) -> None:
    whole = bytearray(packed({"bomb.json": b" " * (64 << 20)}))
    for signature, size in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", whole, whole.index(signature) + size, 10)
    file.write_bytes(whole)
    with pytest.raises(DamagedResultsError, match=r"'bomb\.json' is damaged"):
        ids(file)
    file.write_bytes(packed({"bomb.json": b" " * (64 << 20)}))
    tracemalloc.start()
    try:
        with pytest.raises(DamagedResultsError, match="more than 4194304 bytes"):
            ids(file, ArchiveLimits(member_bytes=4 << 20))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_long_lines_come_one_at_a_time(file: Path) -> None:
    count, length = 40, 1_500_000
    file.write_bytes(packed({"a.jsonl": "\n".join(result(str(n), "x" * length) for n in range(count))}))
    tracemalloc.start()
    try:
        assert [item["custom_id"] for item in read_archive(file)] == [str(n) for n in range(count)]
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_ten_thousand_members_need_little_memory(file: Path) -> None:
    file.write_bytes(packed({f"{n}.json": result(f"id-{n}", "word " * 100) for n in range(10_000)}))
    tracemalloc.start()
    try:
        count = sum(1 for item in read_archive(file) if item["custom_id"].startswith("id-"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 10_000
    assert peak < 30 << 20


def test_clients_and_archive_leave_torch_alone() -> None:
    names = ("archive", "clients", "clients.jsinfer", "clients.openai_batch", "clients.openai_chat")
    imports = "; ".join(f"import trigger_opt.transfer.{name}" for name in names)
    code = f"{imports}; import sys; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"
