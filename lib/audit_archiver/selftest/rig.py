"""What a self-test works with: a configuration of its own in a scratch directory, and the commands, as children."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Optional, Sequence

from audit_archiver import config, log
from audit_archiver.config.model import S3, Config
from audit_archiver.exits import ConfigError, Failed
from audit_archiver.postgres.connect import parse_dsn
from audit_archiver.selftest.scratch import SCHEMA

CHILD_S, END_GRACE_S = 900.0, 30.0
SAID_CHARS = 400

DSN_KEYS = ("host", "port", "user", "sslmode", "sslrootcert", "sslcert", "sslkey")
S3_KEYS = ("endpoint", "region", "storage_class", "encryption", "kms_key_id", "profile", "addressing_style", "ca_bundle", "verify",
           "multipart_threshold_mb", "multipart_part_mb")
SECRETS = ("access_key_id", "secret_access_key", "session_token")
PASSWORD = "selftest_password"  # the variables that only our children know


class Ended(NamedTuple):
    """How a child ended: exit code (negative: the signal), and the last errors that it logged."""

    code: int
    said: str


class Rig:
    """A context manager: the directory is removed at its end, and whoever of ours still runs is ended."""

    def __init__(self, dsn: str, bucket: str, prefix: str, base: Optional[S3], overrides: Mapping[str, Optional[str]], env: Mapping[str, str],
                 batch_rows: int) -> None:
        self._env = {name: value for name, value in env.items() if not name.startswith("AA_")}
        self._running: list[subprocess.Popen[bytes]] = []
        self._batch_rows = batch_rows
        self._database = self._read_dsn(dsn)
        self._s3 = {"bucket": bucket, "prefix": prefix, **self._from(base), **{name: value for name, value in overrides.items() if value is not None}}
        self._place = Path(tempfile.mkdtemp(prefix="aa-selftest-"))  # last: whatever is refused leaves nothing

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        shutil.rmtree(self._place, ignore_errors=True)

    def end(self) -> None:
        """End whoever still runs."""
        while self._running:
            self._end(self._running.pop())

    @property
    def server(self) -> tuple[str, int]:
        """Host, or the directory of the socket, and port of the database, as libpq would find them."""
        env = self._env
        return self._database.get("host") or env.get("PGHOST") or "/var/run/postgresql", int(self._database.get("port") or env.get("PGPORT") or 5432)

    def settings(self, tables: Sequence[str] = ("origin",)) -> Config:
        """The configuration with these tables, as the commands read it."""
        return config.load(str(self._write(tables, {}, {})), self._env)

    def run(self, name: str, tables: Sequence[str], *argv: str, env: Optional[Mapping[str, str]] = None, database: Optional[Mapping[str, Any]] = None,
            s3: Optional[Mapping[str, Any]] = None) -> Ended:
        """One command to its end; `database` and `s3` are changes of those sections."""
        return self.finish(self.start(name, tables, *argv, env=env, database=database, s3=s3))

    def start(self, name: str, tables: Sequence[str], *argv: str, env: Optional[Mapping[str, str]] = None,
              database: Optional[Mapping[str, Any]] = None, s3: Optional[Mapping[str, Any]] = None) -> subprocess.Popen[bytes]:
        """Start a command with a configuration of its own, in a session of its own."""
        path = self._write(tables, database or {}, s3 or {})
        launcher = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), name)
        log.debug("selftest.start", f"{name} {' '.join(argv)}")
        with open(f"{path}.log", "wb") as said:
            try:
                child = subprocess.Popen([sys.executable, launcher, "-c", str(path), "--log-format", "json", *argv], env={**self._env, **(env or {})},
                                         stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)
            except OSError as error:
                raise Failed(f"cannot start '{launcher}': {error.strerror}") from None
        self._running.append(child)
        child.said_in = f"{path}.log"  # type: ignore[attr-defined]
        return child

    def finish(self, child: subprocess.Popen[bytes]) -> Ended:
        """Wait for it."""
        try:
            code = child.wait(CHILD_S)
        except subprocess.TimeoutExpired:
            self._end(child)
            raise Failed(f"'{os.path.basename(child.args[1])}' did not end within {CHILD_S:g} s") from None  # type: ignore[index]
        self._running.remove(child)
        return Ended(code, _errors(child.said_in))  # type: ignore[attr-defined]

    def scratch_file(self, name: str) -> Path:
        """A path in the scratch directory that nothing lies under."""
        path = self._place / name
        path.unlink(missing_ok=True)
        return path

    def _write(self, tables: Sequence[str], database: Mapping[str, Any], s3: Mapping[str, Any]) -> Path:
        listed = [{"name": table, "schema": SCHEMA, "timestamp_column": "created_at", "primary_key": "id"} for table in tables]
        text = json.dumps({
            "version": "2.0", "s3": {**self._s3, **s3}, "staging_dir": str(self._place / "staging"), "resources": {"min_free_disk_gb": 0},
            "defaults": {"retention_days": 90, "batch_size": self._batch_rows, "sleep_between_batches": 0, "vacuum_strategy": "none"},
            "databases": [{**self._database, "fsync_off": "acknowledged", **database, "tables": listed}]})
        descriptor, path = tempfile.mkstemp(suffix=".yaml", dir=self._place)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        return Path(path)

    def _read_dsn(self, dsn: str) -> dict[str, Any]:
        parts = parse_dsn(dsn)
        if password := parts.pop("password", None):
            self._env[PASSWORD] = password
        made: dict[str, Any] = {name: parts.pop(name) for name in DSN_KEYS if name in parts}
        name = parts.pop("dbname", None)
        if parts or not name or "," in made.get("host", ""):
            wrong = f"has '{sorted(parts)[0]}'" if parts else "names several hosts" if name else "names no database"
            raise ConfigError(f"the connection string {wrong}", hint=f"write dbname and, of the others, {', '.join(DSN_KEYS)}, password")
        if "port" in made:
            made["port"] = int(made["port"])
        return {"name": name, **made, **({"password_env": PASSWORD} if password else {})}

    def _from(self, base: Optional[S3]) -> dict[str, Any]:
        """What a configuration says of the store, but bucket and prefix; its secrets go through the environment."""
        if base is None:
            return {}
        told = {field.name: getattr(base, field.name) for field in dataclasses.fields(base) if field.name in S3_KEYS}
        made: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
        for name in SECRETS:
            value = getattr(base, name)
            if value is not None:
                self._env[f"selftest_{name}"] = value if isinstance(value, str) else value.reveal()
                made[f"{name}_env"] = f"selftest_{name}"
        return made

    @staticmethod
    def _end(child: subprocess.Popen[bytes]) -> None:
        for signum in (signal.SIGTERM, signal.SIGKILL):
            if child.poll() is None:
                os.killpg(child.pid, signum)
                try:
                    child.wait(END_GRACE_S)
                except subprocess.TimeoutExpired:
                    log.debug("selftest.end", f"process {child.pid} does not end at signal {signum}")


def _errors(path: str) -> str:
    """The messages of a log's errors, shortened."""
    found = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                found.append(line.strip())
                continue
            if record.get("level") == "ERROR":
                found.append(": ".join(str(record[part]) for part in ("msg", "hint") if record.get(part)))
    return "; ".join(dict.fromkeys(found))[:SAID_CHARS]
