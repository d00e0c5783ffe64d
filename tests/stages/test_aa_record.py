"""aa-record: the commit record that makes a batch archived, the index that finds it, and what a rerun does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from audit_archiver import exits, log
from audit_archiver.catalogue import index
from audit_archiver.config.credentials import Secret
from audit_archiver.config.model import S3
from audit_archiver.formats import batch as batches
from audit_archiver.objectstore.client import Store
from tests.conftest import Bucket, ConfigFile
from tests.ground import batches as ground
from tests.ground import faulty_s3 as faulty
from tests.ground.faulty_s3 import FaultyS3, on, once
from tests.ground.run import Result, run_stage

TABLE = "archives/prod/audit_logs/"


@pytest.fixture()
def server(bucket: Bucket) -> Iterator[FaultyS3]:
    """moto behind an endpoint that can misbehave."""
    with FaultyS3(bucket.endpoint) as made:
        yield made


def carry(config: Path, *lines: dict[str, Any]) -> list[dict[str, Any]]:
    """Upload and verify batches, and give back their lines as a transaction that committed them would."""
    verified = run_stage("aa-verify", (), run_stage("aa-upload", (), ground.dump(*lines), {"AA_CONFIG": config}).out,
                         {"AA_CONFIG": config})
    assert verified.rc == exits.OK, verified.err
    return [ground.committed(line) for line in verified.lines]


@pytest.fixture()
def config(bucket: Bucket, server: FaultyS3, config_file: ConfigFile) -> Path:
    return config_file(ground.NOWHERE, bucket, s3=ground.s3_section(server.endpoint))


@pytest.fixture()
def committed(bucket: Bucket, config: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Makes committed batch lines whose objects are in the bucket."""
    def make(*hows: dict[str, Any]) -> list[dict[str, Any]]:
        return carry(config, *(ground.staged(tmp_path / "staging", bucket.name, rows=10, **how) for how in hows or ({},)))
    return make


@pytest.fixture()
def record(config: Path) -> Callable[..., Result]:
    """Runs aa-record in process on batch lines."""
    return lambda *lines, argv=(): run_stage("aa-record", argv, ground.dump(*lines), {"AA_CONFIG": config})


def reader(made: Bucket) -> Store:
    """The bucket as readers of the catalogue open it."""
    log.setup("test", quiet=True)
    return Store(S3(bucket=made.name, prefix="archives/", endpoint=made.endpoint, access_key_id=made.access_key,
                    secret_access_key=Secret(made.secret_key), retry_base_s=0.01))


@pytest.mark.req("REQ-IDEM-004", "REQ-S3-019")
def test_the_commit_record_is_the_line_itself(committed: Callable[..., Any], record: Callable[..., Result],
                                              bucket: Bucket) -> None:
    [line] = committed()
    result = record(line)
    assert result.rc == exits.OK, result.err
    content = bucket.read(line["serialized"]["stem"] + "_commit.json")
    assert content == ground.dump(line)
    assert batches.parse(content, needs=("committed",), lacks=("recorded",)) == line
    [out] = result.lines
    assert {name: out[name] for name in line} == line
    assert out["recorded"]["at"].endswith("Z")


def test_staging_is_removed_and_only_this_batchs(committed: Callable[..., Any], record: Callable[..., Result]) -> None:
    first, second = committed({"number": 1}, {"number": 2})
    assert record(first).rc == exits.OK
    assert not Path(first["serialized"]["dir"]).exists()
    assert Path(second["serialized"]["dir"]).is_dir()


def test_a_directory_that_is_no_staging_directory_of_the_batch_stays(committed: Callable[..., Any], record: Callable[..., Result],
                                                                     tmp_path: Path) -> None:
    [line] = committed()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "batch.json").write_text("not ours")
    line["serialized"]["dir"] = str(precious)
    result = record(line)
    assert result.rc == exits.OK
    assert (precious / "batch.json").read_text() == "not ours"
    assert "record.staging" in [entry["event"] for entry in result.log]


def test_a_file_that_somebody_put_into_staging_stays(committed: Callable[..., Any], record: Callable[..., Result]) -> None:
    [line] = committed()
    note = Path(line["serialized"]["dir"]) / "note.txt"
    note.write_text("keep me")
    result = record(line)
    assert result.rc == exits.OK
    assert [path.name for path in note.parent.iterdir()] == ["note.txt"]


@pytest.mark.req("T40")
def test_a_batch_is_recorded_without_its_staging(committed: Callable[..., Any], record: Callable[..., Result],
                                                 bucket: Bucket) -> None:
    [line] = committed()
    shutil.rmtree(line["serialized"]["dir"])
    assert record(line).rc == exits.OK
    assert line["serialized"]["stem"] + "_commit.json" in bucket.keys()


# Reruns and rivals

@pytest.mark.req("REQ-IDEM-007", "REQ-IDEM-010")
def test_a_rerun_over_the_same_lines_changes_nothing_and_says_so(committed: Callable[..., Any], record: Callable[..., Result],
                                                                 bucket: Bucket) -> None:
    lines = committed({"number": 1}, {"number": 2})
    assert record(*lines).rc == exits.OK
    before = {key: (bucket.read(key), bucket.client.head_object(Bucket=bucket.name, Key=key)["LastModified"])
              for key in bucket.keys()}
    again = record(*lines)
    assert again.rc == exits.OK, again.err
    assert [line["batch"]["number"] for line in again.lines] == [1, 2]
    assert {key: (bucket.read(key), bucket.client.head_object(Bucket=bucket.name, Key=key)["LastModified"])
            for key in bucket.keys()} == before
    assert [entry["msg"] for entry in again.log if entry["event"] == "record.done"] == [
        f"public.audit_logs batch_00{number} was recorded already: 10 rows" for number in (1, 2)]


@pytest.mark.req("T38", "REQ-IDEM-008")
def test_a_batch_that_recovery_recorded_first_is_recorded_once(committed: Callable[..., Any], record: Callable[..., Result],
                                                               bucket: Bucket) -> None:
    [line] = committed()
    recovered = ground.committed({name: line[name] for name in line if name not in ("deleted", "committed")}, "aa-recover")
    assert record(recovered).rc == exits.OK
    content = bucket.read(line["serialized"]["stem"] + "_commit.json")
    assert record(line).rc == exits.OK
    assert bucket.read(line["serialized"]["stem"] + "_commit.json") == content
    entries = list(index.manifest(reader(bucket), "prod", "public", "audit_logs"))
    assert [entry["id"] for entry in entries] == [line["batch"]["id"]]


def test_a_commit_record_of_another_batch_is_never_overwritten(committed: Callable[..., Any], record: Callable[..., Result],
                                                               bucket: Bucket, tmp_path: Path) -> None:
    [line] = committed()
    other = ground.committed({name: value for name, value in line.items() if name not in ("deleted", "committed")})
    foreign = ground.staged(tmp_path / "other", bucket.name, rows=10, first_id=900)
    other["batch"] = foreign["batch"]
    other["verified"] = {**other["verified"], "keys_sha256": foreign["batch"]["keys_sha256"]}
    key = line["serialized"]["stem"] + "_commit.json"
    bucket.client.put_object(Bucket=bucket.name, Key=key, Body=ground.dump(other))
    result = record(line)
    assert (result.rc, result.out) == (exits.FAILED, b"")
    assert "commit record of another batch" in result.log[-1]["msg"]
    assert bucket.read(key) == ground.dump(other)
    assert Path(line["serialized"]["dir"]).is_dir()  # the last copy that is known to be right stays


@pytest.mark.req("REQ-INT-001", "REQ-S3-025")
def test_a_line_that_was_not_committed_is_refused(committed: Callable[..., Any], record: Callable[..., Result],
                                                  bucket: Bucket) -> None:
    [line] = committed()
    for missing in (("committed",), ("committed", "deleted"), ("committed", "deleted", "verified")):
        result = record({name: value for name, value in line.items() if name not in missing})
        assert (result.rc, result.out) == (exits.FAILED, b"")
    assert not any(key.endswith("_commit.json") for key in bucket.keys())
    assert Path(line["serialized"]["dir"]).is_dir()


def test_a_batch_of_another_bucket_is_refused(committed: Callable[..., Any], record: Callable[..., Result]) -> None:
    [line] = committed()
    result = record({**line, "uploaded": {**line["uploaded"], "bucket": "elsewhere"}})
    assert (result.rc, result.out) == (exits.CONFIG, b"")


@pytest.mark.parametrize("times", [1, 3])
def test_a_commit_record_whose_answer_was_lost_is_ours(committed: Callable[..., Any], record: Callable[..., Result],
                                                       server: FaultyS3, bucket: Bucket, times: int) -> None:
    [line] = committed()
    server.fault = faulty.loses_answer(once(on("PUT", "_commit.json"), times=times))
    result = record(line)
    assert result.rc == exits.OK, result.err
    assert bucket.read(line["serialized"]["stem"] + "_commit.json") == ground.dump(line)


def test_a_store_that_is_gone_leaves_the_batch_committed_and_its_staging_in_place(
        committed: Callable[..., Any], record: Callable[..., Result], server: FaultyS3, bucket: Bucket) -> None:
    lines = committed({"number": 1}, {"number": 2})
    server.fault = faulty.answers(on("PUT", "_batch_002_commit.json"), faulty.error(503, "SlowDown"))
    result = record(*lines)
    assert result.rc == exits.NETWORK
    assert [line["batch"]["number"] for line in result.lines] == [1]
    assert Path(lines[1]["serialized"]["dir"]).is_dir()
    server.fault = None
    assert record(*lines).rc == exits.OK
    assert len(list(index.manifest(reader(bucket), "prod", "public", "audit_logs"))) == 2


# Without conditional writes

@pytest.mark.req("T24", "T23")
@pytest.mark.parametrize("suffix", [".jsonl.gz", "_manifest.json"])
@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_poor_store_is_looked_at_again_before_the_record(poor_bucket: Bucket, config_file: ConfigFile, tmp_path: Path,
                                                           suffix: str, change: str) -> None:
    config = config_file(ground.NOWHERE, poor_bucket, s3=ground.s3_section(poor_bucket.endpoint))
    [line] = carry(config, ground.staged(tmp_path / "staging", poor_bucket.name, rows=10))
    assert line["uploaded"]["create_only"] is False
    key = line["serialized"]["stem"] + suffix
    if change == "replaced":
        poor_bucket.client.put_object(Bucket=poor_bucket.name, Key=key, Body=b"a late write of somebody else")
    else:
        poor_bucket.client.delete_object(Bucket=poor_bucket.name, Key=key)
    result = run_stage("aa-record", (), ground.dump(line), {"AA_CONFIG": config})
    assert (result.rc, result.out) == (exits.FAILED, b"")
    assert suffix in result.log[-1]["msg"]
    assert not any(found.endswith("_commit.json") for found in poor_bucket.keys())
    assert Path(line["serialized"]["dir"]).is_dir()


def test_a_poor_store_gets_the_same_records(poor_bucket: Bucket, config_file: ConfigFile, tmp_path: Path) -> None:
    config = config_file(ground.NOWHERE, poor_bucket, s3=ground.s3_section(poor_bucket.endpoint))
    lines = carry(config, *(ground.staged(tmp_path / "staging", poor_bucket.name, rows=10, number=number) for number in (1, 2)))
    for _ in range(2):
        result = run_stage("aa-record", (), ground.dump(*lines), {"AA_CONFIG": config})
        assert result.rc == exits.OK, result.err
    assert [entry["number"] for entry in index.manifest(reader(poor_bucket), "prod", "public", "audit_logs")] == [1, 2]


# Index, manifest, watermark

@pytest.mark.req("REQ-S3-019", "REQ-S3-020", "REQ-IDEM-004")
def test_an_index_segment_per_run_and_table_is_written_at_the_end(committed: Callable[..., Any], record: Callable[..., Result],
                                                                  bucket: Bucket) -> None:
    lines = committed({"number": 1}, {"table": "other"}, {"number": 2})
    assert record(*lines).rc == exits.OK
    segments = [key for key in bucket.keys() if "/.index/" in key]
    assert segments == [f"{TABLE}.index/{ground.RUN}_001.json", f"archives/prod/other/.index/{ground.RUN}_001.json"]
    value = json.loads(bucket.read(segments[0]))
    assert [(entry["number"], entry["rows"]) for entry in value["batches"]] == [(1, 10), (2, 10)]
    assert value["batches"][0] == index.entry(lines[0])


@pytest.mark.req("REQ-IDEM-008")
def test_another_recorder_of_the_same_run_takes_the_next_number(committed: Callable[..., Any], record: Callable[..., Result],
                                                                bucket: Bucket) -> None:
    first, second = committed({"number": 1}, {"number": 2})
    assert record(first).rc == exits.OK
    assert record(second).rc == exits.OK
    assert [key for key in bucket.keys() if "/.index/" in key] == [
        f"{TABLE}.index/{ground.RUN}_00{number}.json" for number in (1, 2)]
    entries = list(index.manifest(reader(bucket), "prod", "public", "audit_logs"))
    assert [entry["number"] for entry in entries] == [1, 2]


def test_a_segment_is_written_when_it_is_full(committed: Callable[..., Any], record: Callable[..., Result], bucket: Bucket,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "SEGMENT_BATCHES", 2)
    assert record(*committed(*({"number": number} for number in range(1, 6)))).rc == exits.OK
    sizes = [len(json.loads(bucket.read(key))["batches"]) for key in bucket.keys() if "/.index/" in key]
    assert sizes == [2, 2, 1]
    assert len(list(index.manifest(reader(bucket), "prod", "public", "audit_logs"))) == 5


@pytest.mark.req("T38", "REQ-IDEM-004")
def test_a_batch_whose_index_was_never_written_is_in_the_manifest(committed: Callable[..., Any], record: Callable[..., Result],
                                                                  bucket: Bucket, server: FaultyS3) -> None:
    lines = committed({"number": 1}, {"number": 2})
    server.fault = faulty.answers(lambda request: request.method == "PUT" and "/.index/" in request.key,
                                  faulty.error(403, "AccessDenied"))
    result = record(*lines)
    assert result.rc == exits.PERMISSION
    assert len(result.lines) == 2  # both are recorded: their lines were out before the index
    entries = list(index.manifest(reader(bucket), "prod", "public", "audit_logs"))
    assert entries == [index.entry(line) for line in lines]


def test_what_is_recorded_before_a_bad_line_is_indexed(committed: Callable[..., Any], config: Path, bucket: Bucket) -> None:
    [line] = committed()
    result = run_stage("aa-record", (), ground.dump(line) + b"{}\n", {"AA_CONFIG": config})
    assert result.rc == exits.FAILED
    assert [key for key in bucket.keys() if "/.index/" in key] == [f"{TABLE}.index/{ground.RUN}_001.json"]


def test_the_manifest_refuses_a_segment_of_another_table(committed: Callable[..., Any], record: Callable[..., Result],
                                                         bucket: Bucket) -> None:
    assert record(*committed({"table": "other"})).rc == exits.OK
    content = bucket.read(f"archives/prod/other/.index/{ground.RUN}_001.json")
    bucket.client.put_object(Bucket=bucket.name, Key=f"{TABLE}.index/{ground.RUN}_001.json", Body=content)
    with pytest.raises(exits.InputError, match="another table"):
        list(index.manifest(reader(bucket), "prod", "public", "audit_logs"))


@pytest.mark.req("T9")
def test_batches_beyond_number_999_are_in_the_manifest_each_once(committed: Callable[..., Any], record: Callable[..., Result],
                                                                 bucket: Bucket) -> None:
    lines = committed({"number": 999}, {"number": 1000}, {"number": 1001})
    assert record(*lines).rc == exits.OK
    assert [entry["number"] for entry in index.manifest(reader(bucket), "prod", "public", "audit_logs")] == [999, 1000, 1001]


@pytest.mark.req("T54")
def test_the_manifest_of_a_table_leaves_its_namesakes_out(committed: Callable[..., Any], record: Callable[..., Result],
                                                          bucket: Bucket) -> None:
    tables = ({"table": "audit"}, {"table": "audit_log"}, {"table": "audit", "schema": "audit"}, {"table": "audit.audit"})
    assert record(*committed(*tables)).rc == exits.OK
    store = reader(bucket)
    for how in tables:
        found = list(index.manifest(store, "prod", how.get("schema", "public"), how["table"]))
        assert len(found) == 1, how


@pytest.mark.req("REQ-ARC-018", "REQ-ARC-019", "REQ-ARC-022")
def test_the_watermark_is_read_out_of_what_is_archived(committed: Callable[..., Any], record: Callable[..., Result],
                                                       bucket: Bucket) -> None:
    store = reader(bucket)
    assert index.watermark(index.manifest(store, "prod", "public", "audit_logs")) is None
    lines = committed({"number": 2}, {"number": 1}, {"number": 3, "table": "other"})
    assert record(*lines).rc == exits.OK
    mark = index.watermark(index.manifest(store, "prod", "public", "audit_logs"))
    assert mark is not None
    assert (mark["timestamp"], mark["key"], mark["rows"], mark["batches"]) == ("2024-01-01T00:00:00+00:00", [20], 20, 2)


@pytest.mark.req("REQ-ARC-021")
def test_the_watermark_moves_with_the_commit_record_only(committed: Callable[..., Any], record: Callable[..., Result],
                                                         bucket: Bucket) -> None:
    [line] = committed()
    store = reader(bucket)
    assert index.watermark(index.manifest(store, "prod", "public", "audit_logs")) is None
    assert record(line).rc == exits.OK
    assert index.watermark(index.manifest(store, "prod", "public", "audit_logs")) is not None


@pytest.mark.req("REQ-ARC-023")
def test_a_watermark_that_was_changed_is_refused() -> None:
    entry = {"last": ["2024-01-03T09:33:20+00:00", 11000], "rows": 10}
    mark = index.watermark([entry])
    assert mark is not None
    assert index.check_watermark(json.loads(json.dumps(mark))) == mark
    for name, value in (("timestamp", "2025-01-03T09:33:20+00:00"), ("key", [11001]), ("rows", 11), ("sha256", "0" * 64)):
        with pytest.raises(exits.Mismatch):
            index.check_watermark({**mark, name: value})


@pytest.mark.req("T9")
def test_timestamps_are_ordered_as_times_not_as_texts() -> None:
    ordered = ["4713-01-01T00:00:00+00:00 BC", "0044-03-15T00:00:00+00:00 BC", "0001-01-01T00:00:00+00:00",
               "2024-01-01T00:00:03+00:00", "2024-01-01T00:00:03.000001+00:00", "2024-01-01T00:00:03.5+00:00",
               "2024-01-01T00:00:04+00:00", "9999-12-31T23:59:59+00:00", "10000-01-01T00:00:00+00:00",
               "294276-12-31T23:59:59.999999+00:00"]
    assert sorted(reversed(ordered), key=index.time_order) == ordered
    assert sorted(["2024-01-02", "2024-01-01T00:00:00.5", "2024-01-01T00:00:00"], key=index.time_order) == [
        "2024-01-01T00:00:00", "2024-01-01T00:00:00.5", "2024-01-02"]


def test_empty_input_touches_nothing(record: Callable[..., Result], bucket: Bucket) -> None:
    result = record()
    assert (result.rc, result.out) == (exits.OK, b"")
    assert bucket.keys() == []
