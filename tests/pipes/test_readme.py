"""The README's way to one's own database, carried out as it stands: role, configuration, four commands."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any, Iterator

import pytest
import yaml

from tests.conftest import Bucket, TestDatabase
from tests.ground import tables
from tests.ground.driven import OLD
from tests.ground.run import ROOT, Result, run_forked
from tests.ground.wait import until

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The README's code block in a language; there is one of each."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(found) == 1
    return str(found[0])


@pytest.fixture()
def role(db: TestDatabase) -> Iterator[str]:
    """The role of step 2, made by the README's own statements."""
    tables.create(db.connection, rows=1500, first=OLD[0], last=OLD[1])
    name = f"audit_archiver_{os.getpid()}"
    db.admin(f"REVOKE TEMPORARY ON DATABASE {db.name} FROM PUBLIC; REVOKE USAGE ON SCHEMA public FROM PUBLIC")
    db.admin(block("sql").replace("audit_archiver", name).replace("mydb", db.name))
    yield name
    db.admin(f"DROP OWNED BY {name}")
    db.admin(f"DROP ROLE {name}")


@pytest.fixture()
def path(db: TestDatabase, bucket: Bucket, role: str, tmp_path: Path) -> Path:
    """The configuration of step 3, with the test's own servers put in."""
    found: dict[str, Any] = yaml.safe_load(block("yaml"))
    found["s3"].update(bucket=bucket.name, endpoint=bucket.endpoint)
    found["databases"][0].update(name=db.name, host=db.host, port=db.port, user=role, fsync_off="acknowledged")
    found["staging_dir"] = str(tmp_path / "staging")
    made = tmp_path / "my.yaml"
    made.touch(mode=0o600)
    made.write_text(yaml.safe_dump(found))
    return made


@pytest.mark.req("REQ-VAL-002", "REQ-OBS-013", "REQ-EXE-001", "REQ-EXE-002")
def test_the_four_steps_of_the_readme_lead_to_an_archive(db: TestDatabase, bucket: Bucket, path: Path) -> None:
    env = {"DB_PASSWORD": "choose one", "AWS_ACCESS_KEY_ID": bucket.access_key, "AWS_SECRET_ACCESS_KEY": bucket.secret_key}
    results: dict[str, Result] = {}
    left: dict[str, int] = {}
    for line in block("sh").splitlines():
        name, *argv = line.partition("#")[0].split()
        second = int(time.time())
        until(lambda second=second: int(time.time()) > second, "the second, which names of batches bear, is over")  # type: ignore[misc]
        result = run_forked(name, [str(path) if each == "my.yaml" else each for each in argv], env=env)
        assert result.rc == 0, f"{line}\n{result.err}"
        step = argv[2] if argv[2:] else name
        results[step], left[step] = result, db.scalar("SELECT count(*) FROM audit_logs")
    assert left == {"aa-check": 1500, "--dry-run": 1500, "--limit": 500, "--quiet": 0}
    assert not [record for record in results["aa-check"].log if record["level"] == "ERROR"]
    assert (results["--quiet"].out, results["--quiet"].err) == (b"", "")
    assert len([key for key in bucket.keys() if key.endswith("_commit.json")]) == 2
