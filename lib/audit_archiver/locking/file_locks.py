"""Lock records as files in a directory that every host of the runs sees: one JSON file per lock, changed under one flock.

The flock is held for the moment of a change only, never for a run: it could not be broken. A file is replaced whole, so a
process that is killed leaves the old record or the new one. Heartbeats are told by the hosts' clocks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, Iterator, Optional

from audit_archiver.exits import ArchiverError, ConfigError, Failed, LockHeld, PermissionDenied, ResourceError
from audit_archiver.locking.record import Record, covers, next_token

SUFFIX, MUTEX = ".lock", "mutex"
MUTEX_WITHIN_S = 5.0
LOOK_EVERY_S = 0.01


class FileLocks:
    """Records in `directory`, which must be there."""

    def __init__(self, directory: Path) -> None:
        self.title = f"the directory '{directory}'"
        self._directory = directory

    def take(self, name: str, owner: str, server: str, stale_s: float) -> tuple[int, Optional[Record]]:
        """See Backend."""
        with self._alone():
            said = self._read(self._path(name))
            found = _record(said)
            if found is not None and found.server != server and found.heartbeat_age_s <= stale_s:
                raise found.refusal(self.title)
            token, now = next_token(said.get("token", 0), int(time.time() * 1000)), time.time()
            self._write(name, {"name": name, "owner": owner, "server": server, "since": now, "token": token, "beat": now})
            return token, found

    def beat(self, name: str, token: int) -> bool:
        """See Backend."""
        with self._alone():
            said = self._read(self._path(name))
            if "owner" not in said or said["token"] != token:
                return False
            self._write(name, {**said, "beat": time.time()})
            return True

    def release(self, name: str, token: Optional[int]) -> bool:
        """See Backend. The token stays behind: it must not fall."""
        with self._alone():
            said = self._read(self._path(name))
            if "owner" not in said or token not in (None, said["token"]):
                return False
            self._write(name, {"name": name, "token": said["token"]})
            return True

    def look(self, name: str) -> list[Record]:
        """See Backend."""
        try:
            paths = sorted(path for path in self._directory.iterdir() if path.suffix == SUFFIX)
        except OSError as error:
            raise _unusable(self._directory, error) from None
        records = (_record(self._read(path)) for path in paths)
        return sorted((each for each in records if each is not None and covers(name, each.name)), key=lambda each: each.name)

    def _path(self, name: str) -> Path:
        return self._directory / f"audit-archiver-{hashlib.sha256(name.encode()).hexdigest()[:16]}{SUFFIX}"

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            said: dict[str, Any] = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise _unusable(path, error) from None
        except ValueError:
            raise Failed(f"'{path}' is no lock record", hint="nobody but this program writes there; if no run is at work, remove the file") from None
        return said

    def _write(self, name: str, said: dict[str, Any]) -> None:
        path = self._path(name)
        fresh = path.with_suffix(".new")
        try:
            fresh.write_text(json.dumps(said))
            os.replace(fresh, path)
        except OSError as error:
            raise _unusable(path, error) from None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else changes a record meanwhile."""
        path = self._directory / MUTEX
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(path, error) from None
        deadline = time.monotonic() + MUTEX_WITHIN_S
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise LockHeld(f"'{path}' has been held for {MUTEX_WITHIN_S:g} s by somebody who is changing a lock record",
                                       hint="a process that stands still in the middle of it; fuser names it") from None
                except OSError as error:
                    raise _unusable(path, error) from None
                time.sleep(LOOK_EVERY_S)
            yield
        finally:
            os.close(descriptor)


def _record(said: dict[str, Any]) -> Optional[Record]:
    if "owner" not in said:
        return None
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(said["since"]))
    return Record(said["name"], said["owner"], said["server"], since, said["token"], time.time() - said["beat"])


def _unusable(path: Path, error: OSError) -> ArchiverError:
    said = f"the lock file '{path}' cannot be used: {error.strerror}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionDenied(said, hint="'locking.lock_dir' must be writable for the account of the runs")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EFBIG):
        return ResourceError(said)
    return ConfigError(said, hint="make the directory that 'locking.lock_dir' names; every host of the runs must see it")
