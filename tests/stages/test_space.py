"""Sizes, vacuum by its effect, and the two figures that are never mixed: reusable and returned."""

from __future__ import annotations

import os
from typing import Any, Iterator

import pytest

from audit_archiver.config.model import Database
from audit_archiver.exits import Retryable
from audit_archiver.postgres import connect, space
from tests.conftest import TestDatabase
from tests.ground import tables

TABLE = ("public", "audit_logs")


@pytest.fixture()
def session(db: TestDatabase) -> Iterator[Any]:
    """A session as aa-archive opens one, with a short lock_timeout."""
    made = connect.connect(_database(db), purpose="test")
    yield made
    made.close()


def _database(db: TestDatabase, user: str = "archiver", lock_timeout_s: float = 0.2) -> Database:
    return Database(name=db.name, host=db.host, port=db.port, user=user, lock_timeout_s=lock_timeout_s)


def _measured(session: Any) -> space.Space:
    found = space.measure(session, *TABLE)
    assert found is not None
    return found


@pytest.mark.req("REQ-VAC-004", "REQ-VAC-005")
def test_the_parts_of_a_table_add_up_to_its_total_size(db: TestDatabase, session: Any) -> None:
    tables.create(db.connection, rows=2000)
    db.execute("ALTER TABLE audit_logs ADD COLUMN big text")
    db.execute("ALTER TABLE audit_logs ALTER COLUMN big SET STORAGE EXTERNAL")
    db.execute("UPDATE audit_logs SET big = repeat('x', 20000) WHERE id <= 200")

    found = _measured(session)

    assert found.total == db.scalar("SELECT pg_total_relation_size('audit_logs')")
    assert found.heap + found.toast + found.indexes == found.total
    assert min(found.heap, found.toast, found.indexes) > 0


def test_what_is_no_table_has_no_size(db: TestDatabase, session: Any) -> None:
    db.execute("CREATE VIEW audit_logs AS SELECT 1 AS id")
    assert space.measure(session, *TABLE) is None
    assert space.measure(session, "public", "nowhere") is None


@pytest.mark.req("REQ-VAC-001", "REQ-VAC-006", "REQ-VAC-013")
def test_after_deleting_the_oldest_rows_a_vacuum_makes_room_reusable_and_returns_none(db: TestDatabase, session: Any) -> None:
    tables.create(db.connection, rows=20000)
    before = _measured(session)
    db.execute("DELETE FROM audit_logs WHERE id <= 16000")

    effect = space.vacuum(session, *TABLE, "standard")
    after = _measured(session)

    assert effect.done and effect.unremoved == 0
    assert before.total - after.total <= 0
    claimed = space.reusable(before, after, 16000, effect.unremoved)
    # THEN what it claims is what a rewrite of the table would really give back, and not more
    assert space.vacuum(session, *TABLE, "full").done
    rewritten = _measured(session)
    free = (after.heap - rewritten.heap) + (after.toast - rewritten.toast)
    assert 0.9 * free <= claimed <= 1.02 * free


def test_room_in_toast_is_counted_as_reusable_too(db: TestDatabase, session: Any) -> None:
    tables.create(db.connection, rows=300)
    db.execute("ALTER TABLE audit_logs ADD COLUMN big text")
    db.execute("ALTER TABLE audit_logs ALTER COLUMN big SET STORAGE EXTERNAL")
    db.execute("UPDATE audit_logs SET big = repeat('x', 20000)")
    db.execute("VACUUM FULL audit_logs")
    before = _measured(session)
    db.execute("DELETE FROM audit_logs WHERE id <= 150")

    effect = space.vacuum(session, *TABLE, "standard")

    assert space.reusable(before, _measured(session), 150, effect.unremoved) > 0.4 * before.toast


def test_what_goes_back_to_the_operating_system_is_not_counted_as_reusable(db: TestDatabase, session: Any) -> None:
    tables.create(db.connection, rows=20000)
    before = _measured(session)
    db.execute("DELETE FROM audit_logs WHERE id > 4000")  # the newest: whole pages at the end become empty

    effect = space.vacuum(session, *TABLE, "standard")
    after = _measured(session)

    returned = before.heap - after.heap
    assert returned > 0.7 * before.heap
    assert space.reusable(before, after, 16000, effect.unremoved) <= 0.02 * before.heap


@pytest.mark.req("T35")
def test_a_vacuum_that_an_old_transaction_holds_up_claims_nothing_and_names_who_holds_it(
        db: TestDatabase, session: Any) -> None:
    tables.create(db.connection, rows=2000)
    before = _measured(session)
    # GIVEN a session that still sees the deleted rows
    old = db.connect(application_name="nightly report")
    with old.cursor() as cursor:
        cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        cursor.execute("SELECT count(*) FROM audit_logs")
    db.execute("DELETE FROM audit_logs WHERE id <= 1500")

    effect = space.vacuum(session, *TABLE, "standard")
    after = _measured(session)
    old.close()

    assert effect.done and effect.unremoved == 1500
    assert effect.held_by is not None and "nightly report" in effect.held_by
    assert space.reusable(before, after, 1500, effect.unremoved) == 0


@pytest.mark.req("REQ-VAC-001")
@pytest.mark.parametrize("strategy", ["analyze", "standard"])
def test_a_vacuum_by_a_role_that_may_not_is_reported_as_not_done_though_it_ends_well(
        db: TestDatabase, strategy: str) -> None:
    tables.create(db.connection, rows=100)
    role = f"deleter_{os.getpid()}"
    db.admin(f"CREATE ROLE {role} LOGIN")
    try:
        db.execute(f"GRANT SELECT, DELETE, UPDATE ON audit_logs TO {role}")
        session = connect.connect(_database(db, role), purpose="test")
        effect = space.vacuum(session, *TABLE, strategy)
        session.close()
    finally:
        db.admin(f"DROP OWNED BY {role}")
        db.admin(f"DROP ROLE {role}")

    assert not effect.done
    assert effect.said and effect.said[0].startswith("WARNING")


@pytest.mark.req("REQ-VAC-013")
@pytest.mark.parametrize("strategy", ["analyze", "standard", "full"])
def test_each_strategy_is_seen_to_have_happened(db: TestDatabase, session: Any, strategy: str) -> None:
    tables.create(db.connection, rows=100)
    file = db.scalar("SELECT pg_relation_filenode('audit_logs')")

    assert space.vacuum(session, *TABLE, strategy).done

    assert (db.scalar("SELECT pg_relation_filenode('audit_logs')") != file) == (strategy == "full")


@pytest.mark.req("REQ-VAC-003")
def test_a_verbose_vacuum_says_what_it_did(db: TestDatabase, session: Any) -> None:
    tables.create(db.connection, rows=100)
    assert any("audit_logs" in text for text in space.vacuum(session, *TABLE, "standard", verbose=True).said)
    assert not space.vacuum(session, *TABLE, "standard").said
    assert any("audit_logs" in text for text in space.vacuum(session, *TABLE, "analyze", verbose=True).said)


@pytest.mark.req("REQ-VAC-008")
def test_a_full_vacuum_waits_for_its_lock_no_longer_than_lock_timeout(db: TestDatabase, session: Any) -> None:
    tables.create(db.connection, rows=100)
    reader = db.connect()
    with reader.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT count(*) FROM audit_logs")
        with pytest.raises(Retryable):
            space.vacuum(session, *TABLE, "full")
    reader.close()
