"""Batches in a transaction holder that lives in the test's own process, without S3 and without a child process.

    with Holder(config_file(db, bucket)) as holder:
        lines = holder.verified(plan(holder.settings, "audit_logs"))     # real aa-select and aa-serialize, in process
        deleted = holder.delete(lines)                                   # real aa-delete
        holder.commit(deleted[0])

What aa-upload and aa-verify would add is vouched for here: the holder takes their word, so its tests need no store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Union

from audit_archiver import config, lines
from audit_archiver.config.model import Config, Database
from audit_archiver.driver import children, pipeline
from audit_archiver.exits import ArchiverError, Failed
from audit_archiver.formats import job as jobs
from audit_archiver.holder import commit
from audit_archiver.holder.client import Client
from audit_archiver.holder.operations import Operations
from audit_archiver.holder.server import Server
from audit_archiver.holder.session import Standing
from audit_archiver.postgres import catalog, connect
from tests.ground.run import BIN, Result, run_stage

RUN = "20251230T021545Z-4711"
CUTOFF = "2025-01-01T00:00:00Z"


WHOLE = "aa-select | aa-serialize | VOUCH | aa-delete"


class NoServer:
    """Stands for a bucket where nothing is sent to a store; the configuration wants one."""

    name, endpoint, region, access_key, secret_key = "nowhere", "http://127.0.0.1:9", "us-east-1", "key", "secret"


def plan(settings: Config, table: str, *, schema: str = "public", key: Sequence[str] = ("id",), timestamp: str = "created_at",
         cutoff: str = CUTOFF, batch_size: int = 100, **more: Any) -> dict[str, Any]:
    """The job of one table of the only configured database, as aa-plan makes it."""
    database = settings.databases[0]
    connection = connect.connect(database, purpose="plan")
    try:
        shape = catalog.shape(connection, schema, table, tuple(key), timestamp)
    finally:
        connection.close()
    fields = {"start": None, "end": None, "limit": None, "sleep_s": 0, "cursor": None, "estimate": None, "run": RUN, **more}
    return jobs.build(database=database.name, schema=schema, table=table, key=list(key), timestamp=timestamp, cutoff=cutoff,
                      batch_size=batch_size, shape_sha256=shape.sha256, **fields)


def vouched(line: Mapping[str, Any], **verified: Any) -> dict[str, Any]:
    """A serialized line as it would come out of aa-upload and aa-verify; `verified` replaces fields of that section."""
    batch, serialized = line["batch"], line["serialized"]
    sample = [batch["first"][1:], batch["last"][1:]]
    mark = {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "how": "read", "rows": batch["rows"],
            "sha256": serialized["data"]["sha256"], "keys_sha256": batch["keys_sha256"], "sample": sample}
    return {**line, "uploaded": {"bucket": NoServer.name, "etags": ["a", "b", "c"], "versions": [None] * 3, "create_only": True},
            "verified": {**mark, **verified}}


def nothing_to_recover(_database: Database, _control: connect.Connection, _tables: Any) -> Standing:
    """Recovery where no earlier run left anything."""
    return Standing({})


class Holder:
    """Operations and their server in this process, and the stages that use them."""

    def __init__(self, path: Union[str, Path], *, in_flight: int = 50, env: Optional[Mapping[str, str]] = None,
                 recover: Any = nothing_to_recover, database: Optional[Mapping[str, Any]] = None, **more: Any) -> None:
        """`database` replaces fields of the configured database, also with values that a configuration may not have."""
        self.settings = config.load(str(path), {})
        if database:
            changed = dataclasses.replace(self.settings.databases[0], **database)
            self.settings = dataclasses.replace(self.settings, databases=(changed,))
        self.operations = Operations(self.settings, None, in_flight, recover, **more)
        self.server = Server(self.operations, env or {})
        self.server.serve()
        self.env = {"AA_TXN": self.server.path, "AA_CONFIG": str(path), "AA_STAGING": str(Path(path).parent / "staging")}
        self._clients: list[Client] = []

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it as aa-txn ends."""
        self.server.close()
        self.operations.close()
        for client in self._clients:
            client.bye(0, None)

    def client(self, stage: str = "aa-select") -> Client:
        """A stage that has said hello."""
        made = Client(self.server.path, stage)
        self._clients.append(made)
        return made

    def stage(self, name: str, stdin: bytes, *argv: str) -> Result:
        """Run a real stage in this process."""
        return run_stage(name, argv, stdin, self.env)

    def select(self, *todo: Mapping[str, Any]) -> Result:
        """aa-select over jobs."""
        return self.stage("aa-select", b"".join(map(lines.dump, todo)))

    def verified(self, *todo: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The jobs' batches selected, staged and vouched for."""
        selected = self.select(*todo)
        assert selected.rc == 0, selected.err
        staged = self.stage("aa-serialize", selected.out)
        assert staged.rc == 0, staged.err
        return [vouched(line) for line in staged.lines]

    def delete(self, batch_lines: Sequence[Mapping[str, Any]]) -> Result:
        """aa-delete over verified lines."""
        return self.stage("aa-delete", b"".join(map(lines.dump, batch_lines)))

    def commit(self, line: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """Commit one deleted line, as the driver does when it comes out of the pipe."""
        return commit.commit(self.operations, json.loads(json.dumps(line)), **more)

    def begun(self, job: Mapping[str, Any], client: Optional[Client] = None) -> dict[str, Any]:
        """A batch begun by a stage of its own."""
        return (client or self.client()).call("begin", job=job)

    def copied(self, job: Mapping[str, Any], client: Optional[Client] = None) -> dict[str, Any]:
        """A batch begun, locked and copied to nowhere; what begin answered."""
        client = client or self.client()
        begun = client.call("begin", job=job)
        client.call("lock", handle=begun["handle"], cursor=None, limit=begun["rows"])
        with open(os.devnull, "wb") as out:
            client.call("copy", out.fileno(), handle=begun["handle"])
        return begun

    def command(self, shell: str, *todo: Mapping[str, Any], signals: Optional[pipeline.Signals] = None) -> tuple[
            Optional[ArchiverError], list[dict[str, Any]]]:
        """Run a pipe of real processes as aa-txn does: why it failed, or None, and the committed lines.

        `VOUCH` in `shell` stands for upload and verify, `SAY STAGE CODE` for a stage that says just that.
        """
        jobs_file = Path(self.env["AA_CONFIG"]).parent / "jobs"
        jobs_file.write_bytes(b"".join(map(lines.dump, todo)))
        tool = f"{sys.executable} {Path(__file__).with_name('stand_in.py')}"
        text = shell.replace("VOUCH", f"{tool} vouch").replace("SAY", f"{tool} say").replace("WAIT", f"{tool} wait")
        out: list[dict[str, Any]] = []
        with open(jobs_file, "rb") as stdin:
            child = children.start(["sh", "-c", text], {"PATH": f"{BIN}:{os.defpath}", **self.env}, stdin)
            failure = pipeline.run([child], self.operations, self.server, signals or pipeline.Signals(install=False),
                                   lambda line: out.append(json.loads(line)))
        return failure, out

    def archive(self, *todo: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The whole way of the jobs' batches; the committed lines."""
        deleted = self.delete(self.verified(*todo))
        assert deleted.rc == 0, deleted.err
        return [self.commit(line) for line in deleted.lines]


def lock_row(connection: Any, sql: str) -> None:
    """Open a transaction on `connection` that runs `sql` and stays open: somebody else's locks."""
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute(sql)


def backends(db: Any, like: str = "audit-archiver %") -> list[tuple[int, str, str]]:
    """(pid, application_name, state) of the sessions in the test's database whose name is like that."""
    return db.admin("SELECT pid, application_name, state FROM pg_stat_activity WHERE datname = %s AND application_name LIKE %s "
                    "ORDER BY backend_start", (db.name, like))


def staged_files(root: Path) -> list[str]:
    """Every file beneath the staging directory."""
    return sorted(os.path.relpath(os.path.join(place, name), root) for place, _, names in os.walk(root) for name in names)


def stuck_copy(holder: Holder, read_end: int, write_end: int) -> Client:
    """A client that copies more rows than fit into a pipe that nobody reads."""
    client = Client(holder.server.path, "aa-select")
    begun = client.call("begin", job=plan(holder.settings, "audit_logs"))
    client.call("lock", handle=begun["handle"], cursor=None, limit=3000)

    def copy() -> None:
        with contextlib.suppress(Failed, OSError, ValueError):
            client.call("copy", write_end, handle=begun["handle"])

    threading.Thread(target=copy, daemon=True).start()
    os.read(read_end, 1)
    return client
