"""One client of an S3 store: where it points, who we are there, how often a request is tried.

Everything comes from the configuration, which has its gaps filled from AWS_* already; what AWS_* variables and
profiles would add on their own (another endpoint, another profile) is shut out. Requests are tried again by us and not by
botocore: after a PUT whose answer was lost, its own retry would meet our own object and report a refusal (C10).
Checksum trailers are sent and wanted only where the API demands them: other stores refuse them, or keep
them inside the object (T22). Digests travel as Content-MD5, and contents are read back anyway.

botocore is imported when a Connection is made: it costs more than the rest of a stage's start together.
"""

from __future__ import annotations

import contextlib
import functools
import random
import time
from typing import TYPE_CHECKING, Any, Callable, Iterator, Optional, TypeVar

from audit_archiver import lines, log
from audit_archiver.exits import ConfigError, NetworkError
from audit_archiver.objectstore.errors import translated

if TYPE_CHECKING:
    from audit_archiver.config.model import S3

Answer = TypeVar("Answer")

DEFAULT_REGION = "us-east-1"
PARALLEL_REQUESTS = 10


class Connection:
    """A lazy pool of HTTP connections to one bucket, safe to use from several threads.

    `watch` is the descriptor of our output: a pause between two tries ends with BrokenPipeError as soon as its
    reader is gone. Raises ConfigError for an endpoint, profile or region that cannot be used.
    """

    def __init__(self, s3: S3, watch: Optional[int] = None) -> None:
        self.s3, self._watch = s3, watch
        try:
            with self.errors("use the object store"):
                self.client, self.identity = _client(s3)
        except ValueError as error:
            raise ConfigError(f"cannot use the object store: {error}", at=s3.at) from None
        self.endpoint = self.client.meta.endpoint_url
        self.region = self.client.meta.region_name
        self.proxy = _proxy(self.endpoint)

    def request(self, operation: str, what: str, **params: Any) -> dict[str, Any]:
        """One try of one API operation on the bucket; raises the errors of `objectstore.errors` and `exits`.

        A store that refuses a PUT need not have read its body, and then the next request on that connection hangs
        until the read timeout: after a refusal connections are opened anew.
        """
        with self.errors(what):
            try:
                return getattr(self.client, operation)(Bucket=self.s3.bucket, **params)
            except Exception:
                if "Body" in params:
                    self.client.close()
                raise

    def retrying(self, attempt: Callable[[], Answer]) -> Answer:
        """`attempt()`, again after a pause while it raises a NetworkError worth a retry (REQ-S3-023)."""
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
        """Wait before the next try: base, twice, four times ... up to the maximum, less up to a quarter by chance."""
        seconds = min(self.s3.retry_max_s, self.s3.retry_base_s * 2 ** (tried - 1)) * random.uniform(0.75, 1)
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


def _client(s3: S3) -> tuple[Any, str]:
    """The botocore client, which is boto3's without the resources and twice as fast to make, and who it is."""
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
        "retries": {"mode": "standard", "total_max_attempts": 1}, "max_pool_connections": PARALLEL_REQUESTS,
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
        return client, "nobody (no credentials found)"
    key = credentials.access_key
    how = "" if explicit else f" ({'profile ' + s3.profile if s3.profile else credentials.method})"
    return client, f"{key[:4]}...{key[-4:]}{how}"


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
