"""Data objects: gzip members, equal bytes, bounded memory, damage that is seen."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import time
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit_archiver.exits import InputError, Mismatch
from audit_archiver.formats import members, rows
from tests.unit.profile import fixed

LEVELS = (1, 4, 6, 7, 8, 9)


def line(number: int, width: int = 40) -> bytes:
    """One row whose text gzip halves."""
    noise = hashlib.sha256(str(number).encode()).hexdigest() * (width // 64 + 1)
    return b'{"id":%d,"created_at":"2024-01-01T00:00:03.5+00:00","v":"%s"}\n' % (number, noise[:width].encode())


def some(count: int, width: int = 40) -> list[bytes]:
    """That many rows."""
    return [line(number, width) for number in range(count)]


def pack(chunks: Iterable[bytes], level: int = 6) -> tuple[bytes, dict[str, Any]]:
    """The object and its summary, written chunk by chunk."""
    out = io.BytesIO()
    writer = members.Writer(out, level)
    for chunk in chunks:
        writer.write(chunk, chunk.count(b"\n"))
    writer.close()
    return out.getvalue(), writer.summary()


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """`data` in pieces."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in zip(edges, edges[1:])]


def read(packed: bytes, places: Sequence[int] = ()) -> tuple[bytes, members.Reader]:
    """What a reader gives for an object that arrives in pieces."""
    reader = members.Reader(cut(packed, places))
    return b"".join(reader), reader


@fixed
@given(count=st.integers(0, 1700), width=st.sampled_from([0, 40, 700]), level=st.sampled_from(LEVELS),
       written=st.lists(st.integers(0, 1700), max_size=6), arrived=st.lists(st.integers(0, 1 << 20), max_size=8))
def test_what_was_written_in_any_chunks_is_read_back_from_any_chunks(
        count: int, width: int, level: int, written: list[int], arrived: list[int]) -> None:
    made = some(count, width)
    edges = [0, *sorted(place % (count + 1) for place in written), count]
    packed, summary = pack([b"".join(made[start:end]) for start, end in zip(edges, edges[1:])], level)
    whole = b"".join(made)
    plain, reader = read(packed, arrived)
    assert plain == whole
    assert (reader.bytes, reader.gz_bytes) == (len(whole), len(packed))
    assert summary == {"sha256": hashlib.sha256(whole).hexdigest(), "bytes": len(whole),
                       "gz_sha256": hashlib.sha256(packed).hexdigest(), "gz_bytes": len(packed),
                       "member_rows": members.MEMBER_ROWS, "members": summary["members"]}
    assert (reader.sha256(), reader.gz_sha256()) == (summary["sha256"], summary["gz_sha256"])
    assert len(summary["members"]) == -(-count // members.MEMBER_ROWS)


@fixed
@given(count=st.integers(1, 1100), places=st.lists(st.integers(0, 1100), min_size=1, max_size=30), level=st.sampled_from(LEVELS))
@pytest.mark.req("T19")
def test_equal_rows_give_equal_bytes_however_the_pipe_cut_them(count: int, places: list[int], level: int) -> None:
    made = some(count, 300)
    edges = [0, *sorted(place % (count + 1) for place in places), count]
    once = pack([b"".join(made)], level)
    assert pack([b"".join(made[start:end]) for start, end in zip(edges, edges[1:])], level) == once
    assert pack(made, level) == once


@pytest.mark.req("T19")
@pytest.mark.parametrize("level", LEVELS)
def test_equal_rows_give_equal_bytes_at_another_time(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    once = pack(some(1200), level)
    monkeypatch.setattr(time, "time", lambda: 4102444800.0)
    assert pack(some(1200), level) == once
    assert once[0][4:8] == b"\0\0\0\0", "the time in the header is 0"


@pytest.mark.req("T19")
@pytest.mark.parametrize("width", [members.SLICE_BYTES - 90, members.SLICE_BYTES, 3 * members.SLICE_BYTES + 17])
def test_rows_as_long_as_a_slice_give_equal_bytes_too(width: int) -> None:
    made = some(7, width)
    assert pack(made) == pack([b"".join(made)])
    assert read(pack(made)[0])[0] == b"".join(made)


@pytest.mark.req("REQ-S3-012", "REQ-S3-013")
@pytest.mark.parametrize("level", LEVELS)
def test_zcat_and_gzip_read_the_object_whole(level: int, tmp_path: Path) -> None:
    packed, _ = pack(some(1234), level)
    assert gzip.decompress(packed) == b"".join(some(1234))
    (tmp_path / "data.jsonl.gz").write_bytes(packed)
    told = subprocess.run(["gzip", "-dc", str(tmp_path / "data.jsonl.gz")], capture_output=True, check=True)
    assert told.stdout == b"".join(some(1234)) and told.stderr == b""
    assert [json.loads(text)["id"] for text in told.stdout.split(b"\n")[:-1]] == list(range(1234))


def test_each_member_can_be_fetched_and_unpacked_alone() -> None:
    made = some(1700)
    packed, summary = pack([b"".join(made)])
    edges = [*summary["members"], len(packed)]
    for number, (start, end) in enumerate(zip(edges, edges[1:])):
        assert gzip.decompress(packed[start:end]) == b"".join(made[number * 500:(number + 1) * 500])


@pytest.mark.req("REQ-S3-013")
def test_every_level_names_its_library() -> None:
    assert [members.compressor(level) for level in range(1, 10)] == [
        *[("isal", 1)] * 6, ("isal", 3), ("zlib", 8), ("zlib", 9)]


@pytest.mark.req("T26")
def test_a_flipped_bit_anywhere_is_seen_in_the_packed_digest_or_ends_in_mismatch() -> None:
    packed, summary = pack(some(600))
    for place in range(0, len(packed), 97):
        broken = bytearray(packed)
        broken[place] ^= 1 << place % 8
        reader = members.Reader([bytes(broken)])
        try:
            for _ in reader:
                pass
        except Mismatch:
            continue
        assert reader.gz_sha256() != summary["gz_sha256"]


@pytest.mark.req("T20")
@pytest.mark.parametrize("end", [-1, -8, -9, 10, 1])
def test_an_object_that_was_cut_off_is_a_mismatch(end: int) -> None:
    packed, _ = pack(some(600))
    with pytest.raises(Mismatch, match="ends inside a gzip member"):
        read(packed[:end])


@pytest.mark.req("T20")
def test_an_object_cut_at_the_border_of_two_members_is_short_and_no_error_of_gzip() -> None:
    packed, summary = pack(some(1200))
    plain, reader = read(packed[:summary["members"][1]])
    assert plain == b"".join(some(500))
    assert reader.gz_sha256() != summary["gz_sha256"]


@pytest.mark.req("T20")
def test_what_is_no_gzip_or_has_something_behind_it_is_a_mismatch() -> None:
    packed, _ = pack(some(3))
    for data in (b"{}\n", b"\0" * 20, packed + b"\0" * 512, packed + b"x"):
        with pytest.raises(Mismatch):
            read(data)


@pytest.mark.req("T22")
def test_an_upload_trailer_stored_inside_the_object_is_a_mismatch() -> None:
    packed, _ = pack(some(3))
    framed = b"%x\r\n" % len(packed) + packed + b"\r\n0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n"
    with pytest.raises(Mismatch, match="no gzip stream"):
        read(framed)


def test_an_object_that_ends_inside_a_row_is_a_mismatch() -> None:
    with pytest.raises(Mismatch, match="ends inside a row"):
        read(gzip.compress(b'{"id":1}\n{"id":2'))


def test_an_object_without_rows_is_read_as_none() -> None:
    assert pack([]) == (b"", {"sha256": hashlib.sha256().hexdigest(), "bytes": 0, "gz_sha256": hashlib.sha256().hexdigest(),
                              "gz_bytes": 0, "member_rows": 500, "members": []})
    assert read(b"")[0] == b""


def test_rows_that_pack_a_thousand_to_one_are_unpacked_a_little_at_a_time() -> None:
    packed, _ = pack([b'{"v":"' + b"a" * 20000 + b'"}\n'] * 3000)
    assert len(packed) < 1 << 19
    reader = members.Reader([packed])
    longest = max(map(len, reader))
    assert reader.bytes > 60_000_000
    assert longest <= members.UNPACKED_BYTES + 20100


def test_the_writer_keeps_no_chunk_longer_than_the_call() -> None:
    class Chunk(bytes):
        gone = False

        def __del__(self) -> None:
            Chunk.gone = True

    writer = members.Writer(io.BytesIO(), 6)
    writer.write(Chunk(b"".join(some(501))), 501)
    assert Chunk.gone


def test_chunks_of_whole_lines_come_out() -> None:
    def pieces() -> Iterator[bytes]:
        packed, _ = pack(some(1700, 500))
        for place in range(0, len(packed), 1000):
            yield packed[place:place + 1000]
    assert all(chunk.endswith(b"\n") for chunk in members.Reader(pieces()))


ADDED = {"_archived_at": "2025-12-30T02:15:47Z", "_batch_id": "9f" * 32, "_source_database": 'pr"o\\d', "_source_table": "lög\u2028"}


@fixed
@given(values=st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20), min_size=1, max_size=3), min_size=1, max_size=20),
       unescaped=st.booleans())
@pytest.mark.req("REQ-S3-016")
def test_the_fields_of_the_archive_are_the_last_ones_of_every_row(values: list[dict[str, str]], unescaped: bool) -> None:
    made = [json.dumps(value, ensure_ascii=not unescaped, separators=(",", ":")).encode() + b"\n" for value in values]
    whole = rows.Appender(ADDED).extend([line[:-2] for line in made]).split(b"\n")
    assert whole.pop() == b""
    for before, after in zip(made, whole):
        assert after.startswith(before[:-2] + b',"_archived_at":')
        assert json.loads(after) == {**json.loads(before), **ADDED}
        assert rows.Stripper(ADDED).strip(after + b"\n") == before
    assert len(whole) == len(made)


def test_a_line_that_does_not_end_in_its_batch_s_fields_is_not_stripped() -> None:
    stripper = rows.Stripper({**ADDED, "_batch_id": "0" * 64})
    for line in (rows.Appender(ADDED).extend([b'{"id":1']), b'{"id":1}\n', b"\n"):
        with pytest.raises(InputError, match="does not end as its batch's rows do"):
            stripper.strip(line)


def test_the_fields_of_the_archive_are_those_of_the_requirement() -> None:
    batch = {"archived_at": "2025-12-30T02:15:47Z", "id": "9f" * 32, "database": "prod", "table": "t", "schema": "public"}
    assert rows.added_fields(batch) == {"_archived_at": "2025-12-30T02:15:47Z", "_batch_id": "9f" * 32, "_source_database": "prod",
                                        "_source_table": "t"}
