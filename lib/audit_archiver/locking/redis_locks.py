"""Lock records in Redis (5 or newer): one hash per lock, changed by scripts, which Redis runs one at a time, by its own clock."""

from __future__ import annotations

import contextlib
import time
from typing import Any, Iterator, Optional

from audit_archiver.config.credentials import Secret
from audit_archiver.exits import ArchiverError, ConfigError, Failed, NetworkError, PermissionDenied
from audit_archiver.locking.record import Record, covers

KEY = "audit-archiver:lock:"
TIMEOUT_S = 5.0

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local was = redis.call('HMGET', KEYS[1], 'owner', 'server', 'since', 'token', 'beat')
"""
_LOOK = _NOW + """
if not was[1] then return {} end
return {was[1], was[2], was[3], was[4], string.format('%.0f', now - was[5])}
"""
_TAKE = _NOW + """
local left = {}
if was[1] then
  local age = now - was[5]
  left = {was[1], was[2], was[3], was[4], string.format('%.0f', age)}
  if was[2] ~= ARGV[2] and age <= tonumber(ARGV[3]) then return {'', left} end
end
local token = string.format('%.0f', math.max((tonumber(was[4]) or 0) + 1, now))
local since = string.format('%.0f', now)
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'server', ARGV[2], 'since', since, 'token', token, 'beat', since)
return {token, left}
"""
_BEAT = _NOW + """
if not was[1] or was[4] ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'beat', string.format('%.0f', now))
return 1
"""
_RELEASE = _NOW + """
if not was[1] or (ARGV[1] ~= '' and was[4] ~= ARGV[1]) then return 0 end
redis.call('HDEL', KEYS[1], 'owner', 'server', 'since', 'beat')
return 1
"""


class RedisLocks:
    """Records in the Redis that `url` names. The token stays when a lock is released: it must not fall."""

    title = "Redis"

    def __init__(self, url: Secret) -> None:
        try:
            import redis
        except ImportError:
            raise ConfigError("the locking backend 'redis' needs the Python package 'redis'",
                              hint="pip install 'audit-archiver[redis]', or write 'backend: postgres'") from None
        self._errors = redis.exceptions
        try:
            self._redis: Any = redis.Redis.from_url(url.reveal(), socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S,
                                                    decode_responses=True)
        except ValueError:  # its text could hold the password
            raise ConfigError("the variable that 'locking.redis_url_env' names holds no Redis URL",
                              hint="write redis://HOST:PORT/0, rediss:// for TLS, or unix://PATH") from None

    def take(self, name: str, owner: str, server: str, stale_s: float) -> tuple[int, Optional[Record]]:
        """See Backend."""
        token, left = self._run(_TAKE, name, owner, server, str(int(stale_s * 1000)))
        found = _record(name, left)
        if not token:
            assert found is not None
            raise found.refusal(self.title)
        return int(token), found

    def beat(self, name: str, token: int) -> bool:
        """See Backend."""
        return bool(self._run(_BEAT, name, str(token)))

    def release(self, name: str, token: Optional[int]) -> bool:
        """See Backend."""
        return bool(self._run(_RELEASE, name, "" if token is None else str(token)))

    def look(self, name: str) -> list[Record]:
        """See Backend."""
        pattern = "".join(f"\\{each}" if each in "*?[]\\" else each for each in KEY + name) + "*"
        with self._translating():
            found = sorted(key[len(KEY):] for key in self._redis.scan_iter(match=pattern, count=1000))
        records = (_record(each, self._run(_LOOK, each)) for each in found if covers(name, each))
        return [each for each in records if each is not None]

    def _run(self, script: str, name: str, *args: str) -> Any:
        with self._translating():
            return self._redis.eval(script, 1, KEY + name, *args)

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except self._errors.RedisError as error:
            raise self._translated(error) from None

    def _translated(self, error: Exception) -> ArchiverError:
        kinds = self._errors
        if isinstance(error, (kinds.AuthenticationError, getattr(kinds, "NoPermissionError", kinds.AuthenticationError))):
            return PermissionDenied("Redis refused us (locking.backend)", detail=type(error).__name__,
                                    hint="the URL in the variable of 'locking.redis_url_env' must name a user that may run EVAL")
        if isinstance(error, (kinds.ConnectionError, kinds.TimeoutError)):
            return NetworkError(f"Redis cannot be reached (locking.backend): {type(error).__name__}",
                                hint="nothing is deleted without it; start it again, or write 'backend: postgres'")
        return Failed(f"Redis answered with an error (locking.backend): {error}")


def _record(name: str, said: list[str]) -> Optional[Record]:
    if not said:
        return None
    owner, server, since, token, age = said
    return Record(name, owner, server, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(since) / 1000)), int(token), int(age) / 1000)
