"""aa-verify: what is read back, and every way in which it is not what was selected. No mark, hence no delete."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import pytest

from audit_archiver import exits
from tests.conftest import Bucket, ConfigFile
from tests.ground import batches as ground
from tests.ground import faulty_s3 as faulty
from tests.ground.faulty_s3 import FaultyS3, on, once
from tests.ground.run import Result, run_forked, run_stage

DATA, METADATA, KEYS = ".jsonl.gz", "_metadata.json", "_manifest.json"


@pytest.fixture()
def store(bucket: Bucket) -> Iterator[FaultyS3]:
    """moto behind an endpoint that can misbehave."""
    with FaultyS3(bucket.endpoint) as made:
        yield made


@pytest.fixture()
def stage(bucket: Bucket, store: FaultyS3, config_file: ConfigFile) -> Callable[..., Result]:
    """Runs a stage in process against `store` on batch lines."""
    def run(name: str, *lines: dict[str, Any], argv: tuple[str, ...] = (), **s3: Any) -> Result:
        path = config_file(ground.NOWHERE, bucket, s3=ground.s3_section(store.endpoint, **s3))
        return run_stage(name, argv, ground.dump(*lines), {"AA_CONFIG": path})
    return run


@pytest.fixture()
def uploaded(bucket: Bucket, stage: Callable[..., Result], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Makes batches that are uploaded; their staging is gone afterwards, since verification must not need it."""
    def make(**how: Any) -> dict[str, Any]:
        line = ground.staged(tmp_path / "staging", bucket.name, **how)
        result = stage("aa-upload", line)
        assert result.rc == exits.OK, result.err
        shutil.rmtree(line["serialized"]["dir"])
        return dict(result.lines[0])
    return make


def refused(result: Result) -> str:
    """The whole message of a stage that found a difference: exit 2 and not one line out."""
    assert (result.rc, result.out) == (exits.FAILED, b""), result
    last = result.log[-1]
    return " ".join(str(last.get(part)) for part in ("msg", "detail", "hint"))


# What is whole

@pytest.mark.req("REQ-VER-003", "REQ-VER-008", "REQ-VER-012", "REQ-INT-004", "REQ-INT-005", "REQ-S3-024")
def test_a_batch_that_came_back_whole_is_marked(uploaded: Callable[..., Any], stage: Callable[..., Result],
                                                bucket: Bucket) -> None:
    line = uploaded(rows=1234)
    result = stage("aa-verify", line)
    assert result.rc == exits.OK, result.err
    [out] = result.lines
    assert {name: out[name] for name in line} == line
    plain = gzip.decompress(bucket.read(line["serialized"]["stem"] + DATA))
    mark = out["verified"]
    assert (mark["how"], mark["rows"]) == ("read", plain.count(b"\n")) == ("read", 1234)
    assert mark["sha256"] == hashlib.sha256(plain).hexdigest()
    ids = [json.loads(row)["id"] for row in plain.splitlines()]
    assert mark["keys_sha256"] == hashlib.sha256("".join(f"{number}\n" for number in ids).encode()).hexdigest()
    assert mark["at"].endswith("Z")


@pytest.mark.req("REQ-VER-004", "REQ-VER-006")
def test_the_three_counts_are_logged(uploaded: Callable[..., Any], stage: Callable[..., Result]) -> None:
    result = stage("aa-verify", uploaded(rows=321))
    [counts] = [record for record in result.log if record["event"] == "verify.counts"]
    assert (counts["locked"], counts["fetched"], counts["archived"]) == (321, 321, 321)
    assert counts["run_id"] == ground.RUN


@pytest.mark.req("REQ-VER-017")
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (7, 7), (10, 10), (999, 10), (2500, 25), (150_000, 1000)])
def test_the_sample_is_one_percent_of_the_keys_read_back(uploaded: Callable[..., Any], stage: Callable[..., Result],
                                                         rows: int, size: int) -> None:
    line = uploaded(rows=rows, width=4)
    samples = [[tuple(key) for key in stage("aa-verify", line).lines[0]["verified"]["sample"]] for _ in range(2)]
    for sample in samples:
        assert len(sample) == len(set(sample)) == size
        assert set(sample) <= {(number,) for number in range(1, rows + 1)}
        assert sample == sorted(sample)
    if rows > 500:
        assert samples[0] != samples[1]  # chosen at random


@pytest.mark.parametrize("key", [("id",), ("created_at", "id"), ("tenant", "id"), ('odd "name"', "id")])
def test_keys_of_any_columns_are_compared_and_sampled(uploaded: Callable[..., Any], stage: Callable[..., Result],
                                                      key: tuple[str, ...]) -> None:
    result = stage("aa-verify", uploaded(rows=50, key=key))
    assert result.rc == exits.OK, result.err
    sample = result.lines[0]["verified"]["sample"]
    assert len(sample) == 10 and {len(each) for each in sample} == {len(key)}
    assert all(isinstance(each[-1], int) for each in sample)


@pytest.mark.req("REQ-S3-021")
def test_a_batch_of_many_members_and_parts_is_read_as_it_comes(uploaded: Callable[..., Any], stage: Callable[..., Result],
                                                               store: FaultyS3, bucket: Bucket, config_file: ConfigFile,
                                                               tmp_path: Path) -> None:
    line = ground.staged(tmp_path / "large", bucket.name, rows=6000, width=2600, number=9)
    [line] = stage("aa-upload", line, multipart_threshold_mb=5).lines
    assert line["uploaded"]["etags"][0].endswith("-2")
    result = stage("aa-verify", line)
    assert result.rc == exits.OK, result.err
    assert result.lines[0]["verified"]["rows"] == 6000


@pytest.mark.req("T24")
def test_batches_in_a_versioned_bucket_and_in_a_poor_store_are_verified(bucket: Bucket, poor_bucket: Bucket,
                                                                        config_file: ConfigFile, tmp_path: Path) -> None:
    bucket.client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"})
    for number, made in enumerate((bucket, poor_bucket), 1):
        path = config_file(ground.NOWHERE, made, s3=ground.s3_section(made.endpoint))
        line = ground.staged(tmp_path / "staging", made.name, number=number)
        result = run_stage("aa-upload", (), ground.dump(line), {"AA_CONFIG": path})
        assert result.rc == exits.OK, result.err
        assert all(result.lines[0]["uploaded"]["versions"]) is (made is bucket)
        result = run_stage("aa-verify", (), result.out, {"AA_CONFIG": path})
        assert result.rc == exits.OK, result.err


def test_a_verified_line_can_be_verified_anew_and_a_deleted_one_not(uploaded: Callable[..., Any],
                                                                    stage: Callable[..., Result]) -> None:
    [line] = stage("aa-verify", uploaded()).lines
    old = {**line, "verified": {**line["verified"], "at": "2020-01-01T00:00:00Z"}}
    [again] = stage("aa-verify", old).lines
    assert again["verified"]["at"] > "2025"
    assert "already" in refused(stage("aa-verify", ground.committed(line)))


@pytest.mark.req("REQ-INT-001")
def test_a_line_that_was_not_uploaded_is_refused(bucket: Bucket, stage: Callable[..., Result], tmp_path: Path) -> None:
    assert "was not uploaded" in refused(stage("aa-verify", ground.staged(tmp_path, bucket.name)))


def test_a_batch_of_another_bucket_is_refused(uploaded: Callable[..., Any], stage: Callable[..., Result]) -> None:
    line = uploaded()
    result = stage("aa-verify", {**line, "uploaded": {**line["uploaded"], "bucket": "elsewhere"}})
    assert (result.rc, result.out) == (exits.CONFIG, b"")
    assert "elsewhere" in result.log[-1]["msg"]


# What is damaged: T20, T21, T26

def _truncated(body: bytes) -> Optional[bytes]:
    return body[:len(body) // 2]


def _empty(body: bytes) -> Optional[bytes]:
    return b""


def _dropped(body: bytes) -> Optional[bytes]:
    return None


def _swapped(body: bytes) -> Optional[bytes]:
    return gzip.compress(b'{"id":1,"created_at":"x"}\n' * 100) if body[:2] == b"\x1f\x8b" else b'{"swapped": true}\n'


def _trailer_inside(body: bytes) -> Optional[bytes]:
    return body + b"\r\n0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n"


@pytest.mark.req("T20", "REQ-S3-025", "REQ-VER-005")
@pytest.mark.parametrize("suffix", [DATA, METADATA, KEYS])
@pytest.mark.parametrize("damage", [_truncated, _empty, _dropped, _swapped, faulty.flip_bit])
def test_an_upload_that_says_ok_and_keeps_something_else_is_not_verified(
        bucket: Bucket, store: FaultyS3, stage: Callable[..., Result], tmp_path: Path, suffix: str,
        damage: Callable[[bytes], Optional[bytes]]) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)
    store.fault = faulty.stores(on("PUT", suffix), damage)
    result = stage("aa-upload", line)
    assert result.rc == exits.OK, result.err  # the store lied
    store.fault = None
    assert suffix in refused(stage("aa-verify", result.lines[0]))


@pytest.mark.req("T22")
@pytest.mark.parametrize("suffix", [DATA, METADATA, KEYS])
def test_a_trailer_stored_inside_the_object_is_found(bucket: Bucket, store: FaultyS3, stage: Callable[..., Result],
                                                     tmp_path: Path, suffix: str) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)
    store.fault = faulty.stores(on("PUT", suffix), _trailer_inside)
    [line] = stage("aa-upload", line).lines
    store.fault = None
    assert suffix in refused(stage("aa-verify", line))


@pytest.mark.req("T21")
@pytest.mark.parametrize("suffix", [DATA, METADATA, KEYS])
@pytest.mark.parametrize("place", [0.01, 0.5, 0.999])
def test_a_flipped_bit_under_intact_headers_is_found(uploaded: Callable[..., Any], store: FaultyS3,
                                                     stage: Callable[..., Result], suffix: str, place: float) -> None:
    def flip(body: bytes) -> bytes:
        at = int(len(body) * place)
        return body[:at] + bytes([body[at] ^ 4]) + body[at + 1:]

    line = uploaded(rows=700)
    store.fault = faulty.returns(on("GET", suffix), flip)
    refused(stage("aa-verify", line))
    store.fault = None
    assert stage("aa-verify", line).rc == exits.OK


@pytest.mark.req("T21")
def test_a_byte_that_unpacking_ignores_is_compared_too(uploaded: Callable[..., Any], store: FaultyS3,
                                                       stage: Callable[..., Result]) -> None:
    line = uploaded()
    store.fault = faulty.returns(on("GET", DATA), lambda body: body[:4] + b"\1" + body[5:])  # the time in gzip's header
    assert "packed SHA-256" in refused(stage("aa-verify", line))


@pytest.mark.req("T21")
def test_other_rows_under_our_name_are_found_whatever_the_metadata_say(uploaded: Callable[..., Any], bucket: Bucket,
                                                                       stage: Callable[..., Result]) -> None:
    line = uploaded()
    key = line["serialized"]["stem"] + DATA
    rows = gzip.decompress(bucket.read(key)).replace(b'"id":7,', b'"id":8,')
    bucket.client.put_object(Bucket=bucket.name, Key=key, Body=gzip.compress(rows),
                             Metadata={"sha256": line["serialized"]["data"]["sha256"]})
    assert "digest of the keys" in refused(stage("aa-verify", line))


def _recompressed(line: dict[str, Any], change: Callable[[bytes], bytes]) -> dict[str, Any]:
    """The batch as if the compressor had packed `change(rows)` while the digest of the rows was taken before."""
    [path] = Path(line["serialized"]["dir"]).glob("*.gz")
    packed = gzip.compress(change(gzip.decompress(path.read_bytes())), mtime=0)
    path.write_bytes(packed)
    new = {"gz_sha256": hashlib.sha256(packed).hexdigest(), "gz_bytes": len(packed)}
    [described] = Path(line["serialized"]["dir"]).glob("*_metadata.json")
    value = json.loads(described.read_bytes())
    value.update(new)
    value["file_size"]["compressed"] = len(packed)
    described.write_text(json.dumps(value))
    serialized = {**line["serialized"], "data": {**line["serialized"]["data"], **new},
                  "metadata_sha256": hashlib.sha256(described.read_bytes()).hexdigest()}
    return {**line, "serialized": serialized}


@pytest.mark.req("T26", "REQ-VER-012")
@pytest.mark.parametrize(("change", "said"), [
    (lambda rows: rows.replace(b'"action":"', b'"action":"x', 1), "SHA-256"),
    (lambda rows: rows[:rows.rindex(b"\n", 0, -1) + 1], "row count"),
    (lambda rows: rows + rows[rows.rindex(b"\n", 0, -1) + 1:], "row count"),
    (lambda rows: rows.replace(b'"id":7,', b'"id":8,', 1), "digest of the keys"),
    (lambda rows: rows[:-1], "ends inside a row")])
def test_what_the_compressor_damaged_before_the_upload_is_found(bucket: Bucket, stage: Callable[..., Result], tmp_path: Path,
                                                                change: Callable[[bytes], bytes], said: str) -> None:
    line = _recompressed(ground.staged(tmp_path / "staging", bucket.name), change)
    [line] = stage("aa-upload", line).lines
    assert said in refused(stage("aa-verify", line))


@pytest.mark.req("T26")
def test_a_packed_object_of_the_same_rows_passes(bucket: Bucket, stage: Callable[..., Result], tmp_path: Path) -> None:
    """The counterpart of the test above: what that helper makes is wrong for its rows only."""
    line = _recompressed(ground.staged(tmp_path / "staging", bucket.name), lambda rows: rows)
    [line] = stage("aa-upload", line).lines
    result = stage("aa-verify", line)
    assert result.rc == exits.OK, result.err


@pytest.mark.req("REQ-VER-008", "REQ-VER-009", "REQ-VER-010")
@pytest.mark.parametrize(("before", "after"), [(b"\n7,\n", b"\n8,\n"), (b"\n7,\n", b"\n"), (b'"rows":100', b'"rows":99')])
def test_a_key_list_of_other_keys_is_found_though_its_digest_is_the_lines(bucket: Bucket, stage: Callable[..., Result],
                                                                         tmp_path: Path, before: bytes,
                                                                         after: bytes) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)
    [path] = Path(line["serialized"]["dir"]).glob("*_manifest.json")
    changed = path.read_bytes().replace(before, after)
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    line["serialized"]["manifest_sha256"] = hashlib.sha256(changed).hexdigest()
    [line] = stage("aa-upload", line).lines
    refused(stage("aa-verify", line))


@pytest.mark.req("REQ-VER-013")
def test_metadata_that_could_not_rebuild_the_line_are_found(bucket: Bucket, stage: Callable[..., Result],
                                                            tmp_path: Path) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)
    [path] = Path(line["serialized"]["dir"]).glob("*_metadata.json")
    value = json.loads(path.read_bytes())
    value["checksum"] = "sha256:" + "0" * 64
    path.write_text(json.dumps(value))
    line["serialized"]["metadata_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    [line] = stage("aa-upload", line).lines
    assert "'serialized.data' of" in refused(stage("aa-verify", line))


@pytest.mark.req("REQ-VER-004", "REQ-VER-005", "REQ-INT-005")
@pytest.mark.parametrize(("locked", "fetched", "said"), [
    (101, 100, "contradicts itself"), (100, 101, "contradicts itself"), (101, 101, "row count"), (99, 99, "row count")])
def test_counts_that_are_not_all_three_equal_are_refused(uploaded: Callable[..., Any], stage: Callable[..., Result],
                                                         locked: int, fetched: int, said: str) -> None:
    line = uploaded(rows=100)
    changed = {**line, "batch": {**line["batch"], "rows": locked}, "serialized": {**line["serialized"], "rows": fetched}}
    assert said in refused(stage("aa-verify", changed))


def test_every_difference_is_named(uploaded: Callable[..., Any], bucket: Bucket, stage: Callable[..., Result]) -> None:
    line = uploaded()
    for suffix in (METADATA, KEYS):
        bucket.client.put_object(Bucket=bucket.name, Key=line["serialized"]["stem"] + suffix, Body=b"{}")
    said = refused(stage("aa-verify", line))
    assert METADATA in said and KEYS in said


def test_an_object_that_is_gone_is_named(uploaded: Callable[..., Any], bucket: Bucket, stage: Callable[..., Result]) -> None:
    for number, suffix in enumerate((DATA, METADATA, KEYS), 1):
        line = uploaded(number=number)
        bucket.client.delete_object(Bucket=bucket.name, Key=line["serialized"]["stem"] + suffix)
        for how in ("read", "head"):
            assert suffix in refused(stage("aa-verify", line, argv=("--how", how)))


def test_a_zip_bomb_under_our_name_does_not_fill_the_memory(uploaded: Callable[..., Any], bucket: Bucket,
                                                            stage: Callable[..., Result]) -> None:
    line = uploaded()
    packed = gzip.compress(b"{}\n" * (64 << 20))
    bucket.client.put_object(Bucket=bucket.name, Key=line["serialized"]["stem"] + DATA, Body=packed)
    refused(stage("aa-verify", line))


# T23: somebody else's object

@pytest.mark.req("T23")
@pytest.mark.parametrize("how", ["read", "head"])
def test_another_runs_object_of_the_same_size_does_not_satisfy(uploaded: Callable[..., Any], bucket: Bucket,
                                                               stage: Callable[..., Result], how: str) -> None:
    line = uploaded()
    key = line["serialized"]["stem"] + DATA
    body = bytearray(bucket.read(key))
    random.Random(1).shuffle(body)
    bucket.client.put_object(Bucket=bucket.name, Key=key, Body=bytes(body))
    refused(stage("aa-verify", line, argv=("--how", how)))


@pytest.mark.req("T23")
@pytest.mark.parametrize("how", ["read", "head"])
def test_the_same_bytes_in_a_new_version_are_another_object(bucket: Bucket, uploaded: Callable[..., Any],
                                                            stage: Callable[..., Result], how: str) -> None:
    bucket.client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"})
    line = uploaded()
    key = line["serialized"]["stem"] + KEYS
    bucket.client.put_object(Bucket=bucket.name, Key=key, Body=bucket.read(key))
    assert "version of" in refused(stage("aa-verify", line, argv=("--how", how)))


# head, the downgrade

@pytest.mark.req("REQ-S3-024", "REQ-INT-004")
def test_head_compares_sizes_and_etags_and_warns(uploaded: Callable[..., Any], stage: Callable[..., Result],
                                                 store: FaultyS3) -> None:
    line = uploaded()
    store.requests.clear()
    for options in ({"argv": ("--how", "head")}, {"verify": "head"}):
        result = stage("aa-verify", line, **options)
        assert result.rc == exits.OK, result.err
        assert {name: result.lines[0]["verified"][name] for name in ("how", "rows", "sample")} == {
            "how": "head", "rows": 100, "sample": []}
        assert [record["level"] for record in result.log if record["event"] == "verify.head"] == ["WARNING"]
    assert not store.seen(on("GET", DATA))
    result = stage("aa-verify", line, verify="head", argv=("--how", "read"))
    assert result.lines[0]["verified"]["how"] == "read"


@pytest.mark.req("T20")
@pytest.mark.parametrize("damage", [_truncated, _empty, _dropped])
def test_head_finds_an_object_of_another_size(bucket: Bucket, store: FaultyS3, stage: Callable[..., Result], tmp_path: Path,
                                              damage: Callable[[bytes], Optional[bytes]]) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)
    store.fault = faulty.stores(on("PUT", DATA), damage)
    [line] = stage("aa-upload", line).lines
    store.fault = None
    refused(stage("aa-verify", line, argv=("--how", "head")))


@pytest.mark.req("T20", "REQ-INT-004")
def test_head_finds_another_size_under_the_same_etag(uploaded: Callable[..., Any], store: FaultyS3,
                                                     stage: Callable[..., Result]) -> None:
    line = uploaded()

    def shorter(request: faulty.Request, forward: faulty.Forward) -> Any:
        answer = forward(request)
        return replace(answer, headers={**answer.headers, "content-length": "7"}) if on("HEAD", DATA)(request) else answer

    store.fault = shorter
    assert "size of" in refused(stage("aa-verify", line, argv=("--how", "head")))


# Could not look

@pytest.mark.req("REQ-S3-023")
def test_a_stream_that_breaks_is_read_again_from_its_start(uploaded: Callable[..., Any], stage: Callable[..., Result],
                                                           store: FaultyS3) -> None:
    line = uploaded(rows=3000, width=200)
    store.requests.clear()
    store.fault = faulty.cuts(once(on("GET", DATA), times=2), 50_000)
    result = stage("aa-verify", line)
    assert result.rc == exits.OK, result.err
    assert result.lines[0]["verified"]["rows"] == 3000
    assert len(store.seen(on("GET", DATA))) == 3


@pytest.mark.parametrize(("answer", "code"), [
    (faulty.error(503, "SlowDown"), exits.NETWORK), (faulty.error(403, "AccessDenied"), exits.PERMISSION),
    (faulty.error(400, "ExpiredToken"), exits.PERMISSION)])
@pytest.mark.req("T25")
def test_not_being_able_to_look_is_no_difference_and_no_mark(uploaded: Callable[..., Any], stage: Callable[..., Result],
                                                             store: FaultyS3, answer: faulty.Answer, code: int) -> None:
    line = uploaded()
    store.fault = faulty.answers(on("GET", DATA), answer)
    result = stage("aa-verify", line)
    assert (result.rc, result.out) == (code, b"")


@pytest.mark.req("T23", "T24")
def test_a_delayed_put_of_the_same_bytes_changes_nothing(poor_bucket: Bucket, config_file: ConfigFile,
                                                         tmp_path: Path) -> None:
    """C10 without conditional writes: the late twin holds the same bytes, since a name is used for one sequence only."""
    with FaultyS3(poor_bucket.endpoint) as server:
        path = config_file(ground.NOWHERE, poor_bucket, s3=ground.s3_section(server.endpoint))
        late = faulty.Held(once(on("PUT", DATA)))
        server.fault = late
        line = ground.staged(tmp_path / "staging", poor_bucket.name)
        result = run_stage("aa-upload", (), ground.dump(line), {"AA_CONFIG": path})
        assert result.rc == exits.OK, result.err
        assert [answer.status for answer in late.deliver()] == [200]
        result = run_stage("aa-verify", (), result.out, {"AA_CONFIG": path})
        assert result.rc == exits.OK, result.err


def test_empty_input_asks_nothing(stage: Callable[..., Result], store: FaultyS3) -> None:
    result = stage("aa-verify")
    assert (result.rc, result.out) == (exits.OK, b"")
    assert store.requests == []


def test_upload_and_verify_work_as_a_pipe(bucket: Bucket, store: FaultyS3, config_file: ConfigFile, tmp_path: Path) -> None:
    path = config_file(ground.NOWHERE, bucket, s3=ground.s3_section(store.endpoint))
    lines = [ground.staged(tmp_path / "staging", bucket.name, number=number, rows=20) for number in (1, 2, 3)]
    first = run_forked("aa-upload", ["-c", path], ground.dump(*lines))
    second = run_forked("aa-verify", ["-c", path], first.out)
    assert (first.rc, second.rc) == (exits.OK, exits.OK), first.err + second.err
    assert [line["verified"]["rows"] for line in second.lines] == [20, 20, 20]
