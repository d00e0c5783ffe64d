"""aa-upload: three objects per batch, create-only, and every way in which that fails."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from audit_archiver import exits
from audit_archiver.formats import names
from tests.conftest import Bucket, ConfigFile
from tests.ground import batches as ground
from tests.ground import faulty_s3 as faulty
from tests.ground.faulty_s3 import FaultyS3, on, once
from tests.ground.listener import Holder
from tests.ground.run import Result, run_forked, run_stage

DATA, METADATA, KEYS = ".jsonl.gz", "_metadata.json", "_manifest.json"


@pytest.fixture()
def store(bucket: Bucket) -> Iterator[FaultyS3]:
    """moto behind an endpoint that can misbehave."""
    with FaultyS3(bucket.endpoint) as made:
        yield made


@pytest.fixture()
def upload(bucket: Bucket, store: FaultyS3, config_file: ConfigFile) -> Callable[..., Result]:
    """Runs aa-upload in process against `store` on batch lines."""
    def run(*lines: dict[str, Any], argv: tuple[str, ...] = (), **s3: Any) -> Result:
        path = config_file(ground.NOWHERE, bucket, s3=ground.s3_section(store.endpoint, **s3))
        return run_stage("aa-upload", argv, ground.dump(*lines), {"AA_CONFIG": path})
    return run


def objects(line: dict[str, Any]) -> list[str]:
    """The keys of a batch's three objects, sorted."""
    return sorted(line["serialized"]["stem"] + suffix for suffix in (DATA, METADATA, KEYS))


def archived(bucket: Bucket) -> list[str]:
    """The keys of batch objects in the bucket."""
    return [key for key in bucket.keys() if "/year=" in key]


@pytest.mark.req("REQ-S3-007", "REQ-S3-008", "REQ-S3-009", "REQ-VER-010")
def test_upload_puts_the_staged_bytes_under_their_names_and_says_so(bucket: Bucket, upload: Callable[..., Result],
                                                                    tmp_path: Path) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)
    result = upload(line)
    assert result.rc == exits.OK, result.err
    [out] = result.lines
    assert {name: out[name] for name in line} == line
    assert archived(bucket) == objects(line)
    stem = "archives/prod/audit_logs/year=2025/month=12/day=30/audit_logs_20251230T021547Z_batch_001"
    assert line["serialized"]["stem"] == stem
    for suffix in (DATA, METADATA, KEYS):
        assert bucket.read(stem + suffix) == (Path(line["serialized"]["dir"]) / (os.path.basename(stem) + suffix)).read_bytes()
    etags = [bucket.client.head_object(Bucket=bucket.name, Key=stem + suffix)["ETag"].strip('"')
             for suffix in (DATA, METADATA, KEYS)]
    assert out["uploaded"] == {"bucket": bucket.name, "etags": etags, "versions": [None] * 3, "create_only": True}
    assert Path(line["serialized"]["dir"]).is_dir()  # aa-record removes it


def test_upload_carries_many_batches_in_their_order(bucket: Bucket, upload: Callable[..., Result], tmp_path: Path) -> None:
    lines = [ground.staged(tmp_path / "staging", bucket.name, number=number, rows=5) for number in (3, 1, 2)]
    lines.append(ground.staged(tmp_path / "staging", bucket.name, table="other", schema="audit", rows=5))
    result = upload(*lines)
    assert result.rc == exits.OK, result.err
    assert [(line["batch"]["table"], line["batch"]["number"]) for line in result.lines] == [
        ("audit_logs", 3), ("audit_logs", 1), ("audit_logs", 2), ("other", 1)]
    assert archived(bucket) == sorted(key for line in lines for key in objects(line))


def test_the_first_log_line_says_where_and_as_whom_and_keeps_the_secret(bucket: Bucket, store: FaultyS3,
                                                                         upload: Callable[..., Result], tmp_path: Path) -> None:
    result = upload(ground.staged(tmp_path / "staging", bucket.name))
    first = result.log[0]
    assert first["event"] == "s3.open"
    assert (first["endpoint"], first["region"]) == (store.endpoint, "us-east-1")
    assert first["identity"] == f"{bucket.access_key[:4]}...{bucket.access_key[-4:]}"
    assert bucket.secret_key not in result.err


def test_quiet_writes_not_one_byte(bucket: Bucket, upload: Callable[..., Result], tmp_path: Path) -> None:
    result = upload(ground.staged(tmp_path / "staging", bucket.name), argv=("--quiet",))
    assert (result.rc, result.err) == (exits.OK, "")


def test_the_key_list_goes_last(bucket: Bucket, store: FaultyS3, upload: Callable[..., Result], tmp_path: Path) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)
    store.fault = faulty.answers(on("PUT", KEYS), faulty.error(403, "AccessDenied"))
    result = upload(line)
    assert (result.rc, result.out) == (exits.PERMISSION, b"")
    assert archived(bucket) == [key for key in objects(line) if not key.endswith(KEYS)]
    store.fault = faulty.answers(on("PUT", METADATA), faulty.error(403, "AccessDenied"))
    second = ground.staged(tmp_path / "staging", bucket.name, number=2)
    assert upload(second).rc == exits.PERMISSION
    assert second["serialized"]["stem"] + KEYS not in bucket.keys()


def test_a_rerun_finds_its_own_objects_and_changes_nothing(bucket: Bucket, store: FaultyS3, upload: Callable[..., Result],
                                                           tmp_path: Path) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)
    first = upload(line)
    stored = {key: bucket.client.head_object(Bucket=bucket.name, Key=key)["LastModified"] for key in bucket.keys()}
    second = upload(line)
    assert second.rc == exits.OK
    assert second.lines == first.lines
    assert {key: bucket.client.head_object(Bucket=bucket.name, Key=key)["LastModified"] for key in bucket.keys()} == stored


@pytest.mark.parametrize("which", ["bucket", "poor_bucket"])
@pytest.mark.req("T10", "T24", "REQ-IDEM-007", "REQ-IDEM-008")
def test_two_runs_of_the_same_second_do_not_overwrite_each_other(which: str, request: pytest.FixtureRequest,
                                                                 config_file: ConfigFile, tmp_path: Path) -> None:
    made: Bucket = request.getfixturevalue(which)
    path = config_file(ground.NOWHERE, made, s3=ground.s3_section(made.endpoint))
    mine = ground.staged(tmp_path / "mine", made.name)
    theirs = ground.staged(tmp_path / "theirs", made.name, run="20251230T021545Z-4712", first_id=5000)
    assert mine["serialized"]["stem"] == theirs["serialized"]["stem"]
    first = run_stage("aa-upload", (), ground.dump(mine), {"AA_CONFIG": path})
    second = run_stage("aa-upload", (), ground.dump(theirs), {"AA_CONFIG": path})
    assert first.rc == exits.OK, first.err
    assert (second.rc, second.out) == (exits.FAILED, b"")
    assert "select again" in second.log[-1]["hint"]
    assert made.read(mine["serialized"]["stem"] + DATA) == next(Path(mine["serialized"]["dir"]).glob("*.gz")).read_bytes()
    assert first.lines[0]["uploaded"]["create_only"] is (which == "bucket")


@pytest.mark.req("T24")
def test_a_lost_race_for_the_name_ends_the_stage_without_a_line(bucket: Bucket, store: FaultyS3,
                                                                upload: Callable[..., Result], tmp_path: Path) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)

    def somebody_is_faster(request: faulty.Request, forward: faulty.Forward) -> Any:
        if on("PUT", DATA)(request):
            bucket.client.put_object(Bucket=bucket.name, Key=request.key, Body=b"theirs")
        return forward(request)

    store.fault = somebody_is_faster
    result = upload(line)
    assert (result.rc, result.out) == (exits.FAILED, b"")
    assert bucket.read(line["serialized"]["stem"] + DATA) == b"theirs"
    assert line["serialized"]["stem"] + KEYS not in bucket.keys()


def test_a_holder_is_told_that_the_next_number_can_succeed(bucket: Bucket, upload: Callable[..., Result], config_file: ConfigFile,
                                                           store: FaultyS3, tmp_path: Path) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)
    bucket.client.put_object(Bucket=bucket.name, Key=line["serialized"]["stem"] + DATA, Body=b"theirs")
    with Holder() as holder:
        path = config_file(ground.NOWHERE, bucket, s3=ground.s3_section(store.endpoint))
        result = run_stage("aa-upload", (), ground.dump(line), {"AA_CONFIG": path, "AA_TXN": holder.path})
        assert (result.rc, result.out) == (exits.FAILED, b"")
        assert [request["op"] for request in holder.requests] == ["hello", "bye"]
        assert (holder.requests[-1]["code"], holder.requests[-1]["retry"]) == (exits.FAILED, True)


# Before the first object

def test_a_run_says_once_that_it_begins_before_its_first_object(bucket: Bucket, store: FaultyS3,
                                                                upload: Callable[..., Result], tmp_path: Path) -> None:
    lines = [ground.staged(tmp_path / "staging", bucket.name, number=number, rows=5) for number in (1, 2)]
    assert upload(*lines).rc == exits.OK
    puts = [request.key for request in store.seen(on("PUT")) if ".probe-" not in request.key]
    start = names.run_start_key("archives/", "prod", ground.RUN)
    assert puts[:2] == ["archives/prod/audit_logs/_owner.json", start]
    assert puts.count(start) == 1
    value = json.loads(bucket.read(start))
    assert (value["format"], value["run"], value["database"], value["event"]) == ("aa-run", ground.RUN, "prod", "start")
    again = ground.staged(tmp_path / "staging", bucket.name, number=3, rows=5)
    assert upload(again).rc == exits.OK  # a restarted pipeline of the same run finds it there
    assert json.loads(bucket.read(start)) == value


def test_a_start_of_another_run_under_our_name_stops_the_upload(bucket: Bucket, upload: Callable[..., Result],
                                                                tmp_path: Path) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)
    assert upload(line).rc == exits.OK
    start = names.run_start_key("archives/", "prod", ground.RUN)
    value = {**json.loads(bucket.read(start)), "database": "another"}
    bucket.client.put_object(Bucket=bucket.name, Key=start, Body=json.dumps(value).encode())
    assert upload(ground.staged(tmp_path / "staging", bucket.name, number=2)).rc == exits.FAILED


@pytest.mark.parametrize("change", [{"system": "7000000000000000001"}, {"database_oid": 1}, {"table": "audit%2Elogs"}, {"schema": "audit"},
                                    {"database": "stock"}])
def test_s12_a_prefix_of_another_server_or_table_is_refused_with_its_owner_s_name_and_the_remedy(
        bucket: Bucket, upload: Callable[..., Result], tmp_path: Path, change: dict[str, Any]) -> None:
    """S12: two servers with one database name would share everything, and decide each other's batches."""
    assert upload(ground.staged(tmp_path / "staging", bucket.name)).rc == exits.OK
    owner = "archives/prod/audit_logs/_owner.json"
    theirs = {**json.loads(bucket.read(owner)), **change}
    bucket.client.put_object(Bucket=bucket.name, Key=owner, Body=json.dumps(theirs).encode())
    before = bucket.keys()
    second = ground.staged(tmp_path / "staging", bucket.name, number=2)
    result = upload(second)
    assert (result.rc, result.out) == (exits.CONFIG, b"")
    said = result.log[-1]
    assert f"'s3://{bucket.name}/archives/prod/audit_logs/' belongs to another table, database or server" in said["msg"]
    assert said["detail"] == (f"system {theirs['system']}, database oid {theirs['database_oid']}, "
                              f"{theirs['database']} {theirs['schema']}.{theirs['table']}")
    assert "s3.prefix" in said["hint"] and "aa-recover --adopt" in said["hint"]
    assert (bucket.keys(), json.loads(bucket.read(owner))) == (before, theirs), "nothing is uploaded, and the owner stays"
    assert (Path(second["serialized"]["dir"]) / "batch.json").exists(), "and it can still be sent elsewhere"


def test_two_tables_that_look_alike_have_prefixes_of_their_own(bucket: Bucket, upload: Callable[..., Result],
                                                               tmp_path: Path) -> None:
    lines = [ground.staged(tmp_path / "staging", bucket.name, schema="audit", table="t", rows=5),
             ground.staged(tmp_path / "staging", bucket.name, schema="public", table="audit.t", rows=5),
             ground.staged(tmp_path / "staging", bucket.name, schema="public", table="T", rows=5),
             ground.staged(tmp_path / "staging", bucket.name, schema="public", table="_t", rows=5)]
    assert upload(*lines).rc == exits.OK
    assert len(archived(bucket)) == 12
    assert len([key for key in bucket.keys() if key.endswith("/_owner.json")]) == 4


# What does not belong here

def _other_prefix(line: dict[str, Any]) -> dict[str, Any]:
    stem = line["serialized"]["stem"].replace("archives/", "elsewhere/")
    return {**line, "serialized": {**line["serialized"], "stem": stem}}


def _other_day(line: dict[str, Any]) -> dict[str, Any]:
    stem = line["serialized"]["stem"].replace("day=30", "day=31")
    return {**line, "serialized": {**line["serialized"], "stem": stem}}


@pytest.mark.parametrize("change", [_other_prefix, _other_day])
def test_a_line_whose_name_is_not_the_configurations_is_refused(bucket: Bucket, upload: Callable[..., Result],
                                                                tmp_path: Path, change: Callable[..., dict[str, Any]]) -> None:
    result = upload(change(ground.staged(tmp_path / "staging", bucket.name)))
    assert (result.rc, result.out) == (exits.CONFIG, b"")
    assert bucket.keys() == []


def test_a_batch_that_was_serialized_for_another_bucket_is_refused(bucket: Bucket, upload: Callable[..., Result],
                                                                   tmp_path: Path) -> None:
    result = upload(ground.staged(tmp_path / "staging", "another-bucket"))
    assert (result.rc, result.out) == (exits.CONFIG, b"")
    assert "another-bucket" in result.log[-1]["msg"] and bucket.name in result.log[-1]["msg"]
    assert bucket.keys() == []


def test_metadata_of_another_batch_of_the_same_name_are_refused(bucket: Bucket, upload: Callable[..., Result],
                                                                tmp_path: Path) -> None:
    line = ground.staged(tmp_path / "mine", bucket.name)
    other = ground.staged(tmp_path / "theirs", bucket.name, run="20251230T021545Z-4712", first_id=5000)
    for path in Path(other["serialized"]["dir"]).glob("*_metadata.json"):
        shutil.copy(path, line["serialized"]["dir"])
    line["serialized"]["metadata_sha256"] = other["serialized"]["metadata_sha256"]
    result = upload(line)
    assert (result.rc, result.out) == (exits.FAILED, b"")
    assert "describe another batch" in result.log[-1]["msg"]
    assert bucket.keys() == []


@pytest.mark.parametrize("suffix", [DATA, METADATA, KEYS])
def test_staged_bytes_that_changed_are_not_sent(bucket: Bucket, upload: Callable[..., Result], tmp_path: Path,
                                                suffix: str) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)
    path = next(Path(line["serialized"]["dir"]).glob(f"*{suffix}"))
    path.write_bytes(path.read_bytes().replace(b"\n", b" \n", 1) if suffix != DATA else faulty.flip_bit(path.read_bytes()))
    result = upload(line)
    assert (result.rc, result.out) == (exits.FAILED, b"")
    assert "are not those of the batch line" in result.log[-1]["msg"]
    assert line["serialized"]["stem"] + suffix not in bucket.keys()


@pytest.mark.parametrize("suffix", [DATA, METADATA, KEYS])
def test_a_missing_staged_file_is_named(bucket: Bucket, upload: Callable[..., Result], tmp_path: Path, suffix: str) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)
    path = next(Path(line["serialized"]["dir"]).glob(f"*{suffix}"))
    path.unlink()
    result = upload(line)
    assert (result.rc, result.out) == (exits.FAILED, b"")
    assert path.name in result.log[-1]["msg"]
    assert line["serialized"]["stem"] + KEYS not in bucket.keys()


@pytest.mark.req("REQ-INT-001")
def test_lines_out_of_order_are_refused(bucket: Bucket, upload: Callable[..., Result], tmp_path: Path) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)
    unserialized = {name: value for name, value in line.items() if name != "serialized"}
    assert upload(unserialized).rc == exits.FAILED
    [uploaded] = upload(line).lines
    assert upload(uploaded).rc == exits.FAILED


@pytest.mark.req("T27", "REQ-S3-010")
def test_slashes_around_a_prefix_make_no_empty_directories(bucket: Bucket, upload: Callable[..., Result],
                                                           tmp_path: Path) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name, prefix="archives/deep/")
    assert upload(line, prefix="//archives//deep/").rc == exits.OK
    assert bucket.keys() and not any("//" in key or key.startswith("/") for key in bucket.keys())
    assert archived(bucket) == objects(line)


# What is asked of the store

@pytest.mark.req("REQ-S3-004")
def test_data_and_key_list_go_into_the_storage_class_encrypted(bucket: Bucket, store: FaultyS3, upload: Callable[..., Result],
                                                               tmp_path: Path) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)
    assert upload(line, storage_class="GLACIER_IR", encryption="SSE-KMS", kms_key_id="alias/audit").rc == exits.OK
    for suffix, expected in ((DATA, "GLACIER_IR"), (METADATA, "STANDARD"), (KEYS, "GLACIER_IR")):
        found = bucket.client.head_object(Bucket=bucket.name, Key=line["serialized"]["stem"] + suffix)
        assert found.get("StorageClass", "STANDARD") == expected
        assert (found["ServerSideEncryption"], found["SSEKMSKeyId"]) == ("aws:kms", "alias/audit")


@pytest.mark.req("T22")
def test_a_store_without_trailers_is_served_from_start_to_key_list(bucket: Bucket, store: FaultyS3,
                                                                   upload: Callable[..., Result], tmp_path: Path) -> None:
    store.fault = faulty.refuses_trailers
    line = ground.staged(tmp_path / "staging", bucket.name)
    assert upload(line).rc == exits.OK
    assert archived(bucket) == objects(line)


@pytest.mark.req("REQ-S3-021", "REQ-S3-022")
def test_data_above_the_threshold_goes_in_parts(bucket: Bucket, store: FaultyS3, upload: Callable[..., Result],
                                                tmp_path: Path) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name, rows=5000, width=2600)
    assert line["serialized"]["data"]["gz_bytes"] > 6 << 20
    result = upload(line, multipart_threshold_mb=6)
    assert result.rc == exits.OK, result.err
    assert [request.query["partNumber"] for request in store.seen(on("PUT", DATA, partNumber=""))] == ["1", "2"]
    head = bucket.client.head_object(Bucket=bucket.name, Key=line["serialized"]["stem"] + DATA)
    assert result.lines[0]["uploaded"]["etags"][0] == head["ETag"].strip('"')
    assert not (Path(line["serialized"]["dir"]) / "upload.json").exists()


# Faults

@pytest.mark.req("REQ-S3-023")
def test_a_store_that_is_busy_for_a_while_gets_its_objects(bucket: Bucket, store: FaultyS3, upload: Callable[..., Result],
                                                           tmp_path: Path) -> None:
    store.fault = faulty.answers(once(on("PUT", DATA), times=3), faulty.error(503, "SlowDown"))
    line = ground.staged(tmp_path / "staging", bucket.name)
    result = upload(line)
    assert result.rc == exits.OK
    assert archived(bucket) == objects(line)
    assert [record["event"] for record in result.log].count("s3.retry") == 3


@pytest.mark.parametrize("suffix", [DATA, METADATA, KEYS])
def test_an_answer_that_is_lost_makes_no_second_object(bucket: Bucket, store: FaultyS3, upload: Callable[..., Result],
                                                       tmp_path: Path, suffix: str) -> None:
    store.fault = faulty.loses_answer(once(on("PUT", suffix)))
    line = ground.staged(tmp_path / "staging", bucket.name)
    assert upload(line).rc == exits.OK
    assert len(store.seen(on("PUT", suffix))) == 1
    assert archived(bucket) == objects(line)


@pytest.mark.req("REQ-NET-008", "REQ-NET-009")
def test_a_batch_that_cannot_be_sent_is_kept_and_can_be_sent_later(bucket: Bucket, store: FaultyS3,
                                                                   upload: Callable[..., Result], tmp_path: Path) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)
    fallback = tmp_path / "fallback"
    fallback.mkdir()
    store.fault = faulty.answers(on("PUT", DATA), faulty.error(503, "SlowDown"))
    result = upload(line, local_fallback_dir=str(fallback))
    assert (result.rc, result.out) == (exits.NETWORK, b"")
    kept = fallback / "prod" / "public.audit_logs" / "20251230T021547Z_batch_001"
    assert f"'aa-upload {kept}/batch.json | aa-verify | aa-delete | aa-record' finishes it" in result.log[-1]["hint"]
    assert not Path(line["serialized"]["dir"]).exists()
    assert sorted(path.suffix for path in kept.iterdir()) == [".gz", ".json", ".json", ".json"]
    moved = json.loads((kept / "batch.json").read_bytes())
    assert moved["serialized"]["dir"] == str(kept)
    store.fault = None
    later = upload(moved, local_fallback_dir=str(fallback))
    assert later.rc == exits.OK, later.err
    assert archived(bucket) == objects(line)


@pytest.mark.req("REQ-NET-008")
def test_a_fallback_that_cannot_be_written_does_not_hide_why_the_upload_stopped(
        bucket: Bucket, store: FaultyS3, upload: Callable[..., Result], tmp_path: Path) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)
    fallback = tmp_path / "fallback"
    fallback.mkdir()
    (fallback / "prod").write_text("a file where a directory should be")
    store.fault = faulty.drops(on("PUT", DATA))
    result = upload(line, local_fallback_dir=str(fallback))
    assert (result.rc, result.out) == (exits.NETWORK, b"")
    assert "cannot write" in result.log[-1]["msg"]
    assert line["serialized"]["dir"] in result.log[-1]["hint"]
    assert (Path(line["serialized"]["dir"]) / "batch.json").exists()


def test_a_store_that_guards_a_put_and_not_a_completion_is_marked_as_unguarded(
        bucket: Bucket, store: FaultyS3, upload: Callable[..., Result], tmp_path: Path) -> None:
    store.fault = faulty.ignores_if_none_match(on("POST", uploadId=""))
    large = ground.staged(tmp_path / "staging", bucket.name, rows=5000, width=2600)
    small = ground.staged(tmp_path / "staging", bucket.name, number=2, rows=5, first_id=9000)
    result = upload(large, small, multipart_threshold_mb=5)
    assert [line["uploaded"]["create_only"] for line in result.lines] == [False, True], result.err


@pytest.mark.req("REQ-NET-008")
def test_without_a_fallback_the_batch_stays_in_staging(bucket: Bucket, store: FaultyS3, upload: Callable[..., Result],
                                                       tmp_path: Path) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)
    store.fault = faulty.drops(on("PUT", DATA))
    result = upload(line)
    assert (result.rc, result.out) == (exits.NETWORK, b"")
    assert "tried 4 times" in result.log[-1]["detail"]
    assert (Path(line["serialized"]["dir"]) / "batch.json").exists()


@pytest.mark.req("T25")
def test_credentials_that_expire_stop_the_upload_and_it_goes_on_with_new_ones(bucket: Bucket, store: FaultyS3,
                                                                              upload: Callable[..., Result],
                                                                              tmp_path: Path) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)
    expired = faulty.error(400, "ExpiredToken", "The provided token has expired.")
    store.fault = faulty.answers(on("PUT", KEYS), expired)
    result = upload(line)
    assert (result.rc, result.out) == (exits.PERMISSION, b"")
    assert "expired" in result.log[-1]["msg"]
    assert len(store.seen(on("PUT", KEYS))) == 1  # not tried again
    store.fault = None
    assert upload(line).rc == exits.OK
    assert archived(bucket) == objects(line)


def test_upload_needs_its_staging_and_says_where_it_looked(bucket: Bucket, upload: Callable[..., Result],
                                                           tmp_path: Path) -> None:
    line = ground.staged(tmp_path / "staging", bucket.name)
    shutil.rmtree(line["serialized"]["dir"])
    result = upload(line)
    assert (result.rc, result.out) == (exits.FAILED, b"")
    assert line["serialized"]["dir"] in result.log[-1]["msg"]


def test_empty_input_touches_nothing(bucket: Bucket, upload: Callable[..., Result]) -> None:
    result = upload()
    assert (result.rc, result.out) == (exits.OK, b"")
    assert bucket.keys() == []


def test_upload_runs_forked_with_cron_s_environment(bucket: Bucket, store: FaultyS3, config_file: ConfigFile,
                                                    tmp_path: Path) -> None:
    path = config_file(ground.NOWHERE, bucket, s3=ground.s3_section(store.endpoint))
    line = ground.staged(tmp_path / "staging", bucket.name)
    result = run_forked("aa-upload", ["-c", path], ground.dump(line),
                        {"LC_ALL": "C", "TZ": "Asia/Kathmandu", "PYTHONUTF8": "0"})
    assert result.rc == exits.OK, result.err
    assert result.lines[0]["uploaded"]["create_only"] is True
    assert json.loads(bucket.read(names.run_start_key("archives/", "prod", ground.RUN)))["at"].endswith("Z")
