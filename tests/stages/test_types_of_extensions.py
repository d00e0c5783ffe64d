"""Base types of extensions and of users: by their text where each value is shown to come back, or refused by name."""

from __future__ import annotations

from typing import Iterator

import psycopg2.errors
import pytest

from audit_archiver.postgres import columns as table_columns
from tests.conftest import TestDatabase
from tests.stages.type_session import Session


@pytest.fixture()
def session(db: TestDatabase) -> Iterator[Session]:
    made = Session(db)
    yield made
    made.connection.close()


def base_type(session: Session, name: str, takes: str, gives: str, *, how: str = "IMMUTABLE", like: str = "int8") -> None:
    """A base type public.`name`, stored as `like`, with functions of the server's own as its input and output."""
    session.rows(f"CREATE TYPE public.{name}; "
                 f"CREATE FUNCTION public.{name}_in(cstring) RETURNS public.{name} LANGUAGE internal STRICT {how} AS '{takes}'; "
                 f"CREATE FUNCTION public.{name}_out(public.{name}) RETURNS cstring LANGUAGE internal STRICT {how} AS '{gives}'; "
                 f"CREATE TYPE public.{name} (INPUT = public.{name}_in, OUTPUT = public.{name}_out, LIKE = {like})")


def lossy(session: Session) -> None:
    """public.short: eight bytes, of which its text shows four."""
    base_type(session, "short", "int8in", "int4out")
    session.rows("CREATE FUNCTION public.make_short(int8) RETURNS public.short LANGUAGE internal STRICT IMMUTABLE AS 'int8up'")


def inexact(session: Session, table: str) -> list[int]:
    """The rows of a table that are found not to come back, each asked alone: it may raise."""
    columns, found = session.columns(table), []
    for n, in session.rows(f"SELECT n FROM {table} ORDER BY n"):
        try:
            ((same,),) = session.rows(f"SELECT {table_columns.roundtrip_sql(columns, 't')} FROM {table} t WHERE n = {n}")
        except psycopg2.errors.DataError:
            same = False
        found += [] if same else [n]
    return found


HSTORE = [
    "''", "'a=>1'", "'a=>NULL'", '\'a=>"NULL", b=>null\'', '\'"" => "", " " => " "\'',
    "hstore(ARRAY['it''s \"x\"', 'back\\slash', 'a=>b', 'a, b', E'tab\\tline\\nend', 'Grüße 🐘', '{}', 'null'], "
    "ARRAY['\"', '\\', '=>', ',', E'\\n', 'ß', '[1]', 'NULL'])",
    "hstore(ARRAY['long', repeat('k', 3000)], ARRAY[repeat('v\"\\', 5000), NULL])",
]


def test_hstore_comes_back_alone_and_inside_domains_arrays_composites_and_ranges(session: Session, db: TestDatabase) -> None:
    db.needs("hstore")
    session.rows("CREATE SCHEMA \"my ext\"; CREATE EXTENSION hstore SCHEMA \"my ext\"; SET search_path = pg_catalog, \"my ext\"; "
                 "CREATE DOMAIN public.tags AS hstore CHECK (NOT VALUE ? 'forbidden'); "
                 "CREATE TYPE public.noted AS (a int, h hstore, hs hstore[], d public.tags); "
                 "CREATE TYPE public.hranges AS RANGE (subtype = hstore); CREATE DOMAIN public.many AS public.tags[]")
    rows = [f"{h}::hstore, {h}::hstore, ARRAY[{h}, NULL, {h}]::hstore[], ROW({n}, {h}, ARRAY[{h}]::hstore[], {h})::public.noted, "
            f"public.hranges({h}::hstore, NULL), ARRAY[NULL, {h}]::public.many, ARRAY[ROW(1, {h}, NULL, NULL), NULL]::public.noted[]"
            for n, h in enumerate(HSTORE)]
    odd = "NULL, '', '[0:1]={NULL,a=>1}', ROW(NULL, NULL, NULL, NULL), 'empty', '[3:3]={a=>NULL}', '{}'"
    deep = "NULL, NULL, ARRAY[ARRAY['a=>1', '\"b\"=>\"\\\\\"'], ARRAY[NULL, '']]::hstore[], NULL, NULL, '{}', NULL"

    lines = session.values("public.hs", "h hstore, d public.tags, l hstore[], c public.noted, r public.hranges, m public.many, cs public.noted[]",
                           *rows, odd, deep)

    assert [line["h"] for line in lines[:3]] == ["", '"a"=>"1"', '"a"=>NULL']
    assert lines[1]["d"] == '"a"=>"1"' and lines[1]["l"] == ['"a"=>"1"', None, '"a"=>"1"']
    assert lines[1]["c"] == {"a": 1, "h": '"a"=>"1"', "hs": ['"a"=>"1"'], "d": '"a"=>"1"'}
    assert lines[-2]["l"] == {"$array": '[0:1]={NULL,"\\"a\\"=>\\"1\\""}'} and lines[-2]["c"] == {"a": None, "h": None, "hs": None, "d": None}
    assert [column.roundtrip_always for column in session.columns("public.hs")] == [False] * 8, "every hstore comes back, none has to be tried"


def test_citext_and_ltree_come_back_alone_and_inside_domains_arrays_and_composites(session: Session, db: TestDatabase) -> None:
    db.needs("citext", "ltree")
    session.rows("CREATE EXTENSION citext SCHEMA public; CREATE EXTENSION ltree SCHEMA public; CREATE DOMAIN public.mail AS public.citext; "
                 "CREATE DOMAIN public.way AS public.ltree; CREATE TYPE public.both AS (c public.citext, l public.ltree[], d public.mail)")

    lines = session.values("public.good", "c public.citext, l public.ltree, cs public.citext[], d public.mail, w public.way[], b public.both",
                           "'Grüße', 'a.b.c', '{A,NULL}', 'X', '{a,a.b}', ROW('a\"', '{A.B,NULL}', 'It''s')", "'', '', '{}', '', '{}', NULL",
                           "NULL, NULL, '{{a,B},{NULL,d}}', NULL, '[2:2]={a}', ROW(NULL, NULL, NULL)")

    assert lines[0] == {"n": 0, "c": "Grüße", "l": "a.b.c", "cs": ["A", None], "d": "X", "w": ["a", "a.b"],
                        "b": {"c": 'a"', "l": ["A.B", None], "d": "It's"}}


@pytest.mark.parametrize(("extension", "type_", "values"), [
    ("cube", "cube", ["(0.1, 2), (3, -4e-300)", "(1)", "(0.1,0.2)", "(NaN)", "(Infinity)"]),
    ("isn", "isbn", ["978-0-393-04002-9", "0-393-04002-X", "978-0-393-04002-1!"]), ("isn", "upc", ["220356483481"]),
    ("ltree", "lquery", ["*.Top.!a|b@*.*{1,2}.c%", "a"]), ("ltree", "ltxtquery", ["Europe & !(Asia | b*@)"]),
    ("intarray", "query_int", ["1&(2|!3)", "5"]), ("seg", "seg", ["1.50 .. 2", "~ 1", "<2"])])
def test_other_types_of_extensions_come_back_value_by_value(session: Session, db: TestDatabase, extension: str, type_: str,
                                                           values: list[str]) -> None:
    db.needs(extension)
    session.rows(f"CREATE EXTENSION {extension} SCHEMA public; CREATE DOMAIN public.dom AS public.{type_}; "
                 f"CREATE TYPE public.com AS (v public.{type_}, d public.dom)")

    lines = session.values("public.others", f"v public.{type_}, l public.{type_}[], d public.dom, c public.com, cs public.com[]",
                           *(f"'{v}', ARRAY['{v}', NULL]::public.{type_}[], '{v}', ROW('{v}', '{v}'), ARRAY[ROW('{v}', NULL), NULL]::public.com[]"
                             for v in values),
                           f"NULL, ARRAY[ARRAY['{values[0]}', NULL]]::public.{type_}[], NULL, NULL, '{{}}'",
                           f"NULL, ('[5:5]=' || ARRAY['{values[0]}']::public.{type_}[]::text)::public.{type_}[], NULL, ROW(NULL, NULL), NULL")

    shown = [text for text, in session.rows("SELECT v::text FROM public.others ORDER BY n")]
    assert [line["v"] for line in lines] == shown and lines[0]["l"] == [shown[0], None] and lines[0]["c"] == {"v": shown[0], "d": shown[0]}
    assert all(column.roundtrip_always for column in session.columns("public.others")[1:])


def test_a_value_that_its_text_does_not_give_back_is_in_no_line(session: Session) -> None:
    """Its text is read as another value with the same text: only the bytes tell."""
    lossy(session)
    session.rows("CREATE DOMAIN public.dshort AS public.short; CREATE TYPE public.cshort AS (a int, s public.short)")
    small, large = "public.make_short(7)", "public.make_short(8589934599)"
    assert session.rows(f"SELECT {small}::text, {large}::text") == [("7", "7")]
    one = ["{0}", "NULL", "NULL", "NULL", "NULL"]
    for place, shape in enumerate(["{0}", "{0}::public.dshort", "ROW(1, {0})::public.cshort", "ARRAY[NULL, {0}]",
                                   "ARRAY[ROW(2, {0})::public.cshort]"]):
        one[:] = ["NULL"] * 5
        one[place] = shape
        table = f"public.shorts{place}"
        session.rows(f"CREATE TABLE {table} (n int, s public.short, d public.dshort, c public.cshort, l public.short[], cs public.cshort[])")
        for n, value in enumerate((small, large, "NULL::public.short")):
            session.rows(f"INSERT INTO {table} VALUES ({n}, {', '.join(one).format(value)})")
        assert inexact(session, table) == [1]
        with pytest.raises(psycopg2.errors.InvalidTextRepresentation):
            session.lines(table)
        session.rows(f"DELETE FROM {table} WHERE n = 1")
        session.survives(table)


@pytest.mark.parametrize("bounds", ["ARRAY[ARRAY[{0}], ARRAY[{0}]]", "array_fill({0}, ARRAY[2], ARRAY[0])"])
def test_the_text_of_an_odd_array_is_proven_by_its_elements(session: Session, bounds: str) -> None:
    lossy(session)
    small, large = "public.make_short(7)", "public.make_short(8589934599)"
    session.values("public.odd", "l public.short[]", bounds.format(small))

    session.rows(f"INSERT INTO public.odd VALUES (1, {bounds.format(large)})")

    assert inexact(session, "public.odd") == [1]


def test_a_type_whose_text_may_depend_on_more_than_the_value_is_refused_by_name_with_a_remedy(session: Session) -> None:
    base_type(session, "fickle", "int8in", "int8out", how="STABLE")
    session.rows("CREATE DOMAIN public.dfickle AS public.fickle; CREATE TYPE public.cfickle AS (a int, f public.fickle); "
                 "CREATE TABLE public.bad (n int, f public.fickle, fs public.fickle[], d public.dfickle, c public.cfickle)")

    found = {column.name: column for column in session.columns("public.bad")}

    assert [name for name, column in found.items() if column.refusal] == ["f", "fs", "d", "c"]
    for name in ("f", "fs", "d", "c"):
        reason, remedy = found[name].refusal or ("", "")
        assert "'public.fickle'" in reason and "ALTER TABLE" in remedy
        with pytest.raises(ValueError):
            found[name].encode("t")


def test_casts_that_somebody_made_change_no_text(session: Session, db: TestDatabase) -> None:
    db.needs("citext", "hstore")
    session.rows("CREATE EXTENSION citext SCHEMA public; CREATE EXTENSION hstore SCHEMA public; "
                 "CREATE FUNCTION public.lower_json(public.citext) RETURNS json LANGUAGE sql IMMUTABLE AS 'SELECT to_json(lower($1::text))'; "
                 "CREATE CAST (public.citext AS json) WITH FUNCTION public.lower_json; "
                 "CREATE FUNCTION public.secret(public.hstore) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT ''hidden'''; "
                 "CREATE CAST (public.hstore AS text) WITH FUNCTION public.secret; "
                 "CREATE FUNCTION public.nothing(text) RETURNS public.hstore LANGUAGE sql IMMUTABLE AS 'SELECT public.hstore(''x'', NULL)'; "
                 "CREATE CAST (text AS public.hstore) WITH FUNCTION public.nothing")

    lines = session.values("public.cast_away", "c public.citext, h public.hstore, cs public.citext[], hs public.hstore[]",
                           "'Grüße', 'a=>1', '{Aa}', '{a=>1}'", "NULL, NULL, NULL, '{{a=>1},{b=>NULL}}'")

    assert lines[0] == {"n": 0, "c": "Grüße", "h": '"a"=>"1"', "cs": ["Aa"], "hs": ['"a"=>"1"']}
