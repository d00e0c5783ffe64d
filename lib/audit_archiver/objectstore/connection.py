"""One client of an S3 store: where it points, who we are there, how often a request is tried.

Everything comes from the configuration, which has its gaps filled from AWS_* already; what AWS_* variables and
profiles would add on their own (another endpoint, another profile) is shut out. Requests are tried again by us and not by
botocore: after a PUT whose answer was lost, its own retry would meet our own object and report a refusal (C10).
Checksum trailers are sent and wanted only where the API demands them: other stores refuse them, or keep
them inside the object (T22). Digests travel as Content-MD5, and contents are read back anyway.

Credentials that expire in the middle of a run are read again, once per set (T25). What a provider of botocore's can renew
(roles, instances, credential_process) it renews by itself before; a file that somebody else keeps up to date it reads once.

botocore is imported when a Connection is made: it costs more than the rest of a stage's start together.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from typing import TYPE_CHECKING, Any, Callable, Iterator, Optional, TypeVar

from audit_archiver import lines, log
from audit_archiver.exits import ArchiverError, ConfigError, NetworkError
from audit_archiver.objectstore.breaker import Breaker
from audit_archiver.objectstore.errors import CircuitOpen, Expired, NotFound, Throttled, translated
from audit_archiver.objectstore.pace import Pace

if TYPE_CHECKING:
    from audit_archiver.config.model import S3

Answer = TypeVar("Answer")

DEFAULT_REGION = "us-east-1"
PARALLEL_REQUESTS = 10
MB = 1_000_000


class Connection:
    """A lazy pool of HTTP connections to one bucket, safe to use from several threads.

    `watch` is the descriptor of our output: a pause between two tries ends with BrokenPipeError as soon as its
    reader is gone. Raises ConfigError for an endpoint, profile or region that cannot be used.
    """

    def __init__(self, s3: S3, watch: Optional[int] = None) -> None:
        self.s3, self._watch = s3, watch
        self._pace = Pace(s3.rate_limit_requests_per_second, s3.rate_limit_mb_per_second and s3.rate_limit_mb_per_second * MB)
        self._breaker = Breaker(s3.circuit_breaker_failures, s3.circuit_breaker_reset_s)
        self._renewing, self._trying = threading.Lock(), threading.local()
        try:
            with self.errors("use the object store"):
                self.client, self._keys, self.identity = _client(s3)
        except ValueError as error:
            raise ConfigError(f"cannot use the object store: {error}", at=s3.at) from None
        self.endpoint = self.client.meta.endpoint_url
        self.region = self.client.meta.region_name
        self.proxy = _proxy(self.endpoint)

    def request(self, operation: str, what: str, **params: Any) -> dict[str, Any]:
        """One try of one API operation on the bucket; raises the errors of `objectstore.errors` and `exits`.

        With credentials that have expired it is sent again if new ones are there.
        """
        self._rest(self._pace.request(operation, params.get("ContentLength", 0)))
        while True:
            client = self.client
            try:
                return self._send(client, operation, what, params)
            except Expired:
                if not self._renewed(client):
                    raise
            if hasattr(params.get("Body"), "seek"):
                params["Body"].seek(0)

    def _send(self, client: Any, operation: str, what: str, params: dict[str, Any]) -> dict[str, Any]:
        """Connections are opened anew after a failure: the others may have died with this one, and wait in silence. So they are
        after a refusal of a body: a store need not have read it, and then the next request there hangs until the timeout.
        """
        try:
            with self.errors(what):
                answer: dict[str, Any] = getattr(client, operation)(Bucket=self.s3.bucket, **params)
        except ArchiverError as error:
            if "Body" in params or isinstance(error, NetworkError):
                client.close()
            if isinstance(error, Throttled):
                left = self._pace.refused(operation)
                log.info("s3.slower", f"the store wants it slower: up to {left:.0f} requests a second", requests_per_s=round(left, 1))
            if operation == "head_object" and not isinstance(error, (NotFound, NetworkError)):
                # the answer to a HEAD has no body, and so no word about what is wrong
                self._send(client, "list_objects_v2", what, {"Prefix": params["Key"], "MaxKeys": 1})
            raise
        self._pace.answered(operation)
        return answer

    def _renewed(self, client: Any) -> bool:
        """Whether there are other credentials than those that `client` used; from now on they are used."""
        with self._renewing:
            if self.client is not client:
                return True
            try:
                with self.errors("read the credentials again"):
                    made, keys, identity = _client(self.s3)
            except (ArchiverError, ValueError) as error:
                log.warning("s3.credentials", f"the credentials have expired, and cannot be read again: {error}")
                return False
            if keys == self._keys:
                return False
            self.client, self._keys, self.identity = made, keys, identity
            log.info("s3.credentials", f"the credentials had expired; goes on as {identity}", identity=identity)
            return True

    def retrying(self, attempt: Callable[[], Answer]) -> Answer:
        """`attempt()`, again after a pause while it raises a NetworkError worth a retry (REQ-S3-023).

        What is retried inside of it is part of the same attempt, so that tries do not multiply. Raises CircuitOpen at once where
        several operations before were given up.
        """
        if getattr(self._trying, "now", False):
            return attempt()
        if not self._breaker.admits():
            raise CircuitOpen(f"'{self.endpoint}' is not asked: the last {self._breaker.given_up} operations were given up",
                              hint=f"it is asked again every {self.s3.circuit_breaker_reset_s:g} s (s3.circuit_breaker_reset_s)")
        self._trying.now = True
        try:
            answer = self._tried(attempt)
        except NetworkError:
            self._breaker.failed()
            raise
        except ArchiverError:
            self._breaker.answered()
            raise
        finally:
            self._trying.now = False
        self._breaker.answered()
        return answer

    def _tried(self, attempt: Callable[[], Answer]) -> Answer:
        for tried in range(1, self.s3.retries + 2):
            try:
                return attempt()
            except NetworkError as error:
                if not error.retry:
                    raise
                if tried > self.s3.retries:
                    error.detail = f"tried {tried} times" + (f"; {error.detail}" if error.detail else "")
                    raise
                log.warning("s3.retry", error.msg, detail=error.detail, tried=tried)
                self.pause(tried)
        raise AssertionError("unreachable")

    def safely(self, operation: str, what: str, **params: Any) -> dict[str, Any]:
        """`request` with retries, for operations that may be done twice."""
        return self.retrying(lambda: self.request(operation, what, **params))

    def pause(self, tried: int) -> None:
        """Wait before the try that follows the `tried`-th."""
        self._rest(self.s3.pause_s(tried))

    def arrived(self, count: int) -> None:
        """So many bytes were read from a stream: the next ones wait for their turn."""
        self._rest(self._pace.bytes(count))

    def _rest(self, seconds: float) -> None:
        if seconds <= 0:
            return
        if self._watch is None:
            time.sleep(seconds)
        else:
            lines.pause(self._watch, seconds)

    def url(self, key: str) -> str:
        """What messages call an object."""
        return f"s3://{self.s3.bucket}/{key}"

    @contextlib.contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Turn botocore's errors into ours, also for what is read from a stream after the request."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        try:
            yield
        except (BotoCoreError, ClientError, ResponseParserError) as error:
            raise translated(error, what, getattr(self, "endpoint", self.s3.endpoint or "AWS"), self.s3.at) from None


def _client(s3: S3) -> tuple[Any, Optional[tuple[str, ...]], str]:
    """The botocore client, which is boto3's without the resources and twice as fast to make, with which keys, and who it is."""
    import botocore.session
    from botocore.config import Config
    from botocore.handlers import set_list_objects_encoding_type_url

    session = botocore.session.Session()
    session.register_component("data_loader", _loader())
    explicit = bool(s3.access_key_id and s3.secret_access_key)
    if s3.profile and not explicit:
        session.set_config_variable("profile", s3.profile)
    else:
        session.get_component("config_store").set_config_variable("profile", None)  # AWS_PROFILE must not win
    if explicit:
        session.set_credentials(s3.access_key_id, s3.secret_access_key.reveal(),
                                s3.session_token.reveal() if s3.session_token else None)
    options: dict[str, Any] = {
        "connect_timeout": s3.connect_timeout_s, "read_timeout": s3.read_timeout_s,
        "retries": {"mode": "standard", "total_max_attempts": 1}, "max_pool_connections": PARALLEL_REQUESTS, "tcp_keepalive": True,
        "s3": {"addressing_style": s3.addressing_style}, "user_agent_extra": "audit-archiver",
        "ignore_configured_endpoint_urls": True,
    }
    checksums = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    try:
        config = Config(**options, **checksums)
    except TypeError:  # botocore before 1.36 knows neither option, and sends no trailers
        config = Config(**options)
    client = session.create_client("s3", config=config, verify=s3.ca_bundle, endpoint_url=s3.endpoint,
                                   region_name=s3.region or session.get_config_variable("region") or DEFAULT_REGION)
    client.meta.events.unregister("before-parameter-build.s3.ListObjectsV2", set_list_objects_encoding_type_url)  # see listing.py
    credentials = session.get_credentials()
    if credentials is None:
        return client, None, "nobody (no credentials found)"
    key = credentials.access_key
    how = "" if explicit else f" ({'profile ' + s3.profile if s3.profile else credentials.method})"
    return client, tuple(credentials.get_frozen_credentials()), f"{key[:4]}...{key[-4:]}{how}"


@functools.lru_cache(maxsize=1)
def _loader() -> Any:
    """botocore's descriptions of S3, read once for this process and its forks: more than half of a client's cost."""
    from botocore.loaders import Loader

    class OnlyS3(Loader):
        """botocore lists every service's directory to check a name; that is a tenth of the client's cost."""

        def list_available_services(self, type_name: str) -> list[str]:
            return ["s3"]

    return OnlyS3(include_default_search_paths=True)


def _proxy(endpoint: str) -> Optional[str]:
    """The proxy that requests go through, without its password; proxies come from the environment and redirect silently."""
    from botocore.utils import get_environ_proxies

    proxy = get_environ_proxies(endpoint).get(endpoint.partition(":")[0])
    return proxy.rpartition("@")[2] if proxy else None
