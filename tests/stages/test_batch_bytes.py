"""A batch of wide rows is cut before its rows are locked: rows cannot be unlocked again (postgres.md S15)."""

from __future__ import annotations

from typing import Any

import pytest

from audit_archiver import config
from audit_archiver.postgres import transaction
from tests.ground import held

WIDE = """
CREATE TABLE wide (id bigint PRIMARY KEY, created_at timestamptz NOT NULL, document text NOT NULL);
ALTER TABLE wide ALTER document SET STORAGE EXTERNAL;
CREATE INDEX ON wide (created_at, id);
INSERT INTO wide SELECT i, timestamptz '2024-01-01 00:00Z' + i * interval '1 minute', repeat(chr(97 + i % 26), 100000)
FROM generate_series(1, 40) AS i;
"""
TABLE = {"name": "wide", "timestamp_column": "created_at", "primary_key": "id"}


def batch_rows(path: Any) -> list[int]:
    """The rows of each batch that aa-select would make of the table."""
    settings = config.load(str(path), {})
    job = held.plan(settings, "wide")
    sizes: list[int] = []
    with held.Holder(path) as holder:
        client, cursor = holder.client("aa-select"), None
        while True:
            begun = client.call("begin", job=job)
            found = client.call("lock", handle=begun["handle"], cursor=cursor, limit=100)
            client.call("abandon", handle=begun["handle"])
            sizes += [found["rows"]] if found["rows"] else []
            cursor = found["next"]
            if cursor is None:
                return sizes


def test_a_batch_of_wide_rows_ends_at_the_byte_cap(db: Any, config_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    db.execute(WIDE)
    monkeypatch.setattr(transaction, "BATCH_BYTES", 1_050_000)

    assert batch_rows(config_file(db, held.NoServer(), [TABLE])) == [10, 10, 10, 10]


def test_a_row_over_the_byte_cap_goes_alone(db: Any, config_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    db.execute(WIDE)
    monkeypatch.setattr(transaction, "BATCH_BYTES", 50_000)

    assert batch_rows(config_file(db, held.NoServer(), [TABLE])) == [1] * 40


def test_rows_under_the_byte_cap_are_one_batch(db: Any, config_file: Any) -> None:
    db.execute(WIDE)

    assert batch_rows(config_file(db, held.NoServer(), [TABLE])) == [40]
