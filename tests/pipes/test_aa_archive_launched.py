"""aa-archive inside a process that has other threads: its stages cannot be forks then, and are started by their launchers.

The same on every system but Linux. The driver itself runs in the test's process, so what it does after a failure is looked at from
inside.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from typing import Any, Callable, Iterator

import pytest

from audit_archiver import exits
from audit_archiver.cli import STOP_SIGNALS
from audit_archiver.driver import children
from tests.ground import tables
from tests.ground.driven import Driven, logs
from tests.ground.run import BIN, Result, run_stage

KEYED = {"timestamp_column": "created_at", "primary_key": "id"}
QUICK = {"retries": 0, "retry_base_s": 0.01, "retry_max_s": 0.05}
FAILS = """
CREATE FUNCTION public.no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  IF OLD.id = 5 THEN RAISE EXCEPTION 'not this one'; END IF; RETURN OLD; END $$;
CREATE TRIGGER no BEFORE DELETE ON public.audit_logs FOR EACH ROW EXECUTE PROCEDURE public.no();
"""


@pytest.fixture()
def threaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A process with a second thread, and signal handlers that come back; the names of the stages that were launched."""
    done, started = threading.Event(), list[str]()
    thread = threading.Thread(target=done.wait, daemon=True)
    thread.start()
    monkeypatch.setattr("sys.argv", [str(BIN / "aa-archive")])
    start = children.start

    def noted(argv: Any, *rest: Any, **more: Any) -> Any:
        started.append(os.path.basename(argv[1]))
        return start(argv, *rest, **more)

    monkeypatch.setattr(children, "start", noted)
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    yield started
    for each, handler in before.items():
        signal.signal(each, handler)
    done.set()
    thread.join(10)


@pytest.fixture()
def driven(db: Any, bucket: Any, config_file: Any, threaded: list[str]) -> Callable[..., Driven]:
    """A function that writes a configuration and gives its runs."""
    return lambda *args, **more: Driven(db, bucket, config_file(db, bucket, *args, s3=QUICK, **more))


def run(runs: Driven, *argv: str) -> Result:
    """One run of aa-archive in this process."""
    return run_stage("aa-archive", ["-c", str(runs.path), *argv], env={"PATH": os.defpath})


def report(result: Result) -> list[tuple[str, str, int]]:
    """(table, outcome, rows) of a run's report."""
    return [(each["table"], each["outcome"], each["rows"]) for each in json.loads(result.out)["databases"][0]["tables"]]


def test_stages_that_cannot_be_forks_are_launched_and_archive_the_same(db: Any, driven: Callable[..., Driven], threaded: list[str]) -> None:
    before = logs(db, old=60, young=5)
    db.execute("CREATE TABLE public.keyless (id int, created_at timestamptz)")
    runs = driven([{"name": name, **KEYED} for name in ("audit_logs", "keyless")], defaults={"batch_size": 25, "vacuum_strategy": "standard"})

    result = run(runs)

    assert result.rc == exits.SOME_FAILED, result.err
    assert report(result) == [("audit_logs", "done", 60), ("keyless", "refused", 0)]
    assert json.loads(result.out)["databases"][0]["tables"][0]["space"]["done"]
    assert runs.whole("public.audit_logs", before) == 60
    assert sorted(set(threaded)) == ["aa-delete", "aa-record", "aa-select", "aa-serialize", "aa-upload", "aa-verify"]


def test_a_row_that_fails_alone_is_found_by_smaller_batches_and_the_others_go(db: Any, driven: Callable[..., Driven]) -> None:
    before = logs(db, old=40, young=0)
    db.execute(FAILS)
    runs = driven(defaults={"batch_size": 40})

    result = run(runs)

    assert result.rc == exits.SOME_FAILED and "row.left.failed" in result.err, result.err
    assert [row[0] for row in db.execute("SELECT id FROM audit_logs")] == [5]
    assert runs.whole("public.audit_logs", before) == 39


def test_late_mode_compares_and_deletes_by_itself(db: Any, driven: Callable[..., Driven]) -> None:
    before = logs(db, old=30, young=5)
    runs = driven(locking={"mode": "late"})
    result = run(runs, "--quiet")
    assert (result.rc, result.out, result.err) == (0, b"", "")
    assert runs.whole("public.audit_logs", before) == 30
    assert {line["committed"]["by"] for line in runs.archive.commits()} == {"aa-delete"}


@pytest.mark.parametrize("mode", ["held", "late"])
def test_a_bucket_that_cannot_be_written_fails_the_tables_and_deletes_nothing(db: Any, driven: Callable[..., Driven], bucket: Any,
                                                                              monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """The bucket goes after the run has begun: only then the stages meet it."""
    before = logs(db, old=30, young=0)
    runs = driven(locking={"mode": mode})
    start = children.start

    def then_gone(argv: Any, *rest: Any, **more: Any) -> Any:
        if "aa-upload" in argv[1]:
            for key in bucket.keys():
                bucket.client.delete_object(Bucket=bucket.name, Key=key)
            bucket.client.delete_bucket(Bucket=bucket.name)
        return start(argv, *rest, **more)

    monkeypatch.setattr(children, "start", then_gone)
    result = run(runs)
    bucket.client.create_bucket(Bucket=bucket.name)
    assert result.rc not in (exits.OK, exits.SOME_FAILED), result.err
    assert [outcome for _, outcome, _ in report(result)] == ["failed"]
    assert tables.digest(db.connection, "public.audit_logs") == before


def test_what_only_looks_starts_no_stage(db: Any, driven: Callable[..., Driven], threaded: list[str]) -> None:
    before = logs(db, old=30, young=5)
    runs = driven()
    planned, validated = run(runs, "--dry-run"), run(runs, "--validate-only")
    assert (planned.rc, validated.rc) == (0, 0), planned.err + validated.err
    assert json.loads(planned.out)["tables"][0]["rows"] == 30
    assert (threaded, runs.archive.keys(), tables.digest(db.connection, "public.audit_logs")) == ([], [], before)
