"""The guarded delete beside everything else: other sessions, broken connections, a real pipe, a poor store."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import psycopg2
import pytest

from audit_archiver import exits
from audit_archiver.formats import names
from tests.ground import tables
from tests.ground.archive import Archive
from tests.ground.by_hand import ByHand, dump
from tests.ground.kill import go_on, stopped_at
from tests.ground.proxy import Proxy
from tests.ground.run import BIN, Child, finish, spawn
from tests.ground.wait import until

ROWS = 250


@pytest.fixture()
def hand(db: Any, bucket: Any, config_file: Any) -> ByHand:
    tables.create(db.connection, rows=ROWS, first="2024-01-01", last="2024-03-01")
    return ByHand(db, config_file(db, bucket))


def frozen_at(hand: ByHand, line: dict[str, Any], point: str, **env: str) -> tuple[Child, int]:
    """aa-delete on one line, stopped at `point`."""
    child = spawn("aa-delete", env={**hand.env, "AA_TEST_POINT": point, **env}, stdin=subprocess.PIPE)
    assert child.stdin is not None
    child.stdin.write(dump([line]))
    child.stdin.close()
    child.stdin = None
    return child, stopped_at(point, child.token, ended=child.poll)


def left(hand: ByHand) -> int:
    return int(hand.db.scalar("SELECT count(*) FROM audit_logs"))


@pytest.mark.req("T44", "T34")
def test_the_pipe_by_hand_archives_every_row_exactly_once(hand: ByHand, bucket: Any) -> None:
    """GIVEN no holder at all WHEN the stages run in one pipe THEN archive and table together are the table before."""
    before = tables.digest(hand.db.connection, "public.audit_logs")
    pipe = "aa-plan | aa-select | aa-serialize | aa-upload | aa-verify | aa-delete | aa-record"
    done = subprocess.run(["/bin/sh", "-c", pipe], env={"PATH": f"{BIN}:{os.defpath}", **hand.env}, capture_output=True,
                          timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert left(hand) == 0
    archive = Archive(bucket.client, bucket.name)
    assert archive.check()[:2] == (3, ROWS)
    archive.restore(hand.settings.databases[0], "public.audit_logs", "public.back")
    assert tables.digest(hand.db.connection, "public.back") == before


@pytest.mark.parametrize("hung", [
    "CREATE TRIGGER late BEFORE DELETE ON audit_logs FOR EACH ROW EXECUTE PROCEDURE public.late()",
    "CREATE TABLE child (log bigint REFERENCES audit_logs ON DELETE CASCADE)"])
def test_what_is_hung_on_the_table_while_its_rows_are_locked_rolls_the_delete_back(hand: ByHand, hung: str) -> None:
    """C7: FOR UPDATE does not keep CREATE TRIGGER or a new foreign key out."""
    hand.db.execute("CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RETURN old; END$$")
    line = hand.export("--limit", "100")[0]
    child, victim = frozen_at(hand, line, "guarded.compared")
    hand.db.execute(hung)
    go_on(victim)
    result = finish(child)
    assert (result.rc, result.out) == (exits.FAILED, b""), result.err
    assert "changed while its batch was open" in result.err
    assert left(hand) == ROWS


def test_ddl_waits_while_the_rows_are_locked_and_goes_on_afterwards(hand: ByHand) -> None:
    line = hand.export("--limit", "100")[0]
    child, victim = frozen_at(hand, line, "guarded.compared")
    hand.db.execute("SET lock_timeout = '100ms'")
    with pytest.raises(Exception, match="lock timeout"):
        hand.db.execute("ALTER TABLE audit_logs ADD COLUMN verdict text")
    go_on(victim)
    assert finish(child).rc == 0
    hand.db.execute("ALTER TABLE audit_logs ADD COLUMN verdict text")
    assert left(hand) == ROWS - 100


@pytest.mark.req("T39", "REQ-TXN-005")
def test_a_connection_cut_between_delete_and_commit_rolls_back(hand: ByHand, bucket: Any, config_file: Any) -> None:
    line = hand.export("--limit", "100")[0]
    with Proxy(f"{hand.db.host}/.s.PGSQL.{hand.db.port}") as proxy:
        through = config_file(hand.db, bucket, database={"host": "127.0.0.1", "port": proxy.port})
        child, victim = frozen_at(hand, line, "guarded.deleted", AA_CONFIG=str(through))
        proxy.cut()
        go_on(victim)
        result = finish(child)
    assert (result.rc, result.out) == (exits.NETWORK, b""), result.err
    until(lambda: hand.recover("--dry-run").rc != exits.LOCKED, "the server has ended the cut sessions")
    assert left(hand) == ROWS


@pytest.mark.req("T38", "REQ-REL-003")
def test_a_commit_whose_answer_was_lost_is_in_doubt_and_recovery_knows(hand: ByHand, bucket: Any, config_file: Any) -> None:
    """S1: the server committed, and nobody heard it. Not a word that the batch is deleted, nor that it is not."""
    line = hand.export("--limit", "100")[0]
    with Proxy(f"{hand.db.host}/.s.PGSQL.{hand.db.port}") as proxy:
        through = config_file(hand.db, bucket, database={"host": "127.0.0.1", "port": proxy.port})
        answer = _bytes_of_the_check(hand, proxy)
        child, victim = frozen_at(hand, line, "guarded.deleted", AA_CONFIG=str(through))
        proxy.cut_after = answer + 5  # inside the answer to COMMIT, which follows the check
        go_on(victim)
        result = finish(child)
    assert (result.rc, result.out) == (exits.NETWORK, b""), result.err
    assert "is unknown" in result.err and "aa-recover" in result.err
    assert left(hand) == ROWS - 100
    until(lambda: hand.recover("--dry-run").rc != exits.LOCKED, "the server has ended the cut sessions")
    found = hand.recover().lines[0]["databases"][0]["verdicts"]
    assert [each["verdict"] for each in found] == ["RECORD"]


def test_a_poor_store_without_conditional_writes_serves_too(db: Any, poor_bucket: Any, config_file: Any) -> None:
    """C10: its objects can be replaced behind our back, so they are looked at again."""
    tables.create(db.connection, rows=ROWS, first="2024-01-01", last="2024-03-01")
    hand = ByHand(db, config_file(db, poor_bucket))
    lines = hand.export()
    result = hand.delete(lines)
    assert result.rc == 0, result.err
    assert all(line["uploaded"]["create_only"] is False for line in result.lines)
    assert [each["verdict"] for each in hand.recover().lines[0]["databases"][0]["verdicts"]] == ["RECORD"] * 3
    assert all(hand.states(line) == ["commit", "intent_1"] for line in lines)


def test_a_stop_signal_before_the_commit_rolls_back_and_frees_the_lock(hand: ByHand) -> None:
    line = hand.export("--limit", "100")[0]
    child, victim = frozen_at(hand, line, "guarded.deleted")
    os.kill(victim, signal.SIGTERM)
    go_on(victim)
    assert finish(child).rc == -signal.SIGTERM
    until(lambda: hand.recover("--dry-run").rc == 0, "the lock is free")
    assert left(hand) == ROWS


def test_the_output_full_after_the_commit_loses_no_batch(hand: ByHand) -> None:
    """The line is lost, the intent is not: recovery records what it names."""
    line = hand.export("--limit", "100")[0]
    with open("/dev/full", "wb", buffering=0) as full:
        child = spawn("aa-delete", env=hand.env, stdin=subprocess.PIPE, stdout=full)
        result = finish(child, dump([line]))
    assert result.rc == exits.RESOURCE
    assert left(hand) == ROWS - 100
    until(lambda: hand.recover("--dry-run").rc != exits.LOCKED, "the lock is free")
    assert hand.recover().rc == 0
    assert hand.has(line, names.COMMIT)


def _bytes_of_the_check(hand: ByHand, proxy: Proxy) -> int:
    """How many bytes the server answers to what is asked right before COMMIT."""
    connection = psycopg2.connect(host="127.0.0.1", port=proxy.port, user=hand.db.user, password=hand.db.password, dbname=hand.db.name)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT txid_current()::text")
        before = proxy.down_bytes
        cursor.execute("SELECT txid_current_if_assigned()::text")
        asked = proxy.down_bytes - before
        cursor.execute("ROLLBACK")
    connection.close()
    return asked
