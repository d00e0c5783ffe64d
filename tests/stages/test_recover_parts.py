"""Recovery beyond the table of verdicts: batches by hand that grow old, runs that end, staging, scopes, several databases."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from audit_archiver import exits
from audit_archiver.catalogue import evidence, staged
from audit_archiver.catalogue.recover import Recoverer, recover_database
from audit_archiver.formats import names
from audit_archiver.postgres import connect, witness
from tests.ground import tables
from tests.ground.by_hand import ByHand, dump
from tests.ground.held import Holder, plan
from tests.ground.postgres import Cluster
from tests.ground.wait import until
from tests.pipes.test_aa_recover import database_on

ROWS = 250
CUTOFF = "2025-01-01T00:00:00Z"
AT_ONCE = datetime.timedelta(0)


@pytest.fixture()
def hand(db: Any, bucket: Any, config_file: Any) -> ByHand:
    tables.create(db.connection, rows=ROWS, first="2024-01-01", last="2024-03-01")
    return ByHand(db, config_file(db, bucket))


@pytest.fixture()
def a_day_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is by hand is not waited for any longer."""
    monkeypatch.setattr(evidence, "PATIENCE", AT_ONCE)
    monkeypatch.setattr(staged, "PATIENCE", AT_ONCE)


def held(hand: ByHand, *, commit: bool, table: str = "audit_logs", schema: str = "public", limit: int = 100,
         record: bool = False) -> dict[str, Any]:
    """One batch under a holder that ends right after it."""
    another_second(hand)
    with Holder(hand.path) as holder:
        data = holder.select(plan(hand.settings, table, schema=schema, cutoff=CUTOFF, limit=limit)).out
        for stage in ("aa-serialize", "aa-upload", "aa-verify"):
            data = holder.stage(stage, data).out
        line = json.loads(data)
        if commit:
            deleted = holder.delete([line])
            assert deleted.rc == 0, deleted.err
            line = holder.commit(deleted.lines[0])
    if record:
        hand.record([line])
    return dict(line)


def another_second(hand: ByHand) -> None:
    """Names bear the server's seconds: two exports must not want the same ones (T10)."""
    now = hand.db.scalar("SELECT date_trunc('second', clock_timestamp())")
    until(lambda: hand.db.scalar("SELECT date_trunc('second', clock_timestamp())") > now, "the second is over")


def verdicts(hand: ByHand, *argv: str, code: int = exits.OK) -> list[tuple[str, str, str]]:
    """(table, number, verdict) of each batch."""
    result = hand.recover(*argv)
    assert result.rc == code, result.err
    return [(each["table"], each["batch"][-3:], each["verdict"])
            for found in result.lines[0]["databases"] for each in found["verdicts"]]


# -- exported by hand, and nobody came back


@pytest.mark.req("T38")
def test_an_old_batch_by_hand_whose_rows_are_there_is_abandoned_and_its_run_ends(hand: ByHand, a_day_later: None) -> None:
    line = hand.export("--limit", "100")[0]
    assert verdicts(hand) == [("audit_logs", "001", "ABANDON")]
    assert (hand.states(line), hand.ended(line["batch"]["run"])) == (["abandoned"], True)
    assert hand.delete([line]).rc == exits.FAILED
    assert hand.db.scalar("SELECT count(*) FROM audit_logs") == ROWS


@pytest.mark.req("T38")
@pytest.mark.parametrize("limit", [100, 60])
def test_an_old_batch_by_hand_whose_rows_another_run_archived_is_abandoned(hand: ByHand, a_day_later: None, limit: int) -> None:
    """A trial by hand, then the nightly run: the rows are in one archive, and the table must not be blocked for ever."""
    trial = hand.export("--limit", "100")[0]
    held(hand, commit=True, limit=limit, record=True)
    assert verdicts(hand) == [("audit_logs", "001", "ABANDON")]
    said = hand.read(trial, names.ABANDONED)["evidence"]
    assert (said["present"], said["accounted"], said["status"]) == (100 - limit, limit, "none")


def test_an_old_batch_by_hand_whose_rows_somebody_removed_is_held(hand: ByHand, a_day_later: None) -> None:
    """One row more than the other run archived."""
    hand.export("--limit", "100")
    held(hand, commit=True, limit=60, record=True)
    hand.db.execute("DELETE FROM audit_logs WHERE id = 61")
    assert verdicts(hand, code=exits.FAILED) == [("audit_logs", "001", "HOLD")]


def test_a_run_by_hand_that_is_all_recorded_stays_open_for_a_day(hand: ByHand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next batch may be on its way; ended, nobody would find it."""
    lines = hand.export(run="20251230T021545Z-7")
    hand.record(hand.delete(lines[:1]).lines)
    assert verdicts(hand) == [("audit_logs", "002", "WAIT"), ("audit_logs", "003", "WAIT")]
    hand.record(hand.delete(lines[1:]).lines)
    assert verdicts(hand) == []
    assert not hand.ended("20251230T021545Z-7")
    monkeypatch.setattr(evidence, "PATIENCE", AT_ONCE)
    assert verdicts(hand) == []
    assert hand.ended("20251230T021545Z-7")


# -- runs, scopes, interfaces


def test_the_callers_own_run_is_recovered_but_not_ended(hand: ByHand) -> None:
    """Before a restart of its pipeline."""
    line = held(hand, commit=False)
    database = hand.settings.databases[0]
    control = connect.connect(database, purpose="control")
    outcome = recover_database(hand.settings, hand.store, database, control, line["batch"]["run"])
    control.close()
    assert [each.verdict for each in outcome.verdicts] == ["ABANDON"]
    assert outcome.ended == [] and not hand.ended(line["batch"]["run"])


def test_a_restarted_run_does_not_wait_for_what_it_exported_without_a_holder(hand: ByHand) -> None:
    """Late mode: its stages are dead, so nobody will go on with these batches; the next attempt selects the rows anew."""
    lines = hand.export("--limit", "100", run="20251230T021545Z-7")
    staged_only = hand.staging / hand.db.name / "public.audit_logs"
    database = hand.settings.databases[0]
    control = connect.connect(database, purpose="control")
    try:
        Recoverer(hand.settings, hand.store, "20251230T021545Z-8")(database, control)
        assert hand.states(lines[0]) == []
        recoverer = Recoverer(hand.settings, hand.store, "20251230T021545Z-7")
        recoverer(database, control)
    finally:
        control.close()
    assert hand.states(lines[0]) == ["abandoned"]
    assert list(staged_only.iterdir()) == []
    assert recoverer.end(database, "aa-archive") and hand.ended("20251230T021545Z-7")


def test_a_run_is_ended_even_if_the_server_went_away_after_its_last_batch(hand: ByHand) -> None:
    hand.export("--limit", "10", run="20251230T021545Z-7")
    recoverer = Recoverer(hand.settings, hand.store, "20251230T021545Z-7")
    gone = dataclasses.replace(hand.settings.databases[0], host="/nonexistent")
    assert recoverer.end(gone, "aa-archive")
    assert "wal" not in json.loads(hand.store.get_bytes(names.run_end_key("archives/", hand.db.name, "20251230T021545Z-7")))


@pytest.mark.req("REQ-REL-006")
def test_a_run_is_not_ended_while_a_batch_of_it_is_held(hand: ByHand) -> None:
    """An ended run is not looked into again: its held batch would be forgotten, and its rows with it."""
    line = held(hand, commit=False)
    hand.db.execute("DELETE FROM audit_logs WHERE id = 4")
    database, run = hand.settings.databases[0], line["batch"]["run"]
    control = connect.connect(database, purpose="control")
    recoverer = Recoverer(hand.settings, hand.store, run)
    try:
        assert recoverer(database, control).tables == {("public", "audit_logs"): recoverer.outcomes[database.name][0].verdicts[0].words}
    finally:
        control.close()
    assert not recoverer.end(database, "aa-archive") and not hand.ended(run)


def test_with_a_lock_per_table_only_that_table_is_decided_and_no_run_ends(db: Any, bucket: Any, config_file: Any) -> None:
    for table in ("audit_logs", "other"):
        tables.create(db.connection, table, rows=20, first="2024-01-01", last="2024-03-01")
    both = [{"name": name, "timestamp_column": "created_at", "primary_key": "id"} for name in ("audit_logs", "other")]
    hand = ByHand(db, config_file(db, bucket, both, locking={"scope": "table"}))
    for table in ("audit_logs", "other"):
        line = held(hand, commit=False, table=table)
    database = hand.settings.databases[0]
    control = connect.connect(database, purpose="control")
    recoverer = Recoverer(hand.settings, hand.store)
    assert recoverer(database, control, [("public", "other")]).tables == {}
    control.close()
    said = recoverer.outcomes[database.name][0]
    assert [(each.table, each.verdict) for each in said.verdicts] == [(("public", "other"), "ABANDON")]
    assert said.said() == ("1 batch abandoned (public.other batch_001 of "
                           f"{line['batch']['archived_at'][:10]}: all its rows are in the table, unchanged)")
    assert not hand.ended(line["batch"]["run"])
    assert verdicts(hand, "--table", "audit_logs") == [("audit_logs", "001", "ABANDON")]
    assert not hand.ended(line["batch"]["run"])
    assert verdicts(hand) == []
    assert hand.ended(line["batch"]["run"])


@pytest.mark.req("T58")
def test_a_held_table_is_named_to_the_holder_and_other_tables_go_on(hand: ByHand) -> None:
    held(hand, commit=False)
    hand.db.execute("DELETE FROM audit_logs WHERE id = 4")
    tables.create(hand.db.connection, "other", rows=20, first="2024-01-01", last="2024-03-01")
    with Holder(hand.path, recover=Recoverer(hand.settings, hand.store)) as holder:
        refused = holder.select(plan(hand.settings, "audit_logs", cutoff=CUTOFF))
        assert b"aa-rows" not in refused.out and "is held back" in refused.err and "1 of its 100 rows are gone" in refused.err
        assert b"aa-rows" in holder.select(plan(hand.settings, "other", cutoff=CUTOFF)).out


def test_a_held_table_is_held_for_the_guarded_delete_too(hand: ByHand) -> None:
    line = held(hand, commit=False)
    hand.db.execute("DELETE FROM audit_logs WHERE id = 4")
    another_second(hand)
    by_hand = hand.export("--start-date", "2024-02-20")[0]
    assert by_hand["batch"]["first"] != line["batch"]["first"]
    result = hand.delete([by_hand])
    assert result.rc == exits.CONFIG and "is held back" in result.err


@pytest.mark.req("REQ-DB-005")
def test_one_database_that_cannot_be_reached_does_not_stop_the_next(hand: ByHand, bucket: Any, config_file: Any) -> None:
    import yaml

    held(hand, commit=True)
    settings = yaml.safe_load(hand.path.read_text())
    settings["databases"].insert(0, {**settings["databases"][0], "name": "nowhere", "host": "/nonexistent"})
    path = hand.path.with_name("two.yaml")
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(settings))
    result = hand.run("aa-recover", ["-c", str(path), "--output", "json"])
    assert result.rc == exits.SOME_FAILED
    assert [each["database"] for each in result.lines[0]["databases"]] == [hand.db.name]
    assert "nowhere" in result.err


def test_a_batch_of_an_ended_run_that_a_late_writer_left_is_still_found_while_another_run_is_open(hand: ByHand) -> None:
    first = held(hand, commit=False)
    assert verdicts(hand) == [("audit_logs", "001", "ABANDON")]
    hand.store.delete(first["serialized"]["stem"] + names.ABANDONED)  # as if a frozen upload had come back
    another_second(hand)
    hand.export("--limit", "10")
    assert ("audit_logs", "001", "ABANDON") in verdicts(hand)


# -- a table whose name is shortened in the bucket


LONG = ("ß" * 31, "日" * 21)


def held_with_a_long_name(hand: ByHand, config_file: Any, bucket: Any, *, commit: bool) -> tuple[ByHand, dict[str, Any]]:
    """A batch of a table of a schema whose %XX are together too long for a file's name."""
    hand.db.execute(f'ALTER TABLE audit_logs RENAME TO "{LONG[1]}"; CREATE SCHEMA "{LONG[0]}"; '
                    f'ALTER TABLE "{LONG[1]}" SET SCHEMA "{LONG[0]}"')
    entry = {"name": LONG[1], "schema": LONG[0], "timestamp_column": "created_at", "primary_key": "id"}
    moved = ByHand(hand.db, config_file(hand.db, bucket, [entry]))
    line = held(moved, commit=commit, table=LONG[1], schema=LONG[0])
    assert ".sha256." in line["serialized"]["stem"] and ".sha256." in line["serialized"]["dir"]
    return moved, line


@pytest.mark.req("T8", "T38")
@pytest.mark.parametrize("commit, verdict", [(True, "RECORD"), (False, "ABANDON")])
def test_a_batch_under_a_shortened_name_is_decided_and_its_staging_removed(hand: ByHand, config_file: Any, bucket: Any, commit: bool,
                                                                           verdict: str) -> None:
    moved, line = held_with_a_long_name(hand, config_file, bucket, commit=commit)
    assert verdicts(moved) == [(LONG[1], "001", verdict)]
    assert moved.states(line) == ["commit" if commit else "abandoned"] and not os.path.exists(line["serialized"]["dir"])


@pytest.mark.req("T8", "T58")
def test_a_shortened_name_without_metadata_blocks_the_table_that_its_owner_names(hand: ByHand, config_file: Any, bucket: Any) -> None:
    moved, line = held_with_a_long_name(hand, config_file, bucket, commit=False)
    shutil.rmtree(moved.staging)
    bucket.client.delete_object(Bucket=bucket.name, Key=line["serialized"]["stem"] + names.METADATA)
    with Holder(moved.path, recover=Recoverer(moved.settings, moved.store)) as holder:
        refused = holder.select(plan(moved.settings, LONG[1], schema=LONG[0], cutoff=CUTOFF))
        assert b"aa-rows" not in refused.out and "it has a key list, but no metadata" in refused.err
    bucket.client.delete_object(Bucket=bucket.name, Key=names.table_dir(moved.store.prefix, hand.db.name, *LONG) + "_owner.json")
    result = moved.recover()
    assert result.rc == exits.FAILED and "nothing says whose it is" in result.err
    assert moved.states(line) == [] and hand.db.scalar(f'SELECT count(*) FROM "{LONG[0]}"."{LONG[1]}"') == ROWS


# -- the failed-over server


@pytest.mark.req("T38")
def test_after_a_failover_nothing_is_known_of_transactions_and_the_keys_decide(bucket: Any, config_file: Any) -> None:
    """GIVEN a standby that has every row WHEN it is promoted THEN its timeline is another, whatever its control file says."""
    with Cluster.start() as server:
        db = database_on(server)
        tables.create(db.connection, rows=ROWS, first="2024-01-01", last="2024-03-01")
        hand = ByHand(db, config_file(db, bucket))
        line = held(hand, commit=True)
        db.close()
        server.down()
        old = int(server.version.split(".")[0]) < 12
        note = server.data / ("recovery.conf" if old else "standby.signal")
        note.write_text("standby_mode = 'on'\n" if old else "")
        os.chown(note, server.data.stat().st_uid, server.data.stat().st_gid)
        server.up()
        server.run("pg_ctl", "-D", str(server.data), "promote")
        until(lambda: not db.scalar("SELECT pg_is_in_recovery()"), "the standby is a primary")
        control = connect.connect(hand.settings.databases[0], purpose="look")
        assert (line["batch"]["server"]["timeline"], witness.place(control).timeline) == (1, 2)
        control.close()
        assert verdicts(hand) == [("audit_logs", "001", "RECORD")]
        assert hand.read(line, names.COMMIT)["committed"]["xid"] is None
        db.close()


# -- staging and cleanup


def test_staging_of_dead_runs_is_forgotten_and_that_of_people_is_kept(hand: ByHand, a_day_later: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(staged, "PATIENCE", datetime.timedelta(hours=24))
    with Holder(hand.path) as holder:
        data = holder.select(plan(hand.settings, "audit_logs", cutoff=CUTOFF, limit=100)).out
        dead = holder.stage("aa-serialize", data).lines[0]["serialized"]["dir"]
    another_second(hand)
    person = hand.export("--limit", "10", upto="aa-serialize")[0]["serialized"]["dir"]
    unfinished = hand.staging / hand.db.name / "public.audit_logs" / "20240101T000000Z_batch_001"
    writing = hand.staging / hand.db.name / "public.audit_logs" / "20240101T000000Z_batch_002"
    for place in (unfinished, writing):
        place.mkdir()
        (place / "audit_logs_20240101T000000Z_batch_001.jsonl.gz.tmp").write_bytes(b"half")
    for path in (unfinished, *unfinished.iterdir()):
        os.utime(path, (0, 0))
    stranger = hand.staging / hand.db.name / "notes.txt"
    stranger.write_text("somebody's")

    assert hand.recover("--dry-run").lines[0]["databases"][0]["forgotten"] == sorted([dead, str(unfinished)])
    assert Path(dead).is_dir()
    assert hand.recover().lines[0]["databases"][0]["forgotten"] == sorted([dead, str(unfinished)])

    assert [path.is_dir() for path in map(Path, (dead, person, unfinished, writing))] == [False, True, False, True]
    assert stranger.exists()


def test_staging_of_a_recorded_batch_is_removed(hand: ByHand) -> None:
    line = held(hand, commit=True)
    place = Path(line["serialized"]["dir"])
    shutil.copytree(place, place.parent / "kept")
    hand.record([line])
    shutil.copytree(place.parent / "kept", place)
    shutil.rmtree(place.parent / "kept")
    assert hand.recover().lines[0]["databases"][0]["forgotten"] == [str(place)]
    assert not place.exists()


@pytest.mark.req("REQ-NET-007", "T57")
def test_parts_that_a_dead_run_sent_are_given_up_with_its_staging(hand: ByHand, bucket: Any) -> None:
    with Holder(hand.path) as holder:
        data = holder.select(plan(hand.settings, "audit_logs", cutoff=CUTOFF, limit=100)).out
        line = holder.stage("aa-serialize", data).lines[0]
    key = line["serialized"]["stem"] + names.DATA
    begun, other = (bucket.client.create_multipart_upload(Bucket=bucket.name, Key=key)["UploadId"] for _ in range(2))
    state = {"format": "aa-upload", "version": 1, "bucket": bucket.name, "key": key, "upload_id": begun, "completed_parts": [], "part_etags": []}
    (Path(line["serialized"]["dir"]) / "upload.json").write_text(json.dumps(state))
    assert hand.recover().lines[0]["databases"][0]["forgotten"] == [line["serialized"]["dir"]]
    left = bucket.client.list_multipart_uploads(Bucket=bucket.name)["Uploads"]
    assert [each["UploadId"] for each in left] == [other], "what nobody here knows of waits for --cleanup"


@pytest.mark.req("REQ-NET-008", "REQ-NET-009", "T57")
def test_a_kept_batch_can_be_finished_after_days_and_goes_when_its_time_is_over(hand: ByHand, db: Any, bucket: Any, config_file: Any,
                                                                               a_day_later: None) -> None:
    fallback = str(hand.path.parent / "fallback")
    away = config_file(db, bucket, s3={"endpoint": "http://127.0.0.1:9", "retries": 0, "local_fallback_dir": fallback})
    week, at_once = (config_file(db, bucket, s3={"local_fallback_dir": fallback, "local_fallback_retention_days": days}) for days in (7, 0))
    for line in hand.export(upto="aa-serialize"):
        assert hand.run("aa-upload", ["-c", str(away)], dump([line])).rc == exits.NETWORK
    first, second, third = sorted(Path(fallback).rglob("batch.json"))
    assert hand.recover("-c", str(week)).lines[0]["databases"][0]["forgotten"] == []

    data = first.read_bytes()
    for stage in ("aa-upload", "aa-verify", "aa-delete", "aa-record"):
        data = hand.must(stage, ["-c", str(week)], data).out
    assert (db.scalar("SELECT count(*) FROM audit_logs"), first.exists()) == (ROWS - 100, False)

    assert hand.recover("-c", str(at_once)).lines[0]["databases"][0]["forgotten"] == [str(second.parent), str(third.parent)]
    assert not second.exists() and db.scalar("SELECT count(*) FROM audit_logs") == ROWS - 100


@pytest.mark.req("REQ-NET-009", "T38")
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "the other way round"])
@pytest.mark.parametrize("status", ["aborted", "unknown"])
def test_of_two_kept_batches_with_the_same_rows_the_second_that_is_sent_deletes_nothing_and_is_never_recorded(
        hand: ByHand, db: Any, bucket: Any, config_file: Any, monkeypatch: Any, order: tuple[int, int], status: str) -> None:
    """Two attempts of one run, set aside while the store was away; after a failover nobody knows what became of their transactions."""
    fallback = hand.path.parent / "fallback"
    away = config_file(db, bucket, s3={"endpoint": "http://127.0.0.1:9", "retries": 0, "local_fallback_dir": str(fallback)})
    for _ in range(2):
        another_second(hand)
        with Holder(hand.path) as holder:
            data = holder.select(plan(hand.settings, "audit_logs", cutoff=CUTOFF, limit=100)).out
            data = holder.stage("aa-serialize", data).out
        assert hand.run("aa-upload", ["-c", str(away)], data).rc == exits.NETWORK
    kept = sorted(fallback.rglob("batch.json"))
    monkeypatch.setattr(witness, "status", lambda *_: status)

    first_kept, second_kept = (kept[place] for place in order)
    first = hand.must("aa-verify", stdin=hand.must("aa-upload", [str(first_kept)]).out).lines[0]
    hand.record(hand.delete([first]).lines)
    another_second(hand)
    sent = hand.must("aa-verify", stdin=hand.must("aa-upload", [str(second_kept)]).out).lines[0]
    refused = hand.delete([sent])

    assert refused.rc == exits.FAILED and "was abandoned by recovery" in refused.log[-1]["msg"]
    assert (hand.states(first), hand.states(sent)) == (["commit", "intent_1"], ["abandoned"])
    assert hand.read(sent, names.ABANDONED)["evidence"]["accounted"] == 100
    assert hand.db.scalar("SELECT count(*) FROM audit_logs") == ROWS - 100


@pytest.mark.req("REQ-NET-006", "REQ-NET-007")
def test_cleanup_gives_up_uploads_in_parts_that_nobody_completes(hand: ByHand, db: Any, bucket: Any, config_file: Any) -> None:
    tables_dir = names.table_dir("archives/", hand.db.name, "public", "audit_logs")
    hand.export("--limit", "10")
    for key in (tables_dir + "big.jsonl.gz", "elsewhere/big.jsonl.gz"):
        bucket.client.create_multipart_upload(Bucket=bucket.name, Key=key)
    patient = config_file(db, bucket, s3={"multipart_timeout_hours": 1_000_000})  # moto says of every upload that it was begun in 2010
    assert hand.recover("--cleanup", "-c", str(patient)).lines[0]["databases"][0]["uploads_given_up"] == []
    assert hand.recover("--cleanup").lines[0]["databases"][0]["uploads_given_up"] == [tables_dir + "big.jsonl.gz"]
    left = bucket.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads", [])
    assert [each["Key"] for each in left] == ["elsewhere/big.jsonl.gz"]


@pytest.mark.req("T38")
def test_metadata_of_another_batch_hold_the_batch_and_its_table(hand: ByHand, bucket: Any) -> None:
    first, second = held(hand, commit=True), held(hand, commit=True)
    theirs = hand.store.get_bytes(first["serialized"]["stem"] + names.METADATA)
    bucket.client.put_object(Bucket=bucket.name, Key=second["serialized"]["stem"] + names.METADATA, Body=theirs)
    result = hand.recover()
    assert result.rc == exits.FAILED
    found = {each["stem"]: (each["verdict"], each["why"]) for each in result.lines[0]["databases"][0]["verdicts"]}
    assert found[first["serialized"]["stem"]][0] == "RECORD"
    verdict, why = found[second["serialized"]["stem"]]
    assert verdict == "HOLD" and "cannot be recorded: " in why and "SHA-256 of " in why, "its own line is in staging, and what lies there is not it"
    assert hand.states(second) == []


def test_an_intent_under_another_number_holds_the_batch(hand: ByHand, bucket: Any) -> None:
    line = hand.export("--limit", "100")[0]
    value = {"format": "aa-intent", "version": 1, "id": line["batch"]["id"], "n": 2, "at": "2025-12-30T02:15:50Z", "xid": "770",
             "server": line["batch"]["server"], "verdict": "FULL", "rows": 100, "keys_sha256": line["batch"]["keys_sha256"]}
    bucket.client.put_object(Bucket=bucket.name, Key=line["serialized"]["stem"] + names.intent(1), Body=json.dumps(value).encode() + b"\n")
    result = hand.recover()
    assert result.rc == exits.FAILED
    (verdict,) = result.lines[0]["databases"][0]["verdicts"]
    assert verdict["verdict"] == "HOLD" and "is another intent than its name says" in verdict["why"]
    assert hand.states(line) == ["intent_1"]
