"""The object store: create-only writes, retries, parts, and errors in words, on moto, rclone and stores that misbehave."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator

import boto3
import botocore.config
import botocore.exceptions
import pytest

from audit_archiver import exits, log
from audit_archiver.config.credentials import Secret
from audit_archiver.config.model import S3
from audit_archiver.objectstore import content
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.errors import NameTaken, NotFound
from tests.conftest import Bucket
from tests.ground import faulty_s3 as faulty
from tests.ground.faulty_s3 import FaultyS3, on, once
from tests.ground.proxy import Proxy
from tests.ground.wait import until

KEY = "archives/prod/audit_logs/object"
MIB = 1 << 20


@pytest.fixture(autouse=True)
def quiet_log() -> None:
    log.setup("test", quiet=True)


@pytest.fixture()
def store_s3(bucket: Bucket) -> Iterator[FaultyS3]:
    """moto behind an endpoint that can misbehave."""
    with FaultyS3(bucket.endpoint) as made:
        yield made


def settings(made: Bucket, **changes: Any) -> S3:
    """The S3 section of a configuration for a bucket, with short pauses."""
    section = S3(bucket=made.name, prefix="archives/", endpoint=made.endpoint, access_key_id=made.access_key,
                 secret_access_key=Secret(made.secret_key), retry_base_s=0.01, retry_max_s=0.05, read_timeout_s=10)
    return replace(section, **changes)


def open_faulty(bucket: Bucket, server: FaultyS3, **changes: Any) -> Store:
    return Store(settings(bucket, endpoint=server.endpoint, **changes))


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


# Create-only writes

@pytest.mark.req("REQ-S3-001", "REQ-IDEM-007")
def test_a_store_with_conditional_writes_is_recognized_and_keeps_no_probe(bucket: Bucket) -> None:
    store = Store(settings(bucket))
    found = store.probe()
    assert found.create_only is True
    assert (found.endpoint, found.region) == (bucket.endpoint, "us-east-1")
    assert bucket.keys() == []


@pytest.mark.req("T24", "REQ-S3-001")
def test_a_store_that_ignores_if_none_match_is_recognized_and_keeps_no_probe(poor_bucket: Bucket) -> None:
    assert Store(settings(poor_bucket)).probe().create_only is False
    assert poor_bucket.keys() == []


def test_a_store_that_honours_if_none_match_on_put_only_is_recognized(bucket: Bucket, store_s3: FaultyS3) -> None:
    store_s3.fault = faulty.ignores_if_none_match(on("POST", uploadId=""))
    store = open_faulty(bucket, store_s3)
    assert store.guards(1 * MIB) is True
    assert store.guards(11 * MIB) is False
    assert bucket.keys() == []
    assert list(store.unfinished_uploads("")) == []


def test_a_store_that_refuses_the_header_counts_as_one_that_ignores_it(bucket: Bucket, store_s3: FaultyS3) -> None:
    store_s3.fault = faulty.answers(lambda request: "if-none-match" in request.headers,
                                    faulty.error(501, "NotImplemented"))
    store = open_faulty(bucket, store_s3)
    assert store.probe().create_only is False
    assert store.put_new(KEY, b"bytes").created is True


@pytest.mark.parametrize("which", ["bucket", "poor_bucket"])
@pytest.mark.req("T24", "REQ-IDEM-007", "REQ-IDEM-008")
def test_a_name_is_never_written_twice(which: str, request: pytest.FixtureRequest) -> None:
    made: Bucket = request.getfixturevalue(which)
    store = Store(settings(made))
    first = store.put_new(KEY, b"one")
    assert first.created is True
    again = store.put_new(KEY, b"one")
    assert (again.created, again.etag) == (False, first.etag)
    with pytest.raises(NameTaken) as caught:
        store.put_new(KEY, b"two")
    assert caught.value.code == exits.FAILED
    assert "select again" in str(caught.value)
    with pytest.raises(NameTaken):
        store.put_new(KEY, b"longer than before")
    assert made.read(KEY) == b"one"


@pytest.mark.req("T24")
def test_a_lost_race_is_a_taken_name(bucket: Bucket, store_s3: FaultyS3) -> None:
    def somebody_is_faster(request: faulty.Request, forward: faulty.Forward) -> Any:
        if on("PUT", "object")(request):
            bucket.client.put_object(Bucket=bucket.name, Key=KEY, Body=b"theirs")
        return forward(request)

    store_s3.fault = somebody_is_faster
    with pytest.raises(NameTaken):
        open_faulty(bucket, store_s3).put_new(KEY, b"ours")
    assert bucket.read(KEY) == b"theirs"


def test_an_answer_that_was_lost_is_settled_by_reading(bucket: Bucket, store_s3: FaultyS3) -> None:
    store_s3.fault = faulty.loses_answer(once(on("PUT", "object")))
    put = open_faulty(bucket, store_s3).put_new(KEY, b"ours")
    assert bucket.read(KEY) == b"ours"
    assert put.etag == hashlib.md5(b"ours").hexdigest()
    assert [request.method for request in store_s3.seen(lambda request: request.key == KEY)] == ["PUT", "HEAD", "GET"]


def test_an_answer_lost_by_a_poor_store_is_settled_by_reading(poor_bucket: Bucket) -> None:
    with FaultyS3(poor_bucket.endpoint) as server:
        server.fault = faulty.loses_answer(once(on("PUT", "object")))
        put = open_faulty(poor_bucket, server).put_new(KEY, b"ours")
        assert put.created is False
        assert len(server.seen(on("PUT", "object"))) == 1
    assert poor_bucket.read(KEY) == b"ours"


def test_a_put_that_arrives_late_cannot_replace_what_was_written_since(bucket: Bucket, store_s3: FaultyS3) -> None:
    late = faulty.Held(once(on("PUT", "object")))
    store_s3.fault = late
    store = open_faulty(bucket, store_s3)
    put = store.put_new(KEY, b"ours")
    assert [answer.status for answer in late.deliver()] == [412]
    head = store.head(KEY)
    assert head is not None and head.etag == put.etag


@pytest.mark.req("T24", "REQ-S3-005")
def test_a_versioned_bucket_with_object_lock_gets_one_version_and_its_content_md5(bucket: Bucket,
                                                                                  store_s3: FaultyS3) -> None:
    name = f"{bucket.name}-locked"
    bucket.client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    store = Store(settings(bucket, bucket=name, endpoint=store_s3.endpoint))
    put = store.put_new(KEY, b"locked")
    assert put.version
    assert store.put_new(KEY, b"locked").version == put.version
    versions = bucket.client.list_object_versions(Bucket=name, Prefix=KEY)["Versions"]
    assert [version["VersionId"] for version in versions] == [put.version]
    digest = base64.b64encode(hashlib.md5(b"locked").digest()).decode()
    assert [request.headers["content-md5"] for request in store_s3.seen(on("PUT", "object"))] == [digest, digest]


def test_a_refused_put_does_not_hang_the_next_request(bucket: Bucket, store_s3: FaultyS3) -> None:
    store = open_faulty(bucket, store_s3, read_timeout_s=20)
    store.put_new(KEY, b"one")
    store_s3.refuses_early = True
    began = time.monotonic()
    with pytest.raises(NameTaken):
        store.put_new(KEY, b"two")
    store.put_new(KEY + "-next", b"two")
    assert time.monotonic() - began < 10  # one read timeout would be 20 s
    assert store_s3.seen(lambda request: request.body == faulty.UNREAD)


# What is sent

@pytest.mark.req("T22", "REQ-S3-001")
def test_a_store_that_refuses_checksum_trailers_is_served(bucket: Bucket, store_s3: FaultyS3) -> None:
    store_s3.fault = faulty.refuses_trailers
    store = open_faulty(bucket, store_s3, multipart_threshold_mb=5)
    assert store.put_new(KEY, b"small").created is True
    assert store.put_new(KEY + "-large", noise(6 * MIB)).created is True
    assert hashlib.sha256(bucket.read(KEY + "-large")).digest() == hashlib.sha256(noise(6 * MIB)).digest()
    default = boto3.client("s3", endpoint_url=store_s3.endpoint, aws_access_key_id="a", aws_secret_access_key="b",
                           region_name="us-east-1", config=botocore.config.Config(retries={"max_attempts": 0}))
    with pytest.raises(botocore.exceptions.ClientError):  # the trap is real: defaults are refused by this store
        default.put_object(Bucket=bucket.name, Key="default", Body=b"small")


@pytest.mark.req("REQ-S3-004")
@pytest.mark.parametrize("storage_class", ["STANDARD_IA", "GLACIER_IR", "INTELLIGENT_TIERING"])
def test_bulk_objects_go_into_the_configured_storage_class_and_small_ones_do_not(bucket: Bucket, storage_class: str) -> None:
    store = Store(settings(bucket, storage_class=storage_class))
    store.put_new(KEY, b"data", bulk=True)
    store.put_new(KEY + ".json", b"{}")
    head, small = store.head(KEY), store.head(KEY + ".json")
    assert head is not None and head.storage_class == storage_class
    assert small is not None and small.storage_class == "STANDARD"


@pytest.mark.parametrize(("encryption", "key_id", "expected"), [
    ("SSE-S3", None, {"x-amz-server-side-encryption": "AES256"}),
    ("SSE-KMS", None, {"x-amz-server-side-encryption": "aws:kms"}),
    ("SSE-KMS", "alias/audit", {"x-amz-server-side-encryption": "aws:kms",
                                "x-amz-server-side-encryption-aws-kms-key-id": "alias/audit"})])
def test_every_object_asks_for_the_configured_encryption(bucket: Bucket, store_s3: FaultyS3, encryption: str, key_id: Any,
                                                         expected: dict[str, str]) -> None:
    store = open_faulty(bucket, store_s3, encryption=encryption, kms_key_id=key_id, multipart_threshold_mb=5)
    store.put_new(KEY, b"data", bulk=True)
    store.put_new(KEY + "-large", noise(6 * MIB), bulk=True)
    creating = store_s3.seen(lambda request: on("PUT")(request) and "uploadId" not in request.query
                             or on("POST", uploads="")(request))
    assert len(creating) >= 4  # probes, object, begun upload
    for request in creating:
        assert {name: request.headers.get(name) for name in expected} == expected, request.path
    for key in (KEY, KEY + "-large"):
        found = bucket.client.head_object(Bucket=bucket.name, Key=key)
        assert found["ServerSideEncryption"] == expected["x-amz-server-side-encryption"]


def test_staged_bytes_that_are_not_those_of_the_line_are_not_sent(bucket: Bucket, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"changed")
    with pytest.raises(exits.Mismatch):
        Store(settings(bucket)).put_new(KEY, path, sha256=hashlib.sha256(b"before").hexdigest())
    assert bucket.keys() == []


# Retries

@pytest.mark.req("REQ-S3-023")
@pytest.mark.parametrize("status", [(503, "SlowDown"), (500, "InternalError"), (400, "BadDigest"), (400, "RequestTimeout")])
def test_a_passing_failure_is_tried_three_times_again(bucket: Bucket, store_s3: FaultyS3, status: tuple[int, str]) -> None:
    store = open_faulty(bucket, store_s3)
    store.probe()
    store_s3.fault = faulty.answers(once(on("PUT", "object"), times=3), faulty.error(*status))
    assert store.put_new(KEY, b"bytes").created is True
    assert len(store_s3.seen(on("PUT", "object"))) == 4


@pytest.mark.req("REQ-S3-023")
def test_spent_retries_are_a_network_error_that_says_how_often(bucket: Bucket, store_s3: FaultyS3) -> None:
    store = open_faulty(bucket, store_s3)
    store.probe()
    store_s3.fault = faulty.answers(on("PUT", "object"), faulty.error(503, "SlowDown"))
    with pytest.raises(exits.NetworkError) as caught:
        store.put_new(KEY, b"bytes")
    assert (caught.value.code, caught.value.retry) == (exits.NETWORK, True)
    assert "SlowDown" in str(caught.value) and "tried 4 times" in str(caught.value)
    assert len(store_s3.seen(on("PUT", "object"))) == 4


@pytest.mark.req("REQ-S3-023")
def test_pauses_double_up_to_the_maximum(bucket: Bucket, store_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_faulty(bucket, store_s3, retries=6, retry_base_s=2, retry_max_s=30)
    store.probe()
    paused: list[float] = []
    monkeypatch.setattr(time, "sleep", paused.append)
    store_s3.fault = faulty.drops(on("PUT", "object"))
    with pytest.raises(exits.NetworkError):
        store.put_new(KEY, b"bytes")
    for found, longest in zip(paused, [2, 4, 8, 16, 30, 30]):
        assert longest * 0.75 <= found <= longest
    assert len(paused) == 6


def test_a_pause_ends_when_the_reader_of_our_output_is_gone(bucket: Bucket, store_s3: FaultyS3) -> None:
    reader, writer = os.pipe()
    store = Store(settings(bucket, endpoint=store_s3.endpoint, retry_base_s=60, retry_max_s=60), watch=writer)
    store.probe()
    store_s3.fault = faulty.answers(on("PUT", "object"), faulty.error(503, "SlowDown"))
    os.close(reader)
    try:
        with pytest.raises(BrokenPipeError):
            store.put_new(KEY, b"bytes")
    finally:
        os.close(writer)


# Reading

def test_an_object_comes_back_as_it_was_written(bucket: Bucket) -> None:
    store = Store(settings(bucket))
    body = noise(300_000)
    put = store.put_new(KEY, body)
    with store.get(KEY) as stream:
        assert (stream.size, stream.etag) == (300_000, put.etag)
        assert b"".join(stream) == body
    assert store.get_bytes(KEY) == body
    with pytest.raises(exits.Mismatch):
        store.get_bytes(KEY, limit=299_999)
    with pytest.raises(NotFound):
        store.get(KEY + "x")
    assert store.head(KEY + "x") is None


@pytest.mark.req("T20")
def test_a_stream_that_ends_too_early_is_a_network_error(bucket: Bucket, store_s3: FaultyS3) -> None:
    store = open_faulty(bucket, store_s3)
    store.put_new(KEY, noise(300_000))
    store_s3.fault = faulty.cuts(on("GET"), 100_000)
    with pytest.raises(exits.NetworkError), store.get(KEY) as stream:
        list(stream)
    store_s3.fault = faulty.cuts(once(on("GET")), 100_000)
    assert store.get_bytes(KEY) == noise(300_000)  # whole reads are tried again


def test_a_listing_goes_on_over_its_pages_and_after_a_key(bucket: Bucket) -> None:
    keys = [f"archives/a%2Eb/year=2025/{number:04d}" for number in range(1003)]
    for key in keys:
        bucket.client.put_object(Bucket=bucket.name, Key=key, Body=b"")
    store = Store(settings(bucket))
    assert [entry.key for entry in store.list("archives/")] == keys
    assert [entry.key for entry in store.list("archives/", start_after=keys[1000])] == keys[1001:]
    assert list(store.directories("archives/")) == ["archives/a%2Eb/"]


def test_a_key_that_xml_cannot_carry_hides_no_other(bucket: Bucket, store_s3: FaultyS3) -> None:
    keys = ["archives/a b+c%20/\x01", "archives/year=2025/of ours"]
    for key in keys:
        bucket.client.put_object(Bucket=bucket.name, Key=key, Body=b"")
    unreadable = faulty.Answer(200, {"content-type": "application/xml"}, b"<ListBucketResult><Key>\x01</Key></ListBucketResult>")  # as S3 does
    store_s3.fault = lambda request, forward: forward(request) if "encoding-type" in request.query else unreadable
    store = open_faulty(bucket, store_s3, retries=0)
    assert [entry.key for entry in store.list("archives/")] == keys
    assert list(store.directories("archives/")) == ["archives/a b+c%20/", "archives/year=2025/"]


# Parts

@pytest.mark.parametrize("which", ["bucket", "poor_bucket"])
@pytest.mark.req("REQ-S3-021", "REQ-S3-022", "REQ-NET-004")
def test_a_file_above_the_threshold_goes_in_parts_and_leaves_no_state(which: str, request: pytest.FixtureRequest,
                                                                      tmp_path: Path) -> None:
    made: Bucket = request.getfixturevalue(which)
    path, state = tmp_path / "data", tmp_path / "upload.json"
    path.write_bytes(noise(12 * MIB + 17))
    with FaultyS3(made.endpoint) as server:
        store = open_faulty(made, server)
        put = store.put_new(KEY, path, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), state=state)
        parts = [len(sent.body) for sent in server.seen(on("PUT", "object", partNumber=""))]
        assert parts == [5 * MIB, 5 * MIB, 2 * MIB + 17]
        assert all(sent.headers["content-md5"] for sent in server.seen(on("PUT", "object", partNumber="")))
        head = store.head(KEY)
        assert head is not None and (head.size, head.etag) == (12 * MIB + 17, put.etag)
        assert store.put_new(KEY, path, state=state).created is False
        with pytest.raises(NameTaken):
            store.put_new(KEY, noise(12 * MIB), state=state)
    assert not state.exists()
    assert made.read(KEY) == path.read_bytes()
    assert list(Store(settings(made)).unfinished_uploads("")) == []


@pytest.mark.parametrize("threshold", [5, 100])
def test_what_is_too_large_for_memory_is_sent_as_a_stream(bucket: Bucket, store_s3: FaultyS3, tmp_path: Path, threshold: int,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "IN_MEMORY_BYTES", 1 * MIB)
    path = tmp_path / "data"
    path.write_bytes(noise(12 * MIB + 5))
    store = open_faulty(bucket, store_s3, multipart_threshold_mb=threshold)
    store_s3.fault = faulty.answers(once(on("PUT", "object")), faulty.error(503, "SlowDown"))  # each try begins at its start
    store.put_new(KEY, path, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), state=tmp_path / "upload.json")
    assert bucket.read(KEY) == path.read_bytes()
    assert len(store_s3.seen(on("PUT", "object"))) == (4 if threshold == 5 else 2)


def test_a_store_that_names_no_etag_in_its_answer_is_asked_for_it(bucket: Bucket, store_s3: FaultyS3) -> None:
    def no_etag(request: faulty.Request, forward: faulty.Forward) -> Any:
        answer = forward(request)
        kept = {name: value for name, value in answer.headers.items() if name != "etag"}
        return replace(answer, headers=kept) if request.method == "PUT" else answer

    store_s3.fault = no_etag
    assert open_faulty(bucket, store_s3).put_new(KEY, b"bytes").etag == hashlib.md5(b"bytes").hexdigest()


@pytest.mark.req("REQ-NET-005", "REQ-S3-023")
def test_a_connection_reset_repeats_its_part_only(bucket: Bucket, store_s3: FaultyS3, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(noise(16 * MIB))
    store_s3.fault = faulty.drops(once(on("PUT", "object", partNumber="2")))
    open_faulty(bucket, store_s3).put_new(KEY, path, state=tmp_path / "upload.json")
    sent = [request.query["partNumber"] for request in store_s3.seen(on("PUT", "object", partNumber=""))]
    assert sent == ["1", "2", "2", "3", "4"]
    assert bucket.read(KEY) == path.read_bytes()


@pytest.mark.req("REQ-NET-004", "T20")
def test_a_part_that_arrived_damaged_is_sent_again(bucket: Bucket, store_s3: FaultyS3, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(noise(11 * MIB))
    damaged = once(on("PUT", "object", partNumber="2"))

    def damages(request: faulty.Request, forward: faulty.Forward) -> Any:
        return forward(replace(request, body=faulty.flip_bit(request.body)) if damaged(request) else request)

    store_s3.fault = damages
    open_faulty(bucket, store_s3).put_new(KEY, path, state=tmp_path / "upload.json")
    assert [request.query["partNumber"] for request in store_s3.seen(on("PUT", "object", partNumber=""))] == ["1", "2", "2", "3"]
    assert bucket.read(KEY) == path.read_bytes()


def test_etags_that_are_no_md5_are_believed_when_they_repeat(bucket: Bucket, store_s3: FaultyS3, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(noise(6 * MIB))
    real: dict[str, str] = {}

    def other_etags(request: faulty.Request, forward: faulty.Forward) -> Any:
        if on("POST", "object", uploadId="")(request):
            body = request.body.decode()
            for shown, kept in real.items():
                body = body.replace(shown, kept)
            return forward(replace(request, body=body.encode()))
        answer = forward(request)
        if on("PUT", "object", partNumber="")(request):
            shown = hashlib.md5(answer.headers["etag"].encode()).hexdigest()
            real[shown] = answer.headers["etag"].strip('"')
            return replace(answer, headers={**answer.headers, "etag": f'"{shown}"'})
        return answer

    store_s3.fault = other_etags
    open_faulty(bucket, store_s3, multipart_threshold_mb=5).put_new(KEY, path, state=tmp_path / "upload.json")
    assert bucket.read(KEY) == path.read_bytes()


@pytest.mark.req("REQ-NET-001", "REQ-NET-002", "REQ-NET-003")
def test_an_upload_that_the_network_ended_goes_on_with_its_next_part(bucket: Bucket, store_s3: FaultyS3,
                                                                    tmp_path: Path) -> None:
    path, state = tmp_path / "data", tmp_path / "upload.json"
    path.write_bytes(noise(16 * MIB))
    store_s3.fault = faulty.drops(on("PUT", "object", partNumber="3"))
    with pytest.raises(exits.NetworkError):
        open_faulty(bucket, store_s3).put_new(KEY, path, state=state)
    kept = json.loads(state.read_text())
    assert kept["completed_parts"] == [1, 2]
    assert kept["part_etags"] == [hashlib.md5(path.read_bytes()[n * 5 * MIB:(n + 1) * 5 * MIB]).hexdigest() for n in (0, 1)]
    assert kept["upload_id"]
    store_s3.fault = None
    store_s3.requests.clear()
    open_faulty(bucket, store_s3).put_new(KEY, path, state=state)
    assert [request.query["partNumber"] for request in store_s3.seen(on("PUT", "object", partNumber=""))] == ["3", "4"]
    assert bucket.read(KEY) == path.read_bytes()
    assert not state.exists()


@pytest.mark.req("REQ-NET-001", "T37")
def test_a_killed_upload_goes_on_with_its_next_part(bucket: Bucket, store_s3: FaultyS3, tmp_path: Path) -> None:
    path, state = tmp_path / "data", tmp_path / "upload.json"
    path.write_bytes(noise(16 * MIB))
    program = ("import sys; from pathlib import Path; from audit_archiver import log; log.setup('t', quiet=True)\n"
               "from audit_archiver.config.model import S3; from audit_archiver.config.credentials import Secret\n"
               "from audit_archiver.objectstore.client import Store\n"
               "name, endpoint, path, state = sys.argv[1:]\n"
               "store = Store(S3(bucket=name, prefix='archives/', endpoint=endpoint, access_key_id='a', "
               "secret_access_key=Secret('b')))\n"
               f"store.put_new('{KEY}', Path(path), state=Path(state))\n")
    with Proxy(("127.0.0.1", int(store_s3.endpoint.rpartition(":")[2]))) as network:
        third = on("PUT", "object", partNumber="3")

        def stalls(request: faulty.Request, forward: faulty.Forward) -> Any:
            network.stall = network.stall or third(request)
            return forward(request)

        store_s3.fault = stalls
        child = subprocess.Popen([sys.executable, "-c", program, bucket.name, f"http://127.0.0.1:{network.port}",
                                  str(path), str(state)])
        try:
            until(lambda: network.stall, "the third part is on its way")
        finally:
            child.kill()
            assert child.wait() == -signal.SIGKILL
    kept = json.loads(state.read_text())
    assert kept["completed_parts"] == [1, 2]
    until(lambda: len(bucket.client.list_parts(Bucket=bucket.name, Key=KEY, UploadId=kept["upload_id"])["Parts"]) == 3, "the third part arrives")
    store_s3.fault = None
    store_s3.requests.clear()
    assert open_faulty(bucket, store_s3).put_new(KEY, path, state=state).created is True
    sent = [request.query["partNumber"] for request in store_s3.seen(on("PUT", "object", partNumber=""))]
    assert sent == ["4"], "the third part arrived, though nobody heard of it"
    assert bucket.read(KEY) == path.read_bytes()


def test_a_completion_whose_answer_was_lost_is_ours(bucket: Bucket, store_s3: FaultyS3, tmp_path: Path) -> None:
    path, state = tmp_path / "data", tmp_path / "upload.json"
    path.write_bytes(noise(11 * MIB))
    store_s3.fault = faulty.loses_answer(once(on("POST", "object", uploadId="")))
    put = open_faulty(bucket, store_s3).put_new(KEY, path, state=state)
    assert put.etag == bucket.client.head_object(Bucket=bucket.name, Key=KEY)["ETag"].strip('"')
    assert bucket.read(KEY) == path.read_bytes()
    assert not state.exists()


def test_an_upload_that_was_cleaned_up_meanwhile_begins_anew(bucket: Bucket, store_s3: FaultyS3, tmp_path: Path) -> None:
    path, state = tmp_path / "data", tmp_path / "upload.json"
    path.write_bytes(noise(11 * MIB))
    store = open_faulty(bucket, store_s3)
    store_s3.fault = faulty.drops(on("PUT", "object", partNumber="3"))
    with pytest.raises(exits.NetworkError):
        store.put_new(KEY, path, state=state)
    [(key, upload_id, _)] = store.unfinished_uploads("archives/")
    store.abort_upload(key, upload_id)
    gone = on("PUT", "object", uploadId=upload_id)  # moto answers 500 here
    store_s3.fault = faulty.answers(gone, faulty.error(404, "NoSuchUpload"))
    assert store.put_new(KEY, path, state=state).created is True
    assert bucket.read(KEY) == path.read_bytes()


def test_the_state_of_other_bytes_is_not_continued(bucket: Bucket, store_s3: FaultyS3, tmp_path: Path) -> None:
    path, state = tmp_path / "data", tmp_path / "upload.json"
    path.write_bytes(noise(11 * MIB, seed=1))
    store = open_faulty(bucket, store_s3)
    store_s3.fault = faulty.drops(on("PUT", "object", partNumber="3"))
    with pytest.raises(exits.NetworkError):
        store.put_new(KEY, path, state=state)
    store_s3.fault = None
    path.write_bytes(noise(11 * MIB, seed=2))
    store.put_new(KEY, path, state=state)
    assert bucket.read(KEY) == noise(11 * MIB, seed=2)


@pytest.mark.parametrize("damage", ["not json", "{}", json.dumps({"bucket": "other"})])
def test_a_state_file_of_something_else_is_not_believed(bucket: Bucket, tmp_path: Path, damage: str) -> None:
    path, state = tmp_path / "data", tmp_path / "upload.json"
    path.write_bytes(noise(11 * MIB))
    state.write_text(damage)
    Store(settings(bucket)).put_new(KEY, path, state=state)
    assert bucket.read(KEY) == path.read_bytes()
    assert not state.exists()


def test_a_completion_refused_inside_a_200_is_an_error(bucket: Bucket, store_s3: FaultyS3, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(noise(11 * MIB))
    store = open_faulty(bucket, store_s3)
    said = faulty.error(200, "InternalError")
    store_s3.fault = faulty.answers(once(on("POST", "object", uploadId="")), said)
    assert store.put_new(KEY, path, state=tmp_path / "upload.json").created is True
    assert bucket.read(KEY) == path.read_bytes()


@pytest.mark.req("REQ-NET-007")
def test_a_given_up_upload_is_aborted_and_orphans_can_be_found(bucket: Bucket, store_s3: FaultyS3, tmp_path: Path) -> None:
    path, state = tmp_path / "data", tmp_path / "upload.json"
    path.write_bytes(noise(11 * MIB))
    store = open_faulty(bucket, store_s3)
    store_s3.fault = faulty.answers(on("PUT", "object", partNumber="2"), faulty.error(403, "AccessDenied"))
    with pytest.raises(exits.PermissionDenied):
        store.put_new(KEY, path, state=state)
    assert list(store.unfinished_uploads("")) == []
    assert not state.exists()
    orphan = bucket.client.create_multipart_upload(Bucket=bucket.name, Key=KEY)["UploadId"]
    assert [(key, upload_id) for key, upload_id, _ in store.unfinished_uploads("archives/")] == [(KEY, orphan)]
    assert bucket.keys() == []


# Errors in words

def _no_bucket(made: S3) -> S3:
    return replace(made, bucket="no-such-bucket-here")


def _wrong_secret(made: S3) -> S3:
    return replace(made, secret_access_key=Secret("wrong-secret"))


def _wrong_key(made: S3) -> S3:
    return replace(made, access_key_id="nobody-knows-me")


def _unreachable(made: S3) -> S3:
    return replace(made, endpoint="http://127.0.0.1:9", retries=0)


@pytest.mark.req("REQ-S3-003", "REQ-S3-006", "REQ-S3-002")
@pytest.mark.parametrize(("wrong", "code", "words"), [
    (_no_bucket, exits.CONFIG, "the bucket does not exist"), (_wrong_secret, exits.PERMISSION, "secret"),
    (_wrong_key, exits.PERMISSION, "the access key is unknown"), (_unreachable, exits.NETWORK, "cannot be reached")])
def test_what_is_wrong_with_the_store_is_said(poor_bucket: Bucket, wrong: Callable[[S3], S3], code: int, words: str) -> None:
    with pytest.raises(exits.ArchiverError) as caught:
        Store(wrong(settings(poor_bucket))).put_new(KEY, b"bytes")
    assert caught.value.code == code
    assert words in str(caught.value)
    assert poor_bucket.secret_key not in str(caught.value) and "wrong-secret" not in str(caught.value)


@pytest.mark.parametrize(("answer", "code", "words"), [
    (faulty.error(403, "AccessDenied"), exits.PERMISSION, "permission denied"),
    (faulty.error(400, "ExpiredToken"), exits.PERMISSION, "expired"),
    (faulty.error(403, "RequestTimeTooSkewed"), exits.PERMISSION, "clock"),
    (faulty.error(400, "AuthorizationHeaderMalformed"), exits.CONFIG, "region"),
    (faulty.error(400, "InvalidStorageClass"), exits.CONFIG, "storage class"),
    (faulty.error(400, "KMS.NotFoundException"), exits.CONFIG, "KMS key"),
    (faulty.error(507, "XMinioStorageFull"), exits.RESOURCE, "full"),
    (faulty.error(400, "SomethingElse"), exits.FAILED, "SomethingElse")])
def test_a_refusal_is_final_and_names_what_to_do(bucket: Bucket, store_s3: FaultyS3, answer: faulty.Answer, code: int,
                                                 words: str) -> None:
    store = open_faulty(bucket, store_s3)
    store.probe()
    store_s3.fault = faulty.answers(on("PUT", "object"), answer)
    with pytest.raises(exits.ArchiverError) as caught:
        store.put_new(KEY, b"bytes")
    assert caught.value.code == code
    assert words in str(caught.value)
    assert len(store_s3.seen(on("PUT", "object"))) == 1


def test_an_answer_that_is_not_s3_is_a_network_error(bucket: Bucket, store_s3: FaultyS3) -> None:
    store = open_faulty(bucket, store_s3, retries=0)
    store.probe()
    store_s3.fault = lambda request, forward: faulty.Answer(200, {"content-type": "text/html"}, b"<html>Log in here")
    with pytest.raises(exits.NetworkError):
        list(store.list("archives/"))


@pytest.mark.req("REQ-S3-003", "REQ-S3-006")
def test_preflight_puts_gets_lists_and_deletes_and_leaves_nothing(bucket: Bucket) -> None:
    found = Store(settings(bucket)).check_bucket()
    assert found.capabilities.create_only is True
    assert found.clock_skew_s is not None and found.clock_skew_s < 30
    assert bucket.keys() == []


@pytest.mark.req("REQ-S3-006")
@pytest.mark.parametrize("method", ["PUT", "GET", "DELETE"])
def test_preflight_misses_each_permission(bucket: Bucket, store_s3: FaultyS3, method: str) -> None:
    store_s3.fault = faulty.answers(lambda request: request.method == method and bool(request.key),
                                    faulty.error(403, "AccessDenied"))
    with pytest.raises(exits.PermissionDenied):
        open_faulty(bucket, store_s3).check_bucket()


# Where it points

def test_the_environment_cannot_redirect_a_configured_store(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "other")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "other")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-3")
    store = Store(settings(bucket, region="eu-central-1"))
    assert (store.connection.endpoint, store.connection.region) == (bucket.endpoint, "eu-central-1")
    assert store.connection.identity.startswith(bucket.access_key[:4])
    assert bucket.secret_key not in store.connection.identity
    assert Store(settings(bucket, endpoint=None)).connection.endpoint == "https://s3.eu-west-3.amazonaws.com"


def test_a_configured_profile_gives_the_keys(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    file.write_text("[archive]\naws_access_key_id = AKIAPROFILE0001\naws_secret_access_key = s\nregion = eu-west-1\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "other")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "other")
    store = Store(settings(bucket, access_key_id=None, secret_access_key=None, profile="archive"))
    assert store.connection.identity == "AKIA...0001 (profile archive)"
    with pytest.raises(exits.ConfigError, match="no-such"):
        Store(settings(bucket, access_key_id=None, secret_access_key=None, profile="no-such"))


def test_no_credentials_are_a_configuration_error(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    store = Store(settings(bucket, access_key_id=None, secret_access_key=None))
    with pytest.raises(exits.ConfigError, match="credentials"):
        store.put_new(KEY, b"bytes")
