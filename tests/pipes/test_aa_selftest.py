"""aa-selftest on an empty database and an empty bucket, on ones that are not empty, and killed in the middle."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from audit_archiver import exits
from tests.conftest import Bucket, TestDatabase
from tests.ground.faulty_s3 import FaultyS3, on, returns
from tests.ground.kill import all_gone, kill_family
from tests.ground.run import Child, Result, finish, spawn
from tests.ground.wait import until


def start(db: TestDatabase, bucket: Bucket, *argv: str, endpoint: str = "", prefix: str = "/trial") -> Child:
    """A self-test of few rows and points as a DBA starts it, with the credentials in the environment."""
    return spawn("aa-selftest", ["--dsn", db.dsn, "--s3", f"s3://{bucket.name}{prefix}", "--endpoint", endpoint or bucket.endpoint,
                                 "--rows", "60", *argv],
                 env={"AWS_ACCESS_KEY_ID": bucket.access_key, "AWS_SECRET_ACCESS_KEY": bucket.secret_key, "AWS_REGION": bucket.region,
                      "TMPDIR": os.environ["HOME"]})


def ended(child: Child, seconds: float = 240) -> Result:
    return finish(child, seconds=seconds)


def left(db: TestDatabase, bucket: Bucket) -> tuple[Any, list[str]]:
    """What there is in the database and in the bucket."""
    return db.scalar("SELECT count(*) FROM pg_namespace WHERE nspname = 'aa_selftest'"), bucket.keys()


@pytest.mark.req("T38")
def test_a_server_and_a_store_that_keep_their_word_pass_and_nothing_stays(db: TestDatabase, bucket: Bucket) -> None:
    result = ended(start(db, bucket, "--point", "upload.data.put", "--point", "holder.commit.sent", "--output", "json"))
    assert result.rc == 0, result
    report = json.loads(result.out)
    outcomes = {step["name"]: step["outcome"] for step in report["steps"]}
    assert set(outcomes.values()) == {"passed"} and len(outcomes) == 12, outcomes
    details = {step["name"]: step["detail"] for step in report["steps"]}
    assert details["killed at upload.data.put"].startswith("stage killed, the run went on; 60 rows, digest equal")
    assert details["killed at holder.commit.sent"].startswith("driver killed, next run after")
    assert (len(report["types"]) > 45, report["exit"], report["left"]) == (True, 0, None)
    assert left(db, bucket) == (0, [])


@pytest.mark.req("T20")
def test_a_store_that_alters_what_it_keeps_fails_the_test_and_is_named(db: TestDatabase, bucket: Bucket) -> None:
    with FaultyS3(bucket.endpoint) as store:
        store.fault = returns(on("GET", ".jsonl.gz"), lambda body: body[:-1] + b"x")
        result = ended(start(db, bucket, "--output", "text", endpoint=store.endpoint))
    assert result.rc == exits.FAILED, result
    assert b"archive, validate, restore, compare" in result.out and b"FAILED" in result.out and b"killed at" not in result.out
    assert "aa-archive ended with" in result.err
    assert left(db, bucket) == (0, [])


def test_what_is_not_empty_is_refused_and_not_touched(db: TestDatabase, bucket: Bucket) -> None:
    db.execute("CREATE TABLE theirs (id int)")
    refused = ended(start(db, bucket))
    assert refused.rc == exits.CONFIG and "not empty: public.theirs" in refused.err
    db.execute("DROP TABLE theirs")
    bucket.client.put_object(Bucket=bucket.name, Key="trial/theirs", Body=b"precious")
    for argv in ((), ("--clean",)):
        refused = ended(start(db, bucket, *argv))
        assert refused.rc == (exits.FAILED if argv else exits.CONFIG) and "trial/" in refused.err, refused
    assert left(db, bucket) == (0, ["trial/theirs"])


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_one_that_is_ended_in_the_middle_removes_everything_or_names_it(db: TestDatabase, bucket: Bucket, signum: int) -> None:
    child = start(db, bucket)
    try:
        until(lambda: any(key.endswith("_commit.json") for key in bucket.keys()) or child.poll() is not None, "it is at work", 120)
        child.send_signal(signum)
        result = ended(child)
        assert result.rc == -signum, result
        all_gone(child.token, 120)
        if signum == signal.SIGKILL:
            refused = ended(start(db, bucket))
            assert refused.rc == exits.CONFIG and "an earlier self-test was killed: schema 'aa_selftest'" in refused.err, refused
            assert ended(start(db, bucket, "--clean")).rc == 0
        assert left(db, bucket) == (0, [])
    finally:
        kill_family(child.token)


@pytest.mark.parametrize(("argv", "said"), [
    (["--point", "no.such"], "a run comes by no point 'no.such'"), (["--s3", "bucket"], "'bucket' is no place in a bucket"),
    (["--dsn", "postgresql://[oops"], "the connection string cannot be read"), (["--dsn", "dbname=x connect_timeout=3"], "has 'connect_timeout'"),
    (["--dsn", "host=a"], "names no database")])
def test_what_cannot_be_meant_is_refused(argv: list[str], said: str, tmp_path: Path) -> None:
    whole = ["--dsn", "dbname=x", "--s3", "s3://b", *argv]
    result = finish(spawn("aa-selftest", whole, env={"TMPDIR": tmp_path}))
    assert list(tmp_path.iterdir()) == []
    assert result.rc == exits.CONFIG and said in result.err, result
