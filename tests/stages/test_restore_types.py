"""A column of every type, archived by hand and restored by aa-restore: the server finds every byte as it was."""

from __future__ import annotations

from typing import Any, Iterator

import pytest

from audit_archiver.postgres.quoting import ident
from tests.conftest import TestDatabase
from tests.ground.restored import Restored
from tests.stages import type_zoo
from tests.stages.type_session import Session

ZOO = [{"name": "zoo", "timestamp_column": "created_at", "primary_key": "n"}]


@pytest.fixture()
def session(db: TestDatabase) -> Iterator[Session]:
    """A pinned session of the superuser: some types need one to be used."""
    made = Session(db)
    yield made
    made.connection.close()


def there_and_back(session: Session, db: TestDatabase, bucket: Any, config_file: Any) -> None:
    """Archive public.zoo, restore it into itself and into a table made from its DDL, and compare both with a copy."""
    before, count = session.digest("public.zoo"), session.rows("SELECT count(*) FROM public.zoo")[0][0]
    session.rows("CREATE TABLE public.original (LIKE public.zoo INCLUDING ALL)")
    names = ", ".join(ident(column.name) for column in session.columns("public.zoo") if column.restored)
    session.rows(f"INSERT INTO public.original ({names}) OVERRIDING SYSTEM VALUE SELECT {names} FROM public.zoo")
    scene = Restored(db, bucket, config_file(db, bucket, ZOO, database={"user": "postgres"}))
    scene.archive()
    assert session.rows("SELECT count(*) FROM public.zoo") == [(0,)]
    for into in ("zoo", "back"):
        report = scene.restore("--restore-all", "--table", "zoo", "--into", into, "--create-table")
        assert (report["rows"]["inserted"], report["differences"]) == (count, [])
        assert session.differing("public.original", f"public.{into}") == []
        assert session.digest(f"public.{into}") == before
        again = scene.restore("--restore-all", "--table", "zoo", "--into", into, "--ignore-watermark")
        assert (again["rows"]["same"], again["rows"]["conflicts"]) == (count, 0)


@pytest.mark.req("REQ-TYPE-001", "REQ-TYPE-007", "REQ-TYPE-010", "REQ-RST-002", "T14")
def test_a_column_of_every_built_in_type_is_restored_as_it_was(session: Session, db: TestDatabase, bucket: Any, config_file: Any) -> None:
    names = type_zoo.known(session)
    assert len(names) > 60
    type_zoo.create(session, names, session.major)
    there_and_back(session, db, bucket, config_file)


@pytest.mark.req("REQ-TYPE-002", "REQ-TYPE-006", "REQ-TYPE-008", "REQ-TYPE-009", "T14")
def test_types_of_users_arrays_ranges_and_composites_are_restored_as_they_were(session: Session, db: TestDatabase, bucket: Any,
                                                                              config_file: Any) -> None:
    session.rows("""
        CREATE SCHEMA "my types";
        CREATE TYPE "my types"."Mood" AS ENUM ('sad', 'it''s "so so"', 'Grüße', '');
        CREATE DOMAIN "my types".amount AS numeric(12,4) CHECK (VALUE >= 0);
        CREATE TYPE "my types".place AS ("the street" text, mood "my types"."Mood", at timestamptz, doc jsonb);
        CREATE TYPE "my types".textrange AS RANGE (subtype = text, collation = "C")""")
    session.rows(f"""CREATE TABLE public.zoo ({type_zoo.KEPT}, {ident('Quoted "x%"')} text, mood "my types"."Mood", moods "my types"."Mood"[],
        amount "my types".amount, place "my types".place, places "my types".place[], r_text "my types".textrange, days daterange[],
        ints int[], flags bool[], raw bytea[], docs json[], own bigint GENERATED ALWAYS AS IDENTITY)""")
    place = """ROW('a, "b" \\ (c)', 'Grüße', '2024-07-01 12:00:00+05:45', 'null')::"my types".place"""
    quoted = ident('Quoted "x%"')
    names = f'n, {quoted}, mood, moods, amount, place, places, r_text, days, ints, flags, raw, docs'
    for row in (
            f"""1, E'tab\\t\\n\\\\ \\x01 "', 'it''s "so so"', ARRAY['', NULL, 'sad']::"my types"."Mood"[], 1.5000, {place}, ARRAY[{place}, NULL],
                '["a","z,""x")', ARRAY['[2024-01-01,2024-02-01)', 'empty']::daterange[], '[0:1]={{1,NULL}}', '{{{{t,f}},{{f,t}}}}',
                '{{"\\\\x00ff",NULL}}', ARRAY['null', NULL, '{{"a": 1}}']::json[]""",
            """2, '', '', '{}', 0, ROW(NULL,NULL,NULL,NULL)::"my types".place, '{}', 'empty', '{}', '{}', '{}', '{}', '{}'""",
            "3" + ", NULL" * names.count(",")):
        session.rows(f"INSERT INTO public.zoo ({names}) VALUES ({row})")
    there_and_back(session, db, bucket, config_file)


def test_rows_of_several_megabytes_are_restored_as_they_were(session: Session, db: TestDatabase, bucket: Any, config_file: Any) -> None:
    session.rows(f"CREATE TABLE public.zoo ({type_zoo.KEPT}, flat text, doc jsonb)")
    session.rows("""INSERT INTO public.zoo SELECT n, '2024-01-01', x, jsonb_build_object('k', x)
                    FROM (SELECT n, (SELECT string_agg(md5(i::text || n), '') FROM generate_series(1, 20000 * n) i) AS x
                          FROM generate_series(1, 2) n) made""")
    there_and_back(session, db, bucket, config_file)
