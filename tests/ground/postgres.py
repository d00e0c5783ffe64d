"""A PostgreSQL of our own: initdb, start on a Unix socket in a short private directory, stop by pid.

    with Cluster.start() as server:  server.connect("postgres") ...

PostgreSQL refuses to run as root, so root runs it as an account that exists already (postgres, else nobody)
on files in a directory of that account's own under /var/tmp; no directory above it is touched. Nobody but that
account and root reaches the socket. TCP on 127.0.0.1 is there only when asked for, with a password.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional, Sequence

import psycopg2
import psycopg2.extensions

from tests.ground import binaries, processes
from tests.ground.wait import PATIENCE, until

PREFIX = "aa-pg-"
NOTE = "cluster.json"
SUPERUSER = "postgres"
QUICK = {"fsync": "off", "full_page_writes": "off", "autovacuum": "off", "shared_buffers": "64MB"}
"""Settings for tests: the data may die with the machine, and nothing happens behind their back."""


class Cluster:
    """One running server. `host` is the socket's directory; `tcp` says whether 127.0.0.1 listens too."""

    def __init__(self, base: Path, bindir: Path, port: int, password: str, tcp: bool) -> None:
        self.base, self.bindir, self.port, self.password, self.tcp = base, bindir, port, password, tcp
        self.host = str(base)
        self.data = base / "data"
        self.log = base / "server.log"
        self.version = binaries.version(bindir)
        self._child: Optional[subprocess.Popen[bytes]] = None
        self.outlive = False

    @classmethod
    def start(cls, *, settings: Optional[Mapping[str, str]] = None, tcp: bool = False, outlive: bool = False,
              bindir: Optional[Path] = None) -> Cluster:
        """Make a new cluster and start it. `settings` default to QUICK; `outlive`: it stays when we end.

        Raises binaries.Missing if there is no server to be had.
        """
        _sweep()
        base = _directory()
        try:
            cluster = cls(base, _reachable(bindir or binaries.choose(), base), processes.free_port() if tcp else 5432,
                          secrets.token_urlsafe(12), tcp)
            cluster.outlive = outlive
            cluster._initdb(QUICK if settings is None else settings)
            cluster.up()
        except BaseException:
            _remove(base)
            raise
        return cluster

    @classmethod
    def at(cls, base: Path) -> Cluster:
        """The cluster that an earlier process started in `base` and left running."""
        made = json.loads((base / NOTE).read_text())
        cluster = cls(base, Path(made["bindir"]), made["port"], made["password"], made["tcp"])
        cluster.outlive = True
        return cluster

    def _initdb(self, settings: Mapping[str, str]) -> None:
        secret = self.base / "password"
        secret.write_text(self.password + "\n")
        _give(secret)
        self.run("initdb", "-D", str(self.data), "-U", SUPERUSER, "--encoding=UTF8", "--locale=C", "--no-sync",
                 "--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={secret}")
        secret.unlink()
        fixed = {"unix_socket_directories": self.host, "unix_socket_permissions": "0700", "port": str(self.port),
                 "listen_addresses": "127.0.0.1" if self.tcp else "", "password_encryption": "scram-sha-256",
                 "log_timezone": "UTC", "timezone": "UTC", "logging_collector": "off", "max_connections": "60"}
        with open(self.data / "postgresql.conf", "a", encoding="utf-8") as conf:
            for name, value in {**fixed, **settings}.items():
                conf.write(f"{name} = '{value}'\n")

    def up(self) -> None:
        """Start the server (again) and wait until it answers."""
        _note(self.base, bindir=str(self.bindir), port=self.port, password=self.password, tcp=self.tcp,
              owner=None if self.outlive else os.getpid())
        with open(self.log, "ab") as log:
            _give(self.log)
            self._child = processes.start([str(self.bindir / "postgres"), "-D", str(self.data)], log=log,
                                          outlive=self.outlive, account=account(), env=_environment(self.base),
                                          cwd=self.base, end=signal.SIGQUIT)
        until(self._answers, f"PostgreSQL in {self.base} answers", 60)

    def _answers(self) -> bool:
        child = self._child
        if child is not None and child.poll() is not None:
            raise RuntimeError(f"PostgreSQL ended with code {child.returncode}:\n{self.log.read_text()[-2000:]}")
        try:
            self.connect().close()
        except psycopg2.OperationalError:
            return False
        return True

    @property
    def pid(self) -> Optional[int]:
        """The postmaster's process id, or None when it does not run."""
        if self._child is not None:
            return self._child.pid if self._child.poll() is None else None
        try:
            pid = int((self.data / "postmaster.pid").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            return None
        return pid if processes.alive(pid) else None

    def down(self, signum: int = signal.SIGINT) -> None:
        """End the server: SIGINT is a fast shutdown, SIGQUIT what a crash leaves behind."""
        pid = self.pid
        if pid is not None:
            processes.stop(pid, signum)
        if self._child is not None:
            self._child.wait()
            self._child = None

    def stop(self) -> None:
        """End the server and remove its files."""
        self.down()
        _remove(self.base)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def dsn(self, dbname: str = "postgres", user: str = SUPERUSER, **more: Any) -> str:
        """A connection string through the socket (no password needed); `more` are libpq's words."""
        return psycopg2.extensions.make_dsn(host=self.host, port=self.port, dbname=dbname, user=user, **more)

    def connect(self, dbname: str = "postgres", user: str = SUPERUSER, **more: Any) -> psycopg2.extensions.connection:
        """A connection in autocommit mode."""
        connection = psycopg2.connect(self.dsn(dbname, user, **more))
        connection.autocommit = True
        return connection

    def run(self, program: str, *args: str) -> str:
        """Run one of the server's own programs as the server's account; returns its stdout."""
        command = [str(self.bindir / program), *args]
        who = account()
        as_whom: dict[str, Any] = {} if who is None else {"user": who.pw_uid, "group": who.pw_gid, "extra_groups": []}
        done = subprocess.run(command, cwd=self.base, env=_environment(self.base), stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, check=False, timeout=120 * PATIENCE, **as_whom)
        if done.returncode:
            raise RuntimeError(f"{program} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        return done.stdout


def account() -> Optional[pwd.struct_passwd]:
    """Whom root becomes for the server's programs; None when we are not root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise binaries.Missing("PostgreSQL refuses to run as root, and there is no account 'postgres' or 'nobody' here")


def _directory() -> Path:
    """A new private directory, short enough for a socket, owned by the server's account."""
    parent = "/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()
    base = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    _note(base, owner=os.getpid())  # before anything else, so that what a kill leaves is known to be ours
    _give(base)
    return base


def _note(base: Path, **facts: Any) -> None:
    note = base / NOTE
    note.touch(mode=0o600)
    note.write_text(json.dumps(facts))


def _give(path: Path) -> None:
    who = account()
    if who is not None:
        os.chown(path, who.pw_uid, who.pw_gid)


def _reachable(bindir: Path, base: Path) -> Path:
    """`bindir`, or a copy of its installation in `base` where the server's account cannot get at it (a venv in /root)."""
    who = account()
    if who is None:
        return bindir
    try:
        subprocess.run([str(bindir / "initdb"), "--version"], user=who.pw_uid, group=who.pw_gid, extra_groups=[],
                       cwd=base, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        return bindir
    except (OSError, subprocess.CalledProcessError):
        package = bindir.parent.parent
        copy = base / "programs" / package.name / bindir.parent.name
        shutil.copytree(bindir.parent, copy, symlinks=True)
        libraries = package.with_name(package.name + ".libs")  # a wheel's, found relative to the programs
        if libraries.is_dir():
            shutil.copytree(libraries, base / "programs" / libraries.name)
        return copy / bindir.name


def _environment(base: Path) -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(base), "LC_ALL": "C", "TZ": "UTC"}


def _remove(base: Path) -> None:
    shutil.rmtree(base, ignore_errors=True)


def _left_behind() -> Iterator[Path]:
    for note in Path("/var/tmp").glob(f"{PREFIX}*/{NOTE}"):
        with contextlib.suppress(OSError, ValueError):
            owner = json.loads(note.read_text())["owner"]
            if owner is not None and note.stat().st_uid == os.geteuid() and not processes.alive(owner):
                yield note.parent


def _sweep() -> None:
    """Remove what a killed test run of this account left: its server died with it, its files did not."""
    for base in _left_behind():
        with contextlib.suppress(KeyError):  # it was killed before there was a server
            Cluster.at(base).down(signal.SIGQUIT)
        _remove(base)


def standby(primary: Cluster, settings: Sequence[str] = ()) -> Cluster:
    """A streaming replica of `primary`, started."""
    base = _directory()
    cluster = Cluster(base, primary.bindir, 5432, primary.password, False)
    cluster.run("pg_basebackup", "-D", str(cluster.data), "-d", primary.dsn(), "-R", "-X", "stream", "-c", "fast")
    with open(cluster.data / "postgresql.conf", "a", encoding="utf-8") as conf:
        conf.write(f"unix_socket_directories = '{base}'\nport = '5432'\nlisten_addresses = ''\n")
        conf.writelines(line + "\n" for line in settings)
    cluster.up()
    return cluster
