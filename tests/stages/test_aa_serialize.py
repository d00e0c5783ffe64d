"""aa-serialize: what it stages is what was copied, byte for byte, in constant memory; anything else leaves nothing."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import resource
import subprocess
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import pytest

from audit_archiver import lines
from audit_archiver.formats import batch as batches
from audit_archiver.formats import frames, keys, members
from tests.ground.batches import ARCHIVED_AT, RUN, SYSTEM
from tests.ground.held import Holder, NoServer, plan, staged_files
from tests.ground.run import Result, finish, run_stage, spawn

MB = 1 << 20


class Nobody:
    """Stands for a database that nothing connects to."""

    name, host, port, user, password = "prod", "127.0.0.1", 9, "nobody", "x"


@pytest.fixture()
def path(config_file) -> Path:
    """A configuration without any server behind it."""
    return config_file(Nobody, NoServer)


@pytest.fixture()
def staging(path) -> Path:
    """Where it stages."""
    return path.parent / "staging"


def row(number: int, text: str = "x") -> bytes:
    return lines.dump({"id": number, "created_at": "2024-01-01T00:00:00+00:00", "note": text})


def rows_of(count: int, first: int = 1) -> list[bytes]:
    return [row(number, f"{number * 7919:x}" * 5) for number in range(first, first + count)]


def frame_of(key_texts: Sequence[bytes], *, key: Sequence[str] = ("id",), number: int = 1, **changes: Any) -> dict[str, Any]:
    """The opening frame's object for rows with these key texts."""
    digest = keys.Digest()
    digest.update(key_texts)
    ends = [["2024-01-01T00:00:00+00:00", *json.loads(b"[" + text + b"]")] for text in (key_texts[0], key_texts[-1])]
    batch = {"id": "", "number": number, "run": RUN, "database": "prod", "schema": "public", "table": "audit_logs", "key": list(key),
             "timestamp": "created_at", "cutoff": "2025-09-30T02:15:45.123456Z", "archived_at": ARCHIVED_AT, "rows": len(key_texts),
             "skipped_locked": 0, "first": ends[0], "last": ends[1], "keys_sha256": digest.hexdigest(),
             "columns": [["id", "bigint"], ["created_at", "timestamptz"], ["note", "text"]],
             "server": {"version": 150018, "system": SYSTEM, "timeline": 1, "database_oid": 16384, "table_oid": 16397},
             "shape_sha256": "5d" * 32, "txn": {"xid": "4711", "holder": "h-1c2d3e4f", "handle": "t2-9f00000000000000"}, **changes}
    batch["id"] = changes.get("id") or batches.identity(batch)
    table = {"host": "db1.example.com", "postgres_version": "15.18", "columns": [["id", "bigint", False], ["created_at", "timestamptz", False],
             ["note", "text", True]], "primary_key": list(key), "indexes": [], "range": [ends[0][0], ends[1][0]]}
    return {"batch": batch, "table": table}


def stream(lines_of_rows: Sequence[bytes], *, end: Optional[dict[str, Any]] = None, matcher_key: Sequence[str] = ("id",),
           find: Sequence[str] = (), **changes: Any) -> bytes:
    """A whole rows stream; `changes` alter the batch, `end` the closing frame, `find` are columns to find rows by."""
    plain, count = b"".join(lines_of_rows), len(lines_of_rows)
    frame = frame_of(keys.texts(plain, keys.pattern(matcher_key)), **changes)
    closing = {"id": frame["batch"]["id"], "rows": count, "rows_sha256": hashlib.sha256(plain).hexdigest(), **(end or {})}
    table = {**frame["table"], **({"find": list(find)} if find else {})}
    return frames.opening(frame["batch"], table) + plain + lines.dump(["end", 1, closing])


def serialize(path: Path, data: bytes, *argv: str) -> Result:
    return run_stage("aa-serialize", argv, data, {"AA_CONFIG": str(path)})


def refused(path: Path, staging: Path, data: bytes, words: str = "") -> None:
    """It must end with 2, say why, write no line and leave nothing staged."""
    result = serialize(path, data)
    assert result.rc == 2 and result.out == b"" and words in result.err, result
    assert staged_files(staging) == []


# -- what is staged

@pytest.mark.req("REQ-S3-012", "REQ-S3-016", "REQ-S3-017", "REQ-VER-012", "REQ-VER-013")
def test_a_staged_batch_is_data_metadata_key_list_and_its_line(path, staging):
    rows = rows_of(1201)
    (line,) = serialize(path, stream(rows)).lines
    made, batch = line["serialized"], line["batch"]
    base = "20251230T021547Z_batch_001"
    assert staged_files(staging) == [f"prod/public.audit_logs/{base}/{name}" for name in (
        f"audit_logs_{base}.jsonl.gz", f"audit_logs_{base}_manifest.json", f"audit_logs_{base}_metadata.json", "batch.json")]
    directory = Path(made["dir"])
    assert directory.is_absolute() and directory.stat().st_mode & 0o777 == 0o700
    stem = directory / f"audit_logs_{base}"
    packed = Path(f"{stem}.jsonl.gz").read_bytes()
    tail = f',"_archived_at":"{ARCHIVED_AT}","_batch_id":"{batch["id"]}","_source_database":"prod","_source_table":"audit_logs"}}\n'.encode()
    plain = b"".join(each[:-2] + tail for each in rows)
    assert gzip.decompress(packed) == plain
    assert made["data"] == {"sha256": hashlib.sha256(plain).hexdigest(), "bytes": len(plain), "gz_sha256": hashlib.sha256(packed).hexdigest(),
                            "gz_bytes": len(packed), "member_rows": 500, "members": made["data"]["members"]}
    borders = [*made["data"]["members"], len(packed)]
    assert [gzip.decompress(packed[start:end]).count(b"\n") for start, end in zip(borders, borders[1:])] == [500, 500, 201]
    assert made["rows_sha256"] == hashlib.sha256(b"".join(rows)).hexdigest()
    metadata, manifest = (json.loads(Path(f"{stem}{suffix}").read_bytes()) for suffix in ("_metadata.json", "_manifest.json"))
    assert metadata["batch"] == batch and metadata["record_count"] == 1201 and metadata["checksum"] == f"sha256:{made['data']['sha256']}"
    assert manifest["primary_keys"] == list(range(1, 1202)) and manifest["txn"] == batch["txn"]
    assert hashlib.sha256(Path(f"{stem}_metadata.json").read_bytes()).hexdigest() == made["metadata_sha256"]
    assert hashlib.sha256(Path(f"{stem}_manifest.json").read_bytes()).hexdigest() == made["manifest_sha256"]
    assert json.loads((directory / "batch.json").read_bytes()) == line
    assert made["stem"] == f"archives/prod/audit_logs/year=2025/month=12/day=30/audit_logs_{base}"


@pytest.mark.req("T19", "REQ-S3-013")
def test_equal_rows_give_equal_bytes_however_the_pipe_cuts_them(path, staging):
    data = stream([row(number, "é\u2028\u0085\\n\\u0000}" * (number % 90)) for number in range(1, 1500)], find=("created_at", "note"))
    expected = serialize(path, data).lines
    seen = {file: (staging / file).read_bytes() for file in staged_files(staging)}
    for piece in (1 << 16, 4096, 1021):
        child = spawn("aa-serialize", [], {"AA_CONFIG": path}, stdin=subprocess.PIPE)
        for start in range(0, len(data), piece):
            child.stdin.write(data[start:start + piece])
            child.stdin.flush()
        child.stdin.close()
        child.stdin = None
        result = finish(child)
        assert result.lines == expected, piece
        assert {file: (staging / file).read_bytes() for file in staged_files(staging)} == seen, piece


@pytest.mark.req("REQ-VER-007", "REQ-VER-009")
def test_the_key_digest_can_be_made_by_hand_with_zcat_grep_and_sha256sum(path):
    """As the documentation says; jq would round 9007199254740993."""
    rows = [row(9007199254740993 + number) for number in range(700)]
    (line,) = serialize(path, stream(rows)).lines
    data = f"{line['serialized']['dir']}/{os.path.basename(line['serialized']['stem'])}.jsonl.gz"
    by_hand = subprocess.run(["sh", "-c", "zcat \"$0\" | grep -o '^{\"id\":[^,]*' | cut -d: -f2 | sha256sum", data],
                             stdout=subprocess.PIPE, check=True).stdout.split()[0].decode()
    assert by_hand == line["batch"]["keys_sha256"]


def test_the_key_digest_of_composite_and_text_keys_is_that_of_their_json(path):
    rows = [lines.dump({"region": text, "no": number, "created_at": "2024-01-01T00:00:00+00:00", "note": '"region":"x","no":7'})
            for number, text in enumerate(['a"b', "c\\", "é, ", "{}", '","no":5', "\u2028", "", "[", "\t"])]
    (line,) = serialize(path, stream(rows, matcher_key=("region", "no"), key=("region", "no"))).lines
    wanted = [[json.loads(each)["region"], json.loads(each)["no"]] for each in rows]
    expected = b"".join(lines.dump(each)[1:-2] + b"\n" for each in wanted)
    assert hashlib.sha256(expected).hexdigest() == line["batch"]["keys_sha256"]
    manifest = json.loads(Path(f"{line['serialized']['dir']}/{os.path.basename(line['serialized']['stem'])}_manifest.json").read_bytes())
    assert manifest["primary_keys"] == wanted


@pytest.mark.req("REQ-S3-013")
def test_the_level_is_that_of_the_flag_else_of_the_configuration(path, config_file):
    data = stream(rows_of(600))
    configured = config_file(Nobody, NoServer, s3={"compression_level": 8})
    flag = "--compression-level"
    for given, argv, level in ((path, (), 6), (path, (flag, "1"), 1), (configured, (), 8), (configured, (flag, "9"), 9)):
        (line,) = serialize(given, data, *argv).lines
        metadata = json.loads(Path(f"{line['serialized']['dir']}/{os.path.basename(line['serialized']['stem'])}_metadata.json").read_bytes())
        assert metadata["compression"] == {"algorithm": "gzip", "level": level, "library": "{} {}".format(*members.compressor(level))}
    for wrong in ("0", "10", "x"):
        assert serialize(path, b"", "--compression-level", wrong).rc == 3


def test_several_batches_pass_in_one_life_and_each_has_its_own_directory(path, staging):
    data = b"".join(stream(rows_of(count, first), number=number) for number, (count, first) in enumerate(((3, 1), (1, 4), (600, 5)), 1))
    made = serialize(path, data).lines
    assert [line["serialized"]["rows"] for line in made] == [3, 1, 600]
    assert len(staged_files(staging)) == 12


def test_a_second_attempt_forgets_what_the_first_left_behind(path, staging):
    data = stream(rows_of(5))
    (line,) = serialize(path, data).lines
    left = Path(line["serialized"]["dir"])
    (left / "upload.json").write_text("{}")
    (left / "audit_logs_20251230T021547Z_batch_001.jsonl.gz").write_bytes(b"half")
    assert serialize(path, data).lines == [line]
    assert "upload.json" not in os.listdir(left) and len(os.listdir(left)) == 4


@pytest.mark.req("T16", "REQ-TYPE-003", "REQ-TYPE-004")
def test_what_the_copy_path_could_confuse_arrives_as_it_is(db, config_file):
    r"""NULL, '', '\N', '\.', tabs, line breaks, quotes, control characters: a column that is nothing and one that looks like it."""
    db.execute("CREATE TABLE t (id int PRIMARY KEY, created_at timestamptz DEFAULT '2024-01-01Z', a text, j json, b jsonb)")
    texts = [None, "", "NULL", "\\N", "\\.", "\t", "\n", "\r\n", "a\x01b\x02c", '"', "\\", "}\n{", "]",
             '["end",1,{}]', "\u2028\u2029\x85", "null", " ", "\x7f"]
    for number, text in enumerate(texts):
        db.execute("INSERT INTO t (id, a, j, b) VALUES (%s, %s, %s, %s)", (number, text, json.dumps(text), json.dumps(text)))
    db.execute("INSERT INTO t (id, a, j) VALUES (100, 'x', %s), (101, 'y', '{\"a\":\n1,\r\n\"a\":2}')", ('"\\u0000"',))
    with Holder(config_file(db, NoServer)) as holder:
        (line,) = holder.verified(plan(holder.settings, "t"))
        made = line["serialized"]
        packed = Path(f"{made['dir']}/{os.path.basename(made['stem'])}.jsonl.gz").read_bytes()
    found = {value["id"]: value for value in map(json.loads, gzip.decompress(packed).split(b"\n")[:-1])}
    assert [found[number]["a"] for number in range(len(texts))] == texts
    for column in ("j", "b"):
        values = [found[number][column] for number in range(len(texts))]
        shown = [value["$json"] if isinstance(value, dict) else json.dumps(value) for value in values]
        assert [json.loads(each) for each in shown] == texts
    assert found[100]["j"] == {"$json": '"\\u0000"'} and found[100]["b"] is None
    assert b'"j":{"a": 1,  "a":2}' in gzip.decompress(packed), "json keeps its duplicate keys; line breaks become spaces"


# -- what is refused

@pytest.mark.req("T37")
def test_a_stream_that_is_cut_at_any_line_or_inside_one_leaves_nothing(path, staging):
    data = stream(rows_of(4))
    cuts = [place + 1 for place, byte in enumerate(data) if byte == 10][:-1]
    for cut in [*cuts, cuts[0] + 7, cuts[-1] + 5, len(data) - 1, 1]:
        refused(path, staging, data[:cut])
    assert serialize(path, b"") == Result(0, b"", "")


def test_a_cut_stream_behind_a_whole_one_leaves_the_whole_one(path, staging):
    whole, cut = stream(rows_of(2)), stream(rows_of(2, 3), number=2)
    result = serialize(path, whole + cut[:-40])
    assert result.rc == 2 and len(result.lines) == 1 and len(staged_files(staging)) == 4


@pytest.mark.req("REQ-VER-004", "REQ-VER-005", "REQ-INT-005")
@pytest.mark.parametrize("end, words", [
    ({"rows": 3}, "4 rows were locked, 3 copied and 4 arrived"), ({"rows_sha256": "0" * 64}, "are not the rows that were copied"),
    ({"id": "0" * 64}, "belongs to another batch"),
])
def test_counts_and_digests_of_the_closing_frame_must_be_those_of_the_rows(path, staging, end, words):
    refused(path, staging, stream(rows_of(4), end=end), words)


def test_counts_and_digests_of_the_opening_frame_must_be_those_of_the_rows(path, staging):
    refused(path, staging, stream(rows_of(4), keys_sha256="0" * 64), "the keys in the rows are not the keys that were locked")
    refused(path, staging, stream(rows_of(4), rows=5), "1 of 5 lines are no rows that begin with the key columns")
    refused(path, staging, stream(rows_of(4), rows=3), "expected an 'end' frame")
    refused(path, staging, stream(rows_of(4), id="0" * 64), "does not belong to its frame")
    refused(path, staging, stream(rows_of(4), table="other", id=frame_of([b"1", b"4"])["batch"]["id"]), "does not belong to its frame")


def test_columns_to_find_by_must_stand_behind_the_key(path, staging):
    refused(path, staging, stream(rows_of(4), find=("note",)), "4 of 4 lines are no rows that begin with the key columns")
    refused(path, staging, stream(rows_of(4), find=("created_at", "other")), "4 of 4 lines are no rows")


def test_a_row_that_was_altered_exchanged_or_left_out_is_noticed(path, staging):
    rows = rows_of(4)
    data = stream(rows)
    refused(path, staging, data.replace(rows[1], row(2, "another text")), "are not the rows that were copied")
    refused(path, staging, data.replace(rows[0] + rows[1], rows[1] + rows[0]), "are not the rows that were copied")
    refused(path, staging, data.replace(rows[2], b""))
    refused(path, staging, data.replace(rows[2], rows[2] * 2))


@pytest.mark.parametrize("line", [
    b'["end",1,{}]\n', b'["aa-rows",1,{}]\n', b"\x01{\"id\":2}\x01\n", b"\n", b"null\n", b' {"id":2,"created_at":"x"}\n', b'{"id":2\n', b"}\n",
    b'{"created_at":"2024-01-01T00:00:00+00:00","id":2}\n', b'{"id":[2],"created_at":"x"}\n', b'{"id":"2,"created_at":"x"}\n',
], ids=lambda line: repr(line)[2:22])
def test_a_line_between_the_frames_that_is_no_row_is_refused(path, staging, line):
    rows = rows_of(3)
    frame = frame_of([b"1", b"2", b"3"])
    plain = rows[0] + line + rows[2]
    end = {"id": frame["batch"]["id"], "rows": 3, "rows_sha256": hashlib.sha256(plain).hexdigest()}
    refused(path, staging, frames.opening(frame["batch"], frame["table"]) + plain + lines.dump(["end", 1, end]))


def test_what_is_no_rows_stream_is_refused(path, staging):
    data = stream(rows_of(2))
    for wrong in (rows_of(1)[0], b"id,created_at\n", lines.dump(["aa-rows", 2, {}]), data.replace(b'"number":1,', b'"number":1,"extra":1,'),
                  data.split(b"\n", 1)[1], data + rows_of(1)[0], lines.dump({"format": "aa-job"})):
        result = serialize(path, wrong)
        assert result.rc == 2, wrong
    assert len(staged_files(staging)) in (0, 4), "a whole stream before a stray row stays"


# -- places and resources

def test_a_staging_directory_that_cannot_be_made_is_a_3(path, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "staging", Path("/proc/nowhere")):
        result = serialize(path, stream(rows_of(2)), "--staging", str(place))
        assert result.rc == 3 and f"cannot make the staging directory '{place}" in result.err and result.out == b""


@pytest.mark.parametrize("limit, count", [(20_000, 3000), (300, 20)])
def test_a_full_disk_is_a_6_and_leaves_nothing(path, staging, limit, count):
    """A file may not grow beyond `limit`: in the middle of the data, or within the only write that a small file is."""
    child = spawn("aa-serialize", [], {"AA_CONFIG": path}, stdin=subprocess.PIPE,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    result = finish(child, stream(rows_of(count)))
    assert result.rc == 6 and result.out == b"", result
    assert staged_files(staging) == []


def test_a_file_system_without_room_for_a_directory_is_a_6_too(path, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "nr_inodes=2", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("only root outside of a tight container can mount a small file system")
    try:
        result = serialize(path, stream(rows_of(2)), "--staging", str(place))
    finally:
        subprocess.run(["umount", str(place)], check=True)
    assert result.rc == 6 and result.out == b"", result


def _peak(path: Path, data: Iterator[bytes]) -> tuple[int, int]:
    """Feed one stream: the rows that were staged, and the peak memory in bytes up to the line that says so.

    Asked of the living process: getrusage counts the memory of the process that forked it too.
    """
    child = spawn("aa-serialize", [], {"AA_CONFIG": path}, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for chunk in data:
        child.stdin.write(chunk)
    child.stdin.flush()
    line = json.loads(child.stdout.readline())
    status = dict(each.split(":\t", 1) for each in Path(f"/proc/{child.pid}/status").read_text().splitlines())
    child.stdin.close()
    assert child.wait(30) == 0
    return line["serialized"]["rows"], int(status["VmHWM"].split()[0]) * 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_bytes_of_a_batch(path):
    """200 MB in 40,000 rows within 100 MB."""
    count, text = 40_000, b"lorem ipsum dolor sit amet " * 195
    frame = frame_of([b"%d" % number for number in range(count)])
    digest, sent = hashlib.sha256(), []

    def chunks() -> Iterator[bytes]:
        yield frames.opening(frame["batch"], frame["table"])
        for start in range(0, count, 100):
            data = b"".join(b'{"id":%d,"created_at":"2024-01-01T00:00:00+00:00","note":"%s"}\n' % (number, text)
                            for number in range(start, start + 100))
            digest.update(data)
            sent.append(len(data))
            yield data
        yield lines.dump(["end", 1, {"id": frame["batch"]["id"], "rows": count, "rows_sha256": digest.hexdigest()}])

    rows, peak = _peak(path, chunks())
    assert rows == count and sum(sent) > 200 * MB and peak < 100 * MB, f"{peak / MB:.0f} MB"


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
def test_memory_for_one_large_row_is_at_most_three_times_the_row(path):
    large = row(1, "x" * (40 * MB))
    for find in ((), ("created_at", "note")):
        rows, peak = _peak(path, iter([stream([large], find=find)]))
        assert rows == 1 and peak < 100 * MB + 3 * len(large), f"{peak / MB:.0f} MB"


def test_it_touches_no_database_and_no_store(path):
    """The configuration names a host and an endpoint that nobody listens on."""
    assert serialize(path, stream(rows_of(2))).rc == 0
