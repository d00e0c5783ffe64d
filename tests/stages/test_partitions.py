"""A parent in the configuration stands for the physical tables below it, oldest first, with the parent's settings."""

from __future__ import annotations

from typing import Any, Callable

import pytest

from audit_archiver import config
from audit_archiver.config.model import Table
from audit_archiver.postgres import connect, partitions
from audit_archiver.preflight.plan import Selection, plan_database

KEY = {"timestamp_column": "created_at", "primary_key": ["id", "created_at"]}
Jobs = Callable[..., list[dict[str, Any]]]


@pytest.fixture()
def jobs(db: Any, bucket: Any, config_file: Any) -> Jobs:
    """The jobs that aa-plan makes of some configured tables."""
    def plan(*tables: dict[str, Any]) -> list[dict[str, Any]]:
        settings = config.load(str(config_file(db, bucket, [{**KEY, **table} for table in tables])), {})
        return plan_database(settings.databases[0], settings, "20251230T021545Z-4711", Selection()).jobs

    return plan


def parent(db: Any, how: str, name: str = "events") -> None:
    db.execute(f"CREATE TABLE {name} (id int, created_at timestamptz NOT NULL, PRIMARY KEY (id, created_at)) PARTITION BY {how}")


def rows(found: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    return [(job["table"], job.get("estimate", "refused")) for job in found]


@pytest.mark.req("REQ-PG-005")
def test_partitions_by_range_come_oldest_first_and_the_default_one_last(db: Any, jobs: Jobs) -> None:
    parent(db, "RANGE (created_at)")
    db.execute("CREATE TABLE rest PARTITION OF events DEFAULT")
    for month in (3, 1, 2):
        db.execute(f"CREATE TABLE m{9 - month} PARTITION OF events FOR VALUES FROM ('2024-0{month}-01Z') TO ('2024-0{month + 1}-01Z')")
    db.execute("INSERT INTO events SELECT i, timestamptz '2024-01-01Z' + i * interval '1 day' FROM generate_series(0, 99) i")
    found = jobs({"name": "events", "batch_size": 77})
    assert rows(found) == [("m8", 31), ("m7", 29), ("m6", 31), ("rest", 9)]
    assert {job["batch_size"] for job in found} == {77}


def test_partitions_by_list_and_hash_and_those_below_partitions(db: Any, jobs: Jobs) -> None:
    parent(db, "HASH (id)")
    for number in (0, 1):
        db.execute(f"CREATE TABLE h{number} PARTITION OF events FOR VALUES WITH (MODULUS 2, REMAINDER {number}) PARTITION BY LIST (id)")
        db.execute(f"CREATE TABLE h{number}_some PARTITION OF h{number} FOR VALUES IN (1, 2, 3)")
        db.execute(f"CREATE TABLE h{number}_rest PARTITION OF h{number} DEFAULT")
    db.execute("INSERT INTO events SELECT i, '2024-01-01Z' FROM generate_series(1, 40) i")
    found = jobs({"name": "events"})
    assert [job["table"] for job in found] == ["h0_some", "h0_rest", "h1_some", "h1_rest"]
    assert sum(job["estimate"] for job in found) == 40 and sum(job["estimate"] for job in found if job["table"].endswith("some")) == 3


def test_a_leaf_that_is_configured_by_itself_keeps_its_own_settings(db: Any, jobs: Jobs) -> None:
    parent(db, "RANGE (created_at)")
    for year in (2023, 2024):
        db.execute(f"CREATE TABLE y{year} PARTITION OF events FOR VALUES FROM ('{year}-01-01Z') TO ('{year + 1}-01-01Z')")
    found = jobs({"name": "events", "batch_size": 50}, {"name": "y2023", "batch_size": 60})
    assert [(job["table"], job["batch_size"]) for job in found] == [("y2024", 50), ("y2023", 60)]


def test_a_partition_that_cannot_be_archived_is_refused_by_its_own_name_and_an_empty_parent_too(db: Any, jobs: Jobs) -> None:
    parent(db, "RANGE (created_at)")
    db.execute("CREATE TABLE kept PARTITION OF events FOR VALUES FROM ('2023-01-01Z') TO ('2024-01-01Z')")
    db.execute("CREATE UNLOGGED TABLE quick PARTITION OF events FOR VALUES FROM ('2024-01-01Z') TO ('2025-01-01Z')")
    parent(db, "LIST (id)", "hollow")
    found = jobs({"name": "events"}, {"name": "hollow"})
    assert rows(found) == [("kept", 0), ("quick", "refused"), ("hollow", "refused")]
    assert "table 'public.quick' is unlogged" in found[1]["refused"]["msg"]
    assert "'public.hollow' is a partitioned table and holds no rows itself" in found[2]["refused"]["msg"]


def test_a_physical_table_has_the_settings_of_its_nearest_configured_parent(db: Any, bucket: Any, config_file: Any) -> None:
    parent(db, "LIST (id)")
    db.execute("CREATE TABLE one PARTITION OF events FOR VALUES IN (1) PARTITION BY RANGE (created_at)")
    db.execute("CREATE TABLE one_2024 PARTITION OF one FOR VALUES FROM ('2024-01-01Z') TO ('2025-01-01Z')")
    db.execute("CREATE TABLE other (id int)")
    (database,) = config.load(str(config_file(db, bucket, [{"name": "events", **KEY}])), {}).databases
    connection = connect.connect(database, purpose="test")
    try:
        found = [partitions.configured(connection, database, "public", name) for name in ("one_2024", "one", "events", "other")]
        assert [table.name if table else None for table in found] == ["events", "events", "events", None]
        nowhere = Table("nowhere", "created_at", ("id",))
        assert partitions.leaves(connection, [nowhere]) == [nowhere]
    finally:
        connection.close()
