"""Every built-in type comes back from its JSON line as it was: a zoo of values, judged by PostgreSQL itself.

Each value goes the way a row goes: row_to_json through COPY, one line of bytes, json_to_record, INSERT. Then the
server compares the two tables byte for byte (record_image_eq) and by digest.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Iterator

import pytest

from audit_archiver.postgres import columns as table_columns
from audit_archiver.postgres import type_codecs
from audit_archiver.postgres.quoting import ident, literal
from tests.conftest import TestDatabase
from tests.ground.postgres import Cluster
from tests.stages import type_zoo
from tests.stages.type_session import Session


@pytest.fixture()
def session(db: TestDatabase) -> Iterator[Session]:
    made = Session(db)
    yield made
    made.connection.close()


@pytest.fixture(scope="module")
def shared(pg: Cluster) -> Iterator[Session]:
    """One database for the many tests that differ in the type alone; each cleans up before itself."""
    admin = pg.connect()
    with admin.cursor() as cursor:
        cursor.execute("CREATE DATABASE aa_types")
        made = Session(TestDatabase(pg, "aa_types"))
        yield made
        made.connection.close()
        cursor.execute("DROP DATABASE aa_types")
    admin.close()


def builtin(session: Session) -> list[str]:
    """Every built-in base, range and multirange type of the server that a column can have values of, arrays apart."""
    unbuilt = set() if session.has_xml else {"xml"}
    return [name for name, in session.rows(
        "SELECT t.typname::text FROM pg_type t WHERE t.typnamespace = 'pg_catalog'::regnamespace AND t.oid < 16384 "
        "AND t.typtype IN ('b', 'r', 'm') AND NOT EXISTS (SELECT FROM pg_type e WHERE e.typarray = t.oid) ORDER BY 1") if name not in unbuilt]


def quoted(name: str) -> str:
    return f"pg_catalog.{ident(name)}"


def test_the_zoo_knows_every_type_of_the_server(session: Session) -> None:
    assert set(builtin(session)) - set(type_zoo.VALUES) - type_zoo.REFUSED == set()


@pytest.mark.req("REQ-TYPE-001", "REQ-TYPE-003", "REQ-TYPE-004", "REQ-TYPE-005", "REQ-TYPE-007", "REQ-TYPE-008", "REQ-TYPE-010",
                 "REQ-S3-012", "REQ-S3-014", "REQ-S3-015", "T14", "T15", "T16")
def test_a_table_with_one_column_of_every_built_in_type_comes_back_as_it_was(session: Session) -> None:
    names = [name for name in builtin(session) if name not in type_zoo.REFUSED]
    values = {name: type_zoo.values(name, session.major) for name in names}
    session.rows("CREATE TABLE public.zoo (n int, %s)" % ", ".join(f"{ident('a ' + name)} {quoted(name)}" for name in names))
    for n in range(max(map(len, values.values()))):
        row = ", ".join(f"{values[name][n % len(values[name])]}::{quoted(name)}" for name in names)
        session.rows(f"INSERT INTO public.zoo VALUES ({n}, {row})")
    session.rows("INSERT INTO public.zoo VALUES (-1)")

    lines = session.survives("public.zoo")

    assert set(json.loads(lines[0]).values()) == {-1, None}
    assert b"\x01" not in b"".join(lines) and b"\x02" not in b"".join(lines)


SHAPES = {
    "value": ("{t}", "{v}"),
    "domain": ("zoo.dom", "{v}"),
    "list": ("{t}[]", "ARRAY[{v}, NULL, {v}]"),
    "grid": ("{t}[]", "ARRAY[ARRAY[{v}, NULL], ARRAY[{v}, {v}]]"),
    "odd": ("{t}[]", "array_fill({v}, ARRAY[2], ARRAY[0])"),
    "odd_grid": ("{t}[]", "array_fill({v}, ARRAY[2, 2], ARRAY[1, -3])"),
    "none": ("{t}[]", "'{{}}'"),
    "domains": ("zoo.dom[]", "ARRAY[{v}::zoo.dom, NULL]"),
    "list_domain": ("zoo.list", "ARRAY[{v}, NULL]"),
    "list_domains": ("zoo.list[]", "ARRAY[ARRAY[{v}, {v}]::zoo.list, NULL::zoo.list, '{{}}'::zoo.list]"),
    "pair": ("zoo.pair", "ROW({v}, NULL)"),
    "pair_of_nulls": ("zoo.pair", "ROW(NULL, NULL)"),
    "pair_domain": ("zoo.pair_domain", "ROW({v}, 'x')::zoo.pair"),
    "pairs": ("zoo.pair[]", "ARRAY[ROW({v}, '(,)'), NULL, ROW(NULL, NULL)]::zoo.pair[]"),
    "deep": ("zoo.deep", "ROW(ROW({v}, 'x')::zoo.pair, ARRAY[{v}, NULL], {v})"),
}

VECTOR_SHAPES = {
    "list": "ARRAY[{v}::text, NULL, {v}::text]::{t}[]", "grid": "ARRAY[ARRAY[{v}::text, NULL], ARRAY[{v}::text, '']]::{t}[]",
    "odd": "array_fill({v}::text, ARRAY[2], ARRAY[0])::{t}[]", "odd_grid": "array_fill({v}::text, ARRAY[2, 2], ARRAY[1, -3])::{t}[]",
    "domains": "ARRAY[{v}::text, NULL]::zoo.dom[]", "list_domain": "ARRAY[{v}::text, NULL]::{t}[]",
    "list_domains": "ARRAY[ARRAY[{v}::text, {v}::text]::{t}[]::zoo.list, NULL::zoo.list]",
    "deep": "ROW(ROW({v}, 'x')::zoo.pair, ARRAY[{v}::text, NULL]::{t}[], {v})",
}


@pytest.mark.req("REQ-TYPE-002", "REQ-TYPE-009", "REQ-S3-015", "T14")
@pytest.mark.parametrize("name", sorted(type_zoo.VALUES))
def test_domains_arrays_and_composites_of_a_type_come_back_as_they_were(shared: Session, name: str) -> None:
    if name not in builtin(shared):
        pytest.skip(f"PostgreSQL {shared.major} has no {name}")
    t = quoted(name)
    shared.rows("DROP TABLE IF EXISTS public.shapes, public.shapes_back; DROP SCHEMA IF EXISTS zoo CASCADE")
    shared.rows(f"CREATE SCHEMA zoo; CREATE DOMAIN zoo.dom AS {t}; CREATE DOMAIN zoo.list AS {t}[]; "
                 f"CREATE TYPE zoo.pair AS (x {t}, \"a \"\"y\" text); CREATE DOMAIN zoo.pair_domain AS zoo.pair; "
                 f"CREATE TYPE zoo.deep AS (p zoo.pair, l {t}[], d zoo.dom)")
    shared.rows("CREATE TABLE public.shapes (n serial, %s)" % ", ".join(f"{shape} {type_.format(t=t)}" for shape, (type_, _) in SHAPES.items()))
    made_by = {shape: made for shape, (_, made) in SHAPES.items()}
    if name in ("int2vector", "oidvector"):  # before 13, ARRAY[] takes a vector for a row of its own
        made_by = {shape: VECTOR_SHAPES.get(shape, made) for shape, made in made_by.items()}
    names = ", ".join(SHAPES)
    for value in type_zoo.values(name, shared.major):
        row = ", ".join(made.format(v=f"{value}::{t}", t=t) for made in made_by.values())
        shared.rows(f"INSERT INTO public.shapes ({names}) VALUES ({row})")
    shared.rows("INSERT INTO public.shapes DEFAULT VALUES")

    shared.survives("public.shapes")


@pytest.mark.req("REQ-TYPE-003", "REQ-TYPE-004", "REQ-S3-015", "T14")
def test_json_is_nested_as_it_stands_and_wrapped_only_where_it_must_be(session: Session) -> None:
    session.rows("CREATE TABLE public.j (n serial, b jsonb, t json)")
    for text in ("{\"a\": [1.10, null]}", "null", "{\"$json\": 1}", "\"x\"", "{\"a\":1,\"a\":2}", " 1",
                 "{\"p\": \"\\u0000\"}", "{\n \"a\":\r\n1}", None):
        session.rows("INSERT INTO public.j (b, t) VALUES (%s, %s)", (text if text is None or "u0000" not in text else "0", text))

    raw = [line.decode().partition(",")[2] for line in session.survives("public.j")]

    assert raw == [
        '"b":{"a": [1.10, null]},"t":{"a": [1.10, null]}}',
        '"b":{"$json": "null"},"t":{"$json" : "null"}}',
        '"b":{"$json": "{\\"$json\\": 1}"},"t":{"$json" : "{\\"$json\\": 1}"}}',
        '"b":"x","t":"x"}',
        '"b":{"a": 2},"t":{"a":1,"a":2}}',
        '"b":1,"t":{"$json" : " 1"}}',
        '"b":0,"t":{"$json" : "{\\"p\\": \\"\\\\u0000\\"}"}}',
        '"b":{"a": 1},"t":{  "a":  1}}',
        '"b":null,"t":null}']


@pytest.mark.req("REQ-TYPE-002", "REQ-TYPE-005", "REQ-TYPE-008", "REQ-S3-015", "REQ-TIME-009", "T15")
def test_values_have_the_documented_json_forms(session: Session) -> None:
    line = session.values(
        "public.forms", "num numeric(10,2), big int8, f float8, nan float4, b bytea, long bytea, u uuid, ts timestamp, tz timestamptz, d date, "
        "inf timestamptz, ia int[], na numeric[], ta timestamptz[], oa text[], ga int[], c5 char(5), v3 varchar(3), "
        "c \"char\", high \"char\", b3 bit(3), r regclass, iv int2vector, i interval, bo bool",
        "1.50, 9007199254740993, -0.1, 'NaN', '\\xff', decode(repeat('00', 100), 'hex'), 'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11', "
        "'2024-01-02 03:04:05.6', '2024-01-02 03:04:05+05:45', '2024-01-02', 'infinity', '{1,NULL}', '{1.10,NaN}', '{2024-01-02 00:00:00+00}', "
        "'[0:1]={a,NULL}', '{{1,2},{3,4}}', 'ab', 'abc', 'U', "
        "(-1)::\"char\", B'101', 'pg_class', '1 2', '1 day -00:00:01', true")[0]

    assert line == {
        "n": 0, "num": "1.50", "big": 9007199254740993, "f": -0.1, "nan": "NaN", "b": "base64:/w==", "long": "base64:" + "A" * 134 + "==",
        "u": "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "ts": "2024-01-02T03:04:05.6", "tz": "2024-01-01T21:19:05+00:00", "d": "2024-01-02",
        "inf": "infinity", "ia": [1, None], "na": ["1.10", "NaN"], "ta": ["2024-01-02T00:00:00+00:00"], "oa": {"$array": "[0:1]={a,NULL}"},
        "ga": [[1, 2], [3, 4]], "c5": "ab   ", "v3": "abc", "c": "U", "high": "-1", "b3": "101", "r": {"oid": 1259, "name": "pg_class"},
        "iv": "1 2", "i": "1 day -00:00:01", "bo": True}


def test_xml_keeps_its_declaration(session: Session) -> None:
    if not session.has_xml:
        pytest.skip("the server was built without libxml")

    lines = session.values("public.declared", "x xml", "'<?xml version=\"1.0\"?><a/>'", "'<a/>'")

    assert [line["x"] for line in lines] == ["<?xml version=\"1.0\"?><a/>", "<a/>"]


def test_odd_column_names_come_back(session: Session) -> None:
    names = ["Ümlaut", "with \"quotes\"", "per%cent %s", "new\nline", "back\\slash", "select", "_leading",
             "a.b", "{0}", "$json", "t", "r", "_d", "_x"]
    session.rows("CREATE TABLE public.names (n int, %s)" % ", ".join(f"{ident(name)} text[]" for name in names))
    session.rows("INSERT INTO public.names VALUES (1, %s)" % ", ".join(["'{a}'"] * len(names)))

    assert list(json.loads(session.survives("public.names")[0])) == ["n", *names]


@pytest.mark.req("T17")
def test_settings_of_server_database_and_role_do_not_change_a_line(session: Session, db: TestDatabase) -> None:
    xml = "'<a/><b/>'" if session.has_xml else "NULL"
    session.rows("CREATE TABLE public.settings (n int, tz timestamptz, ts timestamp, d date, i interval, f float8, r float4, b bytea, "
                 "m money, x xml, a text[], tr tstzrange, ba bytea[], ia interval[])")
    session.rows("INSERT INTO public.settings VALUES (1, '2024-02-01 12:00:00+00', '2024-02-01 12:00:00', '2024-02-01', '-1 mons +2 days -00:00:01', "
                 f"0.1::float8 + 0.2, 0.1, '\\x00ff', '$1,234.50', {xml}, '{{a,NULL}}', "
                 "'[2024-02-01 12:00:00+00,)', '{\"\\\\x00ff\"}', '{-1 mons +2 days}')")
    before = session.lines("public.settings")
    for setting, value in {"datestyle": "German, DMY", "intervalstyle": "sql_standard", "bytea_output": "escape", "extra_float_digits": "-15",
                           "timezone": "Asia/Kathmandu", "xmloption": "document", "array_nulls": "off", "search_path": "public",
                           "standard_conforming_strings": "off", "backslash_quote": "off", "transform_null_equals": "on"}.items():
        db.admin(f"ALTER DATABASE {db.name} SET {setting} = {literal(value) if setting != 'search_path' else value}")
    db.admin(f"ALTER ROLE postgres IN DATABASE {db.name} SET datestyle = 'SQL, DMY'")

    changed = Session(db)

    assert changed.lines("public.settings") == before
    assert changed.survives("public.settings") == before
    changed.connection.close()


def test_a_latin1_database_comes_back(session: Session, db: TestDatabase, pg: Cluster) -> None:
    db.admin(f"CREATE DATABASE {db.name}_l ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    latin = TestDatabase(pg, db.name + "_l")
    other = Session(latin)
    lines = other.values("public.latin", "t text, j json, b jsonb, c \"char\", a text[]",
                         "'Grüße', '{\"a\": \"\\u20ac\", \"b\": \"ü\"}', '{\"ü\": \"é\"}', (-28)::\"char\", '[0:0]={ü}'",
                         "NULL, '\"é\" ', 'null', NULL, '{é}'")
    other.connection.close()
    latin.close()
    db.admin(f"DROP DATABASE {db.name}_l")

    assert lines[0]["t"] == "Grüße" and lines[0]["j"] == {"$json": "{\"a\": \"\\u20ac\", \"b\": \"ü\"}"}


def test_only_types_without_a_proof_are_checked_in_every_batch(session: Session) -> None:
    session.rows("CREATE DOMAIN public.checked AS int; CREATE DOMAIN public.unchecked AS int; CREATE TYPE public.holds AS (a int, x xml)")
    session.rows("CREATE TABLE public.proof (n int, b jsonb, j json, a text[], ja jsonb[], r tstzrange, y bytea, d public.checked, x xml, q tsquery, "
                 "u public.unchecked, c public.holds, l public.holds[])")
    session.rows("ALTER DOMAIN public.checked ADD CHECK (VALUE > 0); ALTER DOMAIN public.unchecked ADD CHECK (VALUE > 0) NOT VALID")

    found = session.columns("public.proof")

    assert [column.name for column in found if column.roundtrip_always] == ["x", "q", "u", "c", "l"]
    assert all(column.roundtrip_why for column in found if column.roundtrip_always)


def test_keys_can_be_told_from_values_that_are_no_scalar(session: Session) -> None:
    session.rows("CREATE TYPE public.ab AS (a int, b int); "
                 "CREATE TABLE public.keys (n int, u uuid, t timestamptz, v numeric, y bytea, j jsonb, a int[], "
                 "r int4range, c public.ab, g regclass)")

    assert [column.name for column in session.columns("public.keys") if column.scalar] == ["n", "u", "t", "v", "y"]


def test_the_round_trip_finds_a_value_that_a_faulty_codec_would_lose(session: Session) -> None:
    session.rows("CREATE TABLE public.lossy (n int, b jsonb, a text[])")
    session.rows("INSERT INTO public.lossy VALUES (1, '{\"a\": 1}', '{a}'), (2, 'null', '{a}'), (3, '{}', '[2:2]={a}'), (4, NULL, NULL)")
    columns = session.columns("public.lossy")

    def failing(changed: str) -> list[int]:
        faulty = [replace(column, codec=type_codecs.Codec(column.type, column.type)) if column.name == changed else column for column in columns]
        return [n for n, in session.rows(f"SELECT t.n FROM public.lossy t WHERE NOT {table_columns.roundtrip_sql(faulty, 't')}")]

    assert failing("nothing") == []
    assert failing("b") == [2], "row_to_json alone turns JSON null into NULL"
    assert failing("a") == [3], "row_to_json alone forgets lower bounds"


def test_the_round_trip_can_judge_a_line_that_is_already_there(session: Session) -> None:
    session.rows("CREATE TABLE public.given (n int, v numeric)")
    session.rows("INSERT INTO public.given VALUES (1, 1.50), (2, 1.5)")
    check = table_columns.roundtrip_sql(session.columns("public.given"), "t", "l.line")

    found = session.rows(f"SELECT t.n, {check} FROM public.given t, (SELECT '{{\"n\":1,\"v\":\"1.50\"}}'::text AS line) l ORDER BY 1")

    assert found == [(1, True), (2, False)]


def test_bytes_that_differ_without_meaning_do_not_keep_a_row_back(session: Session) -> None:
    """A slice of an array with NULLs keeps its null bitmap; no text and no JSON can tell."""
    session.rows("CREATE TABLE public.bitmap (n int, a int[]); INSERT INTO public.bitmap SELECT 1, ('{1,2,NULL}'::int[])[1:2]")
    columns = session.columns("public.bitmap")
    assert session.rows("SELECT record_image_eq(ROW(a), ROW('{1,2}'::int[])) FROM public.bitmap") == [(False,)]

    assert session.rows(f"SELECT {table_columns.roundtrip_sql(columns, 't')} FROM public.bitmap t") == [(True,)]


def test_a_wide_table_comes_back(session: Session) -> None:
    session.rows("CREATE TABLE public.wide (n int, %s)" % ", ".join(f"c{i} text" for i in range(1599)))
    session.rows("INSERT INTO public.wide (n, c0, c1598) VALUES (1, 'first', 'last')")

    columns = session.columns("public.wide")

    assert session.rows(f"SELECT {table_columns.roundtrip_sql(columns, 't')} FROM public.wide t") == [(True,)]
    assert len(json.loads(session.lines("public.wide")[0])) == 1600


@pytest.mark.req("REQ-TYPE-016", "REQ-TYPE-018")
def test_every_type_of_the_table_and_every_refused_one_is_documented() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "types.md").read_text(encoding="utf-8")

    missing = [name for name in sorted({*type_zoo.VALUES, *type_zoo.REFUSED} - {"char"}) if f"`{name}`" not in text]

    assert missing == [] and '`"char"`' in text
