"""aa-recover on what really happened: crashes, rollbacks, other servers, rewound servers, wiped staging."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from typing import Any, Iterator, Optional

import pytest

from audit_archiver import exits
from audit_archiver.formats import names
from tests.conftest import ARCHIVER, TestDatabase
from tests.ground import processes, tables
from tests.ground.by_hand import ByHand, dump
from tests.ground.driven import Driven
from tests.ground.held import Holder, plan
from tests.ground.kill import kill, stopped_at
from tests.ground.postgres import Cluster, account
from tests.ground.run import finish, spawn
from tests.ground.wait import until

ROWS = 250
CUTOFF = "2025-01-01T00:00:00Z"


@pytest.fixture()
def hand(db: Any, bucket: Any, config_file: Any) -> ByHand:
    tables.create(db.connection, rows=ROWS, first="2024-01-01", last="2024-03-01")
    return ByHand(db, config_file(db, bucket))


@pytest.fixture()
def own() -> Iterator[Cluster]:
    """A server that the test may crash, rewind and replace."""
    with Cluster.start() as cluster:
        yield cluster


def database_on(cluster: Cluster, name: str = "prod") -> TestDatabase:
    """The archiver's database on a server of the test's own."""
    admin = cluster.connect()
    with admin.cursor() as cursor:
        cursor.execute(f"CREATE ROLE {ARCHIVER} LOGIN")
        cursor.execute(f"CREATE DATABASE {name} OWNER {ARCHIVER}")
    admin.close()
    return TestDatabase(cluster, name)


def interrupted(hand: ByHand, *, commit: bool, upto: str = "aa-verify", limit: int = 100, holder: Optional[Holder] = None) -> dict[str, Any]:
    """One batch of a held transaction, stopped after `upto` or, with `commit`, between COMMIT and the record."""
    made = holder or Holder(hand.path)
    try:
        data = made.select(plan(hand.settings, "audit_logs", cutoff=CUTOFF, limit=limit)).out
        for stage in ("aa-serialize", "aa-upload", "aa-verify"):
            result = made.stage(stage, data)
            assert result.rc == 0, result.err
            data = result.out
            if stage == upto:
                break
        line = json.loads(data.split(b"\n")[0])
        if commit:
            deleted = made.delete([line])
            assert deleted.rc == 0, deleted.err
            line = made.commit(deleted.lines[0])
        return dict(line)
    finally:
        if holder is None:
            made.close()


def verdicts(hand: ByHand, *argv: str, code: int = exits.OK) -> dict[str, tuple[str, str]]:
    """aa-recover's verdict and reason by the last digits of each batch."""
    result = hand.recover(*argv)
    assert result.rc == code, result.err
    return {each["batch"].rpartition("_batch_")[2]: (each["verdict"], each["why"])
            for found in result.lines[0]["databases"] for each in found["verdicts"]}


def left(hand: ByHand) -> int:
    return int(hand.db.scalar("SELECT count(*) FROM audit_logs"))


# -- the table of the design


@pytest.mark.req("REQ-REL-003", "REQ-REL-004", "REQ-ERR-011", "REQ-ERR-012", "T38")
def test_a_committed_batch_without_a_record_is_read_back_and_recorded(hand: ByHand) -> None:
    line = interrupted(hand, commit=True)
    assert (left(hand), hand.states(line)) == (ROWS - 100, [])

    assert verdicts(hand) == {"001": ("RECORD", "all its rows are gone from the table, and its transaction committed")}

    record = hand.read(line, names.COMMIT)
    assert record["committed"] == {**record["committed"], "by": "aa-recover", "xid": line["committed"]["xid"], "sample_absent": True}
    assert record["verified"]["how"] == "read"
    assert hand.ended(line["batch"]["run"])
    assert list(hand.staging.rglob("*batch_001*")) == []
    assert verdicts(hand) == {}


@pytest.mark.req("T38", "T37")
@pytest.mark.parametrize("upto", ["aa-upload", "aa-verify"])
def test_a_batch_that_was_rolled_back_is_abandoned_with_the_evidence(hand: ByHand, upto: str) -> None:
    line = interrupted(hand, commit=False, upto=upto)

    assert verdicts(hand) == {"001": ("ABANDON", "all its rows are in the table, unchanged")}

    assert (left(hand), hand.states(line), hand.ended(line["batch"]["run"])) == (ROWS, ["abandoned"], True)
    said = hand.read(line, names.ABANDONED)
    assert said["evidence"] == {"keys": 100, "present": 100, "content": "equal", "xid": line["batch"]["txn"]["xid"],
                                "status": "aborted", "accounted": 0}
    assert list(hand.staging.rglob("*batch_001*")) == []


@pytest.mark.req("T38")
def test_a_rolled_back_batch_whose_rows_were_updated_since_is_abandoned(hand: ByHand) -> None:
    line = interrupted(hand, commit=False)
    hand.db.execute("UPDATE audit_logs SET action = 'corrected' WHERE id = 5")
    assert verdicts(hand)["001"][0] == "ABANDON"
    assert hand.read(line, names.ABANDONED)["evidence"]["content"] == "differs"


@pytest.mark.req("REQ-REL-006")
def test_a_rolled_back_batch_whose_rows_somebody_else_removed_is_held(hand: ByHand) -> None:
    line = interrupted(hand, commit=False)
    hand.db.execute("DELETE FROM audit_logs WHERE id <= 100")

    found = verdicts(hand, code=exits.FAILED)

    assert found == {"001": ("HOLD", "all its rows are gone from the table, but this batch did not delete them")}
    assert (hand.states(line), hand.ended(line["batch"]["run"])) == ([], False)


@pytest.mark.req("REQ-REL-006")
@pytest.mark.parametrize("commit", [True, False])
def test_a_batch_that_is_partly_gone_is_held_and_nothing_is_touched(hand: ByHand, commit: bool) -> None:
    line = interrupted(hand, commit=commit)
    if commit:
        hand.db.execute("INSERT INTO audit_logs (id, created_at, action) VALUES (4, '2024-01-01', 'anew')")
    else:
        hand.db.execute("DELETE FROM audit_logs WHERE id = 4")
    before = (left(hand), tables.digest(hand.db.connection, "audit_logs"))

    result = hand.recover()

    assert result.rc == exits.FAILED
    verdict = result.lines[0]["databases"][0]["verdicts"][0]
    assert (verdict["verdict"], verdict["evidence"]["present"]) == ("HOLD", 1 if commit else 99)
    assert (hand.states(line), hand.ended(line["batch"]["run"])) == ([], False)
    assert (left(hand), tables.digest(hand.db.connection, "audit_logs")) == before
    explained = hand.run("aa-delete", ["--explain", verdict["line"]])
    states = [each["now"] for each in explained.lines]
    assert states == (["absent"] * 3 + ["changed"] + ["absent"] * 96 if commit else ["absent"])


def test_a_committed_batch_whose_rows_are_back_with_other_content_is_held(hand: ByHand) -> None:
    hand.db.execute("CREATE TABLE kept AS SELECT * FROM audit_logs WHERE id <= 100")
    interrupted(hand, commit=True)
    hand.db.execute("INSERT INTO audit_logs SELECT * FROM kept")
    hand.db.execute("UPDATE audit_logs SET action = 'corrected' WHERE id = 5")
    assert verdicts(hand, code=exits.FAILED) == {"001": ("HOLD", "its rows are in the table, but not as they were archived")}


def test_a_committed_batch_whose_rows_were_put_back_unchanged_is_abandoned(hand: ByHand) -> None:
    """The keys decide: recording it would archive rows that are in the table."""
    hand.db.execute("CREATE TABLE kept AS SELECT * FROM audit_logs WHERE id <= 100")
    line = interrupted(hand, commit=True)
    hand.db.execute("INSERT INTO audit_logs SELECT * FROM kept")
    assert verdicts(hand)["001"][0] == "ABANDON"
    assert hand.read(line, names.ABANDONED)["evidence"]["status"] == "committed"


@pytest.mark.req("T40", "REQ-REL-004")
@pytest.mark.parametrize("commit", [True, False])
def test_staging_is_not_needed(hand: ByHand, commit: bool) -> None:
    line = interrupted(hand, commit=commit)
    shutil.rmtree(hand.staging)
    assert verdicts(hand)["001"][0] == ("RECORD" if commit else "ABANDON")
    if commit:
        record = hand.read(line, names.COMMIT)
        bare = {key: value for key, value in line["serialized"].items() if key != "dir"}
        assert (record["batch"], record["serialized"], record["uploaded"]) == (line["batch"], bare, line["uploaded"])


@pytest.mark.req("T38", "REQ-REL-004")
def test_another_server_with_the_same_database_is_decided_by_its_keys(own: Cluster, bucket: Any, config_file: Any, pg: Cluster) -> None:
    """GIVEN a committed batch of a server that is lost WHEN its successor, restored from a dump, recovers THEN it must be told
    that it is the successor, and decides by keys alone."""
    old = database_on(own)
    tables.create(old.connection, rows=ROWS, first="2024-01-01", last="2024-03-01")
    line = interrupted(ByHand(old, config_file(old, bucket)), commit=True)
    old.close()
    with Cluster.start() as successor:
        new = database_on(successor)
        tables.create(new.connection, rows=ROWS, first="2024-01-01", last="2024-03-01")
        new.execute("DELETE FROM audit_logs WHERE id <= 100")
        hand = ByHand(new, config_file(new, bucket))
        before = bucket.keys()
        refused = hand.recover()
        assert refused.rc == exits.CONFIG and "belongs to another server or database" in refused.err and "--adopt" in refused.err
        assert bucket.keys() == before
        assert verdicts(hand, "--adopt") == {"001": ("RECORD", "all its rows are gone from the table; of its transaction nothing is known any more")}
        committed = hand.read(line, names.COMMIT)["committed"]
        assert (committed["xid"], committed["lsn"]) == (None, None)
        assert hand.recover().rc == 0, "from now on it is its own"
        hand.must("aa-archive", ["--force", "-q"])
        assert left(hand) == 0
        new.close()


@pytest.mark.req("T38", "REQ-REL-006")
def test_after_a_crash_the_same_transaction_id_is_somebody_elses_and_is_not_believed(own: Cluster, bucket: Any, config_file: Any) -> None:
    """C1: the machine dies right after the id was published; after the restart the next transaction takes the id and commits.

    The server's background writers would make the id durable within seconds; here they do not get that far.
    """
    db = database_on(own)
    tables.create(db.connection, rows=20, first="2024-01-01", last="2024-03-01")
    hand = ByHand(db, config_file(db, bucket))
    writers = [row[0] for row in db.admin("SELECT pid FROM pg_stat_activity WHERE backend_type IN "
                                          "('walwriter', 'background writer', 'checkpointer')")]
    for pid in writers:
        os.kill(pid, signal.SIGSTOP)
    with Holder(hand.path) as holder:
        rows = holder.select(plan(hand.settings, "audit_logs", cutoff=CUTOFF, limit=3))
        _crash(own)
        line = holder.stage("aa-serialize", rows.out).lines[0]
    hand.must("aa-upload", stdin=dump([line]))
    db.close()
    own.up()
    published = int(line["batch"]["txn"]["xid"])
    taken = [db.admin("SELECT txid_current()")[0][0] for _ in range(10)]
    assert published in taken, f"the id {published} was not handed out again: {taken}"

    found = verdicts(hand)

    assert found["001"][0] == "ABANDON"
    assert hand.read(line, names.ABANDONED)["evidence"] == {
        "keys": 3, "present": 3, "content": "equal", "xid": str(published), "status": "committed", "accounted": 0}
    assert left(hand) == 20
    db.close()


@pytest.mark.req("T38")
@pytest.mark.parametrize("gone", [True, False])
def test_an_id_of_the_future_is_unknown_and_no_error(own: Cluster, bucket: Any, config_file: Any, gone: bool) -> None:
    """A backup was restored: the server never heard of the transaction."""
    db = database_on(own)
    tables.create(db.connection, rows=ROWS, first="2024-01-01", last="2024-03-01")
    hand = ByHand(db, config_file(db, bucket))
    db.close()
    own.down()
    shutil.copytree(own.data, own.base / "backup", symlinks=True)
    own.up()
    for _ in range(5):
        db.admin("SELECT txid_current()")
    line = interrupted(hand, commit=True)
    db.close()
    _restore(own)
    assert left(hand) == ROWS
    if gone:
        db.execute("DELETE FROM audit_logs WHERE id <= 100")

    found = verdicts(hand)

    assert found["001"][0] == ("RECORD" if gone else "ABANDON")
    if not gone:
        assert hand.read(line, names.ABANDONED)["evidence"]["status"] == "unknown"
    db.close()


@pytest.mark.req("T38", "REQ-REL-003")
@pytest.mark.parametrize("status", ["unknown", "committed"])
def test_a_batch_that_is_sent_when_another_run_has_archived_its_rows_is_not_archived_twice(
        own: Cluster, bucket: Any, config_file: Any, status: str) -> None:
    """GIVEN stages that slept while the server was restored from a backup, so that their transaction's id means nothing, or is somebody
    else's by now (C1) WHEN they wake up behind a run on another machine THEN what they send is abandoned. Found by the model of the protocol."""
    db = database_on(own)
    tables.create(db.connection, rows=ROWS, first="2024-01-01", last="2024-03-01")
    hand = ByHand(db, config_file(db, bucket))
    before = tables.digest(db.connection, "audit_logs")
    db.close()
    own.down()
    shutil.copytree(own.data, own.base / "backup", symlinks=True)
    own.up()
    for _ in range(50):
        db.admin("SELECT txid_current()")
    with Holder(hand.path) as holder:
        asleep = holder.stage("aa-serialize", holder.select(plan(hand.settings, "audit_logs", cutoff=CUTOFF, limit=100)).out).lines[0]
    db.close()
    _restore(own)
    until(lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()) > asleep["batch"]["archived_at"], "a batch of its own name can be begun")
    other_machine = ByHand(db, config_file(db, bucket, staging_dir=str(hand.staging) + "-elsewhere"))
    other_machine.must("aa-archive", ["--force", "-q"])
    while status == "committed" and int(db.admin("SELECT txid_current()")[0][0]) <= int(asleep["batch"]["txn"]["xid"]):
        continue
    hand.must("aa-upload", stdin=dump([asleep]))

    found = verdicts(other_machine)["001"]
    assert found == ("ABANDON", "it was overtaken: its rows are archived, as they were here, in batches that were begun after it")

    assert hand.read(asleep, names.ABANDONED)["evidence"]["status"] == status
    driven = Driven(db, bucket, hand.path)
    assert (driven.whole("public.audit_logs", before), left(hand)) == (ROWS, 0)
    db.close()


@pytest.mark.req("REQ-REL-006")
def test_a_rewound_server_stops_the_run_when_archived_rows_are_back(own: Cluster, bucket: Any, config_file: Any) -> None:
    """S11: every batch is recorded, nothing is open; only the log's position tells, and then the keys."""
    db = database_on(own)
    tables.create(db.connection, rows=ROWS, first="2024-01-01", last="2024-03-01")
    hand = ByHand(db, config_file(db, bucket))
    db.close()
    own.down()
    shutil.copytree(own.data, own.base / "backup", symlinks=True)
    own.up()
    line = interrupted(hand, commit=True)
    assert verdicts(hand)["001"][0] == "RECORD"
    db.execute("CREATE TABLE more AS SELECT * FROM audit_logs")
    db.close()
    _restore(own)
    assert left(hand) == ROWS

    result = hand.recover()

    assert result.rc == exits.FAILED and "rewound" in result.err and "100 of 100 rows" in result.err
    name = line["serialized"]["stem"].rpartition("/")[2]
    accepted = hand.recover("--decide", f"{name}=record")
    assert accepted.rc == 0, accepted.err
    assert hand.recover().rc == 0
    db.close()


def test_a_server_that_was_rewound_without_losing_anything_goes_on(own: Cluster, bucket: Any, config_file: Any) -> None:
    db = database_on(own)
    tables.create(db.connection, rows=ROWS, first="2024-01-01", last="2024-03-01")
    hand = ByHand(db, config_file(db, bucket))
    db.close()
    own.down()
    shutil.copytree(own.data, own.base / "backup", symlinks=True)
    own.up()
    interrupted(hand, commit=True)
    assert verdicts(hand)["001"][0] == "RECORD"
    db.close()
    _restore(own)
    db.execute("DELETE FROM audit_logs WHERE id <= 100")
    assert hand.recover().rc == 0
    db.close()


# -- exported by hand


def test_a_batch_exported_by_hand_is_left_alone_for_a_day(hand: ByHand) -> None:
    line = hand.export("--limit", "100")[0]
    assert verdicts(hand) == {"001": ("WAIT", "it was exported by hand less than 24 hours ago")}
    assert (hand.states(line), hand.ended(line["batch"]["run"])) == ([], False)
    assert hand.delete([line]).rc == 0


POINTS = ["guarded.locked", "guarded.compared", "guarded.intent.put", "guarded.deleted", "guarded.committed"]


@pytest.mark.req("T38", "T39", "REQ-REL-003")
@pytest.mark.parametrize("point", POINTS)
def test_a_guarded_delete_killed_at_any_point_is_decided(hand: ByHand, point: str) -> None:
    line = hand.export("--limit", "100")[0]
    child = spawn("aa-delete", env={**hand.env, "AA_TEST_POINT": point}, stdin=-1)
    child.stdin.write(dump([line]))
    child.stdin.close()
    child.stdin = None
    kill(stopped_at(point, child.token, ended=child.poll))
    assert finish(child).rc == -signal.SIGKILL
    until(lambda: hand.recover("--dry-run").rc != exits.LOCKED, "the server has ended the killed command's sessions")

    found = verdicts(hand)["001"][0]

    if point == "guarded.committed":
        assert (found, left(hand), hand.states(line)) == ("RECORD", ROWS - 100, ["commit", "intent_1"])
        assert hand.read(line, names.COMMIT)["committed"]["xid"] == hand.read(line, names.intent(1))["xid"]
    elif point in ("guarded.intent.put", "guarded.deleted"):
        assert (found, left(hand), hand.states(line)) == ("ABANDON", ROWS, ["abandoned", "intent_1"])
    else:
        assert (found, left(hand), hand.states(line)) == ("WAIT", ROWS, [])
        assert hand.delete([line]).rc == 0
        assert left(hand) == ROWS - 100


def test_a_killed_delete_of_a_subset_is_recorded_with_what_it_left_out(hand: ByHand) -> None:
    line = hand.export("--limit", "100")[0]
    hand.db.execute("DELETE FROM audit_logs WHERE id IN (3, 77)")
    child = spawn("aa-delete", ["--allow-subset"], env={**hand.env, "AA_TEST_POINT": "guarded.committed"}, stdin=-1)
    child.stdin.write(dump([line]))
    child.stdin.close()
    child.stdin = None
    kill(stopped_at("guarded.committed", child.token, ended=child.poll))
    finish(child)
    until(lambda: hand.recover("--dry-run").rc != exits.LOCKED, "the server has ended the killed command's sessions")
    assert verdicts(hand)["001"][0] == "RECORD"
    assert hand.read(line, names.COMMIT)["deleted"]["left_out"] == [2, 76]


# -- uploads that were cut, tables that are gone, objects that are missing


@pytest.mark.req("T37", "T38")
@pytest.mark.parametrize("wiped", [False, True])
@pytest.mark.parametrize("point", ["upload.start.put", "upload.data.before", "upload.data.put", "upload.metadata.put"])
def test_an_upload_cut_in_the_middle_is_abandoned_or_leaves_nothing(hand: ByHand, point: str, wiped: bool) -> None:
    with Holder(hand.path) as holder:
        staged = holder.stage("aa-serialize", holder.select(plan(hand.settings, "audit_logs", cutoff=CUTOFF, limit=100)).out)
        child = spawn("aa-upload", env={**holder.env, "AA_TEST_POINT": point}, stdin=-1)
        child.stdin.write(staged.out)
        child.stdin.close()
        child.stdin = None
        kill(stopped_at(point, child.token, ended=child.poll))
        finish(child)
    line = staged.lines[0]
    if wiped:
        shutil.rmtree(hand.staging)

    found = verdicts(hand)

    assert left(hand) == ROWS
    if point in ("upload.start.put", "upload.data.before"):
        assert found == {}
    else:
        assert found["001"][0] == ("ABANDON" if hand.has(line, names.METADATA) or not wiped else "WAIT")
    assert hand.ended(line["batch"]["run"]) == ("WAIT" not in {verdict for verdict, _ in found.values()})
    assert list(hand.staging.rglob("*batch_001*")) == []


def test_a_table_that_is_gone_is_held_and_one_no_longer_configured_is_decided(hand: ByHand, bucket: Any, config_file: Any) -> None:
    line = interrupted(hand, commit=True)
    tables.create(hand.db.connection, "other", rows=10, first="2024-01-01", last="2024-03-01")
    elsewhere = ByHand(hand.db, config_file(hand.db, bucket, [{"name": "other", "timestamp_column": "created_at", "primary_key": "id"}]))
    hand.db.execute("ALTER TABLE audit_logs RENAME TO audit_logs_old")
    assert verdicts(elsewhere, code=exits.FAILED)["001"] == ("HOLD", "table 'public.audit_logs' does not exist")
    hand.db.execute("ALTER TABLE audit_logs_old RENAME TO audit_logs")
    assert verdicts(elsewhere)["001"][0] == "RECORD"
    assert hand.states(line) == ["commit"]


def test_a_column_added_after_the_crash_does_not_make_equal_rows_different(hand: ByHand) -> None:
    interrupted(hand, commit=False)
    hand.db.execute("ALTER TABLE audit_logs ADD COLUMN verdict text DEFAULT 'guilty'")
    assert verdicts(hand) == {"001": ("ABANDON", "all its rows are in the table, unchanged")}


@pytest.mark.req("REQ-REL-006")
def test_a_batch_that_cannot_be_read_back_is_held_and_never_recorded(hand: ByHand, bucket: Any) -> None:
    line = interrupted(hand, commit=True)
    bucket.client.put_object(Bucket=bucket.name, Key=line["serialized"]["stem"] + names.DATA, Body=b"no gzip")
    found = verdicts(hand, code=exits.FAILED)
    assert found["001"][0] == "HOLD" and "cannot be recorded" in found["001"][1]
    assert hand.states(line) == []


def test_a_missing_key_list_is_made_up_for_by_the_keys_in_the_data(hand: ByHand, bucket: Any) -> None:
    """Absence in the bucket licenses nothing: the rows are gone, so this batch must not be given up."""
    line = interrupted(hand, commit=True)
    bucket.client.delete_object(Bucket=bucket.name, Key=line["serialized"]["stem"] + names.KEYS)
    found = verdicts(hand, code=exits.FAILED)
    assert found["001"][0] == "HOLD"
    assert hand.states(line) == []


# -- by hand: dry run, decisions, cleanup, locks


@pytest.mark.req("REQ-REL-006")
@pytest.mark.parametrize("commit", [True, False])
def test_metadata_alone_are_a_cut_upload_only_while_the_rows_are_in_the_table(hand: ByHand, bucket: Any, commit: bool) -> None:
    line = interrupted(hand, commit=commit)
    for suffix in (names.KEYS, names.DATA):
        bucket.client.delete_object(Bucket=bucket.name, Key=line["serialized"]["stem"] + suffix)

    found = verdicts(hand, code=exits.FAILED if commit else exits.OK)

    assert found["001"] == (("HOLD", "its key list and its data are missing, and its rows are not in the table") if commit else
                            ("ABANDON", "its upload was cut off before the key list, so no delete of it was ever begun"))
    assert hand.states(line) == ([] if commit else ["abandoned"])


@pytest.mark.req("T46")
def test_a_dry_run_says_what_would_be_done_and_changes_nothing(hand: ByHand, bucket: Any) -> None:
    interrupted(hand, commit=True)
    hand.db.admin(f"ALTER ROLE {ARCHIVER} SET default_transaction_read_only = on")
    try:
        before = bucket.keys()
        staged = sorted(hand.staging.rglob("*"))
        result = hand.recover("--dry-run", "--cleanup")
        assert result.rc == 0, result.err
        assert [each["verdict"] for each in result.lines[0]["databases"][0]["verdicts"]] == ["RECORD"]
        assert (bucket.keys(), sorted(hand.staging.rglob("*"))) == (before, staged)
    finally:
        hand.db.admin(f"ALTER ROLE {ARCHIVER} RESET default_transaction_read_only")
    assert verdicts(hand)["001"][0] == "RECORD"


@pytest.mark.parametrize("wish", ["record", "abandon"])
def test_a_person_settles_a_held_batch(hand: ByHand, wish: str) -> None:
    """Recorded: what is gone is archived, what is there stays there, each row in one place."""
    line = interrupted(hand, commit=False)
    hand.db.execute("DELETE FROM audit_logs WHERE id IN (4, 5)")
    assert verdicts(hand, code=exits.FAILED)["001"][0] == "HOLD"
    name = line["serialized"]["stem"].rpartition("/")[2]

    found = verdicts(hand, "--decide", f"{name}={wish}")

    assert found["001"][0] == wish.upper()
    assert hand.ended(line["batch"]["run"])
    if wish == "record":
        deleted = hand.read(line, names.COMMIT)["deleted"]
        assert (deleted["verdict"], deleted["rows"]) == ("SUBSET", 2)
        assert sorted(set(range(100)) - set(deleted["left_out"])) == [3, 4]
    else:
        assert hand.states(line) == ["abandoned"]
        removed = hand.recover("--cleanup").lines[0]["databases"][0]
        assert (removed["removed"], removed["kept"]) == ([], [line["serialized"]["stem"]])


@pytest.mark.req("REQ-REL-006")
def test_a_subset_may_be_deleted_only_where_the_batch_itself_took_nothing(hand: ByHand) -> None:
    """Rows that its own transaction deleted would be noted as gone before, and no restore would bring them back."""
    hand.db.execute("CREATE TABLE kept AS SELECT * FROM audit_logs WHERE id = 4")
    line = interrupted(hand, commit=True)
    hand.db.execute("INSERT INTO audit_logs SELECT * FROM kept")
    verdict = hand.recover().lines[0]["databases"][0]["verdicts"][0]
    assert verdict["verdict"] == "HOLD"
    verified = hand.run("aa-verify", [verdict["line"]])
    refused = hand.run("aa-delete", ["--allow-subset"], verified.out)
    assert refused.rc == exits.CONFIG and "is held back" in refused.err
    assert left(hand) == ROWS - 99
    assert verdicts(hand, "--decide", f"{verdict['batch']}=record")["001"][0] == "RECORD"
    assert hand.read(line, names.COMMIT)["deleted"]["left_out"] == [3]


def test_what_is_left_of_a_held_batch_can_be_deleted_as_the_page_says(hand: ByHand) -> None:
    line = interrupted(hand, commit=False)
    hand.db.execute("DELETE FROM audit_logs WHERE id = 4")
    verdict = hand.recover().lines[0]["databases"][0]["verdicts"][0]
    verified = hand.run("aa-verify", [verdict["line"]])
    deleted = hand.run("aa-delete", ["--allow-subset"], verified.out)
    assert deleted.rc == 0, deleted.err
    hand.record(deleted.lines)
    assert (left(hand), hand.read(line, names.COMMIT)["deleted"]["left_out"]) == (ROWS - 100, [3])
    assert verdicts(hand) == {}
    assert list(hand.staging.rglob("*batch_001*")) == []


def test_a_batch_of_a_table_that_is_gone_for_good_is_recorded_if_a_person_says_so(hand: ByHand) -> None:
    line = interrupted(hand, commit=True)
    hand.db.execute("DROP TABLE audit_logs")
    assert verdicts(hand, code=exits.FAILED)["001"][0] == "HOLD"
    name = line["serialized"]["stem"].rpartition("/")[2]
    assert verdicts(hand, "--decide", f"{name}=record")["001"][0] == "RECORD"
    assert hand.read(line, names.COMMIT)["committed"]["sample_absent"] is None


def test_a_decision_about_an_unknown_batch_is_an_error(hand: ByHand) -> None:
    result = hand.recover("--decide", "audit_logs_20240101T000000Z_batch_001=record")
    assert result.rc == exits.CONFIG and "no undecided batch" in result.err
    assert hand.recover("--decide", "nonsense").rc == exits.CONFIG


def test_cleanup_removes_what_was_abandoned_an_hour_ago_and_keeps_the_evidence(hand: ByHand, bucket: Any) -> None:
    line = interrupted(hand, commit=False)
    stem = line["serialized"]["stem"]
    assert hand.recover("--cleanup").lines[0]["databases"][0]["removed"] == []
    said = hand.read(line, names.ABANDONED)
    bucket.client.put_object(Bucket=bucket.name, Key=stem + names.ABANDONED,
                             Body=json.dumps({**said, "at": "2025-01-01T00:00:00Z"}).encode())
    assert len(hand.recover("--cleanup", "--dry-run").lines[0]["databases"][0]["removed"]) == 3
    assert hand.has(line, names.DATA)

    removed = hand.recover("--cleanup").lines[0]["databases"][0]["removed"]

    assert removed == [stem + suffix for suffix in (names.DATA, names.METADATA, names.KEYS)]
    assert [key for key in bucket.keys() if key.startswith(stem)] == [stem + names.ABANDONED]


@pytest.mark.req("T54")
def test_cleanup_leaves_undecided_and_recorded_batches_and_look_alike_tables(hand: ByHand, bucket: Any, config_file: Any) -> None:
    recorded = interrupted(hand, commit=True)
    assert verdicts(hand)["001"][0] == "RECORD"
    now = hand.db.scalar("SELECT date_trunc('second', clock_timestamp())")
    until(lambda: hand.db.scalar("SELECT date_trunc('second', clock_timestamp())") > now, "the second, which names bear, is over")
    undecided = hand.export("--limit", "50")[0]
    before = bucket.keys()
    assert hand.recover("--cleanup").lines[0]["databases"][0]["removed"] == []
    assert bucket.keys() == before
    assert hand.has(recorded, names.DATA) and hand.has(undecided, names.DATA)


@pytest.mark.req("REQ-LOCK-011")
@pytest.mark.parametrize("argv", [[], ["--dry-run"]])
def test_recovery_beside_a_living_run_exits_4_and_names_it(hand: ByHand, argv: list[str]) -> None:
    with Holder(hand.path) as holder:
        line = interrupted(hand, commit=False, holder=holder)
        result = hand.recover(*argv)
        assert (result.rc, result.out) == (exits.LOCKED, b"")
        assert "audit-archiver control" in result.err and "backend" in result.err
        assert hand.states(line) == []


def test_a_transaction_in_progress_stops_recovery_and_is_named(hand: ByHand) -> None:
    """Cannot be ours, as K2 has proven; after a crash it can be somebody else's under our id. Either way: hands off."""
    line = hand.export("--limit", "100")[0]
    stranger = hand.db.connect(application_name="the stranger")
    with stranger.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT txid_current()::text")
        xid = cursor.fetchone()[0]
        intent = {"format": "aa-intent", "version": 1, "id": line["batch"]["id"], "n": 1, "at": "2025-01-01T00:00:00Z", "xid": xid,
                  "server": line["batch"]["server"], "rows": 100, "verdict": "FULL", "keys_sha256": line["batch"]["keys_sha256"]}
        hand.store.put_new(line["serialized"]["stem"] + names.intent(1), json.dumps(intent).encode())
        result = hand.recover()
        assert result.rc == exits.LOCKED and "the stranger" in result.err
        assert "abandoned" not in hand.states(line)
        cursor.execute("ROLLBACK")
    stranger.close()
    assert verdicts(hand)["001"][0] == "ABANDON"


def test_quiet_says_nothing_when_all_is_well_and_text_says_it_in_words(hand: ByHand) -> None:
    interrupted(hand, commit=True)
    text = hand.run("aa-recover", ["--output", "text"])
    assert text.rc == 0 and b"recorded" in text.out and b"batch_001" in text.out
    quiet = hand.run("aa-recover", ["--quiet"])
    assert quiet == (0, b"", "")


def _restore(cluster: Cluster) -> None:
    """Put the copy of the data directory in place of the present one."""
    cluster.down()
    shutil.rmtree(cluster.data)
    shutil.move(str(cluster.base / "backup"), str(cluster.data))
    who = account()
    if who is not None:
        for path in (cluster.data, *cluster.data.rglob("*")):
            os.chown(path, who.pw_uid, who.pw_gid)
    cluster.up()


def _crash(cluster: Cluster) -> None:
    """Everything of the server dies at once, as with the machine: a backend that notices would still write."""
    postmaster = cluster.pid
    assert postmaster is not None
    os.kill(postmaster, signal.SIGSTOP)
    children = [pid for pid in processes.pids() if _parent(pid) == postmaster]
    for pid in (*children, postmaster):
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(map(processes.alive, (*children, postmaster))), "every process of the server is dead")
    cluster.down()


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return int(stat.read().rpartition(")")[2].split()[1])
    except OSError:
        return -1
