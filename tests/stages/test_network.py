"""A network and a store that fail in the middle of an upload: what is sent again, what is kept, and how it is finished later."""

from __future__ import annotations

import json
import re
import signal
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator

import pytest

from audit_archiver import exits
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.errors import CircuitOpen
from tests.conftest import Bucket, ConfigFile
from tests.ground import batches as ground
from tests.ground import faulty_s3 as faulty
from tests.ground.faulty_s3 import FaultyS3, Hangs, on, once
from tests.ground.kill import kill
from tests.ground.proxy import Proxy
from tests.ground.run import run_stage, spawn
from tests.ground.wait import until
from tests.stages.test_objectstore import KEY, MIB, noise, open_faulty, settings

DATA = ".jsonl.gz"


@pytest.fixture()
def store(bucket: Bucket) -> Iterator[FaultyS3]:
    """moto behind an endpoint that can misbehave."""
    with FaultyS3(bucket.endpoint) as made:
        yield made


def parts(store: FaultyS3) -> list[int]:
    """The numbers of the parts that arrived at the proxy."""
    return [int(request.query["partNumber"]) for request in store.seen(on("PUT", DATA, partNumber=""))]


# Parts

@pytest.mark.req("REQ-NET-001", "REQ-NET-002", "REQ-NET-003", "REQ-REL-007", "T37")
@pytest.mark.parametrize("arrives", [False, True], ids=["on its way", "arrived, unknown to us"])
def test_an_upload_killed_between_parts_goes_on_with_those_that_the_store_does_not_have(
        bucket: Bucket, store: FaultyS3, config_file: ConfigFile, tmp_path: Path, arrives: bool) -> None:
    """GIVEN aa-upload with a part on its way WHEN it gets SIGKILL and is run again THEN no part that the store has is sent again."""
    path = config_file(ground.NOWHERE, bucket, s3=ground.s3_section(store.endpoint))
    line = ground.staged(tmp_path / "staging", bucket.name, rows=4000, width=6000)
    (tmp_path / "batch.json").write_bytes(ground.dump(line))
    store.fault = third = Hangs(on("PUT", DATA, partNumber="3"), passing_on=arrives)
    child = spawn("aa-upload", [tmp_path / "batch.json"], {"AA_CONFIG": path})
    try:
        until(lambda: third.hanging, "the third part is on its way")
    finally:
        kill(child.pid)
        third.release()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    state = json.loads((Path(line["serialized"]["dir"]) / "upload.json").read_text())
    assert (state["completed_parts"], parts(store)) == ([1, 2], [1, 2, 3])
    assert len(state["part_etags"]) == 2 and state["upload_id"]
    store.fault = None
    store.requests.clear()
    result = run_stage("aa-upload", [tmp_path / "batch.json"], env={"AA_CONFIG": path})
    assert result.rc == exits.OK, result.err
    assert parts(store) == ([] if arrives else [3])
    stem = line["serialized"]["stem"]
    assert bucket.read(stem + DATA) == next(Path(line["serialized"]["dir"]).glob("*.gz")).read_bytes()
    assert bucket.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads", []) == []
    assert not (Path(line["serialized"]["dir"]) / "upload.json").exists()


@pytest.mark.req("REQ-NET-001", "REQ-NET-004")
def test_what_the_store_says_of_the_parts_counts_and_not_the_state_file(bucket: Bucket, store: FaultyS3, tmp_path: Path) -> None:
    """GIVEN a state file with all parts, and a store in which one is other bytes and one is gone THEN these two are sent."""
    path, state = tmp_path / "data", tmp_path / "upload.json"
    path.write_bytes(noise(16 * MIB))
    store.fault = faulty.drops(on("POST", "object", uploadId=""))
    with pytest.raises(exits.NetworkError):
        open_faulty(bucket, store).put_new(KEY, path, state=state)
    kept = json.loads(state.read_text())
    assert kept["completed_parts"] == [1, 2, 3, 4]
    bucket.client.upload_part(Bucket=bucket.name, Key=KEY, UploadId=kept["upload_id"], PartNumber=2, Body=noise(5 * MIB, seed=9))

    def without_the_third(request: faulty.Request, forward: faulty.Forward) -> faulty.Answer:
        answer = forward(request)
        if not on("GET", "object", uploadId="")(request):
            return answer
        body, count = re.subn(rb"<Part>\s*<PartNumber>3<.*?</Part>", b"", answer.body, flags=re.DOTALL)
        assert count == 1, answer.body
        return replace(answer, body=body)

    store.fault = without_the_third
    store.requests.clear()
    assert open_faulty(bucket, store).put_new(KEY, path, state=state).created is True
    assert [request.query["partNumber"] for request in store.seen(on("PUT", "object", partNumber=""))] == ["2", "3"]
    assert bucket.read(KEY) == path.read_bytes()


def test_a_store_that_does_not_list_parts_gets_them_all_again(bucket: Bucket, store: FaultyS3, tmp_path: Path) -> None:
    path, state = tmp_path / "data", tmp_path / "upload.json"
    path.write_bytes(noise(11 * MIB))
    store.fault = faulty.drops(on("PUT", "object", partNumber="3"))
    with pytest.raises(exits.NetworkError):
        open_faulty(bucket, store).put_new(KEY, path, state=state)
    store.fault = faulty.answers(on("GET", "object", uploadId=""), faulty.error(501, "NotImplemented"))
    store.requests.clear()
    assert open_faulty(bucket, store).put_new(KEY, path, state=state).created is True
    assert [request.query["partNumber"] for request in store.seen(on("PUT", "object", partNumber=""))] == ["1", "2", "3"]
    assert bucket.read(KEY) == path.read_bytes()


# Stalls

@pytest.mark.req("REQ-REL-002", "REQ-ERR-003")
@pytest.mark.parametrize("which", [on("PUT", "object"), on("GET", "object"), on("HEAD", "object")], ids=["PUT", "GET", "HEAD"])
def test_a_request_that_hangs_is_given_up_after_the_timeout_and_sent_again(bucket: Bucket, store: FaultyS3, which: faulty.Which) -> None:
    opened = open_faulty(bucket, store, read_timeout_s=1)
    opened.probe()
    store.fault = hanging = Hangs(once(which))
    try:
        put = opened.put_new(KEY, b"bytes")
        head = opened.head(KEY)
        assert head is not None and head.etag == put.etag
        assert opened.get_bytes(KEY) == b"bytes"
    finally:
        hanging.release()
    assert hanging.hanging == 1
    assert bucket.read(KEY) == b"bytes"


@pytest.mark.req("REQ-REL-002")
def test_connections_that_died_in_silence_while_they_were_idle_cost_one_timeout_together(bucket: Bucket) -> None:
    """GIVEN idle connections behind a firewall that forgot them WHEN the next requests hang THEN one of them is waited for, not each."""
    with Proxy(("127.0.0.1", int(bucket.endpoint.rpartition(":")[2]))) as network:
        opened = Store(settings(bucket, endpoint=f"http://127.0.0.1:{network.port}", read_timeout_s=1.5))
        opened.put_new(KEY, b"bytes")
        streams = [opened.get(KEY) for _ in range(4)]
        for stream in streams:
            stream.read()
            stream.close()
        assert network.connections >= 4
        idle = network.connections
        network.forget()
        assert opened.get_bytes(KEY) == b"bytes"
        assert network.connections == idle + 1, "a new connection after the first that hung"


@pytest.mark.req("REQ-NET-005", "REQ-REL-002")
def test_a_part_that_hangs_is_sent_again_alone(bucket: Bucket, store: FaultyS3, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(noise(11 * MIB))
    store.fault = hanging = Hangs(once(on("PUT", "object", partNumber="2")))
    try:
        assert open_faulty(bucket, store, read_timeout_s=1).put_new(KEY, path, state=tmp_path / "upload.json").created is True
    finally:
        hanging.release()
    assert [request.query["partNumber"] for request in store.seen(on("PUT", "object", partNumber=""))] == ["1", "2", "2", "3"]
    assert bucket.read(KEY) == path.read_bytes()


@pytest.mark.req("REQ-REL-002")
def test_a_body_that_nobody_takes_is_given_up_after_the_timeout(bucket: Bucket, tmp_path: Path) -> None:
    """More than the buffers on the way can hold: the sender itself stands still."""
    with Proxy(("127.0.0.1", int(bucket.endpoint.rpartition(":")[2]))) as network:
        opened = Store(settings(bucket, endpoint=f"http://127.0.0.1:{network.port}", connect_timeout_s=1, read_timeout_s=5,
                                multipart_threshold_mb=100))
        opened.probe()
        network.forget()
        body = noise(24 * MIB)
        assert opened.put_new(KEY, body).created is True
    assert bucket.read(KEY) == body


# A store that is busy, or away

@pytest.mark.req("REQ-NET-013", "REQ-ERR-003", "REQ-REL-002")
def test_slow_down_is_a_pause_and_fewer_requests_and_no_failure(bucket: Bucket, store: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_faulty(bucket, store, retry_base_s=2, retry_max_s=30)
    opened.probe()
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    store.fault = faulty.answers(once(on("PUT", "object"), times=3), faulty.error(503, "SlowDown", "Please reduce your request rate."))
    assert opened.put_new(KEY, b"bytes").created is True
    pauses = [each for each in waited if each >= 1.5]
    assert [round(each / 2 ** number) for number, each in enumerate(pauses, 1)] == [1, 1, 1], waited
    before = len(waited)
    for number in range(40):
        opened.put_new(f"{KEY}-{number}", b"bytes")
    assert len(waited) > before, "the requests that follow are spread"


@pytest.mark.req("REQ-NET-011", "REQ-NET-012")
def test_a_configured_rate_spreads_requests_and_bytes_before_they_are_refused(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Store(settings(bucket, rate_limit_requests_per_second=0.1, rate_limit_mb_per_second=0.1))
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    for number in range(5):
        assert opened.head(f"{KEY}-{number}") is None
    assert len(waited) >= 4 and max(waited) > 30, "a second's worth is a tenth of a request, and nobody waited in truth"
    del waited[:]
    opened.put_new(KEY, noise(MIB))
    assert max(waited) > 9
    del waited[:]
    assert len(opened.get_bytes(KEY)) == MIB
    assert max(waited) > 9


@pytest.mark.req("REQ-ERR-006")
def test_tries_do_not_multiply_where_one_request_leads_to_another(bucket: Bucket, store: FaultyS3) -> None:
    opened = open_faulty(bucket, store)
    opened.probe()
    store.fault = faulty.drops(lambda request: request.key == KEY)
    with pytest.raises(exits.NetworkError, match="tried 4 times"):
        opened.put_new(KEY, b"bytes")
    assert len(store.seen(lambda request: request.key == KEY)) == 4


def test_a_store_that_is_away_is_not_asked_again_and_again(bucket: Bucket, store: FaultyS3) -> None:
    opened = open_faulty(bucket, store, retries=1, circuit_breaker_reset_s=2)
    opened.probe()
    store.fault = faulty.drops(lambda request: True)
    for _ in range(3):
        with pytest.raises(exits.NetworkError, match="tried 2 times"):
            opened.head(KEY)
    asked = len(store.requests)
    with pytest.raises(CircuitOpen, match="the last 3 operations were given up") as caught:
        opened.put_new(KEY, b"bytes")
    assert (caught.value.code, caught.value.retry) == (exits.NETWORK, True)
    assert len(store.requests) == asked
    store.fault = None
    put = until(lambda: _admitted(opened), "one is let through after a while")
    assert put.created is True and bucket.read(KEY) == b"bytes"
    assert opened.head(KEY) is not None, "closed again"


def _admitted(opened: Store) -> Any:
    try:
        return opened.put_new(KEY, b"bytes")
    except CircuitOpen:
        return None


# Credentials

def demands(store: FaultyS3, tokens: list[str]) -> None:
    """From now on only the last of `tokens` is good, as of the time of each request; the others have expired."""
    def fault(request: faulty.Request, forward: faulty.Forward) -> faulty.Answer:
        if request.headers.get("x-amz-security-token") == tokens[-1]:
            return forward(request)
        expired = faulty.error(400, "ExpiredToken", "The provided token has expired.")
        return replace(expired, body=b"") if request.method == "HEAD" else expired

    store.fault = fault


def profile(path: Path, token: str) -> None:
    path.write_text(f"[archive]\naws_access_key_id = AKIA{token}\naws_secret_access_key = s\naws_session_token = {token}\n")


@pytest.mark.req("T25", "REQ-REL-002", "REQ-REL-007")
@pytest.mark.parametrize("method", ["PUT", "HEAD", "GET"])
def test_a_token_that_expires_is_read_again_from_its_file(bucket: Bucket, store: FaultyS3, tmp_path: Path, method: str,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    file, tokens = tmp_path / "credentials", ["ONE1"]
    profile(file, "ONE1")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    demands(store, tokens)
    opened = open_faulty(bucket, store, access_key_id=None, secret_access_key=None, profile="archive")
    opened.put_new(KEY, b"bytes")
    tokens.append("TWO2")
    profile(file, "TWO2")
    did = {"PUT": lambda: opened.put_new(KEY + "-2", b"bytes"), "HEAD": lambda: opened.head(KEY), "GET": lambda: opened.get_bytes(KEY)}[method]()
    assert did
    assert opened.connection.identity == "AKIA...TWO2 (profile archive)"
    tokens.append("THREE3")  # and nobody has written it anywhere
    with pytest.raises(exits.PermissionDenied, match="the session token has expired"):
        opened.head(KEY)


@pytest.mark.req("T25")
def test_a_stream_is_sent_whole_with_the_new_credentials(bucket: Bucket, store: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audit_archiver.objectstore.content.IN_MEMORY_BYTES", 1 * MIB)
    file, tokens, path = tmp_path / "credentials", ["ONE1"], tmp_path / "data"
    path.write_bytes(noise(11 * MIB))
    profile(file, "ONE1")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    demands(store, tokens)
    passing, second = store.fault, once(on("PUT", "object", partNumber="2"))

    def expires_at_the_second_part(request: faulty.Request, forward: faulty.Forward) -> Any:
        if second(request):
            tokens.append("TWO2")
            profile(file, "TWO2")
        assert passing is not None
        return passing(request, forward)

    store.fault = expires_at_the_second_part
    opened = open_faulty(bucket, store, access_key_id=None, secret_access_key=None, profile="archive")
    assert opened.put_new(KEY, path, state=tmp_path / "upload.json").created is True
    assert [request.query["partNumber"] for request in store.seen(on("PUT", "object", partNumber=""))] == ["1", "2", "2", "3"]
    assert bucket.read(KEY) == path.read_bytes()


@pytest.mark.req("T25")
def test_a_provider_that_names_an_end_is_asked_before_it(bucket: Bucket, store: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """credential_process: each answer is good for a minute, so botocore asks anew for every request; no request is refused."""
    program, counter = tmp_path / "provider", tmp_path / "counter"
    program.write_text(f"""#!/bin/sh
echo x >> {counter}
printf '{{"Version": 1, "AccessKeyId": "AKIA", "SecretAccessKey": "s", "SessionToken": "T%d", "Expiration": "%s"}}' \\
  $(wc -l < {counter}) $(date -u -d '+1 minute' +%Y-%m-%dT%H:%M:%SZ)
""")
    program.chmod(stat.S_IRWXU)
    (tmp_path / "config").write_text(f"[profile archive]\ncredential_process = {program}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    opened = open_faulty(bucket, store, access_key_id=None, secret_access_key=None, profile="archive")
    opened.put_new(KEY, b"bytes")
    opened.head(KEY)
    tokens = [request.headers["x-amz-security-token"] for request in store.requests]
    assert len(set(tokens)) > 1, tokens


@pytest.mark.req("T25", "REQ-NET-008")
def test_an_upload_whose_token_expired_for_good_stops_clearly_and_keeps_the_batch_and_its_parts(
        bucket: Bucket, store: FaultyS3, config_file: ConfigFile, tmp_path: Path) -> None:
    path = config_file(ground.NOWHERE, bucket, s3=ground.s3_section(store.endpoint, local_fallback_dir=str(tmp_path / "fallback")))
    line = ground.staged(tmp_path / "staging", bucket.name, rows=4000, width=6000)
    store.fault = faulty.answers(on("PUT", DATA, partNumber="3"), faulty.error(400, "ExpiredToken"))
    stopped = run_stage("aa-upload", stdin=ground.dump(line), env={"AA_CONFIG": path})
    assert (stopped.rc, stopped.out) == (exits.PERMISSION, b"")
    assert "the session token has expired" in stopped.log[-1]["msg"] and str(tmp_path / "fallback") in stopped.log[-1]["hint"]
    store.fault = None
    store.requests.clear()
    [kept] = (tmp_path / "fallback").rglob("batch.json")
    later = run_stage("aa-upload", [kept], env={"AA_CONFIG": path})
    assert later.rc == exits.OK, later.err
    assert parts(store) == [3]
