"""aa-delete without a holder: locks, compares every row, deletes only what is still as it was archived."""

from __future__ import annotations

import json
from typing import Any

import pytest

from audit_archiver import exits
from audit_archiver.catalogue import guard, rollbacks
from audit_archiver.catalogue.rollbacks import Open
from audit_archiver.formats import names
from audit_archiver.postgres import connect, locks
from audit_archiver.restore import account
from tests.ground import tables
from tests.ground.by_hand import ByHand, verified_ago
from tests.ground.wait import until

ROWS = 250


@pytest.fixture()
def hand(db: Any, bucket: Any, config_file: Any) -> ByHand:
    tables.create(db.connection, rows=ROWS, first="2024-01-01", last="2024-03-01")
    return ByHand(db, config_file(db, bucket, database={"lock_timeout": 1}))


def left(hand: ByHand, table: str = "audit_logs") -> int:
    return int(hand.db.scalar(f"SELECT count(*) FROM {table}"))


def refused(hand: ByHand, lines: list[dict[str, Any]], *argv: str, rows: int = ROWS, code: int = exits.FAILED) -> str:
    """aa-delete must refuse the first line, delete nothing and leave no intent; what it says."""
    result = hand.delete(lines, *argv)
    assert (result.rc, result.out) == (code, b""), result.err
    assert left(hand) == rows
    assert "intent_1" not in hand.states(lines[0])
    assert not hand.db.admin("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND database = "
                             "(SELECT oid FROM pg_database WHERE datname = %s)", (hand.db.name,))
    return str(next(record for record in result.log if record["level"] == "ERROR"))


@pytest.mark.req("T44", "REQ-INT-001", "REQ-VER-012", "REQ-VER-017", "REQ-VER-020")
def test_an_unchanged_batch_is_deleted_committed_and_recorded(hand: ByHand) -> None:
    before = tables.digest(hand.db.connection, "audit_logs")
    lines = hand.export()
    assert [line["batch"]["rows"] for line in lines] == [100, 100, 50]
    assert all(line["batch"]["txn"] is None for line in lines)

    result = hand.delete(lines)

    assert result.rc == 0, result.err
    assert left(hand) == 0
    for line in result.lines:
        assert line["deleted"] == {"at": line["deleted"]["at"], "verdict": "FULL", "rows": line["batch"]["rows"]}
        assert (line["committed"]["by"], line["committed"]["sample_absent"]) == ("aa-delete", True)
        assert hand.db.scalar("SELECT txid_status(%s::bigint)", (line["committed"]["xid"],)) == "committed"
        intent = hand.read(line, names.intent(1))
        assert (intent["xid"], intent["verdict"], intent["keys_sha256"]) == (
            line["committed"]["xid"], "FULL", line["batch"]["keys_sha256"])
        assert hand.states(line) == ["intent_1"]  # not recorded yet: that is aa-record's
    hand.record(result.lines)
    assert hand.states(lines[2]) == ["commit", "intent_1"]
    assert sum(line["batch"]["rows"] for line in result.lines) == before.rows


@pytest.mark.req("REQ-DR-013")
def test_a_table_whose_rollback_is_not_over_is_left_alone_until_it_is(hand: ByHand) -> None:
    lines = hand.export()
    begun = Open("20251230T090000Z-1", "public", "audit_logs", (lines[0]["serialized"]["stem"],))
    rollbacks.start(hand.store, begun, hand.db.name, account.by())
    said = refused(hand, lines, code=exits.CONFIG)
    assert "is held back: rollback 20251230T090000Z-1 was interrupted" in said and "aa-rollback --table public.audit_logs" in said
    rollbacks.end(hand.store, begun, hand.db.name, account.by())
    assert (hand.delete(lines).rc, left(hand)) == (0, 0)


@pytest.mark.req("T28", "REQ-INT-002")
def test_a_row_updated_since_it_was_selected_keeps_its_whole_batch_in_the_table(hand: ByHand) -> None:
    lines = hand.export("--limit", "100")
    changed = lines[0]["batch"]["last"][1]
    hand.db.execute("UPDATE audit_logs SET action = 'corrected' WHERE id = %s", (changed,))

    said = refused(hand, lines)

    assert "DIVERGED" in said and "1 of the 100 rows" in said
    assert hand.db.scalar("SELECT action FROM audit_logs WHERE id = %s", (changed,)) == "corrected"
    explained = hand.delete(lines, "--explain")
    assert (explained.rc, explained.lines) == (0, [{"key": [changed], "now": "changed"}])


@pytest.mark.req("T28")
def test_an_update_that_comes_while_the_rows_are_being_locked_is_waited_for_and_seen(hand: ByHand) -> None:
    """GIVEN somebody's uncommitted update WHEN aa-delete wants that row THEN it gives up after lock_timeout."""
    lines = hand.export("--limit", "100")
    other = hand.db.connect()
    with other.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("UPDATE audit_logs SET action = 'corrected' WHERE id = 50")
        said = refused(hand, lines)
        assert "55P03" in said
        cursor.execute("COMMIT")
    other.close()
    assert "DIVERGED" in refused(hand, lines)


@pytest.mark.req("T29", "T13")
def test_a_row_inserted_late_into_the_window_survives(hand: ByHand) -> None:
    lines = hand.export()
    hand.db.execute("INSERT INTO audit_logs (id, created_at, action) SELECT 900000, created_at, 'late' FROM audit_logs WHERE id = 20")

    result = hand.delete(lines)

    assert result.rc == 0, result.err
    assert hand.db.execute("SELECT id FROM audit_logs") == [(900000,)]


@pytest.mark.req("T30", "REQ-VER-003")
def test_a_trigger_that_suppresses_one_delete_rolls_the_batch_back(hand: ByHand) -> None:
    hand.db.execute("CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS "
                    "$$BEGIN IF old.id = 42 THEN RETURN NULL; END IF; RETURN old; END$$")
    hand.db.execute("CREATE TRIGGER keep BEFORE DELETE ON audit_logs FOR EACH ROW EXECUTE PROCEDURE public.keep()")
    lines = hand.export("--limit", "100")

    result = hand.delete(lines)

    assert result.rc == exits.FAILED
    assert "removed 99 rows" in result.err and "100 were verified" in result.err
    assert left(hand) == ROWS


@pytest.mark.req("T30")
def test_a_trigger_that_puts_deleted_rows_back_rolls_the_batch_back(hand: ByHand) -> None:
    hand.db.execute("CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS "
                    "$$BEGIN INSERT INTO public.audit_logs SELECT old.*; RETURN NULL; END$$")
    hand.db.execute("CREATE TRIGGER again AFTER DELETE ON audit_logs FOR EACH ROW WHEN (old.id < 4) EXECUTE PROCEDURE public.again()")
    lines = hand.export("--limit", "100")
    result = hand.delete(lines)
    assert result.rc == exits.FAILED
    assert "3 deleted rows" in result.err
    assert left(hand) == ROWS


@pytest.mark.req("T30", "REQ-TXN-010")
def test_a_deferred_constraint_fails_in_the_delete_and_not_after_it(hand: ByHand) -> None:
    hand.db.execute("CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'not today'; END$$")
    hand.db.execute("CREATE CONSTRAINT TRIGGER refuse AFTER DELETE ON audit_logs DEFERRABLE INITIALLY DEFERRED "
                    "FOR EACH ROW EXECUTE PROCEDURE public.refuse()")
    lines = hand.export("--limit", "100")
    result = hand.delete(lines)
    assert result.rc == exits.FAILED
    assert left(hand) == ROWS


def test_when_rows_are_gone_the_rest_stays_unless_the_subset_is_allowed(hand: ByHand) -> None:
    lines = hand.export("--limit", "100")
    hand.db.execute("DELETE FROM audit_logs WHERE id IN (3, 77)")

    assert "SUBSET" in refused(hand, lines, rows=ROWS - 2)
    explained = hand.delete(lines, "--explain")
    assert explained.lines == [{"key": [3], "now": "absent"}, {"key": [77], "now": "absent"}]
    assert left(hand) == ROWS - 2
    result = hand.delete(lines, "--allow-subset")

    assert result.rc == 0, result.err
    assert left(hand) == ROWS - 100
    line = result.lines[0]
    assert line["deleted"] == {"at": line["deleted"]["at"], "verdict": "SUBSET", "rows": 98, "left_out": [2, 76]}
    assert hand.read(line, names.intent(1))["left_out"] == [2, 76]
    hand.record(result.lines)
    assert hand.read(line, names.COMMIT)["deleted"]["left_out"] == [2, 76]


def test_a_changed_row_forbids_the_subset_too(hand: ByHand) -> None:
    lines = hand.export("--limit", "100")
    hand.db.execute("DELETE FROM audit_logs WHERE id = 3")
    hand.db.execute("UPDATE audit_logs SET action = 'corrected' WHERE id = 4")
    assert "DIVERGED" in refused(hand, lines, "--allow-subset", rows=ROWS - 1)


def test_when_all_rows_are_gone_and_nothing_is_recorded_that_is_an_error(hand: ByHand) -> None:
    lines = hand.export("--limit", "100")
    hand.db.execute("DELETE FROM audit_logs WHERE id <= 100")
    assert "ABSENT" in refused(hand, lines, "--allow-subset", rows=ROWS - 100)


@pytest.mark.req("REQ-IDEM-005", "REQ-IDEM-006")
def test_a_batch_that_is_recorded_is_passed_over_and_not_deleted_twice(hand: ByHand) -> None:
    lines = hand.export()
    hand.record(hand.delete(lines).lines)
    again = hand.delete(lines)
    assert (again.rc, again.out) == (0, b""), again.err
    assert sum("nothing to do" in record["msg"] for record in again.log) == len(lines)


@pytest.mark.req("T12")
def test_a_restored_row_of_a_recorded_batch_is_not_deleted_again(hand: ByHand) -> None:
    hand.db.execute("CREATE TABLE kept AS SELECT * FROM audit_logs WHERE id = 7")
    lines = hand.export("--limit", "100")
    hand.record(hand.delete(lines).lines)
    hand.db.execute("INSERT INTO audit_logs SELECT * FROM kept")
    again = hand.delete(lines)
    assert (again.rc, again.out) == (exits.FAILED, b"")
    assert "archived already, yet 1 of its rows" in again.err
    assert left(hand) == ROWS - 99


@pytest.mark.req("REQ-S3-024")
@pytest.mark.parametrize(("hours", "word"), [(1.1, "more than an hour ago"), (-2, "has not reached")])
def test_an_old_or_impossible_verification_is_refused(hand: ByHand, hours: float, word: str) -> None:
    lines = [verified_ago(line, hours) for line in hand.export("--limit", "100")]
    assert word in refused(hand, lines)
    fresh = hand.must("aa-verify", stdin=json.dumps(lines[0]).encode() + b"\n").lines
    assert hand.delete(fresh).rc == 0


@pytest.mark.req("T20", "T23")
@pytest.mark.parametrize("suffix", [names.DATA, names.METADATA, names.KEYS])
@pytest.mark.parametrize("how", ["gone", "replaced"])
def test_an_object_that_is_no_longer_the_verified_one_forbids_the_delete(hand: ByHand, bucket: Any, suffix: str, how: str) -> None:
    """C9: the mark is an hour good, but the bucket is looked at again."""
    lines = hand.export("--limit", "100")
    key = lines[0]["serialized"]["stem"] + suffix
    bucket.client.delete_object(Bucket=bucket.name, Key=key)
    if how == "replaced":
        bucket.client.put_object(Bucket=bucket.name, Key=key, Body=b"{}")
    assert key in refused(hand, lines)


@pytest.mark.req("T40")
def test_staging_is_not_asked_for_the_keys(hand: ByHand) -> None:
    """GIVEN a staged key list that names other rows WHEN aa-delete runs THEN the bucket's list counts."""
    lines = hand.export("--limit", "100")
    staged = hand.staging.glob(f"*/*/*/*{names.KEYS}")
    for path in staged:
        path.write_text("[]")
    assert hand.delete(lines).rc == 0
    assert left(hand) == ROWS - 100


def test_a_batch_of_another_bucket_or_prefix_is_refused(hand: ByHand) -> None:
    lines = hand.export("--limit", "100")
    elsewhere = {**lines[0], "uploaded": {**lines[0]["uploaded"], "bucket": "another"}}
    assert "another" in refused(hand, [elsewhere], code=exits.CONFIG)


def test_a_batch_that_recovery_abandoned_is_refused(hand: ByHand, bucket: Any) -> None:
    lines = hand.export("--limit", "100")
    bucket.client.put_object(Bucket=bucket.name, Key=lines[0]["serialized"]["stem"] + names.ABANDONED, Body=b"{}")
    assert "abandoned" in refused(hand, lines)


def test_a_batch_of_a_run_that_has_ended_is_refused_since_recovery_would_not_find_it(hand: ByHand, bucket: Any) -> None:
    lines = hand.export("--limit", "100")
    run = lines[0]["batch"]["run"]
    end = {"format": "aa-run", "version": 1, "run": run, "database": hand.db.name, "event": "end", "at": "2025-01-01T00:00:00Z",
           "by": "test", "archiver_version": "0"}
    bucket.client.put_object(Bucket=bucket.name, Key=names.run_end_key("archives/", hand.db.name, run), Body=json.dumps(end).encode())
    assert "has ended" in refused(hand, lines)
    sent = hand.run("aa-upload", stdin=json.dumps({k: lines[0][k] for k in ("format", "version", "batch", "serialized")}).encode() + b"\n")
    assert sent.rc == exits.CONFIG and "has ended" in sent.err


@pytest.mark.req("T31")
@pytest.mark.parametrize("change", [
    "ALTER TABLE audit_logs ADD COLUMN verdict text DEFAULT 'guilty'", "ALTER TABLE audit_logs DROP COLUMN payload",
    "CREATE RULE r AS ON DELETE TO audit_logs DO ALSO NOTIFY gone", "CREATE TABLE child (log bigint REFERENCES audit_logs ON DELETE CASCADE)"])
def test_a_table_altered_since_the_batch_was_selected_is_refused(hand: ByHand, change: str) -> None:
    """C7: what was added is in no archive; what was hung on it would go with the rows."""
    lines = hand.export("--limit", "100")
    hand.db.execute(change)
    result = hand.delete(lines)
    assert result.rc in (exits.FAILED, exits.CONFIG) and result.out == b""
    assert left(hand) == ROWS


def test_the_same_rows_in_a_table_made_anew_are_not_deleted(hand: ByHand) -> None:
    lines = hand.export("--limit", "100")
    hand.db.execute("CREATE TABLE copy (LIKE audit_logs INCLUDING ALL)")
    hand.db.execute("INSERT INTO copy SELECT * FROM audit_logs")
    hand.db.execute("DROP TABLE audit_logs")
    hand.db.execute("ALTER TABLE copy RENAME TO audit_logs")
    assert "not the one that the batch was selected from" in refused(hand, lines)


@pytest.mark.req("T32")
def test_children_that_a_cascade_would_destroy_forbid_the_delete(hand: ByHand) -> None:
    hand.db.execute("CREATE TABLE notes (log bigint REFERENCES audit_logs ON DELETE CASCADE)")
    lines = hand.export("--limit", "100")
    hand.db.execute("INSERT INTO notes VALUES (5)")
    assert "public.notes" in refused(hand, lines)
    assert left(hand, "notes") == 1


@pytest.mark.req("T34", "REQ-LOCK-011", "REQ-REL-005")
def test_a_driver_at_work_is_named_and_nothing_waits_for_ever(hand: ByHand) -> None:
    """GIVEN a driver that holds K1 WHEN aa-delete comes beside it THEN it exits 4 at once and says who and since when."""
    lines = hand.export("--limit", "100")
    driver = connect.connect(hand.settings.databases[0], purpose="control", run="20251230T021545Z-4711")
    backend = driver.info.backend_pid
    try:
        locks.take(driver, None, "the database")
        result = hand.delete(lines)
    finally:
        driver.close()
    assert (result.rc, result.out) == (exits.LOCKED, b"")
    assert f"backend {backend} " in result.err
    assert "audit-archiver control 20251230T021545Z-4711" in result.err and "since 20" in result.err
    assert left(hand) == ROWS
    assert hand.delete(lines).rc == 0


@pytest.mark.req("T34")
def test_a_transaction_of_a_dead_driver_keeps_the_guarded_delete_out_until_it_ends(hand: ByHand) -> None:
    """K2: the driver is gone, its batch's backend is not."""
    lines = hand.export("--limit", "100")
    orphan = connect.connect(hand.settings.databases[0], purpose="batch", run="20251230T021545Z-4711")
    connect.execute(orphan, "BEGIN")
    locks.enter(orphan, None, "the database")
    result = hand.delete(lines)
    assert result.rc == exits.LOCKED and f"backend {orphan.info.backend_pid}" in result.err
    orphan.close()
    assert hand.delete(lines).rc == 0


def test_explain_takes_no_lock_deletes_nothing_and_passes_keys_on_unrounded(db: Any, bucket: Any, config_file: Any) -> None:
    big = 9007199254740993
    tables.create(db.connection, rows=10, first="2024-01-01", last="2024-03-01", start=big)
    hand = ByHand(db, config_file(db, bucket))
    lines = hand.export()
    db.execute("UPDATE audit_logs SET action = 'corrected' WHERE id = %s", (big + 4,))
    blocker = db.connect()
    with blocker.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT 1 FROM audit_logs FOR UPDATE")
        explained = hand.run("aa-delete", ["--explain"], json.dumps(lines[0]).encode() + b"\n")
    blocker.close()
    assert explained.rc == 0, explained.err
    assert explained.out == b'{"key":[%d],"now":"changed"}\n' % (big + 4)
    assert left(hand) == 10


def test_explain_reads_a_line_that_was_never_verified(hand: ByHand) -> None:
    """At HOLD the line may be all that is left."""
    lines = hand.export("--limit", "100", upto="aa-upload")
    hand.db.execute("DELETE FROM audit_logs WHERE id = 9")
    bare = {key: lines[0][key] for key in ("format", "version", "batch", "serialized")}
    assert hand.delete([bare], "--explain").lines == [{"key": [9], "now": "absent"}]


def test_keys_in_parts_composite_keys_and_a_key_column_called_n(db: Any, bucket: Any, config_file: Any) -> None:
    """More keys than are looked up at once; names that collide with those of our own SQL."""
    db.execute('CREATE TABLE "Odd" (n int, "K k" text COLLATE "C", t timestamp NOT NULL, v numeric, PRIMARY KEY ("K k", n))')
    db.execute('''INSERT INTO "Odd" SELECT i, 'k"''\\' || i % 7, '2024-01-01'::timestamp + i * interval '1 second', i / 7.0
                  FROM generate_series(1, 4500) i''')
    path = config_file(db, bucket, [{"name": "Odd", "timestamp_column": "t", "primary_key": ["K k", "n"]}], defaults={"batch_size": 4500})
    hand = ByHand(db, path)
    lines = hand.export()
    assert [line["batch"]["rows"] for line in lines] == [4500]
    db.execute('DELETE FROM "Odd" WHERE n IN (2000, 2001, 4500)')

    result = hand.delete(lines, "--allow-subset")

    assert result.rc == 0, result.err
    assert result.lines[0]["deleted"]["left_out"] == [1999, 2000, 4499]
    assert left(hand, '"Odd"') == 0


def test_with_a_lock_per_table_another_tables_run_is_no_obstacle(db: Any, bucket: Any, config_file: Any) -> None:
    tables.create(db.connection, rows=20, first="2024-01-01", last="2024-03-01")
    tables.create(db.connection, "other", rows=20, first="2024-01-01", last="2024-03-01")
    both = [{"name": name, "timestamp_column": "created_at", "primary_key": "id"} for name in ("audit_logs", "other")]
    hand = ByHand(db, config_file(db, bucket, both, locking={"scope": "table"}))
    lines = hand.export()
    driver = connect.connect(hand.settings.databases[0], purpose="control")
    try:
        locks.take(driver, [db.scalar("SELECT 'other'::regclass::oid::bigint")], "the database")
        result = hand.delete(lines)
    finally:
        driver.close()
    assert result.rc == exits.LOCKED
    assert [line["batch"]["table"] for line in result.lines] == ["audit_logs"]
    assert (left(hand), left(hand, "other")) == (0, 20)


def test_a_lock_that_was_lost_while_the_rows_were_compared_forbids_the_delete(hand: ByHand, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = hand.export("--limit", "100")

    def ended(name: str) -> None:
        if name == "guarded.compared":
            found = hand.db.admin("SELECT count(pg_terminate_backend(pid)) FROM pg_locks WHERE locktype = 'advisory' AND classid = %s "
                                  "AND mode = 'ExclusiveLock'", (locks.K1_CLASS,))
            assert found == [(1,)]
            until(lambda: not hand.db.admin("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND classid = %s", (locks.K1_CLASS,)), "it is gone")

    monkeypatch.setattr(guard, "point", ended)
    result = hand.delete(lines)
    assert (result.rc, result.out) == (exits.LOCKED, b"") and "no longer holds the lock" in result.err
    assert (left(hand), hand.states(lines[0])) == (ROWS, [])
