"""The DDL in an archive makes the table again: in an empty database the catalog then says of it what it said before."""

from __future__ import annotations

import contextlib
import json
import secrets
from typing import Any, Iterator

import pytest

from audit_archiver import config
from audit_archiver.formats import names
from audit_archiver.postgres import connect, ddl
from tests.conftest import ARCHIVER, Bucket, TestDatabase
from tests.ground.driven import Driven, logs
from tests.ground.postgres import Cluster

MADE = """
CREATE SCHEMA other; CREATE TYPE other.mood AS ENUM ('well', 'it''s \\ so');
CREATE DOMAIN "Short" AS varchar(10) DEFAULT 'none' NOT NULL CHECK (VALUE <> ''); CREATE TYPE pair AS (a int, "B c" other.mood[]);
CREATE TYPE times AS RANGE (SUBTYPE = time); CREATE SEQUENCE other.counted INCREMENT BY 5 START WITH 100;
CREATE TABLE parent (id int PRIMARY KEY);
CREATE TABLE "Audit.Log" (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, seq int DEFAULT nextval('other.counted') NOT NULL, serial serial,
  created_at timestamptz(3) NOT NULL DEFAULT now(), gone int, "It""s" text COLLATE "C" DEFAULT 'a ''b'' \\ c',
  mood other.mood, short "Short", pair pair, pairs pair[], span times, amount numeric(12,2), twice numeric GENERATED ALWAYS AS (amount * 2) STORED,
  parent int REFERENCES parent ON DELETE RESTRICT, UNIQUE (created_at, id), CONSTRAINT "not less" CHECK (amount >= 0), EXCLUDE (seq WITH =));
ALTER TABLE "Audit.Log" DROP COLUMN gone;
CREATE INDEX ON "Audit.Log" (lower("It""s")) WHERE amount > 1;
COMMENT ON TABLE "Audit.Log" IS 'what ''happened'''; COMMENT ON COLUMN "Audit.Log"."It""s" IS 'text';
"""
TABLE = 'public."Audit.Log"'


@pytest.fixture()
def empty(pg: Cluster) -> Iterator[TestDatabase]:
    """A second database with nothing in it."""
    name = f"t_{secrets.token_hex(6)}"
    with contextlib.closing(pg.connect()) as admin, admin.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name} OWNER {ARCHIVER}")
        made = TestDatabase(pg, name)
        try:
            yield made
        finally:
            made.close()
            cursor.execute(f"DROP DATABASE {name}")


def read(db: TestDatabase, bucket: Bucket, config_file: Any, table: str) -> list[str]:
    (database,) = config.load(str(config_file(db, bucket)), {}).databases
    with contextlib.closing(connect.connect(database, purpose="test")) as connection:
        return ddl.statements(connection, db.scalar("SELECT %s::regclass::oid", (table,)))


@pytest.mark.req("REQ-INT-006")
def test_the_statements_make_the_table_again(db: TestDatabase, empty: TestDatabase, bucket: Bucket, config_file: Any) -> None:
    if int(db.cluster.version.partition(".")[0]) < 12:
        pytest.skip("generated columns came with PostgreSQL 12")
    db.execute(MADE)
    found = read(db, bucket, config_file, TABLE)

    empty.execute("CREATE TABLE parent (id int PRIMARY KEY)")
    for statement in found:
        empty.execute(statement)

    assert read(empty, bucket, config_file, TABLE) == found
    assert found[:2] == ["CREATE SCHEMA IF NOT EXISTS \"other\"", "CREATE TYPE other.mood AS ENUM ('well', E'it''s \\\\ so')"]
    for database in (db, empty):
        database.execute(f"INSERT INTO {TABLE} (mood, pair, span, amount) VALUES ('well', ROW(1, ARRAY['well'::other.mood]), '[10:00,11:00)', 4)")
    same = f"SELECT id, seq, serial, \"It\"\"s\", mood, short, pair, span, amount, twice FROM {TABLE}"
    assert empty.execute(same) == db.execute(same)


def test_a_partition_is_written_as_a_table_of_its_own(db: TestDatabase, empty: TestDatabase, bucket: Bucket, config_file: Any) -> None:
    db.execute("CREATE TABLE events (id int, created_at timestamptz NOT NULL, PRIMARY KEY (id, created_at)) PARTITION BY RANGE (created_at)")
    db.execute("CREATE TABLE y2024 PARTITION OF events FOR VALUES FROM ('2024-01-01Z') TO ('2025-01-01Z')")
    found = read(db, bucket, config_file, "public.y2024")
    for statement in found:
        empty.execute(statement)
    assert found == ['CREATE TABLE "public"."y2024" ("id" integer NOT NULL, "created_at" timestamp with time zone NOT NULL)',
                     'ALTER TABLE "public"."y2024" ADD CONSTRAINT "y2024_pkey" PRIMARY KEY (id, created_at)']
    assert read(empty, bucket, config_file, "public.y2024") == found


def test_of_a_table_that_is_gone_there_is_none(db: TestDatabase, bucket: Bucket, config_file: Any) -> None:
    (database,) = config.load(str(config_file(db, bucket)), {}).databases
    with contextlib.closing(connect.connect(database, purpose="test")) as connection:
        assert ddl.statements(connection, 1) == []


@pytest.mark.req("REQ-INT-012")
def test_the_first_batch_of_a_run_carries_it_in_its_metadata_and_the_others_do_not(db: TestDatabase, bucket: Bucket, config_file: Any) -> None:
    before = logs(db, old=250, young=5)
    runs = Driven(db, bucket, config_file(db, bucket))
    runs.ran()
    found = [json.loads(runs.archive.read(commit["serialized"]["stem"] + names.METADATA)) for commit in runs.archive.commits()]
    carried = [value["schema"].get("ddl") for value in sorted(found, key=lambda value: value["batch_number"])]
    assert carried[0] == read(db, bucket, config_file, "public.audit_logs")
    assert set(carried[1:]) == {None}
    assert carried[0] and carried[0][0].startswith('CREATE TABLE "public"."audit_logs" ("id" bigint NOT NULL, ')
    assert runs.whole("public.audit_logs", before) == 250
