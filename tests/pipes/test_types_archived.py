"""Values of every type through the whole way: aa-archive into the bucket, out of it with the reverse expressions.

tests/stages/test_types.py shows the codec by itself; here the holder's copy, gzip, the store, the delete and the
way back lie between the two digests, which PostgreSQL computes.
"""

from __future__ import annotations

from typing import Any, Callable, Iterator

import pytest

from audit_archiver.config.model import Database
from audit_archiver.postgres.quoting import ident
from tests.conftest import TestDatabase
from tests.ground.driven import Driven
from tests.stages import type_zoo
from tests.stages.type_session import Session

KEPT = "n int PRIMARY KEY, created_at timestamptz NOT NULL DEFAULT '2024-01-01 00:00:00+00'"
ZOO = [{"name": "zoo", "timestamp_column": "created_at", "primary_key": "n"}]


@pytest.fixture()
def session(db: TestDatabase) -> Iterator[Session]:
    """A pinned session of the superuser: some types need one to be used."""
    made = Session(db)
    yield made
    made.connection.close()


def there_and_back(session: Session, db: TestDatabase, bucket: Any, config_file: Callable[..., Any], **more: Any) -> Driven:
    """Archive public.zoo, load it into public.back, and have the server compare every value byte for byte."""
    before, lines = session.digest("public.zoo"), session.lines("public.zoo")
    session.rows("CREATE TABLE public.original (LIKE public.zoo INCLUDING ALL)")
    names = ", ".join(ident(column.name) for column in session.columns("public.zoo") if column.restored)
    session.rows(f"INSERT INTO public.original ({names}) OVERRIDING SYSTEM VALUE SELECT {names} FROM public.zoo")
    runs = Driven(db, bucket, config_file(db, bucket, ZOO, database={"user": "postgres"}, **more))
    assert runs.ran()["totals"]["rows"] == len(lines)
    assert session.rows("SELECT count(*) FROM public.zoo") == [(0,)]
    assert runs.archive.restore(Database(db.name, host=db.host, port=db.port, user="postgres"), "public.zoo", "public.back") == len(lines)
    assert session.differing("public.original", "public.back") == []
    assert session.digest("public.back") == before
    return runs


@pytest.mark.req("REQ-TYPE-001", "REQ-TYPE-007", "REQ-TYPE-010", "REQ-S3-012", "REQ-TIME-005", "T14", "T15", "T16")
def test_a_column_of_every_built_in_type_comes_out_of_the_archive_as_it_went_in(session: Session, db: TestDatabase, bucket: Any,
                                                                                config_file: Callable[..., Any]) -> None:
    unbuilt = set() if session.has_xml else {"xml"}
    known = [name for name, in session.rows("SELECT typname::text FROM pg_type WHERE typnamespace = 'pg_catalog'::regnamespace")]
    names = [name for name in sorted(type_zoo.VALUES) if name in known and name not in type_zoo.REFUSED | unbuilt]
    assert len(names) > 60
    values = {name: type_zoo.values(name, session.major) for name in names}
    session.rows(f"CREATE TABLE public.zoo ({KEPT}, %s)" % ", ".join(f"{ident('a ' + name)} pg_catalog.{ident(name)}" for name in names))
    columns = ", ".join(ident("a " + name) for name in names)
    for n in range(max(map(len, values.values()))):
        row = ", ".join(f"{values[name][n % len(values[name])]}::pg_catalog.{ident(name)}" for name in names)
        session.rows(f"INSERT INTO public.zoo (n, {columns}) VALUES ({n}, {row})")
    session.rows("INSERT INTO public.zoo (n) VALUES (-1)")

    runs = there_and_back(session, db, bucket, config_file, roundtrip="always")

    assert sum(runs.sizes()) == session.rows("SELECT count(*) FROM public.original")[0][0]


@pytest.mark.req("REQ-TYPE-002", "REQ-TYPE-006", "REQ-TYPE-008", "REQ-TYPE-009", "REQ-S3-015", "T14")
def test_types_of_users_come_out_of_the_archive_as_they_went_in(session: Session, db: TestDatabase, bucket: Any,
                                                               config_file: Callable[..., Any]) -> None:
    session.rows("""
        CREATE SCHEMA "my types";
        CREATE TYPE "my types"."Mood" AS ENUM ('sad', 'it''s "so so"', 'Grüße', '');
        CREATE DOMAIN "my types".amount AS numeric(12,4) CHECK (VALUE >= 0);
        CREATE DOMAIN "my types".amounts AS "my types".amount[];
        CREATE DOMAIN "my types".doc AS jsonb;
        CREATE TYPE "my types".place AS ("the street" text, mood "my types"."Mood", at timestamptz, doc jsonb);
        CREATE TYPE "my types".journey AS (stops "my types".place[], cost "my types".amount);
        CREATE TYPE "my types".textrange AS RANGE (subtype = text, collation = "C")""")
    multi, quoted = session.major >= 14, ident('Quoted "x"')
    more = ", m_int int4multirange, m_time tstzmultirange[]" if multi else ""
    session.rows(f"""CREATE TABLE public.zoo ({KEPT}, mood "my types"."Mood", moods "my types"."Mood"[], amount "my types".amount,
        amounts "my types".amounts, doc "my types".doc, place "my types".place, trip "my types".journey, r_text "my types".textrange,
        r_num numrange, r_days daterange[], r_time tstzrange, {quoted} text, twice int GENERATED ALWAYS AS (n * 2) STORED,
        own bigint GENERATED ALWAYS AS IDENTITY{more})""" if session.major >= 12 else f"""CREATE TABLE public.zoo ({KEPT},
        mood "my types"."Mood", moods "my types"."Mood"[], amount "my types".amount, amounts "my types".amounts, doc "my types".doc,
        place "my types".place, trip "my types".journey, r_text "my types".textrange, r_num numrange, r_days daterange[], r_time tstzrange,
        {quoted} text, own bigint GENERATED ALWAYS AS IDENTITY{more})""")
    place = """ROW('a, "b" \\ (c)', 'Grüße', '2024-07-01 12:00:00+05:45', 'null')::"my types".place"""
    names = "n, mood, moods, amount, amounts, doc, place, trip, r_text, r_num, r_days, r_time, " + quoted + (", m_int, m_time" if multi else "")
    rows = [
        f"""1, 'it''s "so so"', ARRAY['', NULL, 'sad']::"my types"."Mood"[], 1.5000, ARRAY[0, 1.10]::numeric[], 'null', {place},
            ROW(ARRAY[{place}, NULL], 3)::"my types".journey, '["a","z,""x")', '(1.10,2.00]', ARRAY['[2024-01-01,2024-02-01)', 'empty']::daterange[],
            '[2024-03-31 02:30:00+01,infinity)', E'tab\\t\\n\\\\'""" + (", '{[1,3),[5,9)}', ARRAY['{(,)}', '{}']::tstzmultirange[]" if multi else ""),
        """2, '', '{}', 0, '{}', '{"$json":"null"}', ROW(NULL,NULL,NULL,NULL)::"my types".place, ROW(NULL,NULL)::"my types".journey, 'empty',
            '(,)', '{}', '(,)', ''""" + (", '{}', '{}'" if multi else ""),
        "3" + ", NULL" * names.count(",")]
    for row in rows:
        session.rows(f"INSERT INTO public.zoo ({names}) VALUES ({row})")

    runs = there_and_back(session, db, bucket, config_file)

    assert runs.sizes() == [3]
    if session.major >= 12:
        assert session.rows("SELECT n, twice FROM public.back ORDER BY n") == [(1, 2), (2, 4), (3, 6)]


@pytest.mark.req("T17", "REQ-TIME-001", "REQ-TIME-003")
def test_settings_of_database_and_role_change_no_value_on_the_way(session: Session, db: TestDatabase, bucket: Any,
                                                                 config_file: Callable[..., Any]) -> None:
    session.rows(f"CREATE TABLE public.zoo ({KEPT}, ts timestamp, d date, i interval, f float8, b bytea, m money, a text[])")
    session.rows("INSERT INTO public.zoo VALUES (1, '2024-02-01 12:00:00+00', '2024-02-01 12:00:00', '2024-02-01', '-1 mons +2 days -00:00:01', "
                 "0.1::float8 + 0.2, '\\x00ff', '$1,234.50', '{a,NULL}')")
    for setting, value in {"datestyle": "'German, DMY'", "intervalstyle": "sql_standard", "bytea_output": "escape", "extra_float_digits": "-15",
                           "timezone": "'Asia/Kathmandu'", "array_nulls": "off", "search_path": "public", "synchronous_commit": "off",
                           "default_transaction_isolation": "serializable", "standard_conforming_strings": "off"}.items():
        db.admin(f"ALTER DATABASE {db.name} SET {setting} = {value}")
    db.admin(f"ALTER ROLE postgres IN DATABASE {db.name} SET datestyle = 'SQL, DMY'")

    runs = there_and_back(session, db, bucket, config_file)

    row = runs.archive.rows(runs.archive.commits()[0])[0]
    assert b'"created_at":"2024-02-01T12:00:00+00:00"' in row and b'"d":"2024-02-01"' in row and b'"i":"-1 mons +2 days -00:00:01"' in row


@pytest.mark.req("REQ-TYPE-012", "REQ-TYPE-013")
def test_toasted_values_come_out_of_the_archive_as_they_went_in(session: Session, db: TestDatabase, bucket: Any,
                                                               config_file: Callable[..., Any]) -> None:
    """Several megabytes in one cell, compressed and not, inline and out of line; 1 GB is beyond max_row_mb by ruling."""
    session.rows(f"CREATE TABLE public.zoo ({KEPT}, flat text, packed text, doc jsonb, raw bytea)")
    session.rows("ALTER TABLE public.zoo ALTER COLUMN flat SET STORAGE EXTERNAL")
    session.rows("""INSERT INTO public.zoo SELECT n, '2024-01-01', x, repeat('ab', 500000 * n), jsonb_build_object('k', x), decode(x, 'hex')
                    FROM (SELECT n, (SELECT string_agg(md5(i::text || n), '') FROM generate_series(1, 40000 * n) i) AS x
                          FROM generate_series(1, 3) n) made""")
    assert session.rows("SELECT pg_relation_size(reltoastrelid) > 4000000 FROM pg_class WHERE oid = 'public.zoo'::regclass") == [(True,)]

    runs = there_and_back(session, db, bucket, config_file)

    assert sum(runs.sizes()) == 3


@pytest.mark.parametrize("column", ["pg_node_tree", "pg_ndistinct"])
def test_a_type_that_cannot_come_back_refuses_the_table_by_name_before_anything_moves(session: Session, db: TestDatabase, bucket: Any,
                                                                                     config_file: Callable[..., Any], column: str) -> None:
    session.rows(f"CREATE TABLE public.zoo ({KEPT}, working {column})")
    session.rows("INSERT INTO public.zoo (n) VALUES (1)")
    runs = Driven(db, bucket, config_file(db, bucket, ZOO, database={"user": "postgres"}))
    result = runs.run()
    assert result.rc == 3 and column in result.err and "working" in result.err
    assert (session.rows("SELECT count(*) FROM public.zoo"), runs.archive.keys()) == ([(1,)], [])
