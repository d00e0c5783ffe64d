"""Objects in GLACIER and DEEP_ARCHIVE: found before anything else, asked for, waited for. moto refuses to read them, and thaws."""

from __future__ import annotations

import json
import urllib.request
from typing import Any, Iterator

import pytest

from audit_archiver.formats import names
from audit_archiver.restore import thaw
from tests.ground import tables
from tests.ground.restored import Restored
from tests.ground.run import finish, run_stage, spawn
from tests.ground.wait import until

SLOWLY = {"model_name": "s3::keyrestore", "transition": {"progression": "manual", "times": 3}}
AT_ONCE = {"model_name": "s3::keyrestore", "transition": {"progression": "immediate"}}


@pytest.fixture()
def scene(db: Any, bucket: Any, config_file: Any) -> Restored:
    """250 rows in three batches, archived; the table is empty."""
    tables.create(db.connection, rows=250, first="2024-01-01", last="2024-03-01")
    made = Restored(db, bucket, config_file(db, bucket))
    made.before = tables.digest(db.connection, "audit_logs")  # type: ignore[attr-defined]
    made.lines = made.archive()  # type: ignore[attr-defined]
    return made


@pytest.fixture()
def slowly(bucket: Any) -> Iterator[None]:
    """A store where an object is thawed only when it was looked at for the third time."""
    _moto(bucket, SLOWLY)
    yield
    _moto(bucket, AT_ONCE)


def _moto(bucket: Any, setting: dict[str, Any]) -> None:
    request = urllib.request.Request(f"{bucket.endpoint}/moto-api/state-manager/set-transition", json.dumps(setting).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        assert answer.status in (200, 201)


def freeze(scene: Restored, *numbers: int, suffixes: tuple[str, ...] = (names.DATA,), storage_class: str = "GLACIER") -> None:
    """What a lifecycle rule does to objects of these batches."""
    for number in numbers:
        for suffix in suffixes:
            key = scene.lines[number]["serialized"]["stem"] + suffix
            scene.bucket.client.copy_object(Bucket=scene.bucket.name, Key=key, CopySource={"Bucket": scene.bucket.name, "Key": key},
                                            StorageClass=storage_class)


def asked_for(scene: Restored) -> list[str]:
    return [key for key in scene.bucket.keys() if "Restore" in scene.bucket.client.head_object(Bucket=scene.bucket.name, Key=key)]


def rows(scene: Restored) -> int:
    return int(scene.db.scalar("SELECT count(*) FROM audit_logs"))


def test_frozen_objects_are_refused_before_anything_else_with_what_to_say(scene: Restored) -> None:
    freeze(scene, 0, 2)
    freeze(scene, 2, suffixes=(names.METADATA,), storage_class="DEEP_ARCHIVE")
    scene.db.execute("DROP TABLE audit_logs")
    result = scene.run("--restore-all", "--table", "audit_logs", "--create-table")
    assert (result.rc, asked_for(scene), scene.db.scalar("SELECT to_regclass('audit_logs')")) == (7, [], None)
    assert "3 objects with" in result.err and "of 2 batches have to be thawed first" in result.err and "--thaw asks for them" in result.err
    assert "DEEP_ARCHIVE, GLACIER" in result.err


def test_what_is_not_meant_may_be_frozen(scene: Restored) -> None:
    freeze(scene, 0)
    freeze(scene, 1, suffixes=(names.KEYS,))
    report = scene.restore("--table", "audit_logs", "--start-date", str(scene.lines[1]["batch"]["first"][0])[:10])
    assert report["rows"]["inserted"] >= 140


def test_thaw_asks_once_exits_7_with_a_time_and_the_next_call_restores(scene: Restored, slowly: None) -> None:
    freeze(scene, 0, 1, 2)
    first = scene.run("--restore-all", "--table", "audit_logs", "--thaw", "--thaw-days", "2", "--thaw-tier", "Bulk")
    assert (first.rc, len(asked_for(scene)), rows(scene)) == (7, 3, 0)
    asked, = [record for record in first.log if record["event"] == "thaw.asked"]
    assert (asked["objects"], asked["of"], asked["tier"]) == (3, 3, "Bulk")
    assert f"they should be by {asked['ready_by']}" in first.err
    second = scene.run("--restore-all", "--table", "audit_logs", "--thaw")
    if second.rc == 7:  # it counts who looks
        assert next(record for record in second.log if record["event"] == "thaw.asked")["objects"] == 0, "nothing is asked for twice"
        assert until(lambda: scene.run("--restore-all", "--table", "audit_logs").rc == 0, "it is thawed") is not False
    assert tables.digest(scene.db.connection, "audit_logs") == scene.before


def test_wait_waits_and_goes_on(scene: Restored, slowly: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thaw, "POLL_S", 0.01)
    freeze(scene, 0, 1, 2, suffixes=(names.DATA, names.METADATA))
    result = scene.run("--restore-all", "--table", "audit_logs", "--thaw", "--wait")
    assert result.rc == 0, result.err
    assert any(record["event"] == "thaw.waiting" for record in result.log)
    assert tables.digest(scene.db.connection, "audit_logs") == scene.before


def test_wait_can_be_interrupted(scene: Restored, slowly: None) -> None:
    freeze(scene, 0)
    child = spawn("aa-restore", ["-c", scene.path, "--restore-all", "--table", "audit_logs", "--thaw", "--wait"])
    until(lambda: asked_for(scene), "it has asked")
    child.terminate()
    assert finish(child).rc in (143, -15)
    assert rows(scene) == 0


@pytest.mark.req("T46")
def test_a_dry_run_asks_for_nothing(scene: Restored) -> None:
    freeze(scene, 0)
    result = scene.run("--restore-all", "--table", "audit_logs", "--thaw", "--dry-run")
    assert (result.rc, asked_for(scene)) == (7, []) and "a dry run asks for nothing" in result.err


def test_flags_that_mean_nothing_are_refused(scene: Restored) -> None:
    alone = scene.run("--restore-all", "--table", "audit_logs", "--wait")
    assert alone.rc == 3 and "--wait belongs to --thaw" in alone.err
    freeze(scene, 0, storage_class="DEEP_ARCHIVE")
    dear = scene.run("--restore-all", "--table", "audit_logs", "--thaw", "--thaw-tier", "Expedited")
    assert (dear.rc, asked_for(scene)) == (3, []) and "not for objects of class DEEP_ARCHIVE" in dear.err


def test_a_validation_says_what_is_frozen_and_thaws_it(scene: Restored) -> None:
    freeze(scene, 1, suffixes=(names.DATA, names.KEYS))
    light = run_stage("aa-validate", ["-c", scene.path, "--depth", "light", "--output", "json"])
    assert light.rc == 0, light.err
    refused = run_stage("aa-validate", ["-c", scene.path, "--output", "json"])
    finding, = [each for each in refused.lines[0]["findings"] if each["status"] != "warn"]
    assert (refused.rc, finding["check"], asked_for(scene)) == (7, "look.failed", []) and "--thaw asks for them" in json.dumps(refused.lines[0])
    whole = run_stage("aa-validate", ["-c", scene.path, "--output", "json", "--thaw", "--wait"])
    assert (whole.rc, len(asked_for(scene))) == (0, 2), whole.err


