"""Rows that are larger than `max_row_mb` are named and stay; all others go, and no process takes more than is promised."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ground.driven import Driven, summary

TABLE = {"name": "documents", "timestamp_column": "created_at", "primary_key": "id"}


def documents(db: Any, *bodies: str) -> None:
    db.execute("CREATE TABLE documents (id int PRIMARY KEY, created_at timestamptz NOT NULL, body text, doc jsonb)")
    for number, body in enumerate(bodies, 1):
        db.execute(f"INSERT INTO documents VALUES ({number}, '2024-01-01', {body}, NULL)")


@pytest.mark.req("T18")
def test_a_cell_of_300_mb_is_named_and_stays_and_the_others_go(db: Any, bucket: Any, config_file: Any) -> None:
    documents(db, "'small'", "repeat('x', 300000000)", "repeat('y', 3000000)")
    db.execute("INSERT INTO documents VALUES (4, '2024-01-02', repeat('z', 150000000), jsonb_build_object('k', repeat('z', 150000000)))")
    runs = Driven(db, bucket, config_file(db, bucket, [TABLE]))

    result = runs.run()

    assert result.rc == 1, result.err
    (table,) = summary(result)["databases"][0]["tables"]
    assert (table["rows"], table["left"]["too_wide"]) == (2, 2)
    assert "larger than max_row_mb (256) and stays in the table" in result.err and '"key": "2"' in result.err and '"key": "4"' in result.err
    assert [row[0] for row in db.execute("SELECT id FROM documents ORDER BY id")] == [2, 4]


@pytest.mark.parametrize("storage", ["EXTENDED", "EXTERNAL"])
def test_it_is_the_length_of_the_line_that_counts_not_that_of_what_is_stored(db: Any, bucket: Any, config_file: Any, storage: str) -> None:
    documents(db, "repeat('a', 9900000)", "repeat('a', 10100000)", "repeat(E'\\x01', 1600000)", "repeat(E'\\x01', 1700000)")
    db.execute(f"CREATE TABLE stored (LIKE documents INCLUDING ALL); ALTER TABLE stored ALTER body SET STORAGE {storage}")
    db.execute("INSERT INTO stored SELECT id, created_at, body || '', doc FROM documents")
    db.execute("DROP TABLE documents; ALTER TABLE stored RENAME TO documents")
    runs = Driven(db, bucket, config_file(db, bucket, [TABLE], resources={"max_row_mb": 10}))

    result = runs.run()

    assert result.rc == 1, result.err
    assert [row[0] for row in db.execute("SELECT id FROM documents ORDER BY id")] == [2, 4]
