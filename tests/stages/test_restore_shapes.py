"""aa-restore where table and archive differ, and where the table is made again: columns, types, keys, indexes, sequences."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ground.restored import Restored

LOGS = [{"name": "logs", "timestamp_column": "at", "primary_key": "id"}]
ALL = ("--restore-all", "--table", "logs")
ROWS = "SELECT id, at, note, amount, small, day, doc FROM original ORDER BY id"

CREATE = """
CREATE TABLE logs (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, at timestamptz NOT NULL, note text, amount numeric(12,4) CHECK (amount >= 0),
    small integer, day timestamptz, doc jsonb, twice int GENERATED ALWAYS AS (small * 2) STORED, part serial)
"""
FILL = """
INSERT INTO logs (at, note, amount, small, day, doc)
SELECT '2024-01-01Z'::timestamptz + i * interval '1 hour', CASE WHEN i % 3 > 0 THEN 'note ' || i END, i * 1.25, i * 100, '2024-05-01Z', '{"a": 1}'
FROM generate_series(1, 20) i
"""


@pytest.fixture()
def scene(db: Any, bucket: Any, config_file: Any) -> Restored:
    """20 rows of a table with an identity, a serial, a generated column, checks and indexes, archived."""
    db.execute(CREATE if db.connection.server_version >= 120000 else CREATE.replace("twice int GENERATED ALWAYS AS (small * 2) STORED, ", ""))
    db.execute("CREATE INDEX logs_at ON logs (at, id)")
    db.execute("CREATE UNIQUE INDEX \"Logs' amount\" ON logs (amount DESC) INCLUDE (note)")
    db.execute("CREATE INDEX ON logs (lower(note)) WHERE small > 100")
    db.execute("COMMENT ON COLUMN logs.note IS 'what was said'")
    db.execute(FILL)
    db.execute("CREATE TABLE original AS SELECT * FROM logs")
    made = Restored(db, bucket, config_file(db, bucket, LOGS))
    made.archive()
    return made


def equal(scene: Restored, table: str = "logs", columns: str = "id, at, note, amount, small, day, doc") -> bool:
    """Whether the table holds exactly the archived rows, in these columns."""
    return bool(scene.db.execute(f"SELECT {columns} FROM {table} ORDER BY id") == scene.db.execute(f"SELECT {columns} FROM original ORDER BY id"))


CHANGES = {
    # change: (SQL, kind, what lenient comes to: None all rows, a text the refusal, columns to compare)
    "added": ("ALTER TABLE {} ADD extra text DEFAULT 'new'", "added", None, "id, at, note, amount, small, day, doc"),
    "added without a default": ("ALTER TABLE {} ADD extra text NOT NULL", "added", "demands a value", ""),
    "dropped": ("ALTER TABLE {} DROP note", "dropped", None, "id, at, amount, small, day, doc"),
    "renamed": ("ALTER TABLE {} RENAME note TO remark", "dropped", None, "id, at, amount, small, day, doc"),
    "widened": ("ALTER TABLE {} ALTER small TYPE bigint", "retyped", None, "id, at, note, amount, small, day, doc"),
    "narrowed, and all values fit": ("ALTER TABLE {} ALTER small TYPE smallint", "retyped", None, "id, at, note, amount, small, day, doc"),
    "narrowed, and values would be cut": ("ALTER TABLE {} ALTER note TYPE varchar(6)", "retyped", "would lose something", ""),
    "retyped with loss": ("ALTER TABLE {} ALTER at TYPE date", "retyped", "would lose something", ""),
    "retyped without loss": ("ALTER TABLE {} ALTER day TYPE date", "retyped", None, "id, at, note, amount, small, doc"),
    "retyped through text": ("ALTER TABLE {} ALTER small TYPE text", "retyped", None, "id, at, note, amount, small::text, day, doc"),
    "rounded": ("ALTER TABLE {} ALTER amount TYPE numeric(10,1)", "retyped", "would lose something", ""),
    "no cast at all": ("ALTER TABLE {} ALTER doc TYPE uuid USING NULL", "retyped", "does not go into the table", ""),
    "NOT NULL": ("ALTER TABLE {} ALTER note SET NOT NULL", "not_null", "archived rows hold NULL", ""),
    "key dropped": ("ALTER TABLE {} DROP id", "dropped", "no column 'id'", ""),
}


@pytest.mark.req("REQ-RST-004", "REQ-RESTORE-001", "REQ-RESTORE-002", "REQ-RESTORE-003", "REQ-RESTORE-004", "REQ-RESTORE-005", "REQ-RESTORE-006",
                 "REQ-RESTORE-007", "T50")
def test_a_changed_table_is_refused_by_strict_and_taken_by_lenient_where_nothing_is_lost(scene: Restored) -> None:
    for number, (change, (sql, kind, refusal, columns)) in enumerate(CHANGES.items()):
        table = f"changed_{number}"
        scene.db.execute(f"CREATE TABLE {table} (LIKE logs INCLUDING ALL)")
        if "small" in sql:
            scene.db.execute(f"ALTER TABLE {table} DROP COLUMN IF EXISTS twice")
            scene.db.execute(f"DROP INDEX {table}_lower_idx")
        scene.db.execute(sql.format(table))
        strict = scene.run(*ALL, "--into", table)
        said = [record["kind"] for record in strict.log if record["event"] == "restore.difference"]
        assert (strict.rc, kind in said, [each["kind"] for each in strict.lines[0]["differences"]]) == (3, True, said), f"{change}: {strict.err}"

        lenient = scene.run(*ALL, "--into", table, "--schema-strategy", "lenient")
        if refusal is not None:
            assert lenient.rc in (2, 3) and refusal in lenient.err, f"{change}: {lenient.err}"
            assert scene.db.scalar(f"SELECT count(*) FROM {table}") == 0
            continue
        assert lenient.rc == 0, f"{change}: {lenient.err}"
        wanted = scene.db.execute(f"SELECT {columns} FROM original ORDER BY id")
        assert scene.db.execute(f"SELECT {columns} FROM {table} ORDER BY id") == wanted, change
        if change == "added":
            assert scene.db.execute(f"SELECT DISTINCT extra FROM {table}") == [("new",)]


@pytest.mark.req("REQ-RESTORE-002")
def test_columns_in_another_order_are_no_difference(scene: Restored) -> None:
    scene.db.execute("CREATE TABLE turned (doc jsonb, day timestamptz, small int, part int NOT NULL, amount numeric(12,4), note text, "
                     "at timestamptz NOT NULL, id bigint PRIMARY KEY, twice int)")
    if scene.db.connection.server_version < 120000:
        scene.db.execute("ALTER TABLE turned DROP twice")
    report = scene.restore(*ALL, "--into", "turned")
    assert report["differences"] == [] and equal(scene, "turned")


@pytest.mark.req("T48", "REQ-RST-002")
def test_after_a_restore_into_its_own_table_identity_serial_and_generated_columns_go_on(scene: Restored) -> None:
    scene.db.execute("ALTER TABLE logs ALTER id RESTART WITH 1")
    scene.restore(*ALL)
    assert equal(scene, columns="id, part, twice" if scene.db.connection.server_version >= 120000 else "id, part")
    assert scene.db.execute("INSERT INTO logs (at, small, amount) VALUES (now(), 7, 999) RETURNING id, part") == [(21, 21)]


@pytest.mark.req("T48")
def test_a_sequence_is_never_moved_back(scene: Restored) -> None:
    scene.db.execute("SELECT setval(pg_get_serial_sequence('logs', 'id'), 500)")
    scene.restore(*ALL)
    assert scene.db.execute("INSERT INTO logs (at, amount) VALUES (now(), 999) RETURNING id") == [(501,)]


def shape(scene: Restored, table: str) -> dict[str, Any]:
    """What the catalog says of a table, without the names of table, indexes and constraints."""
    def said(sql: str) -> list[Any]:
        schema, _, name = table.rpartition(".")
        return sorted(row[0].replace(f" ON {schema or 'public'}.{name} ", " ON T ") for row in scene.db.execute(sql, (table,)))
    return {
        "columns": scene.db.execute("SELECT attname, format_type(atttypid, atttypmod), attnotnull, attidentity, col_description(attrelid, attnum) "
                                    "FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum", (table,)),
        "indexes": said("SELECT regexp_replace(pg_get_indexdef(indexrelid), ' INDEX (\"[^\"]*\"|[^ ]*) ', ' INDEX ') FROM pg_index WHERE "
                        "indrelid = %s::regclass"),
        "constraints": said("SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = %s::regclass")}


@pytest.mark.req("REQ-RST-002", "T49", "T48", "REQ-INT-006", "REQ-INT-012")
@pytest.mark.parametrize("into", ["again", "other.logs", "logs"])
def test_the_table_is_made_again_with_its_keys_checks_indexes_and_sequences(scene: Restored, into: str) -> None:
    before = shape(scene, "logs")
    names = scene.db.execute("SELECT relname FROM pg_class WHERE relkind = 'i' AND relname ~* 'logs' ORDER BY 1")
    if into == "logs":
        scene.db.execute("DROP TABLE logs")
    report = scene.restore(*ALL, "--into", into, "--create-table")
    assert report["target"]["created"] is True and equal(scene, into)
    made = shape(scene, into)
    assert made["columns"] == before["columns"]
    assert (made["indexes"], made["constraints"]) == (before["indexes"], before["constraints"])
    assert scene.db.execute(f"INSERT INTO {into} (at, small, amount) VALUES (now(), 7, 999) RETURNING id") == [(21,)]
    if into == "logs":
        assert scene.db.execute("SELECT relname FROM pg_class WHERE relkind = 'i' AND relname ~* 'logs' ORDER BY 1") == names


def test_what_create_table_had_not_finished_a_rerun_finishes(scene: Restored) -> None:
    before = shape(scene, "logs")
    scene.restore(*ALL, "--into", "again", "--create-table")
    lost = scene.db.scalar("SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = 'again'::regclass AND NOT indisunique LIMIT 1")
    scene.db.execute(f"DROP INDEX {lost}")
    scene.restore(*ALL, "--into", "again", "--create-table", "--ignore-watermark")
    assert shape(scene, "again")["indexes"] == before["indexes"]


def test_an_existing_table_is_taken_as_it_is_and_never_dropped(scene: Restored) -> None:
    scene.db.execute("INSERT INTO logs (at, amount) VALUES (now(), 999)")
    report = scene.restore(*ALL, "--create-table")
    assert report["target"]["created"] is False and scene.db.scalar("SELECT count(*) FROM logs") == 21


@pytest.mark.req("REQ-RST-002")
def test_rows_go_into_another_database_of_the_same_server_with_their_types(scene: Restored) -> None:
    scene.db.execute("CREATE TYPE mood AS ENUM ('sad', 'glad')")
    scene.db.execute("ALTER TABLE logs ADD mood mood, ADD moods mood[]")
    scene.db.execute("INSERT INTO logs (id, at, mood, moods) OVERRIDING SYSTEM VALUE VALUES (100, '2024-02-01Z', 'glad', '{sad,NULL}')")
    scene.archive()
    other = f"{scene.db.name}_other"
    scene.db.admin(f"CREATE DATABASE {other} OWNER archiver")
    try:
        report = scene.restore("--run", scene.listed()[-1]["run"], "--into", f"{other}:kept.logs", "--create-table")
        assert (report["target"], report["rows"]["inserted"]) == ({"database": other, "schema": "kept", "table": "logs", "created": True}, 1)
        connection = scene.db.cluster.connect(other, "archiver")
        with connection.cursor() as cursor:
            cursor.execute("SELECT id, mood::text, moods::text FROM kept.logs")
            assert cursor.fetchall() == [(100, "glad", "{sad,NULL}")]
        connection.close()
        again = scene.run(*ALL, "--into", f"{other}:kept.logs")
        assert again.rc == 3 and "mood" in again.err  # the first batches were archived before the column was
        scene.restore(*ALL, "--into", f"{other}:kept.logs", "--schema-strategy", "lenient")
    finally:
        scene.db.admin(f"DROP DATABASE {other}")


def test_a_type_that_the_target_does_not_have_is_named(scene: Restored) -> None:
    scene.db.execute("CREATE DOMAIN shade AS text")
    scene.db.execute("ALTER TABLE logs ADD shade shade")
    scene.db.execute("INSERT INTO logs (id, at, shade) OVERRIDING SYSTEM VALUE VALUES (100, '2024-02-01Z', 'dark')")
    scene.archive()
    scene.db.execute("ALTER TABLE logs ALTER shade TYPE text; DROP DOMAIN shade")
    result = scene.run("--run", scene.listed()[-1]["run"], "--schema-strategy", "lenient")
    assert result.rc == 3 and "no type 'public.shade'" in result.err
