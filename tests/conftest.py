"""Fixtures of the test ground: real servers for the session, a fresh database and bucket for every test."""

from __future__ import annotations

import os
import secrets
import signal
from pathlib import Path
from typing import Any, Iterator, Optional, Protocol, Sequence

import psycopg2.extensions
import pytest
import yaml

from tests.ground import s3 as s3_servers
from tests.ground.postgres import Cluster

TEMPLATE = "aa_template"
ARCHIVER = "archiver"
FOREIGN = ("AWS_", "PG", "AA_", "BOTO_", "S3_")
FOREIGN_NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "TZ", "LANG", "LANGUAGE", "XDG_CONFIG_HOME",
                 "XDG_STATE_HOME", "XDG_RUNTIME_DIR", "STATE_DIRECTORY", "RUNTIME_DIRECTORY", "NOTIFY_SOCKET")

pytest_plugins = ["tests.ground.traced"]

for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:  # a shell starts what runs in the background like this, nohup too, and children inherit it
        signal.signal(number, usual)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the developer's or the machine's environment reaches a test."""
    for name in list(os.environ):
        if name.startswith(FOREIGN) or name.startswith("LC_") or name.lower() in FOREIGN_NAMES \
                or name in FOREIGN_NAMES:
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def pg() -> Iterator[Cluster]:
    """A PostgreSQL server for the whole session (AA_PG and AA_PG_BINDIR choose which), and the role `archiver`."""
    with Cluster.start() as cluster:
        connection = cluster.connect()
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE ROLE {ARCHIVER} LOGIN PASSWORD 'archiver-password'")
            cursor.execute(f"CREATE DATABASE {TEMPLATE} OWNER {ARCHIVER} IS_TEMPLATE true")
        connection.close()
        yield cluster


class TestDatabase:
    """One test's own database. The ordinary role `archiver` owns it and whatever `execute` creates."""

    __test__ = False

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.host, self.port, self.user, self.password = cluster.host, cluster.port, ARCHIVER, "archiver-password"
        self.dsn, self.admin_dsn = cluster.dsn(name, ARCHIVER), cluster.dsn(name)
        self._own: Optional[psycopg2.extensions.connection] = None
        self._admin: Optional[psycopg2.extensions.connection] = None

    def connect(self, user: str = ARCHIVER, **more: Any) -> psycopg2.extensions.connection:
        """A connection of one's own, in autocommit mode."""
        return self.cluster.connect(self.name, user, **more)

    @property
    def connection(self) -> psycopg2.extensions.connection:
        """The connection that `execute` uses."""
        if self._own is None or self._own.closed:
            self._own = self.connect()
        return self._own

    def execute(self, sql: str, args: Optional[Sequence[Any]] = None) -> list[tuple[Any, ...]]:
        """Run SQL as the archiver and return its rows, if any."""
        return _execute(self.connection, sql, args)

    def scalar(self, sql: str, args: Optional[Sequence[Any]] = None) -> Any:
        """The first column of the first row."""
        return self.execute(sql, args)[0][0]

    def admin(self, sql: str, args: Optional[Sequence[Any]] = None) -> list[tuple[Any, ...]]:
        """Run SQL as the superuser."""
        if self._admin is None or self._admin.closed:
            self._admin = self.connect("postgres")
        return _execute(self._admin, sql, args)

    def needs(self, *features: str) -> None:
        """Skip the test if the server was built without a feature: "xml", or the name of an extension (hstore).

        The embedded server of the wheel has neither libxml nor contrib; any distribution's has both.
        """
        for feature in features:
            sql = ("SELECT count(*) FROM pg_available_extensions WHERE name = %s" if feature != "xml" else
                   "SELECT count(*) FROM pg_config() WHERE name = 'CONFIGURE' AND setting LIKE '%%--with-libxml%%' AND %s <> ''")
            if not self.admin(sql, (feature,))[0][0]:
                pytest.skip(f"PostgreSQL {self.cluster.version} in {self.cluster.bindir} was built without {feature}; "
                            "AA_PG or AA_PG_BINDIR names another")

    def close(self) -> None:
        """Close the connections that this object opened."""
        for connection in (self._own, self._admin):
            if connection is not None:
                connection.close()


def _execute(connection: psycopg2.extensions.connection, sql: str,
             args: Optional[Sequence[Any]]) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(sql, args)
        return cursor.fetchall() if cursor.description else []


@pytest.fixture()
def db(pg: Cluster) -> Iterator[TestDatabase]:
    """A fresh database, removed with every session that is still in it."""
    name = f"t_{secrets.token_hex(6)}"
    admin = pg.connect()
    with admin.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} OWNER {ARCHIVER}")
        made = TestDatabase(pg, name)
        yield made
        made.close()
        cursor.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        cursor.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
        _drop(cursor, name)
    admin.close()


def _drop(cursor: Any, name: str) -> None:
    """DROP DATABASE waits 5 s itself for ended sessions to leave; prepared transactions would block it for ever."""
    cursor.execute("SELECT gid FROM pg_prepared_xacts WHERE database = %s", (name,))
    assert not cursor.fetchall(), "the test left a prepared transaction"
    cursor.execute(f"DROP DATABASE {name}")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_servers.S3Server]:
    """An S3 server for the whole session (AA_S3 chooses which): moto."""
    server = s3_servers.shared(tmp_path_factory.mktemp("s3"))
    yield server
    server.stop()


@pytest.fixture()
def rclone(tmp_path: Path) -> Iterator[s3_servers.S3Server]:
    """rclone's S3 server: checks keys, ignores conditional writes, keeps objects as files."""
    server = s3_servers.RcloneServer(tmp_path / "rclone")
    yield server
    server.stop()


class Bucket:
    """One test's own bucket on a server."""

    def __init__(self, server: s3_servers.S3Server, name: str) -> None:
        self.server, self.name, self.endpoint = server, name, server.endpoint
        self.access_key, self.secret_key, self.region = server.access_key, server.secret_key, s3_servers.REGION
        self.client = server.client()
        self.client.create_bucket(Bucket=name)

    def keys(self, prefix: str = "") -> list[str]:
        """Every key under `prefix`, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", []))

    def read(self, key: str) -> bytes:
        """An object's bytes."""
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()


@pytest.fixture()
def bucket(s3: s3_servers.S3Server) -> Bucket:
    """A fresh, empty bucket on the session's server."""
    return Bucket(s3, f"t-{secrets.token_hex(6)}")


@pytest.fixture()
def poor_bucket(rclone: s3_servers.S3Server) -> Bucket:
    """A fresh, empty bucket on a store without conditional writes."""
    return Bucket(rclone, f"t-{secrets.token_hex(6)}")


class ConfigFile(Protocol):
    """What the fixture `config_file` gives."""

    def __call__(self, db: TestDatabase, bucket: Bucket, tables: Sequence[dict[str, Any]] = ...,
                 **overrides: Any) -> Path: ...


AUDIT_LOGS: dict[str, Any] = {"name": "audit_logs", "timestamp_column": "created_at", "primary_key": "id"}


@pytest.fixture()
def config_file(tmp_path: Path) -> ConfigFile:
    """A function that writes a configuration for a database and a bucket and returns its path.

    Overrides are merged over the top-level sections: s3={...}, defaults={...}, locking={...}, database={...}
    (the one entry of `databases`); any other name becomes a top-level key.
    """
    def write(db: TestDatabase, bucket: Bucket, tables: Sequence[dict[str, Any]] = (AUDIT_LOGS,),
              **overrides: Any) -> Path:
        sections: dict[str, Any] = {
            "version": "2.0",
            "s3": {"endpoint": bucket.endpoint, "bucket": bucket.name, "prefix": "archives/", "region": bucket.region,
                   "access_key_id": bucket.access_key, "secret_access_key": bucket.secret_key},
            "defaults": {"retention_days": 90, "batch_size": 100, "sleep_between_batches": 0,
                         "vacuum_strategy": "none"},
            "locking": {"enabled": True, "backend": "postgres"},
            "staging_dir": str(tmp_path / "staging"),
            "resources": {"min_free_disk_gb": 0},
        }
        database: dict[str, Any] = {"name": db.name, "host": db.host, "port": db.port, "user": db.user,
                                    "password": db.password, "fsync_off": "acknowledged",
                                    "tables": [dict(table) for table in tables]}
        database.update(overrides.pop("database", {}))
        for name, value in overrides.items():
            sections[name] = {**sections.get(name, {}), **value} if isinstance(value, dict) else value
        sections["databases"] = [database]
        path = tmp_path / f"config-{secrets.token_hex(3)}.yaml"
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(sections, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return path

    return write
