"""Tables that fight back: triggers, rules, foreign keys, row-level security, and changes while a batch is open."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any, Callable

import pytest

from audit_archiver.exits import ArchiverError, ConfigError, PermissionDenied
from audit_archiver.postgres import catalog, connect
from tests.ground.held import WHOLE, Holder, NoServer, backends, plan

LOGS = {"name": "logs", "timestamp_column": "created_at", "primary_key": "id"}


@pytest.fixture()
def path(db, config_file) -> Path:
    """A configuration for the table logs: 20 rows, 10 of them before 2025."""
    db.execute("CREATE TABLE logs (id bigint PRIMARY KEY, created_at timestamptz NOT NULL, note text)")
    db.execute("INSERT INTO logs SELECT i, '2024-12-22Z'::timestamptz + i * interval '1 day', 'n' || i FROM generate_series(0, 19) i")
    return config_file(db, NoServer, [LOGS])


def everything(db) -> list[tuple[Any, ...]]:
    return db.execute("SELECT * FROM logs ORDER BY id")


def refused(holder: Holder, db, *jobs: Any, words: str, rc: int = 2) -> None:
    """The delete must fail with these words, the run with it, and the table must be as before."""
    before = everything(db)
    result = holder.delete(holder.verified(*(jobs or (plan(holder.settings, "logs"),))))
    assert result.rc == rc and words in result.err, result.err
    assert result.out == b"" and holder.operations.failure is not None and holder.operations.open_batches() == []
    assert everything(db) == before


def trigger(db, when: str, body: str, name: str = "meddle") -> None:
    db.execute(f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$")
    db.execute(f"CREATE TRIGGER {name} {when} EXECUTE FUNCTION {name}()")


# -- triggers and rules (T30, S4)

@pytest.mark.req("T30", "REQ-VER-005")
def test_a_trigger_that_suppresses_deletes_rolls_everything_back(holding, db):
    trigger(db, "BEFORE DELETE ON logs FOR EACH ROW", "IF OLD.id = 3 THEN RETURN NULL; END IF; RETURN OLD;")
    refused(holding(), db, words="the delete removed 9 rows of 'public.logs' where 10 were verified")


@pytest.mark.req("T30")
def test_a_trigger_that_puts_rows_back_rolls_everything_back(holding, db):
    trigger(db, "AFTER DELETE ON logs FOR EACH ROW", "INSERT INTO public.logs VALUES (OLD.*); RETURN NULL;")
    refused(holding(), db, words="10 deleted rows of 'public.logs' are there again after the delete")


def test_a_deferred_trigger_that_puts_rows_back_rolls_everything_back(holding, db):
    db.execute("CREATE FUNCTION back() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.logs VALUES (OLD.*); RETURN NULL; END $$")
    db.execute("CREATE CONSTRAINT TRIGGER back AFTER DELETE ON logs DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION back()")
    refused(holding(), db, words="are there again after the delete")


def test_a_statement_trigger_that_puts_rows_back_rolls_everything_back(holding, db):
    db.execute("CREATE FUNCTION back() RETURNS trigger LANGUAGE plpgsql AS $$ "
               "BEGIN INSERT INTO public.logs SELECT * FROM gone LIMIT 1; RETURN NULL; END $$")
    db.execute("CREATE TRIGGER back AFTER DELETE ON logs REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE FUNCTION back()")
    refused(holding(), db, words="1 deleted rows of 'public.logs' are there again")


def test_a_trigger_that_updates_the_row_it_is_about_to_lose_rolls_everything_back(holding, db):
    trigger(db, "BEFORE DELETE ON logs FOR EACH ROW", "UPDATE public.logs SET note = 'seen' WHERE id = OLD.id; RETURN OLD;")
    before = everything(db)
    holder = holding()
    assert holder.delete(holder.verified(plan(holder.settings, "logs"))).rc == 2
    assert everything(db) == before


def test_a_trigger_that_fails_rolls_everything_back_and_its_text_stays_unsaid(holding, db):
    trigger(db, "BEFORE DELETE ON logs FOR EACH ROW", "RAISE EXCEPTION 'row % holds a secret', OLD.note;")
    before = everything(db)
    holder = holding()
    result = holder.delete(holder.verified(plan(holder.settings, "logs")))
    assert result.rc == 2 and "secret" not in result.err
    assert everything(db) == before


def test_a_trigger_that_only_writes_a_history_elsewhere_is_left_to_work(holding, db):
    db.execute("CREATE TABLE history (id bigint)")
    trigger(db, "AFTER DELETE ON logs FOR EACH ROW", "INSERT INTO public.history VALUES (OLD.id); RETURN NULL;")
    holder = holding()
    (line,) = holder.archive(plan(holder.settings, "logs"))
    assert line["deleted"]["rows"] == 10
    assert db.scalar("SELECT count(*) FROM history") == 10 and len(everything(db)) == 10


@pytest.mark.req("REQ-TXN-012", "REQ-TXN-013", "REQ-TXN-014", "REQ-TXN-015")
def test_a_delete_that_fails_is_undone_to_its_one_savepoint_and_the_rows_stay_locked(holding, db):
    db.execute("CREATE TABLE history (id bigint)")
    trigger(db, "BEFORE DELETE ON logs FOR EACH ROW",
            "INSERT INTO public.history VALUES (OLD.id); IF OLD.id = 3 THEN RETURN NULL; END IF; RETURN OLD;")
    holder = holding()
    begun = holder.copied(plan(holder.settings, "logs"))
    batch = holder.operations.batches[begun["handle"]]
    with pytest.raises(ArchiverError, match="the delete removed 9 rows"):
        batch.transaction.delete(10, batch.locked.keys_sha256)
    batch.transaction.check()
    assert connect.scalar(batch.transaction.connection, "SELECT count(*) FROM public.history") == 0
    assert connect.scalar(batch.transaction.connection, "SELECT count(*) FROM public.logs") == 20
    assert len(db.execute("SELECT id FROM logs FOR UPDATE SKIP LOCKED")) == 10, "locks set before the savepoint survive it"


@pytest.mark.req("T30")
def test_a_rule_on_delete_is_refused_before_anything_moves(holding, db):
    db.execute("CREATE RULE keep AS ON DELETE TO logs DO INSTEAD NOTHING")
    holder = holding()
    with pytest.raises(ConfigError, match="has the rule 'keep' on DELETE") as caught:
        plan(holder.settings, "logs")
    assert caught.value.code == 3


@pytest.mark.req("T30")
def test_a_rule_that_comes_after_the_plan_fails_the_job(holding, db):
    holder = holding()
    job = plan(holder.settings, "logs")
    db.execute("CREATE RULE keep AS ON DELETE TO logs DO INSTEAD NOTHING")
    assert holder.select(job).out == b""
    (note,) = holder.operations.notes.values()
    assert "has the rule 'keep'" in note.error.msg and len(everything(db)) == 20


# -- changes while a batch is open (C7)

@pytest.mark.req("REQ-INT-007", "REQ-INT-008")
def test_a_column_added_after_the_plan_is_noticed_before_anything_is_read(holding, db):
    holder = holding()
    job = plan(holder.settings, "logs")
    db.execute("ALTER TABLE logs ADD COLUMN verdict text DEFAULT 'guilty'")
    assert holder.select(job).out == b""
    (note,) = holder.operations.notes.values()
    assert "changed after it was planned" in note.error.msg and note.error.retry
    assert len(everything(db)) == 20


def test_a_column_added_between_begin_and_lock_is_noticed_at_the_lock(holding, db):
    holder = holding()
    client = holder.client()
    first = client.call("begin", job=plan(holder.settings, "logs", batch_size=5))
    db.execute("ALTER TABLE logs ADD COLUMN verdict text DEFAULT 'guilty'")
    with pytest.raises(ArchiverError, match="changed while its batch was open") as caught:
        client.call("lock", handle=first["handle"], cursor=None, limit=5)
    assert caught.value.retry and holder.operations.failure is None
    assert holder.operations.open_batches() == []


def test_alter_table_waits_while_the_rows_are_locked(holding, db):
    holder = holding()
    holder.copied(plan(holder.settings, "logs"))
    db.execute("SET lock_timeout = '100ms'")
    for statement in ("ALTER TABLE logs ADD COLUMN verdict text", "CREATE RULE keep AS ON DELETE TO logs DO INSTEAD NOTHING",
                      "CREATE POLICY mine ON logs", "DROP TABLE logs", "TRUNCATE logs"):
        with pytest.raises(Exception, match="lock timeout"):
            db.execute(statement)


@pytest.mark.parametrize("change", [
    "CREATE FUNCTION noop() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN OLD; END $$; "
    "CREATE TRIGGER noop BEFORE DELETE ON logs FOR EACH ROW EXECUTE FUNCTION noop()",
    "CREATE TABLE child (log bigint REFERENCES logs ON DELETE CASCADE)",
    "CREATE TABLE child (log bigint REFERENCES logs)",
])
def test_what_row_locks_do_not_keep_out_is_noticed_after_the_delete(holding, db, change):
    """CREATE TRIGGER and a new foreign key pass a FOR UPDATE; the shape is read again after the DELETE."""
    holder = holding()
    lines = holder.verified(plan(holder.settings, "logs"))
    db.execute(change)
    result = holder.delete(lines)
    assert result.rc == 2 and "changed while its batch was open" in result.err
    assert holder.operations.failure.retry
    assert len(everything(db)) == 20


# -- foreign keys

@pytest.fixture()
def with_children(holding, db) -> Callable[[str], None]:
    """Make a table whose rows 2 and 15 reference logs, with an action on delete."""
    def make(action: str) -> None:
        db.execute(f"CREATE TABLE child (id int PRIMARY KEY, log bigint DEFAULT 19 REFERENCES logs ON DELETE {action})")
        db.execute("INSERT INTO child VALUES (1, 2), (2, 15)")
    return make


@pytest.mark.req("T32")
@pytest.mark.parametrize("action", ["CASCADE", "SET NULL", "SET DEFAULT"])
def test_a_delete_that_would_reach_rows_of_a_child_table_is_refused_by_name(holding, with_children, db, action):
    with_children(action)
    holder = holding()
    assert holder.select(plan(holder.settings, "logs")).out == b""
    (note,) = holder.operations.notes.values()
    assert f"would reach 1 rows of 'public.child' through 'child_log_fkey' ({action})" in note.error.msg
    assert holder.operations.failure is None, "it fails alone"
    assert db.execute("SELECT * FROM child") == [(1, 2), (2, 15)] and len(everything(db)) == 20


@pytest.mark.req("T32")
def test_cascading_children_are_let_go_once_that_is_acknowledged(holding, with_children, db, config_file):
    with_children("CASCADE")
    holder = holding(config_file(db, NoServer, [{**LOGS, "cascade": "acknowledged"}]))
    holder.archive(plan(holder.settings, "logs"))
    assert db.execute("SELECT * FROM child") == [(2, 15)] and len(everything(db)) == 10


@pytest.mark.req("T32")
def test_a_cascading_child_without_rows_of_the_batch_keeps_nothing_back(holding, with_children, db):
    with_children("CASCADE")
    db.execute("DELETE FROM child WHERE id = 1")
    holder = holding()
    holder.archive(plan(holder.settings, "logs"))
    assert db.execute("SELECT * FROM child") == [(2, 15)] and len(everything(db)) == 10


@pytest.mark.req("T32", "REQ-LOCK-001")
def test_a_child_row_cannot_come_in_while_its_parent_is_locked(holding, with_children, db):
    """FOR UPDATE and not FOR NO KEY UPDATE: the weaker lock lets children in, and the cascade takes them."""
    with_children("CASCADE")
    db.execute("DELETE FROM child WHERE id = 1")
    holder = holding()
    lines = holder.verified(plan(holder.settings, "logs"))
    other = db.connect(options="-c lock_timeout=100ms")
    with pytest.raises(Exception, match="lock timeout"), other.cursor() as cursor:
        cursor.execute("INSERT INTO child VALUES (3, 4)")
    other.close()
    holder.commit(holder.delete(lines).lines[0])
    assert db.execute("SELECT * FROM child") == [(2, 15)]


def test_rows_that_are_still_referenced_stay_and_the_others_go(holding, with_children, db):
    with_children("NO ACTION")
    holder = holding()
    (line,) = holder.archive(plan(holder.settings, "logs"))
    assert line["deleted"]["rows"] == 9
    assert [row[0] for row in everything(db)] == [2, *range(10, 20)]


@pytest.mark.req("T34")
def test_a_table_that_references_itself_goes_through_two_places_without_waiting_for_itself(holding, db):
    db.execute("ALTER TABLE logs ADD COLUMN previous bigint REFERENCES logs")
    db.execute("UPDATE logs SET previous = id - 1 WHERE id % 3 = 0 AND id > 0")
    holder = holding(in_flight=2, database={"lock_timeout_s": 5})
    failure, lines = holder.command(WHOLE, plan(holder.settings, "logs", batch_size=2))
    assert failure is None, failure
    # 2, 5 and 8 are referenced by 3, 6 and 9; the cursor has passed them when these are gone
    assert [row[0] for row in everything(db)] == [2, 5, 8, *range(10, 20)]
    assert sum(line["deleted"]["rows"] for line in lines) == 7


@pytest.mark.req("T34")
def test_tables_that_reference_each_other_go_through_two_places(holding, db):
    db.execute("CREATE TABLE mate (id bigint PRIMARY KEY, created_at timestamptz NOT NULL, log bigint REFERENCES logs DEFERRABLE)")
    db.execute("INSERT INTO mate SELECT id, created_at, id FROM logs")
    db.execute("ALTER TABLE logs ADD COLUMN mate bigint REFERENCES mate DEFERRABLE")
    db.execute("UPDATE logs SET mate = id + 1 WHERE id % 2 = 0")
    holder = holding(in_flight=2, database={"lock_timeout_s": 5})
    failure, lines = holder.command(WHOLE, plan(holder.settings, "mate", batch_size=2), plan(holder.settings, "logs", batch_size=2))
    assert failure is None, failure
    # a mate goes unless an even log still names it; a log goes once its mate is gone
    assert db.execute("SELECT array_agg(id ORDER BY id) FROM mate WHERE id < 10") == [([1, 3, 5, 7, 9],)]
    assert [row[0] for row in everything(db)] == [1, 3, 5, 7, 9, *range(10, 20)]
    assert sum(line["deleted"]["rows"] for line in lines) == 5 + 5


def test_a_table_with_foreign_keys_is_alone_and_the_next_one_waits_for_it(holding, with_children, db):
    with_children("NO ACTION")
    db.execute("CREATE TABLE plain (LIKE logs INCLUDING ALL)")
    holder = holding(in_flight=2)
    client, other = holder.client(), holder.client()
    begun = client.call("begin", job=plan(holder.settings, "logs"))
    answer: list[Any] = []
    waiting = threading.Thread(target=lambda: answer.append(other.call("begin", job=plan(holder.settings, "plain"))), daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive() and len(backends(db, "audit-archiver batch%")) == 1
    client.call("abandon", handle=begun["handle"])
    waiting.join(10)
    assert answer[0]["number"] == 1


# -- privileges, row-level security, replication

@pytest.mark.req("T11")
def test_rows_hidden_by_row_level_security_are_an_error_and_not_an_empty_table(holding, db):
    db.execute("ALTER TABLE logs ENABLE ROW LEVEL SECURITY")
    db.execute("ALTER TABLE logs FORCE ROW LEVEL SECURITY")
    db.execute("CREATE POLICY own ON logs USING (id < 5)")
    holder = holding()
    with pytest.raises(PermissionDenied, match="row-level security, which would hide rows from this role") as caught:
        plan(holder.settings, "logs")
    assert caught.value.code == 5
    db.execute("ALTER TABLE logs NO FORCE ROW LEVEL SECURITY")
    assert len(holder.archive(plan(holder.settings, "logs"))) == 1, "the owner is not bound by policies"


@pytest.mark.req("T11")
def test_a_member_of_the_owner_is_not_bound_by_policies_and_a_stranger_is(holding, db, pg):
    db.execute("ALTER TABLE logs ENABLE ROW LEVEL SECURITY")
    for name, grant in (("member", "GRANT archiver TO {}"), ("stranger", "GRANT SELECT, UPDATE, DELETE ON logs TO {}")):
        role = f"{name}_{db.name}"
        db.admin(f"CREATE ROLE {role} LOGIN")
        try:
            db.admin(grant.format(role))
            holder = holding(database={"user": role})
            connection = connect.connect(holder.settings.databases[0], purpose="plan")
            outcome = contextlib.nullcontext() if name == "member" else pytest.raises(PermissionDenied, match="row-level security")
            with outcome:
                catalog.shape(connection, "public", "logs", ("id",), "created_at")
            connection.close()
        finally:
            db.admin(f"DROP OWNED BY {role}")
            db.admin(f"DROP ROLE {role}")


def test_a_published_table_without_replica_identity_loses_nothing(holding, db):
    """UPDATE and DELETE on it fail at the delete only (S13): nothing is lost, and the reason is said."""
    db.execute("ALTER TABLE logs DROP CONSTRAINT logs_pkey")
    db.execute("CREATE UNIQUE INDEX ON logs (id)")
    db.admin("CREATE PUBLICATION everything FOR TABLE logs")
    refused(holding(), db, words="does not have a replica identity")


def test_locking_needs_no_lock_on_the_table(holding, db):
    holder = holding()
    holder.copied(plan(holder.settings, "logs"))
    modes = {row[0] for row in db.admin("SELECT mode FROM pg_locks WHERE relation = 'logs'::regclass AND pid <> pg_backend_pid()")}
    assert modes <= {"AccessShareLock", "RowShareLock"}, modes


def test_a_partitioned_table_a_view_and_other_kinds_are_refused_by_name(holding, db):
    db.execute("CREATE TABLE parted (id bigint, created_at timestamptz, PRIMARY KEY (id, created_at)) PARTITION BY RANGE (created_at)")
    db.execute("CREATE TABLE part_2024 PARTITION OF parted FOR VALUES FROM ('2024-01-01Z') TO ('2025-01-01Z')")
    db.execute("CREATE VIEW seen AS SELECT * FROM logs")
    db.execute("CREATE UNLOGGED TABLE quick (LIKE logs INCLUDING ALL)")
    holder = holding()
    for table, words in (("parted", "is a partitioned table"), ("seen", "is a view, not a table"), ("quick", "is unlogged"),
                         ("nosuch", "does not exist")):
        with pytest.raises(ConfigError, match=words):
            plan(holder.settings, table)


@pytest.mark.req("REQ-TXN-001")
def test_a_leaf_of_a_partitioned_table_is_archived_by_itself(holding, db):
    db.execute("CREATE TABLE parted (id bigint, created_at timestamptz, PRIMARY KEY (id, created_at)) PARTITION BY RANGE (created_at)")
    for year in (2023, 2024, 2025):
        db.execute(f"CREATE TABLE part_{year} PARTITION OF parted FOR VALUES FROM ('{year}-01-01Z') TO ('{year + 1}-01-01Z')")
    db.execute("INSERT INTO parted SELECT i, '2023-01-01Z'::timestamptz + i * interval '10 days' FROM generate_series(0, 99) i")
    before = dict(db.execute("SELECT tableoid::regclass::text, count(*) FROM parted GROUP BY 1"))
    holder = holding()
    (line,) = holder.archive(plan(holder.settings, "part_2023", key=("id", "created_at"), batch_size=1000))
    assert line["deleted"]["rows"] == before["part_2023"]
    assert dict(db.execute("SELECT tableoid::regclass::text, count(*) FROM parted GROUP BY 1")) == {
        name: count for name, count in before.items() if name != "part_2023"}
