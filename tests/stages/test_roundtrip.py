"""A row that would not come back is named and left in place, also where the check itself raises (postgres.md C8, S5)."""

from __future__ import annotations

from typing import Any

import pytest

from audit_archiver import config
from audit_archiver.exits import ConfigError
from tests.ground import held

NOT_VALID = """
CREATE DOMAIN code AS text;
CREATE TABLE old (id bigint PRIMARY KEY, created_at timestamptz NOT NULL, code code);
INSERT INTO old SELECT i, timestamptz '2024-01-01 00:00Z' + i * interval '1 minute', CASE WHEN i IN (3, 77) THEN 'bad' ELSE 'good' END
FROM generate_series(1, 100) AS i;
ALTER DOMAIN code ADD CONSTRAINT known CHECK (VALUE <> 'bad') NOT VALID;
"""
OLD = {"name": "old", "timestamp_column": "created_at", "primary_key": "id"}


def test_rows_whose_value_its_domain_takes_no_longer_are_named_and_stay(db: Any, config_file: Any) -> None:
    db.execute(NOT_VALID)
    path = config_file(db, held.NoServer(), [OLD])
    job = held.plan(config.load(str(path), {}), "old")

    with held.Holder(path) as holder:
        for line in holder.archive(job):
            assert line["batch"]["rows"] == 98

    assert [row[0] for row in db.execute("SELECT id FROM old ORDER BY id")] == [3, 77]


def test_a_key_that_is_no_single_json_value_is_refused(db: Any, config_file: Any) -> None:
    db.execute("CREATE TABLE odd (id int[] PRIMARY KEY, created_at timestamptz NOT NULL)")
    path = config_file(db, held.NoServer(), [{**OLD, "name": "odd"}])

    with pytest.raises(ConfigError, match=r"key column 'id' of table 'public.odd' has the type integer\[\]"):
        held.plan(config.load(str(path), {}), "odd")
