"""aa-validate: every kind of damage is found and named, and what was not looked at is said."""

from __future__ import annotations

import gzip
import hashlib
import json
import secrets
import signal
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Optional

import pytest

from audit_archiver import exits, lines, log
from audit_archiver.catalogue import runs
from audit_archiver.config.credentials import Secret
from audit_archiver.config.model import S3
from audit_archiver.formats import names, schema
from audit_archiver.objectstore.client import Store
from audit_archiver.validate import subset
from audit_archiver.validate.findings import CHECKS
from tests.conftest import Bucket, ConfigFile
from tests.ground import batches as ground
from tests.ground import faulty_s3 as faulty
from tests.ground.run import Result, finish, run_stage, spawn
from tests.ground.s3 import S3Server
from tests.ground.wait import PATIENCE

ROWS, BATCHES = 50, 4
TABLE = "archives/prod/audit_logs/"


class Archive(NamedTuple):
    """A bucket with four batches of one run, and what a test does to it."""

    bucket: Bucket
    config: Path
    lines: list[dict[str, Any]]

    def key(self, number: int, suffix: str) -> str:
        """The key of an object of a batch, counted from 1."""
        return str(self.lines[number - 1]["serialized"]["stem"]) + suffix

    def get(self, number: int, suffix: str) -> bytes:
        """An object's bytes."""
        return self.bucket.read(self.key(number, suffix))

    def put(self, key: str, body: bytes) -> None:
        """Write over an object, or beside."""
        self.bucket.client.put_object(Bucket=self.bucket.name, Key=key, Body=body)

    def remove(self, *keys: str) -> None:
        """Delete objects."""
        for key in keys:
            self.bucket.client.delete_object(Bucket=self.bucket.name, Key=key)

    def edit(self, number: int, suffix: str, change: Callable[[Any], Any]) -> None:
        """Change a JSON object."""
        value = json.loads(self.get(number, suffix))
        change(value)
        self.put(self.key(number, suffix), lines.dump(value))

    def repack(self, number: int, change: Callable[[list[bytes]], list[bytes]]) -> None:
        """Change the rows and pack them as gzip again, sound as a stream."""
        rows = gzip.decompress(self.get(number, names.DATA)).splitlines(keepends=True)
        self.put(self.key(number, names.DATA), gzip.compress(b"".join(change(rows))))

    @property
    def index(self) -> str:
        """The key of the run's index segment."""
        return names.index_key("archives/", "prod", "public", "audit_logs", ground.RUN, 1)

    @property
    def store(self) -> Store:
        """The bucket as the archiver opens it."""
        return Store(S3(bucket=self.bucket.name, prefix="archives/", endpoint=self.bucket.endpoint, access_key_id=self.bucket.access_key,
                        secret_access_key=Secret(self.bucket.secret_key), retry_base_s=0.01))

    def validate(self, *argv: Any) -> Result:
        """aa-validate, in process."""
        return run_stage("aa-validate", ["--output", "json", *argv], env={"AA_CONFIG": self.config})

    def report(self, *argv: Any) -> dict[str, Any]:
        """Its report, valid and with the exit code in it."""
        result = self.validate(*argv)
        assert result.out, result.err
        [made] = result.lines
        schema.validate("validation", made, "the report")
        assert made["exit"] == result.rc
        return dict(made)

    def batch(self, number: int) -> str:
        """The name of a batch."""
        return self.key(number, "").rpartition("/")[2]


class Kept:
    """The whole archive, made once: each test finds it as it was made."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.lines: list[dict[str, Any]] = []
        self.objects: dict[str, bytes] = {}

    def keep(self, archive: Archive) -> None:
        """Note what there is."""
        self.lines = archive.lines
        self.objects = {key: self.bucket.read(key) for key in self.bucket.keys()}

    def mend(self) -> None:
        """Put back what a test has damaged, and remove what it has added."""
        client, name = self.bucket.client, self.bucket.name
        there = {item["Key"]: item["ETag"].strip('"') for item in client.list_objects_v2(Bucket=name).get("Contents", [])}
        for key in there.keys() - self.objects.keys():
            client.delete_object(Bucket=name, Key=key)
        for key, body in self.objects.items():
            if there.get(key) != hashlib.md5(body).hexdigest():
                client.put_object(Bucket=name, Key=key, Body=body)


@pytest.fixture(scope="module")
def kept(s3: S3Server) -> Kept:
    return Kept(Bucket(s3, f"t-{secrets.token_hex(6)}"))


@pytest.fixture()
def archive(kept: Kept, config_file: ConfigFile, tmp_path: Path) -> Iterator[Archive]:
    """Four batches of 50 rows, uploaded, verified and recorded by the commands, in a run that has ended."""
    config = config_file(ground.NOWHERE, kept.bucket, s3=ground.s3_section(kept.bucket.endpoint, retries=1))
    if not kept.lines:
        kept.keep(made(kept.bucket, config, tmp_path))
    yield Archive(kept.bucket, config, kept.lines)
    kept.mend()


def made(bucket: Bucket, config: Path, tmp_path: Path) -> Archive:
    """The commands on four staged batches, and the end of their run."""
    staged = [ground.staged(tmp_path / "staging", bucket.name, rows=ROWS, number=number) for number in range(1, BATCHES + 1)]
    archive = Archive(bucket, config, recorded(config, staged))
    log.setup("test", quiet=True)
    runs.put_end(archive.store, "prod", ground.RUN, "aa-archive")
    return archive


def recorded(config: Path, staged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Upload, verify and record staged batches; their lines."""
    env = {"AA_CONFIG": config}
    uploaded = run_stage("aa-upload", (), ground.dump(*staged), env)
    verified = run_stage("aa-verify", (), uploaded.out, env)
    assert uploaded.rc == verified.rc == exits.OK, uploaded.err + verified.err
    committed = [ground.committed(line) for line in verified.lines]
    assert run_stage("aa-record", (), ground.dump(*committed), env).rc == exits.OK
    return committed


def found(report: dict[str, Any], *statuses: str) -> dict[str, set[Optional[str]]]:
    """{check: batches} of the findings of these statuses, all if none is named."""
    made: dict[str, set[Optional[str]]] = {}
    for each in report["findings"]:
        if each["status"] in (statuses or ("fail", "warn", "unknown")):
            made.setdefault(each["check"], set()).add(each["batch"])
    return made


@pytest.mark.req("REQ-VER-015", "REQ-DR-006", "REQ-DR-008")
def test_an_archive_that_is_whole_is_said_to_be_so_at_every_depth_and_nothing_is_written(archive: Archive) -> None:
    before = archive.bucket.keys()
    reports = {depth: archive.report("--depth", depth) for depth in ("light", "sample", "full")}
    for report in reports.values():
        assert (report["exit"], report["findings"]) == (exits.OK, [])
        assert (report["looked_at"]["tables"], report["looked_at"]["batches"]) == (1, BATCHES)
    assert reports["full"]["looked_at"]["rows"] == reports["sample"]["looked_at"]["rows"] == ROWS * BATCHES
    assert reports["light"]["looked_at"]["rows"] == 0
    assert archive.bucket.keys() == before


def flipped(archive: Archive) -> None:
    content = bytearray(archive.get(2, names.DATA))
    content[len(content) // 2] ^= 0x10
    archive.put(archive.key(2, names.DATA), bytes(content))


def cut(archive: Archive) -> None:
    archive.put(archive.key(2, names.DATA), archive.get(2, names.DATA)[:-100])


def emptied(suffix: str) -> Callable[[Archive], None]:
    return lambda archive: archive.put(archive.key(2, suffix), b"")


def gone(*suffixes: str) -> Callable[[Archive], None]:
    return lambda archive: archive.remove(*(archive.key(2, suffix) for suffix in suffixes))


def swapped(archive: Archive) -> None:
    two, three = archive.get(2, names.DATA), archive.get(3, names.DATA)
    archive.put(archive.key(2, names.DATA), three)
    archive.put(archive.key(3, names.DATA), two)


def foreign(archive: Archive) -> None:
    archive.put(TABLE + "year=2025/month=12/day=30/notes.txt", b"hello")


def orphaned(archive: Archive) -> None:
    stem = archive.key(4, "").replace("_batch_004", "_batch_009")
    archive.put(stem + names.DATA, archive.get(4, names.DATA))


def twice(archive: Archive) -> None:
    """The whole batch once more under another number, its records made to fit."""
    stem = archive.key(2, "").replace("_batch_002", "_batch_005")
    record = json.loads(archive.get(2, names.COMMIT))
    record["batch"]["number"] = 5
    record["serialized"]["stem"] = stem
    for suffix in (names.DATA, names.METADATA, names.KEYS):
        archive.put(stem + suffix, archive.get(2, suffix))
    archive.put(stem + names.COMMIT, lines.dump(record))


def row_removed(archive: Archive) -> None:
    archive.repack(2, lambda rows: rows[:20] + rows[21:])


def row_altered(archive: Archive) -> None:
    archive.repack(2, lambda rows: [rows[0].replace(b'"action":"', b'"action":"x', 1), *rows[1:]])


def counted_anew(archive: Archive) -> None:
    archive.edit(2, names.METADATA, lambda value: value.update(record_count=ROWS - 1))


def counted_anew_in_the_record(archive: Archive) -> None:
    archive.edit(2, names.COMMIT, lambda value: value["batch"].update(rows=ROWS - 1))


def other_keys(archive: Archive) -> None:
    archive.put(archive.key(2, names.KEYS), archive.get(2, names.KEYS).replace(b"\n60,", b"\n61,"))


def retyped(archive: Archive) -> None:
    archive.edit(2, names.METADATA, lambda value: value["schema"]["columns"][2].update(type="varchar"))


def index_cut(archive: Archive) -> None:
    archive.put(archive.index, archive.bucket.read(archive.index)[:-50])


def index_edited(archive: Archive) -> None:
    value = json.loads(archive.bucket.read(archive.index))
    value["batches"][1]["rows"] -= 1
    archive.put(archive.index, lines.dump(value))


def abandoned(archive: Archive) -> None:
    archive.put(archive.key(2, names.ABANDONED), b"{}\n")


def owned_by_another(archive: Archive) -> None:
    value = json.loads(archive.bucket.read(TABLE + "_owner.json"))
    archive.put(TABLE + "_owner.json", lines.dump({**value, "table": "other"}))


EVERY = (names.DATA, names.METADATA, names.KEYS, names.COMMIT)
DAMAGE: list[tuple[str, Callable[[Archive], None], dict[str, set[Optional[int]]], set[str]]] = [
    # what is done, what full finds in which batch, and what of it light finds
    ("a bit flipped", flipped, {"data.damaged": {2}}, {"data.replaced"}),
    ("an object cut", cut, {"data.damaged": {2}, "data.size": {2}}, {"data.size", "data.replaced"}),
    ("an empty data object", emptied(names.DATA), {"data.size": {2}, "data.rows": {2}, "data.sha256": {2}, "data.keys": {2}},
     {"data.size", "data.replaced"}),
    ("empty metadata", emptied(names.METADATA), {"metadata.sha256": {2}, "metadata.invalid": {2}}, {"metadata.sha256", "metadata.invalid"}),
    ("an empty key list", emptied(names.KEYS), {"keys.sha256": {2}, "keys.invalid": {2}}, {"keys.replaced"}),
    ("an empty commit record", emptied(names.COMMIT), {"record.invalid": {2}}, {"record.invalid"}),
    ("two objects swapped", swapped, {"data.sha256": {2, 3}, "data.keys": {2, 3}}, {"data.replaced"}),
    ("metadata gone", gone(names.METADATA), {"metadata.missing": {2}}, {"metadata.missing"}),
    ("data gone", gone(names.DATA), {"data.missing": {2}}, {"data.missing"}),
    ("a key list gone", gone(names.KEYS), {"keys.missing": {2}}, {"keys.missing"}),
    ("a commit record gone", gone(names.COMMIT), {"record.missing": {2}}, {"record.missing"}),
    ("a whole batch gone", gone(*EVERY), {"batch.gone": {2}}, {"batch.gone"}),
    ("a foreign object", foreign, {"foreign.object": {None}}, {"foreign.object"}),
    ("data without a record", orphaned, {"orphan.batch": {9}}, {"orphan.batch"}),
    ("a batch twice", twice, {"batch.twice": {5}, "rows.twice": {5}, "metadata.invalid": {5}}, {"batch.twice"}),
    ("a count edited in the metadata", counted_anew, {"metadata.sha256": {2}, "metadata.invalid": {2}}, {"metadata.sha256", "metadata.invalid"}),
    ("a count edited in the record", counted_anew_in_the_record, {"record.invalid": {2}}, {"record.invalid"}),
    ("a count edited in the index", index_edited, {"index.differs": {2}}, {"index.differs"}),
    ("a row removed, the gzip sound", row_removed, {"data.rows": {2}, "data.sha256": {2}, "data.keys": {2}}, {"data.size", "data.replaced"}),
    ("a value altered, the gzip sound", row_altered, {"data.sha256": {2}}, {"data.size", "data.replaced"}),
    ("another key in the key list", other_keys, {"keys.sha256": {2}, "keys.invalid": {2}}, {"keys.replaced"}),
    ("another type in the metadata", retyped, {"metadata.sha256": {2}, "metadata.columns": {2}}, {"metadata.sha256", "metadata.columns"}),
    ("a batch recorded and abandoned", abandoned, {"record.abandoned": {2}}, {"record.abandoned"}),
    ("another table's owner file", owned_by_another, {"owner.invalid": {None}}, {"owner.invalid"}),
    ("an index segment cut", index_cut, {"index.invalid": {None}}, {"index.invalid"}),
]


@pytest.mark.req("REQ-DR-007", "REQ-VER-015", "REQ-VER-016", "T52")
@pytest.mark.parametrize("damage, expected, light", [case[1:] for case in DAMAGE], ids=[case[0].replace(" ", "_") for case in DAMAGE])
def test_damage_is_found_and_named(damage: Callable[[Archive], None], expected: dict[str, set[Optional[int]]], light: set[str],
                                   archive: Archive) -> None:
    damage(archive)
    report = archive.report("--depth", "full")
    wrong = found(report, "fail")
    assert report["exit"] == exits.FAILED
    for check, numbers in expected.items():
        assert {name and int(name.rpartition("_")[2]) for name in wrong[check]} == numbers, wrong
    assert wrong.keys() - expected.keys() <= {"data.size", "numbers.gap"}, wrong
    assert all(each["remedy"] and each["text"] for each in report["findings"])
    quick = archive.report("--depth", "light")
    assert light <= found(quick, "fail").keys() and quick["exit"] == exits.FAILED
    assert any("content of data objects" in each for each in quick["not_looked_at"])


@pytest.mark.req("T52")
def test_a_batch_that_is_gone_with_its_place_in_the_index_is_missed_by_its_number(archive: Archive) -> None:
    gone(*EVERY)(archive)
    archive.remove(archive.index)
    report = archive.report("--depth", "light")
    [gap] = [each for each in report["findings"] if each["check"] == "numbers.gap"]
    assert (gap["status"], report["exit"]) == ("fail", exits.FAILED) and "no batch 2" in gap["text"]
    assert len(found(report, "warn")["index.unlisted"]) == BATCHES - 1


@pytest.mark.req("T52")
def test_a_run_of_which_nothing_is_left_is_named(archive: Archive) -> None:
    archive.remove(*(key for key in archive.bucket.keys(TABLE) if not key.endswith("_owner.json")))
    assert "run.empty" in found(archive.report("--depth", "light"), "warn")


def test_a_segment_that_is_missing_before_another_is_named(archive: Archive) -> None:
    archive.put(archive.index.replace("_001", "_002"), archive.bucket.read(archive.index).replace(b'"segment":1', b'"segment":2'))
    archive.remove(archive.index)
    assert "index.gap" in found(archive.report("--depth", "light"), "fail")


def test_light_finds_nothing_where_only_reading_helps_and_says_that_it_did_not_read(archive: Archive) -> None:
    report = archive.report("--depth", "light")
    assert report["exit"] == exits.OK
    told = " ".join(report["not_looked_at"])
    assert "content of data objects" in told and "in two batches" in told and "still in their tables" in told


def test_bytes_that_were_written_anew_and_are_the_same_are_a_warning_once_they_are_read(archive: Archive) -> None:
    key = archive.key(2, names.DATA)
    body, client = archive.get(2, names.DATA), archive.bucket.client
    upload = client.create_multipart_upload(Bucket=archive.bucket.name, Key=key)["UploadId"]
    part = client.upload_part(Bucket=archive.bucket.name, Key=key, UploadId=upload, PartNumber=1, Body=body)["ETag"]
    client.complete_multipart_upload(Bucket=archive.bucket.name, Key=key, UploadId=upload,
                                     MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part}]})
    assert found(archive.report("--depth", "light"), "fail").keys() == {"data.replaced"}
    report = archive.report("--depth", "full")
    assert (report["exit"], found(report).keys(), found(report, "warn").keys()) == (exits.OK, {"data.replaced"}, {"data.replaced"})


@pytest.mark.req("REQ-DR-009")
def test_a_subset_names_the_same_batches_each_time_and_all_subsets_together_every_batch_once(archive: Archive) -> None:
    parts = [[line["batch"]["id"] for line in archive.lines if subset.parse(f"{part}/3").means(line["batch"]["id"])] for part in (1, 2, 3)]
    assert sorted(sum(parts, [])) == sorted(line["batch"]["id"] for line in archive.lines)
    for number, part in enumerate(parts, 1):
        result = archive.validate("--subset", f"{number}/3")
        [report] = result.lines
        assert (report["subset"], report["looked_at"]["batches"], report["exit"]) == (f"{number}/3", len(part), exits.OK)
        [cost] = [each for each in result.log if each["event"] == "validate.cost"]
        sizes = {line["batch"]["id"]: line["serialized"]["data"]["gz_bytes"] for line in archive.lines}
        assert cost["data_bytes"] == sum(sizes[each] for each in part)
        assert cost["objects"] == report["looked_at"]["objects"] - 1 >= 4 * len(part), "what was said before, and the index segment"
        assert len(part) == BATCHES or any("other subsets" in each for each in report["not_looked_at"])


def test_a_key_that_a_batch_of_another_subset_holds_too_is_found(archive: Archive, tmp_path: Path) -> None:
    staged = ground.staged(tmp_path / "more", archive.bucket.name, rows=2, number=5, first_id=100, run="20251230T031545Z-1")
    recorded(archive.config, [staged])
    ids = {number: line["batch"]["id"] for number, line in enumerate([*archive.lines, staged], 1)}
    parts = next(parts for parts in range(2, 100) if int(ids[5][:16], 16) % parts not in (int(ids[number][:16], 16) % parts for number in (1, 2, 3)))
    report = archive.report("--subset", f"{int(ids[5][:16], 16) % parts + 1}/{parts}")
    twice = {(each["batch"][-3:], each["text"][-8:-5], json.dumps(each["keys"])) for each in report["findings"] if each["check"] == "rows.twice"}
    assert twice == {("002", "005", "[[100]]"), ("003", "005", "[[101]]")}
    assert any("whose times overlap" in each for each in report["not_looked_at"])


@pytest.mark.parametrize("wrong", ["0/3", "4/3", "3", "1/0", "-1/3", "a/b", "1/3x"])
def test_a_subset_that_is_none_is_refused(wrong: str, archive: Archive) -> None:
    result = archive.validate(f"--subset={wrong}")
    assert (result.rc, result.out) == (exits.CONFIG, b"")
    assert "K/N" in result.err


@pytest.mark.req("T53")
def test_repair_says_what_it_would_write_and_writes_it_only_when_told_to(archive: Archive) -> None:
    whole = json.loads(archive.bucket.read(archive.index))
    archive.remove(archive.index)
    before = archive.bucket.keys()
    assert found(archive.report("--depth", "light"), "warn").keys() == {"index.unlisted"}
    said = archive.report("--depth", "light", "--repair")["repair"]
    assert said == {"executed": False, "segments": [{"run": ground.RUN, "database": "prod", "schema": "public", "table": "audit_logs",
                                                     "batches": BATCHES}]}
    assert archive.bucket.keys() == before
    done = archive.report("--depth", "light", "--repair", "--execute")["repair"]
    assert done == {**said, "executed": True}
    assert json.loads(archive.bucket.read(archive.index)) == whole
    assert sorted(archive.bucket.keys()) == sorted([*before, archive.index])
    again = archive.report("--depth", "full", "--repair", "--execute")
    assert (again["exit"], again["findings"], again["repair"]["segments"]) == (exits.OK, [], [])


@pytest.mark.parametrize("argv, about", [(["--execute"], "--repair"), (["--repair", "--subset", "1/2"], "--subset"),
                                         (["--s3-key", "x", "--table", "t"], "one batch"), (["--table", "nothing"], "nothing is archived"),
                                         (["--depth", "light", "--against-table", "yes"], "--against-table")])
def test_options_that_do_not_go_together_are_refused(argv: list[str], about: str, archive: Archive) -> None:
    result = archive.validate(*argv)
    assert (result.rc, result.out) == (exits.CONFIG, b"")
    assert about in result.err


def test_one_batch_by_its_key_and_one_run(archive: Archive) -> None:
    row_removed(archive)
    assert archive.report("--s3-key", archive.key(1, names.DATA))["exit"] == exits.OK
    report = archive.report("--s3-key", f"s3://{archive.bucket.name}/{archive.key(2, names.DATA)}")
    assert found(report, "fail")["data.rows"] == {archive.batch(2)} and report["looked_at"]["batches"] == 1
    assert archive.report("--run", "20000101T000000Z-1")["looked_at"]["batches"] == 0


@pytest.mark.req("T54")
def test_a_table_whose_name_begins_like_another_is_not_looked_at_with_it(archive: Archive) -> None:
    archive.put("archives/prod/audit_logs_old/notes.txt", b"hello")
    report = archive.report("--table", "audit_logs")
    assert (report["exit"], report["findings"]) == (exits.OK, [])


def test_a_batch_of_a_run_that_has_not_ended_is_a_warning(archive: Archive) -> None:
    archive.remove(archive.key(4, names.COMMIT), archive.index, names.run_end_key("archives/", "prod", ground.RUN))
    report = archive.report("--depth", "light")
    assert (report["exit"], found(report)) == (exits.OK, {"orphan.batch": {archive.batch(4)}})


def test_columns_that_change_from_batch_to_batch_are_told(archive: Archive) -> None:
    for suffix in (names.COMMIT, names.METADATA):
        archive.edit(3, suffix, lambda value: value["batch"]["columns"].__setitem__(2, ["action", "character varying(20)"]))
    report = archive.report("--depth", "light")
    changed = [each["text"] for each in report["findings"] if each["check"] == "schema.changed"]
    assert len(changed) == 2 and "'action' was text and is character varying(20)" in changed[0]


@pytest.mark.req("T52")
def test_a_store_that_cannot_be_reached_is_not_a_damaged_archive(archive: Archive, config_file: ConfigFile) -> None:
    away = config_file(ground.NOWHERE, archive.bucket, s3=ground.s3_section("http://127.0.0.1:9", retries=0))
    result = run_stage("aa-validate", ["--output", "json"], env={"AA_CONFIG": away})
    [report] = result.lines
    assert (result.rc, report["exit"], found(report).keys()) == (exits.NETWORK, exits.NETWORK, {"look.failed"})


@pytest.mark.parametrize("answer, code", [(("InvalidObjectState", "has to be thawed first"), exits.NETWORK),
                                          (("AccessDenied", "permission denied"), exits.PERMISSION)], ids=["frozen", "denied"])
def test_an_object_that_may_not_be_read_is_not_damaged_and_hides_no_other(answer: tuple[str, str], code: int, archive: Archive,
                                                                          config_file: ConfigFile) -> None:
    with faulty.FaultyS3(archive.bucket.endpoint) as server:
        server.fault = faulty.answers(faulty.on("GET", "_batch_002" + names.DATA), faulty.error(403, answer[0]))
        behind = Archive(archive.bucket, config_file(ground.NOWHERE, archive.bucket, s3=ground.s3_section(server.endpoint)), archive.lines)
        report = behind.report()
        assert (report["exit"], found(report)) == (code, {"look.failed": {archive.batch(2)}}) and answer[1] in report["findings"][0]["text"]
        assert report["looked_at"]["rows"] == 3 * ROWS
        archive.repack(3, lambda rows: rows[1:])
        assert behind.report()["exit"] == exits.FAILED


def test_a_signal_does_not_wait_for_the_objects_that_are_being_read(archive: Archive, config_file: ConfigFile) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def never(request: faulty.Request, forward: faulty.Forward) -> faulty.Answer:
        if request.method == "GET" and request.key.endswith(names.DATA):
            asked.set()
            go_on.wait()
        return forward(request)

    with faulty.FaultyS3(archive.bucket.endpoint) as server:
        server.fault = never
        child = spawn("aa-validate", ["-c", config_file(ground.NOWHERE, archive.bucket, s3=ground.s3_section(server.endpoint))])
        try:
            assert asked.wait(30 * PATIENCE)
            child.send_signal(signal.SIGTERM)
            result = finish(child, seconds=30)
        finally:
            go_on.set()
    assert (result.rc, result.out) == (-signal.SIGTERM, b"") and "stopped by SIGTERM" in result.err


def test_a_prefix_that_nobody_owns_is_a_warning(archive: Archive) -> None:
    archive.remove(TABLE + "_owner.json")
    report = archive.report("--depth", "light")
    assert (report["exit"], found(report)) == (exits.OK, {"owner.missing": {None}})


def test_a_table_of_one_database_is_found_though_others_have_none(archive: Archive) -> None:
    report = archive.report("--database", "prod", "--database", "other", "--table", "audit_logs")
    assert (report["exit"], report["looked_at"]["batches"]) == (exits.OK, BATCHES)


def test_an_archive_with_nothing_in_it_is_a_warning(archive: Archive, config_file: ConfigFile) -> None:
    elsewhere = config_file(ground.NOWHERE, archive.bucket, s3=ground.s3_section(archive.bucket.endpoint, prefix="other/"))
    report = Archive(archive.bucket, elsewhere, []).report()
    assert (report["exit"], found(report, "warn").keys()) == (exits.OK, {"archive.empty"})


def test_a_database_that_cannot_be_reached_is_said_and_is_an_error_where_it_was_asked_for(archive: Archive) -> None:
    report = archive.report()
    assert report["exit"] == exits.OK and any("still in the tables" in each for each in report["not_looked_at"])
    asked = archive.report("--against-table", "yes")
    assert (asked["exit"], found(asked).keys()) == (exits.NETWORK, {"look.failed"})
    row_removed(archive)
    assert archive.report("--against-table", "yes")["exit"] == exits.FAILED, "what is wrong weighs more than what was not seen"


@pytest.mark.req("REQ-EXE-001")
def test_aa_archive_verifies_archives_as_aa_validate_does(archive: Archive) -> None:
    before = archive.bucket.keys()
    well = run_stage("aa-archive", ["--verify-archives", "--output", "json", "--table", "audit_logs"], env={"AA_CONFIG": archive.config})
    assert (well.rc, well.lines[0]) == (exits.OK, archive.report())
    row_removed(archive)
    result = run_stage("aa-archive", ["--verify-archives", "--output", "json"], env={"AA_CONFIG": archive.config})
    assert (result.rc, found(result.lines[0], "fail")["data.rows"]) == (exits.FAILED, {archive.batch(2)})
    assert archive.bucket.keys() == before


def test_people_read_lines(archive: Archive) -> None:
    row_removed(archive)
    result = run_stage("aa-validate", ["--output", "text"], env={"AA_CONFIG": archive.config})
    told = result.out.decode()
    assert f"fail     data.rows    prod public.audit_logs {archive.batch(2)}: " in told and "exit 2: " in told
    assert "not looked at: whether archived rows are still" in told
    assert run_stage("aa-validate", ["--quiet"], env={"AA_CONFIG": archive.config}).out == b""


def test_no_check_is_declared_that_nothing_can_raise() -> None:
    source = "".join(path.read_text() for path in (Path(__file__).parents[2] / "lib/audit_archiver/validate").glob("*.py")
                     if path.name != "findings.py")
    for check in CHECKS:
        kind = check.rpartition(".")[2]
        assert f'"{check}"' in source or f'}}.{kind}"' in source or check == "look.failed", check
