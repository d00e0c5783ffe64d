"""Twenty databases in one run, one of them away and one with a broken table: all the others are archived, and the run says so."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import signal
from pathlib import Path
from typing import Any, Iterator, Optional

import pytest
import yaml

from audit_archiver import exits
from tests.conftest import ARCHIVER, TestDatabase
from tests.ground import kill, processes, tables
from tests.ground.driven import Driven, summary
from tests.ground.postgres import Cluster
from tests.ground.run import Child, finish
from tests.ground.terminal import Terminal
from tests.ground.wait import until

ROWS = 30
POINT = "upload.data.put"
TWO_AT_ONCE = ("--parallel", "--max-workers", "2")


@pytest.fixture()
def databases(pg: Cluster, request: Any) -> Iterator[list[TestDatabase]]:
    """So many databases (as the test asks) with a small table each, whose rows are all due."""
    names = [f"t_{secrets.token_hex(4)}_{number:02d}" for number in range(request.param)]
    with contextlib.closing(pg.connect()) as admin, admin.cursor() as cursor:
        for name in names:
            cursor.execute(f"CREATE DATABASE {name} OWNER {ARCHIVER}")
        made = [TestDatabase(pg, name) for name in names]
        try:
            for db in made:
                tables.create(db.connection, rows=ROWS, first="2024-01-01", last="2024-02-01")
            yield made
        finally:
            for db in made:
                db.close()
            for name in names:
                cursor.execute(f"DROP DATABASE {name} WITH (FORCE)" if int(pg.version.partition(".")[0]) >= 13 else f"DROP DATABASE {name}")


def configure(config_file: Any, bucket: Any, databases: list[TestDatabase], away: Optional[TestDatabase] = None, **sections: Any) -> Driven:
    """Runs over all these databases; `away` is configured under a name that the server does not know."""
    path = config_file(databases[0], bucket, **sections)
    settings = yaml.safe_load(path.read_text())
    entry = settings["databases"][0]
    settings["databases"] = [{**entry, "name": db.name, **({"dbname": "gone_for_good"} if db is away else {})} for db in databases]
    path.write_text(yaml.safe_dump(settings))
    return Driven(databases[0], bucket, path)


@pytest.mark.req("T58", "REQ-DB-003", "REQ-DB-005", "REQ-DB-004", "REQ-EXE-004")
@pytest.mark.parametrize("databases, argv", [(20, ()), (8, ("--parallel", "--max-workers", "4"))], ids=["in turn", "side by side"],
                         indirect=["databases"])
def test_one_that_is_away_and_one_whose_table_is_broken_do_not_stop_the_others(databases: list[TestDatabase], bucket: Any, config_file: Any,
                                                                               argv: tuple[str, ...]) -> None:
    away, broken, *sound = databases
    broken.execute("ALTER TABLE audit_logs DROP CONSTRAINT audit_logs_pkey")

    result = configure(config_file, bucket, databases, away).run(*argv)

    assert result.rc == exits.SOME_FAILED, result.err
    said = summary(result)
    outcomes = [(made["name"], [table["outcome"] for table in made["tables"]]) for made in said["databases"]]
    assert outcomes == [(db.name, ["refused"] if db in (away, broken) else ["done"]) for db in databases], "and in the order of the configuration"
    reasons = {error["database"]: error["msg"] for error in said["errors"]}
    assert "gone_for_good" in reasons[away.name] and "no primary key or unique index" in reasons[broken.name]
    assert [db.scalar("SELECT count(*) FROM audit_logs") for db in databases] == [ROWS, ROWS] + [0] * len(sound)
    assert said["totals"]["rows"] == ROWS * len(sound)
    assert {record["run_id"] for record in result.log if "run_id" in record} == {said["run"]}, "every line of the log is whole, and of this run"


def left(databases: list[TestDatabase]) -> list[int]:
    return [db.scalar("SELECT count(*) FROM audit_logs") for db in databases]


def two_at_work(child: Child, databases: list[TestDatabase]) -> list[int]:
    """The upload stages of two databases, both stopped; the third database must not even be connected to."""
    def stopped() -> Optional[list[int]]:
        assert child.poll() is None, "the run ended before two databases were at work"
        found = [pid for pid in kill.family(child.token) if processes.state(pid) == "T"]
        return found if len(found) == 2 else None

    pids = until(stopped, "two stages are stopped at the same time")
    assert pids is not None and len({parent(pid) for pid in pids}) == 2 and child.pid not in map(parent, pids), "each has a worker of its own"
    at_work = databases[0].admin("SELECT DISTINCT datname::text FROM pg_stat_activity WHERE application_name LIKE 'audit-archiver%%' "
                                 "AND datname = ANY(%s)", ([db.name for db in databases],))
    assert {name for (name,) in at_work} == {db.name for db in databases[:2]}, "no more than two at once"
    return pids


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def archived_whole(runs: Driven, databases: list[TestDatabase], *argv: str) -> None:
    """One more run, and then each row is in the bucket just once."""
    runs.ran(*argv)
    assert left(databases) == [0] * len(databases)
    for db in databases:
        keys = [key for line in runs.archive.commits() if line["batch"]["database"] == db.name for key in ids(runs, line)]
        assert sorted(keys) == list(range(1, ROWS + 1)), "rows were lost or doubled"


def ids(runs: Driven, line: dict[str, Any]) -> list[int]:
    return [json.loads(row)["id"] for row in runs.archive.rows(line)]


@pytest.mark.req("REQ-DB-004", "REQ-EXE-004")
@pytest.mark.parametrize("databases", [3], indirect=True)
def test_databases_are_worked_on_side_by_side_up_to_the_limit_and_outlive_their_parent_only_to_finish(databases: list[TestDatabase], bucket: Any,
                                                                                                     config_file: Any) -> None:
    # GIVEN two databases whose uploads stand still at the same time, and a third one that waits for a place
    runs = configure(config_file, bucket, databases)
    child = runs.spawn(*TWO_AT_ONCE, env={"AA_TEST_POINT": POINT})
    stopped = two_at_work(child, databases)
    # WHEN the run is killed
    kill.kill(child.pid)
    for pid in stopped:
        kill.go_on(pid)
    # THEN its workers finish what is in flight and nothing of them is left, nor is the third database begun
    kill.all_gone(child.token)
    child.communicate()
    assert left(databases) == [0, 0, ROWS]
    archived_whole(runs, databases, *TWO_AT_ONCE)


@pytest.mark.req("REQ-DB-004", "REQ-DB-005")
@pytest.mark.parametrize("databases", [3], indirect=True)
def test_a_worker_that_is_killed_fails_its_database_alone(databases: list[TestDatabase], bucket: Any, config_file: Any) -> None:
    runs = configure(config_file, bucket, databases, defaults={"parallel_databases": True, "max_parallel_databases": 2})
    child = runs.spawn(env={"AA_TEST_POINT": POINT})
    stopped = two_at_work(child, databases)

    kill.kill(parent(stopped[0]))
    kill.wave_through(POINT, child.token, child.poll)
    result = finish(child)

    said = summary(result)
    assert result.rc == exits.SOME_FAILED, result.err
    assert sorted(table["outcome"] for made in said["databases"] for table in made["tables"]) == ["done", "done", "failed"]
    [error] = said["errors"]
    assert f"the process that worked on database '{error['database']}' ended with code -9" in error["msg"]
    assert {db.name: count for db, count in zip(databases, left(databases))} == {db.name: ROWS * (db.name == error["database"]) for db in databases}
    kill.all_gone(child.token)
    archived_whole(runs, databases)


@pytest.mark.req("REQ-DB-004", "T45")
@pytest.mark.parametrize("databases", [3], indirect=True)
@pytest.mark.parametrize("signals, then", [([signal.SIGTERM], [0, 0, ROWS]), ([signal.SIGTERM, signal.SIGINT], [ROWS] * 3)],
                         ids=["drain", "roll back"])
def test_the_first_signal_drains_every_database_and_the_second_rolls_back(databases: list[TestDatabase], bucket: Any, config_file: Any,
                                                                         signals: list[int], then: list[int]) -> None:
    runs = configure(config_file, bucket, databases)
    child = runs.spawn(*TWO_AT_ONCE, env={"AA_TEST_POINT": POINT})
    stopped = two_at_work(child, databases)

    for signum in signals:
        child.send_signal(signum)
    if len(signals) == 1:
        for pid in stopped:
            kill.go_on(pid)
    result = finish(child)

    assert result.rc - 128 in signals, result.err
    assert left(databases) == then
    said = summary(result)
    assert said["stopped_by"] == signal.Signals(result.rc - 128).name
    assert [made["name"] for made in said["databases"]] == [db.name for db in databases[:2]]
    kill.all_gone(child.token)
    archived_whole(runs, databases)


@pytest.mark.req("REQ-DB-004")
@pytest.mark.parametrize("databases", [1], indirect=True)
def test_two_names_of_one_database_wait_for_each_other(databases: list[TestDatabase], bucket: Any, config_file: Any) -> None:
    [db] = databases
    tables.create(db.connection, "public.other", rows=ROWS, first="2024-01-01", last="2024-02-01")
    runs = configure(config_file, bucket, [db])
    settings = yaml.safe_load(runs.path.read_text())
    [one] = settings["databases"]
    settings["databases"].append({**one, "name": "another", "dbname": db.name, "tables": [{**one["tables"][0], "name": "other"}]})
    runs.path.write_text(yaml.safe_dump(settings))

    assert runs.ran("--parallel")["totals"]["rows"] == 2 * ROWS


@pytest.mark.req("REQ-DB-004", "REQ-EXE-004", "REQ-EXE-005")
@pytest.mark.parametrize("databases", [2], indirect=True)
def test_a_terminal_shows_the_databases_together_in_one_line(databases: list[TestDatabase], bucket: Any, config_file: Any) -> None:
    runs = configure(config_file, bucket, databases, defaults={"batch_size": 10, "sleep_between_batches": 1})
    with Terminal("aa-archive", ["-c", runs.path, "--parallel", "--force"], columns=150) as terminal:
        assert terminal.end() == 0, terminal.seen
    shown = terminal.seen
    assert re.search(r"\r[01] of 2 databases \[[#-]+\] [0-9]+/60  +[0-9]+%", shown), shown
    for db in databases:
        assert f"   {db.name} at " in shown and re.search(rf"^{db.name} public.audit_logs +{ROWS} ", shown, re.MULTILINE), shown
    assert re.search(r"done in .*: 2 of 2 tables\. exit 0", shown)


@pytest.mark.req("REQ-EXE-004")
@pytest.mark.parametrize("databases", [1], indirect=True)
def test_a_limit_that_is_none_is_refused(databases: list[TestDatabase], bucket: Any, config_file: Any) -> None:
    runs = configure(config_file, bucket, databases)
    for argv, says in ((["--max-workers", "2"], "no effect without --parallel"), (["--parallel", "--max-workers", "0"], "'0' is no number"),
                       (["--parallel", "--max-workers", "11"], "from 1 to 10")):
        result = runs.run(*argv)
        assert (result.rc, result.out) == (exits.CONFIG, b"") and says in result.err
    assert left(databases) == [ROWS]
