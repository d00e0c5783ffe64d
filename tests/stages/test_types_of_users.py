"""Enums, composites, ranges and generated columns: what users define comes back, or is refused by name."""

from __future__ import annotations

import json
from typing import Iterator

import pytest

from audit_archiver.postgres import columns as table_columns
from tests.conftest import TestDatabase
from tests.stages.type_session import Session


@pytest.fixture()
def session(db: TestDatabase) -> Iterator[Session]:
    made = Session(db)
    yield made
    made.connection.close()


@pytest.mark.req("REQ-TYPE-006")
def test_enums_come_back_whatever_their_labels_and_casts(session: Session) -> None:
    session.rows("CREATE SCHEMA \"my schema\"; CREATE TYPE \"my schema\".\"Mood %s\" AS ENUM ('sad', 'it''s \"ok\"', 'back\\slash', 'grün', '')")
    session.rows("CREATE TYPE public.cast_enum AS ENUM ('a', 'b'); "
                 "CREATE FUNCTION public.liar(public.cast_enum) RETURNS json LANGUAGE sql IMMUTABLE AS 'SELECT ''{\"not\": \"it\"}''::json'; "
                 "CREATE CAST (public.cast_enum AS json) WITH FUNCTION public.liar; CREATE TYPE public.holder AS (e public.cast_enum)")

    lines = session.values(
        "public.moods", "e \"my schema\".\"Mood %s\", l \"my schema\".\"Mood %s\"[], c public.cast_enum, cl public.cast_enum[], h public.holder",
        "'sad', '{sad,NULL}', 'a', '{a,b,NULL}', ROW('b')",
        "'it''s \"ok\"', '[3:3]={\"\"}', 'b', '{}', ROW(NULL)", "'back\\slash', '{grün}', NULL, NULL, NULL",
        "'grün', NULL, NULL, NULL, NULL", "'', '{}', NULL, NULL, NULL")

    assert [line["e"] for line in lines] == ["sad", "it's \"ok\"", "back\\slash", "grün", ""]
    assert lines[0]["c"] == "a" and lines[0]["cl"] == ["a", "b", None] and lines[0]["h"] == {"e": "b"}


@pytest.mark.req("REQ-TYPE-009")
def test_a_composite_that_is_null_and_one_of_nulls_stay_apart(session: Session) -> None:
    session.rows("CREATE TYPE public.plain AS (a int, b text); CREATE TYPE public.made AS (a numeric, b jsonb, c bytea); "
                 "CREATE TYPE public.nest AS (p public.plain, m public.made, ms public.made[]); CREATE TYPE public.bare AS (); "
                 "CREATE DOMAIN public.positive AS public.plain CHECK ((VALUE).a > 0)")

    lines = session.values(
        "public.composites", "p public.plain, m public.made, x public.nest, b public.bare, d public.positive",
        "NULL, NULL, NULL, NULL, NULL", "ROW(NULL, NULL), ROW(NULL, NULL, NULL), ROW(NULL, NULL, NULL), ROW(), ROW(1, NULL)",
        "ROW(1, 'it''s (,) \"x\"'), ROW(1.10, 'null', '\\x00'), "
        "ROW(ROW(NULL, ''), ROW(NULL, '{\"$json\": 1}', ''), ARRAY[NULL, ROW(NULL, NULL, NULL), "
        "ROW(1, '[]', 'a')]::public.made[]), ROW(), ROW(2, 'x')")

    assert [line["p"] for line in lines] == [None, {"a": None, "b": None}, {"a": 1, "b": "it's (,) \"x\""}]
    assert [line["m"] for line in lines] == [None, {"a": None, "b": None, "c": None}, {"a": "1.10", "b": {"$json": "null"}, "c": "base64:AA=="}]
    assert lines[2]["x"]["ms"] == [None, {"a": None, "b": None, "c": None}, {"a": "1", "b": [], "c": "base64:YQ=="}]


def test_composites_changed_after_rows_were_stored_come_back(session: Session) -> None:
    session.rows("CREATE TYPE public.grown AS (a int, b text, c numeric); CREATE TABLE public.old (n int, v public.grown, l public.grown[]); "
                 "INSERT INTO public.old VALUES (1, ROW(1, 'gone', 2.50), ARRAY[ROW(1, 'gone', 2.50)]::public.grown[]); "
                 "ALTER TYPE public.grown DROP ATTRIBUTE b; ALTER TYPE public.grown ADD ATTRIBUTE d jsonb")

    columns = session.columns("public.old")
    lines = session.lines("public.old")

    assert json.loads(lines[0])["v"] == {"a": 1, "c": "2.50", "d": None}
    session.rows("CREATE TABLE public.back (LIKE public.old)")
    session.load("public.back", lines)
    assert session.digest("public.back") == session.digest("public.old")
    assert session.rows(f"SELECT {table_columns.roundtrip_sql(columns, 't')} FROM public.old t") == [(True,)]


@pytest.mark.req("REQ-TYPE-010")
def test_ranges_of_users_come_back_also_when_renamed(session: Session) -> None:
    session.rows("CREATE SCHEMA zoo; CREATE TYPE zoo.\"Text Range\" AS RANGE (subtype = text, collation = \"C\"); "
                 "CREATE TYPE zoo.jsonbs AS RANGE (subtype = jsonb); CREATE TYPE zoo.before AS RANGE (subtype = float8, subtype_diff = float8mi); "
                 "ALTER TYPE zoo.before RENAME TO after; CREATE DOMAIN zoo.positive AS int4range CHECK (lower(VALUE) > 0); "
                 "CREATE DOMAIN zoo.small AS numeric(5,2); CREATE TYPE zoo.smalls AS RANGE (subtype = zoo.small)")

    lines = session.values(
        "public.ranges", "t zoo.\"Text Range\", j zoo.jsonbs, f zoo.after, d zoo.positive, l zoo.\"Text Range\"[], s zoo.smalls",
        "'(a,\"b \\\\ \\\"c\"]', '[null,null]', '[-0,Infinity)', '[1,2)', '{\"[a,)\",NULL,empty}', '[1.10,2)'",
        "'empty', '(,)', '(NaN,)', NULL, '{}', 'empty'", "'[\"\",\"\"]', '[\"\\\"x\\\"\",]', 'empty', '[5,)', '[0:0]={\"(,)\"}', NULL")

    assert lines[0]["t"] == {"lower": "a", "upper": "b \\ \"c", "bounds": "(]"}
    assert lines[0]["j"] == {"lower": {"$json": "null"}, "upper": {"$json": "null"}, "bounds": "[]"}
    assert lines[1]["t"] == {"empty": True}
    assert lines[1]["j"] == {"lower": None, "upper": None, "bounds": "()"}
    assert lines[2]["d"] == {"lower": 5, "upper": None, "bounds": "[)"}
    assert lines[2]["l"] == {"$array": "[0:0]={\"(,)\"}"}


@pytest.mark.req("REQ-TYPE-010")
def test_multiranges_are_lists_of_ranges(session: Session) -> None:
    if session.major < 14:
        pytest.skip("multiranges came with PostgreSQL 14")
    session.rows("CREATE TYPE public.texts AS RANGE (subtype = text, multirange_type_name = public.many_texts)")

    lines = session.values("public.multi", "a int4multirange, b public.many_texts, c nummultirange[]",
                           "'{[1,3),[5,)}', '{[a,b),[\"c d\",]}', ARRAY['{[1.50,2]}'::nummultirange, NULL, '{}']",
                           "'{}', '{}', '{}'", "NULL, NULL, NULL")

    assert lines[0]["a"] == [{"lower": 1, "upper": 3, "bounds": "[)"}, {"lower": 5, "upper": None, "bounds": "[)"}]
    assert lines[0]["c"] == [[{"lower": "1.50", "upper": "2", "bounds": "[]"}], None, []]
    assert [line["b"] for line in lines[1:]] == [[], None]


def test_dropped_columns_are_skipped_and_generated_ones_are_archived_but_not_restored(session: Session) -> None:
    stored = "s int GENERATED ALWAYS AS (a * 2) STORED" if session.major >= 12 else "s int"
    virtual = ", w int GENERATED ALWAYS AS (a / 0) VIRTUAL" if session.major >= 18 else ""
    session.rows(f"CREATE TABLE public.made (n int GENERATED ALWAYS AS IDENTITY, gone int, a int NOT NULL, {stored}{virtual}); "
                 "ALTER TABLE public.made DROP COLUMN gone; INSERT INTO public.made (a) VALUES (21)")

    columns = session.columns("public.made")

    assert [column.name for column in table_columns.archived(columns)] == ["n", "a", "s"]
    assert [column.attnum for column in columns[:3]] == [1, 3, 4]
    assert [column.nullable for column in columns[:3]] == [False, False, True]
    assert columns[0].identity == "a" and columns[1].identity == ""
    if session.major >= 12:
        assert [column.name for column in columns if column.restored] == ["n", "a"]
        assert session.survives("public.made") == [b'{"n":1,"a":21,"s":42}']


def test_working_data_of_the_server_is_refused_by_name_with_a_remedy(session: Session) -> None:
    session.rows("CREATE TABLE public.bad (n int, node pg_node_tree)")

    (refusal,) = [column.refusal for column in session.columns("public.bad") if column.name == "node"]

    assert refusal is not None and "pg_node_tree" in refusal[0] and "ALTER TABLE" in refusal[1]
    with pytest.raises(ValueError):
        session.columns("public.bad")[1].encode("t")


def test_hidden_oids_are_refused(session: Session) -> None:
    if session.major >= 12:
        pytest.skip("WITH OIDS ended with PostgreSQL 12")
    session.rows("CREATE TABLE public.hidden (n int) WITH OIDS")

    assert [(column.name, column.refusal is not None) for column in session.columns("public.hidden")] == [("n", False), ("oid", True)]
