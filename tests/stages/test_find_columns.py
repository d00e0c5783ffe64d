"""find_columns: their values stand behind the key in each row, and the metadata of a batch say where they may be."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from audit_archiver.catalogue import evidence, staged
from audit_archiver.formats import names
from audit_archiver.postgres import columns as table_columns
from audit_archiver.postgres.type_codecs import UNIFORM
from tests.conftest import AUDIT_LOGS
from tests.ground import tables
from tests.ground.by_hand import ByHand
from tests.ground.finding import in_range, may_hold
from tests.ground.held import Holder, NoServer, plan
from tests.ground.run import run_stage

ODD = 'we"ird [a-z] (.*) \\é $1'
SCALARS = {
    "user_id": "bigint", ODD: "text", ":,{\"": "varchar(9)", "code": "character(4)", "amount": "numeric(8,2)", "at": "timestamp", "day": "date",
    "mood": "mood", "ok": "boolean", "ip": "inet", "ref": "uuid", "raw": "bytea", "small": "posint",
}
VALUES = """
    CASE WHEN i % 7 = 0 THEN NULL ELSE 1000 + i / 3 END,
    (ARRAY['plain', '', 'a"b', 'back\\slash', E'tab\\tnl\\ncr\\r\\x01\\x7f', 'é 😀', '","user_id":42,"x":"', 'null', '}', NULL])[1 + i % 10],
    '","' || i % 50, 'c' || i % 30, i / 100.0, '2024-01-01'::timestamp + i * interval '0.5 s', '0044-03-15 BC'::date + i % 90,
    (ARRAY['sad', 'mad"'])[1 + i % 2]::mood, i % 3 = 0, ('10.0.' || i % 9 || '.' || i % 250)::inet,
    md5('u' || i % 600)::uuid, decode(md5('r' || i % 20), 'hex'), 1 + i % 40
"""
"""Columns by whose values rows are found, and what stands in them."""


def odd_table(db: Any, rows: int) -> None:
    """Between the key and the columns to find by: a text, jsonb and json that look like them."""
    db.execute("CREATE TYPE mood AS ENUM ('sad', 'mad\"'); CREATE DOMAIN posint AS int CHECK (VALUE > 0)")
    columns = ", ".join('"{}" {}'.format(name.replace('"', '""'), kind) for name, kind in SCALARS.items())
    db.execute(f"CREATE TABLE odd (note text, details jsonb, j json, id int PRIMARY KEY, {columns}, created_at timestamptz NOT NULL)")
    decoy = '{"user_id":42,"' + json.dumps(ODD)[1:-1] + '":"decoy"}'
    db.execute("INSERT INTO odd SELECT %s || i, %s::jsonb, %s::json, i, " + VALUES.replace("%", "%%")
               + ", '2024-01-01'::timestamptz + i * interval '1 s' FROM generate_series(1, %s) i",
               ('{"id":1,"user_id":42},"user_id":42,"', decoy, decoy, rows))


def members_of(line: dict[str, Any]) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    """The staged metadata, and the rows of each gzip member, parsed."""
    base = Path(line["serialized"]["dir"]) / Path(line["serialized"]["stem"]).name
    packed = Path(f"{base}{names.DATA}").read_bytes()
    described = json.loads(Path(f"{base}{names.METADATA}").read_bytes())
    borders = [*described["members"], len(packed)]
    return described, [[json.loads(row) for row in gzip.decompress(packed[start:end]).split(b"\n")[:-1]]
                       for start, end in zip(borders, borders[1:])]


def dump(value: Any) -> bytes:
    """A value's JSON as the server writes it."""
    return json.dumps(value, ensure_ascii=False).encode()


def test_every_value_is_found_in_its_member_whatever_stands_around_it(db: Any, config_file: Any) -> None:
    odd_table(db, 1100)
    find = list(SCALARS)[::-1]
    with Holder(config_file(db, NoServer)) as holder:
        (line,) = holder.verified(plan(holder.settings, "odd", batch_size=2000, find=find))
        deleted = holder.delete([line])
        assert deleted.rc == 0 and holder.commit(deleted.lines[0])["committed"], deleted.err
    described, members = members_of(line)
    assert [len(rows) for rows in members] == [500, 500, 100]
    order = ["id", *find, "note", "details", "j", "created_at"]
    assert [name for name, _ in line["batch"]["columns"]] == order and list(members[0][0])[:len(order)] == order
    assert {each["column"]: each["order"] for each in described["ranges"]} == {
        **dict.fromkeys(["id", *find], "json"), "id": "number", "user_id": "number"}
    for column in find:
        for member, rows in enumerate(members):
            for value in {dump(row[column]) for row in rows}:
                assert member in may_hold(described, column, value), (column, value)
                assert in_range(described, column, value), (column, value)
    for column, decoy in (("user_id", b"42"), (ODD, b'"decoy"'), ("ok", b"null"), ("small", b"42")):
        assert may_hold(described, column, decoy) == [], "what stands in other columns is not this one's"


def test_the_key_the_timestamp_and_a_generated_column_can_be_found_by(db: Any, config_file: Any) -> None:
    if db.connection.server_version < 120000:
        pytest.skip("generated columns came with PostgreSQL 12")
    db.execute("CREATE TABLE t (a int, b int, created_at timestamptz, twice int GENERATED ALWAYS AS (a * 2) STORED, PRIMARY KEY (b, a))")
    db.execute("INSERT INTO t SELECT i, i % 4, '2024-01-01'::timestamptz + i * interval '1 s' FROM generate_series(1, 600) i")
    with Holder(config_file(db, NoServer)) as holder:
        (line,) = holder.verified(plan(holder.settings, "t", key=["b", "a"], batch_size=600, find=["created_at", "a", "twice"]))
    described, members = members_of(line)
    assert [name for name, _ in line["batch"]["columns"]] == ["b", "a", "created_at", "twice"]
    assert [[each["min"], each["max"]] for each in described["ranges"]] == [
        [0, 3], [1, 600], ["2024-01-01T00:00:01+00:00", "2024-01-01T00:10:00+00:00"], [2, 1200]]
    for column in ("created_at", "a", "twice"):
        assert all(member in may_hold(described, column, dump(row[column])) for member, rows in enumerate(members) for row in rows)


# -- the order of the columns is the batch's own, whatever the configuration says later

def configured(config_file: Any, db: Any, bucket: Any, *find: str) -> Path:
    """The configuration of audit_logs with these find_columns."""
    return config_file(db, bucket, [{**AUDIT_LOGS, **({"find_columns": list(find)} if find else {})}])


@pytest.mark.parametrize("before, after", [(["user_id", "client"], []), ([], ["user_id"]), (["user_id"], ["client", "user_id"])])
def test_a_batch_by_hand_is_compared_in_its_own_order_after_find_columns_changed(
        db: Any, bucket: Any, config_file: Any, before: list[str], after: list[str]) -> None:
    tables.create(db.connection, rows=250, first="2024-01-01", last="2024-03-01")
    lines = ByHand(db, configured(config_file, db, bucket, *before)).export()
    hand = ByHand(db, configured(config_file, db, bucket, *after))
    described = hand.read(lines[0], names.METADATA)
    assert described.get("find", {}).get("columns", []) == before and ("filters" in described) == bool(before)

    result = hand.delete(lines)

    assert result.rc == 0, result.err
    assert [line["deleted"]["verdict"] for line in result.lines] == ["FULL"] * 3
    assert db.scalar("SELECT count(*) FROM audit_logs") == 0


def test_recovery_compares_rows_in_the_order_of_their_batch(db: Any, bucket: Any, config_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (evidence, staged):
        monkeypatch.setattr(module, "PATIENCE", type(module.PATIENCE)(0))
    tables.create(db.connection, rows=100, first="2024-01-01", last="2024-03-01")
    (line,) = ByHand(db, configured(config_file, db, bucket, "user_id")).export()
    hand = ByHand(db, configured(config_file, db, bucket))

    assert hand.recover().rc == 0

    assert hand.read(line, names.ABANDONED)["evidence"]["content"] == "equal"


# -- which columns

ALIKE = {
    "boolean": ["t", "yes", "1", "f"], "integer": ["-1", " -1"], "smallint": ["7", "+7", "007", "-0", "0"],
    "bigint": ["9007199254740993", " 9007199254740993 "],
    "text": ["a", "a "], "varchar(9)": ["é"], "name": ["n"], "bytea": ["\\x6162", "ab"], "mood": ["sad"], "posint": ["5", "05"],
    "uuid": ["A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11", "{a0eebc999c0b4ef8bb6d6bb9bd380a11}"],
    "date": ["2024-1-2", "January 2, 2024", "0044-03-15 BC", "infinity"], "time": ["4:05", "04:05:00.000", "23:59:60", "24:00"],
    "timestamp": ["2024-01-02 03:04:05.50", "20240102T030405.5", "-infinity"],
    "timestamptz": ["2024-01-02 03:04:05+02", "2024-01-02 01:04:05Z", "2024-01-02 06:49:05 Asia/Kathmandu"],
    "inet": ["10.0.0.1", "10.0.0.1/32", "::ffff", "0:0::FFFF"], "cidr": ["10/8", "10.0.0.0/8"], "macaddr": ["08:00:2b:01:02:03", "08002B-010203"],
    "macaddr8": ["08:00:2b:01:02:03:04:05", "08002b0102030405"], "numeric(8,2)": ["1", "1.0", "1.00", "0.999", "NaN", "-0"],
    "numeric(4,0)": ["10", "1e1", "10.0"], "character(4)": ["a", "a   "],
}


def test_equal_values_of_every_accepted_type_are_written_alike(db: Any) -> None:
    db.execute("CREATE TYPE mood AS ENUM ('sad'); CREATE DOMAIN posint AS int CHECK (VALUE > 0)")
    fields = {f"c{n}": kind for n, kind in enumerate(ALIKE)}
    db.execute("CREATE TABLE a (" + ", ".join(f"{name} {kind}" for name, kind in fields.items()) + ")")
    found = {column.name: column for column in table_columns.columns(db.connection, db.scalar("SELECT 'a'::regclass::oid::bigint"))}
    for name, kind in fields.items():
        assert found[name].uniform, kind
        written = f"to_json({found[name].encode('v')})::text"
        values, texts = db.execute(f"SELECT count(DISTINCT v.{name}), count(DISTINCT {written}) FROM "
                                   f"(SELECT unnest(%s::text[])::{kind} AS {name}) v", (ALIKE[kind],))[0]
        assert values == texts and (values < len(ALIKE[kind]) or kind in ("text", "varchar(9)", "name", "mood", "bytea")), kind
    made = db.execute("SELECT t.typname FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid WHERE attrelid = 'a'::regclass")
    assert {name for name, in made} >= UNIFORM, "each of them is in the list above"


@pytest.mark.parametrize("ddl, find, says", [
    ("user_id int", ["user_di"], "no column 'user_di' (find_columns); did you mean 'user_id'?"),
    ("user_id int", ["zzz"], "no column 'zzz' (find_columns); its columns are id, at, user_id"),
    ("v jsonb", ["v"], "column 'v' of table 'public.a' has the type jsonb, whose equal values may be written differently"),
    ("v numeric", "v", "has the type numeric, whose"), ("v float8", "v", "has the type double precision, whose"),
    ("v interval", "v", "has the type interval, whose"), ("v int[]", "v", "has the type integer[], whose"),
    ("v numeric(9,2)[]", "v", "has the type numeric(9,2)[], whose"), ("v timetz", "v", "has the type time with time zone, whose"),
])
def test_a_column_that_no_row_is_found_by_refuses_the_table_with_its_place(db: Any, config_file: Any, ddl: str, find: Any, says: str) -> None:
    db.execute(f"CREATE TABLE a (id int PRIMARY KEY, at timestamptz, {ddl})")
    path = config_file(db, NoServer, [{"name": "a", "timestamp_column": "at", "primary_key": "id", "find_columns": find}], s3={"retries": 0})
    result = run_stage("aa-plan", ["-c", str(path)])
    assert result.rc == 3
    refused = result.lines[0]["refused"]
    assert says in refused["msg"] and refused["at"].startswith(f"{path}:"), refused


def test_a_column_that_is_not_archived_is_refused_too(db: Any, config_file: Any) -> None:
    if db.connection.server_version < 180000:
        pytest.skip("virtual generated columns came with PostgreSQL 18")
    db.execute("CREATE TABLE a (id int PRIMARY KEY, at timestamptz, v int GENERATED ALWAYS AS (id + 1) VIRTUAL)")
    path = config_file(db, NoServer, [{"name": "a", "timestamp_column": "at", "primary_key": "id", "find_columns": "v"}], s3={"retries": 0})
    result = run_stage("aa-plan", ["-c", str(path)])
    assert result.rc == 3 and "is computed when it is read and not archived" in result.lines[0]["refused"]["msg"]


def test_partitions_are_found_by_the_columns_of_their_parent(db: Any, config_file: Any) -> None:
    db.execute("CREATE TABLE p (id int, at timestamptz, who text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);"
               "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM ('2024-01-01') TO ('2024-02-01');"
               "CREATE TABLE p2 PARTITION OF p FOR VALUES FROM ('2024-02-01') TO ('2024-03-01')")
    path = config_file(db, NoServer, [{"name": "p", "timestamp_column": "at", "primary_key": ["id", "at"], "find_columns": "who"}], s3={"retries": 0})
    result = run_stage("aa-plan", ["-c", str(path)])
    assert [(line["table"], line["find"]) for line in result.lines] == [("p1", ["who"]), ("p2", ["who"])], result.err
