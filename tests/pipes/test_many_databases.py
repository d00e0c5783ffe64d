"""Twenty databases in one run, one of them away and one with a broken table: all the others are archived, and the run says so."""

from __future__ import annotations

import contextlib
import secrets
from typing import Any, Iterator

import pytest
import yaml

from audit_archiver import exits
from tests.conftest import ARCHIVER, TestDatabase
from tests.ground import tables
from tests.ground.driven import Driven, summary
from tests.ground.postgres import Cluster

COUNT = 20


@pytest.fixture()
def databases(pg: Cluster) -> Iterator[list[TestDatabase]]:
    """Databases with a small table each."""
    names = [f"t_{secrets.token_hex(4)}_{number:02d}" for number in range(COUNT)]
    with contextlib.closing(pg.connect()) as admin, admin.cursor() as cursor:
        for name in names:
            cursor.execute(f"CREATE DATABASE {name} OWNER {ARCHIVER}")
        made = [TestDatabase(pg, name) for name in names]
        try:
            for db in made:
                tables.create(db.connection, rows=30, first="2024-01-01", last="2024-02-01")
            yield made
        finally:
            for db in made:
                db.close()
            for name in names:
                cursor.execute(f"DROP DATABASE {name} WITH (FORCE)" if int(pg.version.partition(".")[0]) >= 13 else f"DROP DATABASE {name}")


@pytest.mark.req("T58", "REQ-DB-003", "REQ-DB-005")
def test_one_that_is_away_and_one_whose_table_is_broken_do_not_stop_the_others(databases: list[TestDatabase], bucket: Any, config_file: Any) -> None:
    away, broken, *sound = databases
    broken.execute("ALTER TABLE audit_logs DROP CONSTRAINT audit_logs_pkey")
    path = config_file(sound[0], bucket)
    settings = yaml.safe_load(path.read_text())
    entry = settings["databases"][0]
    settings["databases"] = [{**entry, "name": db.name, **({"dbname": "gone_for_good"} if db is away else {})} for db in databases]
    path.write_text(yaml.safe_dump(settings))
    runs = Driven(sound[0], bucket, path)

    result = runs.run()

    assert result.rc == exits.SOME_FAILED, result.err
    said = summary(result)
    outcomes = {made["name"]: [table["outcome"] for table in made["tables"]] for made in said["databases"]}
    assert outcomes == {db.name: ["refused"] if db in (away, broken) else ["done"] for db in databases}
    reasons = {error["database"]: error["msg"] for error in said["errors"]}
    assert "gone_for_good" in reasons[away.name] and "no primary key or unique index" in reasons[broken.name]
    assert [db.scalar("SELECT count(*) FROM audit_logs") for db in databases] == [30, 30] + [0] * (COUNT - 2)
    assert said["totals"]["rows"] == 30 * (COUNT - 2)
