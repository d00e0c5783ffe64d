"""What a campaign works on: servers, the lines to them, a database with an application at work in it, a bucket, and a judge.

Needs no pytest.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import secrets
import subprocess
import time
import zlib
from pathlib import Path
from typing import Any, Iterable, Optional, Sequence

import yaml
from botocore.exceptions import ClientError

from audit_archiver.formats import names
from tests.crash.cases import DIRECT, POSTGRES, S3
from tests.ground import processes
from tests.ground.application import ABSENT, Application
from tests.ground.archive import Archive
from tests.ground.faulty_s3 import FaultyS3
from tests.ground.kill import family, go_on, kill_family
from tests.ground.postgres import Cluster
from tests.ground.proxy import Proxy
from tests.ground.run import Child, run_stage, spawn
from tests.ground.s3 import ACCESS_KEY, REGION, SECRET_KEY, MotoServer, RcloneServer, S3Server
from tests.ground.wait import until

TABLE = "public.audit_logs"
BATCH_ROWS = 50
DUE_ROWS = 2 * BATCH_ROWS + 20  # what a run finds at least
READ_TIMEOUT_S = 2.0  # of requests to S3 through the line that is broken: less than a stall
POLL_S = 0.03


class Wrong(Exception):
    """A row is not where it has to be, or a run that nothing disturbs did not end well."""


class Ground:
    """Servers for a whole campaign, the lines to them, and a database and bucket for each epoch."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._open = contextlib.ExitStack()
        place.mkdir(parents=True, exist_ok=True)
        self.cluster = self._open.enter_context(Cluster.start(settings={
            "fsync": "off", "full_page_writes": "off", "autovacuum": "off", "shared_buffers": "32MB", "deadlock_timeout": "100ms"}))
        try:
            self.admin("CREATE ROLE archiver LOGIN PASSWORD 'archiver-password'")
            self.stores: list[S3Server] = []
            for kind in (MotoServer, RcloneServer):
                self.stores.append(kind(place / kind.__name__))
                self._open.callback(self.stores[-1].stop)
            self.store = self.stores[0]
            self.to_postgres = self._open.enter_context(Proxy(f"{self.cluster.host}/.s.PGSQL.{self.cluster.port}"))
            self.to_store = self._open.enter_context(Proxy(""))
            self.liar = self._open.enter_context(FaultyS3(""))
            self.choose(0)
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Ground:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def choose(self, number: int) -> None:
        """The object store of the next epoch: one that honours If-None-Match and one that does not, in turn."""
        self.store = self.stores[number % len(self.stores)]
        address = self.store.endpoint.partition("://")[2]
        host, _, port = address.partition(":")
        self.to_store.target, self.liar.target = (host, int(port)), address

    @property
    def can_lie(self) -> bool:
        """Whether this epoch's store takes what it is sent unseen: rclone refuses a body that is not the one that was signed."""
        return isinstance(self.store, MotoServer)

    def line(self, name: str) -> Proxy:
        """The proxy before a server."""
        return self.to_postgres if name == POSTGRES else self.to_store

    def heal(self) -> None:
        """No fault is left on a line."""
        for proxy in (self.to_postgres, self.to_store):
            proxy.stall = proxy.stall_down = proxy.refuse = False
            proxy.latency_s, proxy.cut_after, proxy.cut_after_up = 0.0, None, None
        self.liar.fault = None

    def admin(self, sql: str) -> None:
        """Run SQL as the superuser."""
        with contextlib.closing(self.cluster.connect()) as connection, connection.cursor() as cursor:
            cursor.execute(sql)


class Epoch:
    """A database with an application at work in it, a bucket, and who judges them."""

    def __init__(self, ground: Ground, number: int) -> None:
        ground.choose(number)
        self.ground, self.name = ground, f"epoch_{number}_{secrets.token_hex(3)}"
        self.bucket = self.name.replace("_", "-")
        self.place = ground.place / self.name
        self.place.mkdir()
        ground.admin(f"CREATE DATABASE {self.name} OWNER archiver")
        client = ground.store.client()
        client.create_bucket(Bucket=self.bucket)
        self.archive = Archive(client, self.bucket)
        self.application = Application(self.connect, TABLE, self.place / "ledger.jsonl")
        self.application.create()
        self.faults = 0
        self.seen: dict[str, dict[int, tuple[int, dict[str, Any]]]] = {}
        self.numbers = itertools.count(1)

    def connect(self) -> Any:
        """A session that no fault of a line reaches."""
        return self.ground.cluster.connect(self.name, "archiver")

    def query(self, sql: str, *args: Any) -> list[tuple[Any, ...]]:
        """Rows of a statement, on a session of its own: the server may have died since the last one."""
        with contextlib.closing(self.connect()) as connection, connection.cursor() as cursor:
            cursor.execute(sql, args or None)
            return cursor.fetchall() if cursor.description else []

    def config(self, line: str = DIRECT, mode: str = "held", store: Optional[str] = None) -> Path:
        """The configuration for a way to the servers."""
        cluster = self.ground.cluster
        path = self.place / f"{line}-{mode}-{bool(store)}.yaml"
        way = {"host": cluster.host, "port": cluster.port}
        if line == POSTGRES:
            way = {"host": "127.0.0.1", "port": self.ground.to_postgres.port, "sslmode": "disable"}
        endpoint = store or (f"http://127.0.0.1:{self.ground.to_store.port}" if line == S3 else self.ground.store.endpoint)
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump({
            "version": "2.0",
            "s3": {"endpoint": endpoint, "bucket": self.bucket, "prefix": "archives/", "region": REGION, "access_key_id": ACCESS_KEY,
                   "secret_access_key": SECRET_KEY, "retry_base_s": 0.1, "retry_max_s": 0.4, "connect_timeout_s": 2,
                   "read_timeout_s": READ_TIMEOUT_S if line == S3 else 60},
            "defaults": {"retention_days": 90, "batch_size": BATCH_ROWS, "sleep_between_batches": 0, "vacuum_strategy": "standard"},
            "locking": {"enabled": True, "backend": "postgres", "mode": mode},
            "staging_dir": str(self.place / "staging"), "resources": {"min_free_disk_gb": 0},
            "databases": [{"name": self.name, "user": "archiver", "password": "archiver-password", "fsync_off": "acknowledged",
                           "tables": [{"name": "audit_logs", "timestamp_column": "created_at", "primary_key": "id"}], **way}],
        }, sort_keys=False), encoding="utf-8")
        return path

    def top_up(self) -> None:
        """Enough rows are due for several batches."""
        [[due]] = self.query(f"SELECT count(*) FROM {TABLE} WHERE created_at < now() - interval '100 days'")
        if due < DUE_ROWS:
            self.application.fill(DUE_ROWS - due)

    def sessions(self) -> list[tuple[int, str]]:
        """The archiver's sessions here: (backend, application name), the youngest first."""
        return [(pid, name) for pid, name in self.query(
            "SELECT pid, application_name FROM pg_stat_activity WHERE datname = current_database() "
            "AND application_name LIKE 'audit-archiver %%' ORDER BY backend_start DESC")]

    # -- the judge

    def judge(self, *, settled: bool) -> None:
        """Every row of the ledger is in one place, as it was last written; unless all is `settled`, by a run that ended with 0,
        the rows of a batch that nobody has decided about may be nowhere else than in its objects. Raises Wrong."""
        until(lambda: not self.sessions(), "the sessions of the ended run end", 30)
        with self.application.quiet() as ledger:
            table = {row[0]: row for row in self.query(
                f"SELECT id, to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"+00:00\"'), account, version, note, detail "
                f"FROM {TABLE}")}
            archived, limbo = self.archived()
            wrong: list[str] = []
            for row in {*ledger.rows(), *table, *(key for rows in archived.values() for key in rows)}:
                places = [rows[row] for rows in archived.values() if row in rows]
                if row in table:
                    at, account, version, note, detail = table[row][1:]
                    places.append((version, {"id": row, "created_at": at, "account": account, "version": version, "note": note, "detail": detail}))
                wrong += self._judge_row(ledger, row, places, {} if settled else limbo)
        if wrong:
            raise Wrong(f"{len(wrong)} rows: " + "; ".join(wrong[:10]))
        balance = run_stage("aa-balance", ["-c", self.config(), "--database", self.name, "--table", TABLE, "--output", "json"])
        if balance.rc != 0:
            raise Wrong(f"aa-balance ended with {balance.rc}: {balance.err[-2000:]} {balance.out[-500:]!r}")

    def _judge_row(self, ledger: Any, row: int, places: list[tuple[int, dict[str, Any]]],
                   limbo: dict[int, tuple[int, dict[str, Any]]]) -> list[str]:
        allowed = ledger.versions(row)
        if len(places) > 1:
            return [f"{row} is in {len(places)} places"]
        if not places:
            if row in limbo and limbo[row][0] in allowed:
                return []
            if ABSENT in allowed:
                ledger.settle(row, ABSENT)
                return []
            return [f"{row} is nowhere"]
        version, line = places[0]
        if version not in allowed:
            return [f"{row} is there in version {version}, and the application wrote {sorted(allowed)}"]
        if line != self.application.expected(row, version):
            return [f"{row} was altered: {line}"]
        ledger.settle(row, version)
        return []

    def archived(self) -> tuple[dict[str, dict[int, tuple[int, dict[str, Any]]]], dict[int, tuple[int, dict[str, Any]]]]:
        """Rows by batch of what is archived, and the rows of batches that nobody has decided about."""
        keys = set(self.archive.keys())
        stems = {key[:-len(names.COMMIT)] for key in keys if key.endswith(names.COMMIT)}
        for stem in stems - self.seen.keys():
            commit = json.loads(self.archive.read(stem + names.COMMIT))
            left_out = set(commit.get("deleted", {}).get("left_out", ()))
            self.seen[stem] = _rows(line for place, line in enumerate(self.archive.rows(commit)) if place not in left_out)
        limbo: dict[int, tuple[int, dict[str, Any]]] = {}
        for key in keys:
            stem = key[:-len(names.KEYS)]
            if key.endswith(names.KEYS) and not {stem + names.COMMIT, stem + names.ABANDONED} & keys:
                limbo.update(_rows(self._unpacked(stem)))
        return {stem: self.seen[stem] for stem in stems}, limbo

    def _unpacked(self, stem: str) -> list[bytes]:
        """The rows of a batch that nobody vouches for; none where its data are missing or damaged."""
        try:
            return gzip.decompress(self.archive.read(stem + names.DATA)).splitlines()
        except (ClientError, OSError, EOFError, zlib.error):
            return []

    def close(self) -> None:
        """The application ends, the database goes; what lies in the bucket stays with the server."""
        self.application.stop()
        self.ground.admin(f"DROP DATABASE {self.name}")


def _rows(lines: Iterable[bytes]) -> dict[int, tuple[int, dict[str, Any]]]:
    found = {}
    for line in lines:
        row = {name: value for name, value in json.loads(line).items() if not name.startswith("_")}
        found[row["id"]] = row["version"], row
    return found


class Run:
    """One started command; stands still at a point, if one was asked for and it is ever reached."""

    def __init__(self, epoch: Epoch, argv: Sequence[Any], point: Optional[str] = None) -> None:
        number = next(epoch.numbers)
        self._log = open(epoch.place / f"{number:03}.log", "w+b")
        self.began = time.monotonic()
        self.child: Child = spawn(str(argv[0]), argv[1:], env={"AA_TEST_POINT": point} if point else {},
                                  stdout=subprocess.DEVNULL, stderr=self._log)

    def stopped(self) -> Optional[int]:
        """The process that stands still, or None when the command has ended without."""
        found: list[int] = []

        def look() -> bool:
            found[:] = [pid for pid in [self.child.pid, *descendants(self.child.pid)] if processes.state(pid) == "T"]
            return bool(found) or self.child.poll() is not None

        until(look, f"a process of {self.child.args} stops or all end", 120, POLL_S)
        return found[0] if found else None

    def wait(self) -> int:
        """Its exit code, once all of its processes have ended; whoever stops again is sent on."""
        def ended() -> bool:
            if self.child.poll() is None:
                for pid in descendants(self.child.pid):
                    if processes.state(pid) == "T":
                        go_on(pid)
                if processes.state(self.child.pid) == "T":
                    go_on(self.child.pid)
            return self.child.poll() is not None

        until(ended, "the run ends", 120, POLL_S)
        until(lambda: not family(self.child.token), "every process of the run ends", 30)
        return int(self.child.returncode)

    def end(self) -> str:
        """Nobody is left; its log."""
        kill_family(self.child.token)
        self.child.wait()
        with self._log:
            self._log.seek(0)
            return self._log.read().decode(errors="replace")


def descendants(pid: int) -> list[int]:
    """The children of a process, and theirs (Linux). Cheaper than to look at every process there is."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                for child in map(int, file.read().split()):
                    found += [child, *descendants(child)]
    return found
