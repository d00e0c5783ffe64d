"""Tables, names, keys and databases of every shape: archived exactly, or refused with a message that names them. Nothing is lost.

Partitions are in tests/stages/test_partitions.py, wide rows in test_wide_rows.py.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import Any, Callable, Iterator, NamedTuple

import psycopg2.errors
import pytest

from audit_archiver.postgres.quoting import ident, literal
from tests.conftest import ARCHIVER, TestDatabase
from tests.ground import tables
from tests.ground.archive import Archive
from tests.ground.driven import Driven, summary
from tests.ground.postgres import Cluster
from tests.ground.run import ROOT, run_forked

OLD = "'2024-01-01'::timestamptz + n / 2 * interval '1 minute'"  # two rows at a time: the key decides between them
YOUNG = "now() - interval '5 days'"
ROWS, DUE = 7, 6

every_mode = pytest.mark.parametrize("mode", ["held", "late"])


class Shape(NamedTuple):
    """A table: its columns beside the timestamp, what stands in row n of 7, and its key. Row 7 is young."""

    columns: str
    values: str
    key: Any = "id"
    schema: str = "public"
    stamp: str = "created_at"
    then: str = ""
    empty: bool = False

    def create(self, db: TestDatabase, name: str) -> str:
        """Make and fill it; `then` is done at the end, with the SQL name as {0}. Returns the SQL name."""
        table = f"{ident(self.schema)}.{ident(name)}"
        if self.schema != "public":
            db.execute(f"CREATE SCHEMA IF NOT EXISTS {ident(self.schema)}")
        db.execute(f"CREATE TABLE {table} ({ident(self.stamp)} timestamptz NOT NULL, {self.columns})")
        if not self.empty:
            db.execute(f"INSERT INTO {table} SELECT CASE WHEN n = {ROWS} THEN {YOUNG} ELSE {OLD} END, {self.values} "
                       f"FROM generate_series(1, {ROWS}) n")
        if self.then:
            db.execute(self.then.format(table))
        return table

    def entry(self, name: str) -> dict[str, Any]:
        """The table in the configuration."""
        return {"name": name, "schema": self.schema, "timestamp_column": self.stamp, "primary_key": self.key, "batch_size": 4}


class Still(Archive):
    """An archive to which nobody writes any more: every object is fetched once."""

    def __init__(self, archive: Archive) -> None:
        super().__init__(archive.client, archive.bucket)
        self._keys, self._read = super().keys(), dict[str, bytes]()

    def keys(self, prefix: str = "") -> list[str]:
        return [key for key in self._keys if key.startswith(prefix)]

    def read(self, key: str) -> bytes:
        if key not in self._read:
            self._read[key] = super().read(key)
        return self._read[key]


def archived(db: TestDatabase, bucket: Any, config_file: Any, shapes: dict[str, Shape], **more: Any) -> Driven:
    """Archive tables of these shapes in one run, and show that each row is in exactly one of table and archive."""
    made = {name: shape.create(db, name) for name, shape in shapes.items()}
    before = {name: tables.digest(db.connection, table) for name, table in made.items()}
    runs = Driven(db, bucket, config_file(db, bucket, [shape.entry(name) for name, shape in shapes.items()], **more))
    result = runs.run()
    assert result.rc == 0, result.err
    runs.archive = Still(runs.archive)
    for name, shape in shapes.items():
        due, left = (0, 0) if shape.empty else (DUE, ROWS - DUE)
        assert (name, db.scalar(f"SELECT count(*) FROM {made[name]}")) == (name, left), result.err
        assert (name, runs.whole(made[name], before[name], name=name, schema=shape.schema)) == (name, due)
    return runs


def refused(db: TestDatabase, bucket: Any, config_file: Any, entries: list[dict[str, Any]], *said: str, **more: Any) -> None:
    """A run in which every table is refused: exit 3, each with its message, and nothing was written."""
    runs = Driven(db, bucket, config_file(db, bucket, entries, **more))
    result = runs.run()
    assert result.rc == 3, result.err
    for each in said:
        assert each in result.err
    assert runs.archive.keys() == []


@pytest.fixture()
def database(pg: Cluster) -> Iterator[Callable[..., TestDatabase]]:
    """A function that makes a database of any name and encoding."""
    with contextlib.ExitStack() as stack:
        admin = stack.enter_context(contextlib.closing(pg.connect()))

        def sql(text: str) -> None:
            with admin.cursor() as cursor:
                cursor.execute(text)

        def make(name: str, encoding: str = "UTF8") -> TestDatabase:
            sql(f"CREATE DATABASE {ident(name)} TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' OWNER {ARCHIVER}")
            stack.callback(sql, f"DROP DATABASE {ident(name)}")
            made = TestDatabase(pg, name)
            stack.callback(made.close)
            made.admin(f"GRANT ALL ON SCHEMA public TO {ARCHIVER}")
            return made
        yield make


# Columns

NAMES = ["format", "end", "[", "]", "{", "n", "tid", "t", "b", "d", "p", "tids", "u", "k", "s", "x", "g", "f", "l", "w", "v", "key", "line", "count",
         "_d", "_x", "_c0", "_a0", "a.b", "a/b", "it's", 'say "no"', "100%", "%s", "%(n)s", "back\\slash", " ", "Grüße", "日本", "x" * 63, "ß" * 31]
CONTROL = ["new\nline", "tab\t", "\x01", "\r"]


@every_mode
def test_columns_of_any_name_are_archived(db: TestDatabase, bucket: Any, config_file: Any, mode: str) -> None:
    every, many = NAMES + CONTROL, NAMES[:31]
    shapes = {"texts": Shape(f"id int PRIMARY KEY, {', '.join(f'{ident(name)} text' for name in every)}",
                             f"n, {', '.join(f'{literal(name)} || n' for name in every)}"),
              "key of 31": Shape(f"{', '.join(f'{ident(name)} int' for name in many)}, PRIMARY KEY ({', '.join(map(ident, many))})",
                                 ", ".join("n" for _ in many), key=many)}
    own = ("n", "tid", "tids", "t", "b", "p", "g", "s", "u", "size", "part", "total")
    shapes["toasted"] = Shape(f"{', '.join(f'{name} text' for name in own)}, PRIMARY KEY (n, tid)",
                              f"'n' || n, 'i' || n, 'a', repeat(md5(n::text), 3000), {', '.join(literal(name) for name in own[4:])}",
                              key=["tid", "n"], then="ALTER TABLE {0} ALTER t SET STORAGE EXTERNAL; UPDATE {0} SET t = t || 'y'")
    for name in ("n", "tid", "t", "[", 'say "no"', "%(n)s", "back\\slash", "ß" * 31) if mode == "held" else ("n", "t"):
        shapes[f"key {name}"] = Shape(f"{ident(name)} int PRIMARY KEY, doc jsonb", "n, 'null'", key=name, stamp="at " + name[:29])
    for name in ("end", "n", "tid", "b", "t", "it's", "%s") if mode == "held" else ("n", "t"):
        shapes[f"stamp {name}"] = Shape("id int PRIMARY KEY", "n", stamp=name)

    archived(db, bucket, config_file, shapes, locking={"mode": mode})


def test_generated_identity_and_dropped_columns_and_a_table_without_rows_are_archived(db: TestDatabase, bucket: Any, config_file: Any) -> None:
    shapes = {
        "identity": Shape("id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, own int GENERATED BY DEFAULT AS IDENTITY", "n, n + 100",
                          then="ALTER TABLE {0} ALTER own RESTART WITH 5"),
        "dropped": Shape("gone int, id int PRIMARY KEY, went text, doc jsonb, last int", "n, n, 'was', '{\"a\": 1}', n",
                         then="ALTER TABLE {0} DROP gone, DROP went, DROP last, ADD later text DEFAULT 'late', ADD none int"),
        "empty": Shape("id int PRIMARY KEY", "", empty=True),
        "serial": Shape("id bigserial PRIMARY KEY, \"check\" int CHECK (\"check\" > 0), note text DEFAULT 'd'", "n, n, NULL"),
    }
    shapes["identity"] = shapes["identity"]._replace(columns=shapes["identity"].columns.replace("ALWAYS", "BY DEFAULT"),
                                                     then="ALTER TABLE {0} ALTER id SET GENERATED ALWAYS")
    if int(db.cluster.version.split(".")[0]) >= 12:
        shapes["generated"] = Shape("id int PRIMARY KEY, net numeric, gross numeric", "n, n * 1.10, n",
                                    then="ALTER TABLE {0} DROP gross, ADD gross numeric GENERATED ALWAYS AS (net * 1.2) STORED, "
                                         "ADD upper text GENERATED ALWAYS AS (upper(id::text)) STORED")

    archived(db, bucket, config_file, shapes)


def test_a_timestamp_of_every_accepted_type_is_archived(db: TestDatabase, bucket: Any, config_file: Any) -> None:
    db.execute("CREATE DOMAIN moment AS timestamptz; CREATE DOMAIN instant AS moment NOT NULL; CREATE DOMAIN day AS date")
    types = ("timestamp", "date", "timestamptz(3)", "timestamp(0)", "moment", "instant", "day")

    archived(db, bucket, config_file, {f"at {type_}": Shape("id int PRIMARY KEY", "n", then=f"ALTER TABLE {{0}} ALTER created_at TYPE {type_}")
                                       for type_ in types})


def test_a_table_of_1600_columns_is_archived(db: TestDatabase, bucket: Any, config_file: Any) -> None:
    columns = [f'"column {number}"' for number in range(1598)]
    values = ", ".join("n" if number % 3 else "NULL" for number in range(1598))
    wide = Shape(f"id int PRIMARY KEY, {', '.join(f'{name} int2' for name in columns)}", f"n, {values}")

    archived(db, bucket, config_file, {"wide": wide}, roundtrip="always")


@pytest.mark.parametrize("name", ["_batch_id", "_archived_at", "_source_table", "_source_database"])
def test_a_column_that_bears_a_name_of_ours_is_refused(db: TestDatabase, bucket: Any, config_file: Any, name: str) -> None:
    shape = Shape(f"id int PRIMARY KEY, {name} text", "n, 'x'")
    shape.create(db, "logs")
    refused(db, bucket, config_file, [shape.entry("logs")], f"table 'public.logs' has a column '{name}'", "rename the column")


def test_with_several_unique_keys_the_configured_one_counts(db: TestDatabase, bucket: Any, config_file: Any) -> None:
    two = "id int PRIMARY KEY, code text NOT NULL, a int NOT NULL, b date NOT NULL, c int UNIQUE, UNIQUE (a, b), UNIQUE (code) INCLUDE (c)"
    values = "n, 'c' || n % 4 || n, n / 3, date '2024-01-01' + n, NULL"

    runs = archived(db, bucket, config_file, {"one": Shape(two, values, key="code"), "two": Shape(two, values, key=["b", "a"]),
                                              "more": Shape(two, values, key=["id", "a"])})

    assert {tuple(line["batch"]["key"]) for line in runs.archive.commits()} == {("code",), ("b", "a"), ("id", "a")}


# Keys

ODD = "(ARRAY['', ' ', 'a\"b'',', E'\\\\', E'\\n\\t\\r\\x01', 'Grüße 🐘', '[\"null\"]'])[n]"
MOODS = "CREATE TYPE mood AS ENUM ('z5', 'm1', 'a4', 'M2', 'c7', 'b6', 'm3', ''); CREATE DOMAIN d_mood AS mood"
MOOD = "(ARRAY['m1','M2','m3','a4','z5','b6','c7'])[n]::mood"
MIXED = "(ARRAY['b', 'C', 'a', 'd', 'E', 'F', 'g'])[n]"
KEYS = {
    "int2": "n", "int4": "-n", "int8": "9007199254740993 + n", "numeric": "n + 0.10", "numeric(30,10)": "1e15 + n", "float8": "n / 3.0", "oid": "n",
    "text": "E'it''s \"\\\\\\t ' || n", "varchar": "'v' || n", "char(12)": "'c' || n", "name": "'n' || n", "uuid": "md5(n::text)::uuid",
    "date": "date '0044-03-15 BC' + n", "timestamp": "timestamp '2024-03-31 02:30' + n * interval '1 us'",
    "time": "time '12:00' + n * interval '1 us'", "timestamptz": "timestamptz '2024-03-31 02:30+01' + n * interval '1 us'",
    "interval": "n * interval '1 mon'", "inet": "inet '10.0.0.0/8' + n", "cidr": "('10.0.' || n || '.0/24')::cidr",
    "macaddr": "('08:00:2b:01:02:0' || n)::macaddr", "bytea": "decode(lpad(n::text, 4, 'f'), 'hex')",
    "bit(8)": "n::bit(8)", "money": "n::money", "\"char\"": "(n - 4)::\"char\"", "pg_lsn": "('0/' || n)::pg_lsn",
    "mood": MOOD, "d_int": "n", "d_text": "'d' || n", "d_d_num": "n + 0.5", "d_bytea": "decode('0' || n, 'hex')",
    "text COLLATE \"POSIX\"": "chr(64 + n * 5)", "float4": "n / 3.0", "varbit(9)": "n::bit(9)",
    "timetz": "timetz '12:00+05:45' + n * interval '1 us'", "macaddr8": "('08:00:2b:01:02:03:04:0' || n)::macaddr8",
    "tsvector": "'a ''it''''s'':' || n", "oidvector": "n || ' 7'", "tsquery": "'a & b' || n",
}


@every_mode
def test_keys_of_every_scalar_type_are_told_apart(db: TestDatabase, bucket: Any, config_file: Any, mode: str) -> None:
    db.execute(MOODS)
    db.execute("CREATE DOMAIN d_int AS int CHECK (VALUE > 0); CREATE DOMAIN d_text AS text; CREATE DOMAIN d_num AS numeric; "
               "CREATE DOMAIN d_d_num AS d_num; CREATE DOMAIN d_bytea AS bytea")
    listed = [(type_, f"({value})::{type_.split(' COLL')[0]}") for type_, value in KEYS.items()]
    shapes = {}
    for number, part in enumerate((listed[:30], listed[30:])):
        several = [f"k{place}" for place in range(len(part))]
        columns = ", ".join(f"{name} {type_}" for name, (type_, _) in zip(several, part))
        shapes[f"many {number}"] = Shape(f"{columns}, PRIMARY KEY ({', '.join(several)})", ", ".join(value for _, value in part), key=several)
    if mode == "held":
        shapes.update((f"key {type_}", Shape(f"id {type_} PRIMARY KEY, note text", f"{value}, 'x'")) for type_, value in listed)
    shapes["bool"] = Shape("id bool, part int, PRIMARY KEY (id, part)", "n % 2 = 0, n / 2", key=["id", "part"])
    shapes["odd"] = Shape("id text PRIMARY KEY", ODD)
    shapes["odds"] = Shape("a text, b \"char\", c bytea, PRIMARY KEY (a, b, c)", f"{ODD}, '', convert_to({ODD}, 'UTF8')", key=["c", "a", "b"])
    shapes["with the time"] = Shape("id int, PRIMARY KEY (created_at, id)", "n", key=["created_at", "id"])

    archived(db, bucket, config_file, shapes, locking={"mode": mode})


def test_a_key_of_a_collation_that_ignores_case_is_told_apart(db: TestDatabase, bucket: Any, config_file: Any) -> None:
    try:
        db.execute("CREATE COLLATION lax (provider = icu, locale = 'und-u-ks-level2', deterministic = false)")
    except psycopg2.errors.Error as error:
        pytest.skip(f"PostgreSQL {db.cluster.version} has no such collations: {error}")

    archived(db, bucket, config_file, {"logs": Shape("id text COLLATE lax PRIMARY KEY", MIXED)})


def test_a_key_of_citext_is_told_apart(db: TestDatabase, bucket: Any, config_file: Any) -> None:
    db.needs("citext")
    db.admin("CREATE EXTENSION citext SCHEMA public; CREATE DOMAIN d_citext AS citext")

    archived(db, bucket, config_file, {f"key {each}": Shape(f"id {each} PRIMARY KEY", MIXED) for each in ("citext", "d_citext")})


@pytest.mark.parametrize(("type_", "value", "said"), [
    ("jsonb", "'1'", "no single value"), ("int[]", "'{1}'", "no single value"), ("int4range", "'[1,2)'", "no single value"),
    ("pair", "'(1,2)'", "no single value"), ("ltree", "'a'", "do not compare"), ("hstore", "'a=>1'", "do not compare"),
    ("cube", "'1'", "do not compare"), ("d_mood", "'m1'", "do not compare"), ("d_coll COLLATE \"C\"", "'m1'", "another collation than its type")])
@pytest.mark.req("REQ-TBL-004")
def test_a_key_that_is_no_scalar_or_is_not_compared_in_one_way_is_refused(db: TestDatabase, bucket: Any, config_file: Any, type_: str,
                                                                         value: str, said: str) -> None:
    if type_ in ("ltree", "hstore", "cube"):
        db.needs(type_)
        db.admin(f"CREATE EXTENSION {type_} SCHEMA public")
    db.execute(f"{MOODS}; CREATE TYPE pair AS (a int, b int); CREATE DOMAIN d_coll AS text COLLATE \"POSIX\"")
    db.execute(f"CREATE TABLE logs (created_at timestamptz, id {type_} PRIMARY KEY)")
    db.execute(f"INSERT INTO logs VALUES ('2024-01-01', {value})")

    refused(db, bucket, config_file, [Shape("", "").entry("logs")], "key column 'id' of table 'public.logs'", said)
    assert db.scalar("SELECT count(*) FROM logs") == 1


# Names

TABLES = ["audit.logs", "audit/logs", "..", "it's", 'say "no"', " ", "100%", "%s", "%(n)s", "back\\slash", "MiXed", "select", "Grüße",
          "日本", "x" * 63, "-v", "#", "*"]


def test_tables_and_schemas_of_any_name_are_archived(db: TestDatabase, bucket: Any, config_file: Any) -> None:
    shapes = {name: Shape("id int PRIMARY KEY", "n") for name in TABLES}
    for name in ("my.schema", "a/b", 'q"q', "Grün %s", "pg\\x", "it's", " "):
        shapes[f"in {name}"] = Shape("id int PRIMARY KEY", "n", schema=name)

    archived(db, bucket, config_file, shapes)


def test_a_name_with_a_control_character_is_refused(db: TestDatabase, bucket: Any, config_file: Any) -> None:
    plain, entries = Shape("id int PRIMARY KEY", "n"), []
    for name in CONTROL:
        entries += [plain.entry(name), *(plain._replace(**{part: name}).entry("logs") for part in ("schema", "stamp", "key"))]
    for path, count in ((config_file(db, bucket, entries), len(entries)), (config_file(db, bucket, database={"name": "new\nline"}), 1)):
        result = run_forked("aa-archive", ["-c", path])
        assert (result.rc, result.err.count("has a form that is not allowed")) == (3, count), result.err


LONG = ["ß" * 31, "日" * 21, "%" * 63]


@pytest.mark.parametrize("name", LONG)
def test_the_longest_names_of_databases_tables_and_columns_are_archived(database: Callable[..., TestDatabase], bucket: Any, config_file: Any,
                                                                       name: str) -> None:
    db = database(name)
    assert len(name.encode()) in (62, 63)

    archived(db, bucket, config_file, {name: Shape(f"{ident(name)} int PRIMARY KEY", "n", key=name)})


@pytest.mark.parametrize("name", LONG)
def test_the_longest_names_of_schemas_and_tables_together_are_archived(database: Callable[..., TestDatabase], bucket: Any, config_file: Any,
                                                                      name: str) -> None:
    archived(database(name), bucket, config_file, {name: Shape("id int PRIMARY KEY", "n", schema=name)})


@pytest.mark.parametrize("name", ['a/b "q"', "it's 100% %s", "back\\slash.db", "Grün 日本", "host=x"])
def test_a_database_of_any_name_is_archived(database: Callable[..., TestDatabase], bucket: Any, config_file: Any, name: str) -> None:
    archived(database(name), bucket, config_file, {"logs": Shape("id int PRIMARY KEY", "n")})


# What is no table whose rows are kept

def test_what_is_no_table_of_its_own_is_refused_by_name(db: TestDatabase, bucket: Any, config_file: Any) -> None:
    db.execute("CREATE TABLE logs (id int PRIMARY KEY, created_at timestamptz); INSERT INTO logs VALUES (1, '2024-01-01'); "
               "CREATE VIEW seen AS SELECT * FROM logs; CREATE MATERIALIZED VIEW kept AS SELECT * FROM logs; CREATE SEQUENCE numbers; "
               "CREATE UNLOGGED TABLE quick (LIKE logs INCLUDING ALL); CREATE TYPE pair AS (id int, created_at timestamptz); "
               "CREATE TEMPORARY TABLE brief (LIKE logs INCLUDING ALL)")
    db.admin("CREATE FOREIGN DATA WRAPPER far; CREATE SERVER there FOREIGN DATA WRAPPER far; "
             "CREATE FOREIGN TABLE away (id int, created_at timestamptz) SERVER there; GRANT ALL ON away TO PUBLIC")
    passing = db.scalar("SELECT nspname::text FROM pg_namespace WHERE oid = pg_my_temp_schema()")
    plain = Shape("", "")
    names = ["seen", "kept", "numbers", "quick", "pair", "away", "logs_pkey", "nowhere"]

    refused(db, bucket, config_file, [*map(plain.entry, names), plain._replace(schema=passing).entry("brief")],
            "'public.seen' is a view", "'public.kept' is a materialized view", "'public.numbers' is a sequence", "table 'public.quick' is unlogged",
            "'public.pair' is a composite type", "'public.away' is a foreign table", "'public.logs_pkey' is an index",
            f"table '{passing}.brief' is temporary", "table 'public.nowhere' does not exist")
    assert db.scalar("SELECT count(*) FROM logs") == 1


# Encodings

def test_a_database_in_latin1_is_archived(database: Callable[..., TestDatabase], bucket: Any, config_file: Any) -> None:
    db = database("aa latin " + secrets.token_hex(3), "LATIN1")
    every = "(SELECT string_agg(chr(c), '') FROM generate_series(1, 255) c)"
    db.execute("CREATE TYPE \"Größe\" AS ENUM ('groß', 'klein')")
    shapes = {"Prüfung": Shape(
        "\"Schlüssel\" text PRIMARY KEY, body text, doc jsonb, raw json, tags text[], size \"Größe\", bytes bytea",
        f"'ß' || n, {every}, jsonb_build_object('ü', {every}), '{{\"é\": \"\\u00e9 \\u20ac \\ud83d\\ude00\"}}', ARRAY['ä', NULL], 'groß', "
        f"convert_to({every}, 'LATIN1')", key="Schlüssel", schema="Büro", stamp="am größten")}

    archived(db, bucket, config_file, shapes)


def test_a_database_in_sql_ascii_is_refused_by_name(database: Callable[..., TestDatabase], bucket: Any, config_file: Any) -> None:
    db = database("aa ascii " + secrets.token_hex(3), "SQL_ASCII")
    shape = Shape("id int PRIMARY KEY, body text", "n, E'\\xe9'")
    shape.create(db, "logs")

    refused(db, bucket, config_file, [shape.entry("logs")], "the database's encoding is SQL_ASCII")
    assert db.scalar("SELECT count(*) FROM logs WHERE body = E'\\xe9'") == ROWS


def test_by_hand_bytes_that_are_no_text_of_sql_ascii_leave_no_batch(database: Callable[..., TestDatabase], bucket: Any, config_file: Any) -> None:
    """What is valid UTF-8 passes as it is; other bytes the server itself does not turn into JSON."""
    db = database("aa ascii " + secrets.token_hex(3), "SQL_ASCII")
    shape = Shape("id int PRIMARY KEY, body text", "n, E'\\xe9'")
    shape.create(db, "logs")
    path = config_file(db, bucket, [shape.entry("logs")])

    selected = run_forked("aa-select", ["-c", path], stdin=run_forked("aa-plan", ["-c", path]).out)
    staged = run_forked("aa-serialize", ["-c", path], stdin=selected.out)

    assert (selected.rc, staged.rc, staged.out) == (2, 2, b""), selected.err
    assert "the rows end without their end frame" in staged.err
    db.execute("UPDATE logs SET body = convert_from('\\xc3a9'::bytea, 'SQL_ASCII')")
    again = run_forked("aa-select", ["-c", path], stdin=run_forked("aa-plan", ["-c", path]).out)
    assert (again.rc, again.out.count(b'"body":"\xc3\xa9"')) == (0, DUE)


# Types of extensions

def test_hstore_citext_and_ltree_are_archived(db: TestDatabase, bucket: Any, config_file: Any) -> None:
    db.needs("hstore", "citext", "ltree", "cube")
    for each in ("hstore", "citext", "ltree", "cube"):
        db.admin(f"CREATE EXTENSION {each} SCHEMA public")
    db.execute("CREATE DOMAIN tags AS hstore; CREATE TYPE noted AS (h hstore, d tags)")
    store = "hstore(ARRAY['it''s \"x\"', 'back\\slash=>' || n], ARRAY[NULL, E'\\n\"\\\\'])"

    archived(db, bucket, config_file, {"logs": Shape(
        "id int PRIMARY KEY, h hstore, d tags, hs hstore[], c noted, name citext, path ltree, place cube[]",
        f"n, {store}, {store}, ARRAY[{store}, NULL], ROW({store}, '')::noted, 'MiXed', 'a.b', ARRAY[cube(n / 3.0)]")})


def inexact(db: TestDatabase) -> Shape:
    """A type of eight bytes, of which the text shows four: the text alone would never tell. Two of the rows have such values."""
    db.admin("CREATE TYPE short; CREATE FUNCTION short_in(cstring) RETURNS short LANGUAGE internal STRICT IMMUTABLE AS 'int8in'; "
             "CREATE FUNCTION short_out(short) RETURNS cstring LANGUAGE internal STRICT IMMUTABLE AS 'int4out'; "
             "CREATE TYPE short (INPUT = short_in, OUTPUT = short_out, LIKE = int8); "
             "CREATE FUNCTION short(int8) RETURNS short LANGUAGE internal STRICT IMMUTABLE AS 'int8up'")
    return Shape("id int PRIMARY KEY, v short", "n, short(CASE WHEN n IN (2, 5) THEN 8589934599 ELSE 7 END)")


@pytest.mark.parametrize("roundtrip", ["first", "always", "never"])
def test_a_row_whose_text_is_not_exact_is_named_and_stays_and_the_others_go(db: TestDatabase, bucket: Any, config_file: Any, roundtrip: str) -> None:
    shape = inexact(db)
    shape.create(db, "logs")
    runs = Driven(db, bucket, config_file(db, bucket, [shape.entry("logs")], roundtrip=roundtrip))

    result = runs.run()

    assert result.rc == 1, result.err
    assert '"key": "2"' in result.err and '"key": "5"' in result.err
    assert [row[0] for row in db.execute("SELECT id FROM logs ORDER BY id")] == [2, 5, 7]
    assert sum(runs.sizes()) == 4


@pytest.mark.req("REQ-TYPE-016", "REQ-TYPE-017", "REQ-TYPE-018")
@pytest.mark.parametrize("type_", ["fickle", "fickle[]", "d_fickle", "c_fickle"])
def test_a_type_that_cannot_be_shown_exact_fails_the_check_and_the_run_by_name_with_a_remedy(db: TestDatabase, bucket: Any, config_file: Any,
                                                                                            type_: str) -> None:
    """Its functions are STABLE: what they say may depend on settings."""
    db.admin("CREATE TYPE fickle; CREATE FUNCTION fickle_in(cstring) RETURNS fickle LANGUAGE internal STRICT STABLE AS 'int8in'; "
             "CREATE FUNCTION fickle_out(fickle) RETURNS cstring LANGUAGE internal STRICT STABLE AS 'int8out'; "
             "CREATE TYPE fickle (INPUT = fickle_in, OUTPUT = fickle_out, LIKE = int8); CREATE DOMAIN d_fickle AS fickle; "
             "CREATE TYPE c_fickle AS (a int, f fickle)")
    shape = Shape(f"id int PRIMARY KEY, odd {type_}", "n, NULL")
    shape.create(db, "logs")

    refused(db, bucket, config_file, [shape.entry("logs")], "column 'odd' of table 'public.logs' cannot be archived exactly",
            "the type 'public.fickle'", "ALTER TABLE ... ALTER COLUMN ... TYPE text", "see docs/types.md")

    checked = run_forked("aa-archive", ["-c", config_file(db, bucket, [shape.entry("logs")]), "--validate-only"])
    assert (checked.rc, "the type 'public.fickle'" in checked.err + checked.out.decode()) == (3, True), checked.err
    assert "`STABLE`" in (ROOT / "docs" / "types.md").read_text(encoding="utf-8")


def test_a_row_that_stays_and_a_table_that_is_refused_stop_nothing_in_late_mode(db: TestDatabase, bucket: Any, config_file: Any) -> None:
    shape, plain = inexact(db), Shape("id int PRIMARY KEY", "n")
    for name, each in (("logs", shape), ("good", plain)):
        each.create(db, name)
    db.execute("CREATE VIEW seen AS SELECT * FROM good")
    runs = Driven(db, bucket, config_file(db, bucket, [plain.entry("seen"), shape.entry("logs"), plain.entry("good")], locking={"mode": "late"}))

    made = summary(runs.run())

    assert ([row[0] for row in db.execute("SELECT id FROM logs ORDER BY id")], db.scalar("SELECT count(*) FROM good")) == ([2, 5, 7], 1)
    assert (made["exit"], made["totals"]["rows"], made["totals"]["tables"]["failed"]) == (1, 4 + DUE, 0)
