"""An HTTP endpoint in front of a real S3 server that misbehaves as stores and networks do.

    with FaultyS3(s3.endpoint) as store:
        store.fault = loses_answer(once(on("PUT", ".jsonl.gz")))

A fault sees each request and a function that passes it on, and returns the answer, or DROP to cut the connection.
Every request is kept in `store.requests`, as it came.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import itertools
import re
import socket
import struct
import threading
import time
import urllib.parse
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, Optional, Union
from xml.sax.saxutils import unescape

HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length", "date", "server")
UNREAD = b"\0unread"


@dataclass(frozen=True)
class Request:
    """One request: `key` is the object's key, `query` the parsed query, header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def key(self) -> str:
        """The object key, without the bucket."""
        return urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip("/").partition("/")[2]

    @property
    def query(self) -> dict[str, str]:
        """The query's names and values."""
        return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query, keep_blank_values=True))


@dataclass(frozen=True)
class Answer:
    """What goes back; `short` announces the whole body and sends that many bytes of it."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    short: Optional[int] = None


class Drop:
    """No answer: the connection is reset."""


DROP = Drop()
Forward = Callable[[Request], Answer]
Fault = Callable[[Request, Forward], Union[Answer, Drop]]
Which = Callable[[Request], bool]


def error(status: int, code: str, message: str = "made by the test") -> Answer:
    """An S3 error answer."""
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return Answer(status, {"content-type": "application/xml"}, body.encode())


def on(method: str, suffix: str = "", **query: str) -> Which:
    """Requests of a method whose key ends in `suffix` and whose query has these names (and values, unless "")."""
    def which(request: Request) -> bool:
        found = request.query
        return (request.method == method and request.key.endswith(suffix)
                and all(name in found and (not value or found[name] == value) for name, value in query.items()))
    return which


def once(which: Which, times: int = 1, after: int = 0) -> Which:
    """Only the first `times` requests that `which` wants, after letting `after` of them pass."""
    counter = itertools.count()
    return lambda request: which(request) and after <= next(counter) < after + times


def answers(which: Which, answer: Answer) -> Fault:
    """Those requests are not passed on and get `answer`."""
    return lambda request, forward: answer if which(request) else forward(request)


def drops(which: Which) -> Fault:
    """Those requests never arrive; the connection is reset."""
    return lambda request, forward: DROP if which(request) else forward(request)


def loses_answer(which: Which) -> Fault:
    """Those requests are done, and nobody hears of it."""
    def fault(request: Request, forward: Forward) -> Union[Answer, Drop]:
        answer = forward(request)
        return DROP if which(request) else answer
    return fault


def stores(which: Which, change: Callable[[bytes], Optional[bytes]]) -> Fault:
    """The store keeps `change(body)` (nothing at all if that is None) and answers as if it were the body."""
    def fault(request: Request, forward: Forward) -> Union[Answer, Drop]:
        if not which(request):
            return forward(request)
        etag = f'"{hashlib.md5(request.body).hexdigest()}"'
        body = change(request.body)
        if body is None:
            return Answer(200, {"etag": etag})
        md5 = base64.b64encode(hashlib.md5(body).digest()).decode()
        answer = forward(replace(request, body=body, headers={**request.headers, "content-md5": md5}))
        return replace(answer, headers={**answer.headers, "etag": etag})
    return fault


def returns(which: Which, change: Callable[[bytes], bytes]) -> Fault:
    """What is read back is `change(body)`, with the headers of what is stored."""
    def fault(request: Request, forward: Forward) -> Union[Answer, Drop]:
        answer = forward(request)
        return replace(answer, body=change(answer.body)) if which(request) else answer
    return fault


def cuts(which: Which, at: int) -> Fault:
    """Those answers end after `at` bytes of their body, with the connection."""
    def fault(request: Request, forward: Forward) -> Union[Answer, Drop]:
        answer = forward(request)
        return replace(answer, short=at) if which(request) else answer
    return fault


def swaps(which: Which) -> Fault:
    """Under each name the store keeps what was sent to it under another one: the object before, at first other bytes."""
    before = [b"{}"]
    guard = threading.Lock()

    def change(body: bytes) -> Optional[bytes]:
        with guard:
            kept, before[0] = before[0], body
        return kept

    return stores(which, change)


def lists_late(seconds: float) -> Fault:
    """An object is in no listing until it has been there for so long."""
    put_at: dict[str, float] = {}

    def late(request: Request, forward: Forward) -> Union[Answer, Drop]:
        answer = forward(request)
        if request.method == "PUT" and answer.status == 200:
            put_at[request.key] = time.monotonic()
        if request.method == "GET" and not request.key and answer.status == 200:
            young = {key for key, at in list(put_at.items()) if time.monotonic() - at < seconds}
            seen = re.sub(rb"<Contents>.*?<Key>(.*?)</Key>.*?</Contents>",
                          lambda found: b"" if unescape(found.group(1).decode()) in young else found.group(), answer.body, flags=re.S)
            return Answer(answer.status, answer.headers, seen)
        return answer

    return late


def ignores_if_none_match(which: Which = lambda request: True) -> Fault:
    """A store without conditional writes."""
    def fault(request: Request, forward: Forward) -> Union[Answer, Drop]:
        if not which(request):
            return forward(request)
        kept = {name: value for name, value in request.headers.items() if name != "if-none-match"}
        return forward(replace(request, headers=kept))
    return fault


def refuses_trailers(request: Request, forward: Forward) -> Union[Answer, Drop]:
    """A store that knows neither aws-chunked bodies nor checksum headers (T22)."""
    if "aws-chunked" in request.headers.get("content-encoding", "") or any(
            name.startswith(("x-amz-trailer", "x-amz-sdk-checksum", "x-amz-checksum")) for name in request.headers):
        return error(400, "InvalidArgument", "x-amz-checksum is not supported")
    return forward(request)


def flip_bit(body: bytes) -> bytes:
    """The same bytes with one bit in the middle turned over."""
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1:]


class Held:
    """A PUT that the network keeps: the sender sees its connection break, `deliver()` lets it arrive after all."""

    def __init__(self, which: Which) -> None:
        self._which = which
        self._kept: list[tuple[Request, Forward]] = []

    def __call__(self, request: Request, forward: Forward) -> Union[Answer, Drop]:
        if self._which(request):
            self._kept.append((request, forward))
            return DROP
        return forward(request)

    def deliver(self) -> list[Answer]:
        """What was kept arrives now; the store's answers, which nobody waits for."""
        return [forward(request) for request, forward in self._kept]


class Hangs:
    """Those requests get no answer and their connection stays open, until `release()`; `passing_on`: the store has done them."""

    def __init__(self, which: Which, *, passing_on: bool = False) -> None:
        self._which, self._passing_on, self._over = which, passing_on, threading.Event()
        self.hanging = 0

    def __call__(self, request: Request, forward: Forward) -> Union[Answer, Drop]:
        if not self._which(request):
            return forward(request)
        if self._passing_on:
            forward(request)
        self.hanging += 1
        self._over.wait(60)
        return DROP

    def release(self) -> None:
        """Whoever hangs is let go, with a reset."""
        self._over.set()


class FaultyS3:
    """Listens on a free port of 127.0.0.1 and passes requests to `target`, except for what `fault` does.

    `refuses_early`: a PUT with If-None-Match on a name that is taken is answered 412 before its body is read, and
    that connection then hangs (several stores do this).
    """

    def __init__(self, target: str) -> None:
        self.target = target.partition("://")[2]
        self.fault: Optional[Fault] = None
        self.refuses_early = False
        self.requests: list[Request] = []
        self._ended = threading.Event()
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def __getattr__(self, name: str) -> Any:
                if name.startswith("do_"):
                    return lambda: store._serve(self)
                raise AttributeError(name)

            def handle_expect_100(self) -> bool:
                """100 Continue at once, not when the answer is flushed."""
                passed = super().handle_expect_100()
                self.wfile.flush()
                return passed

            def log_message(self, format: str, *args: Any) -> None:
                """Silence."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that went away is what these tests are about."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> FaultyS3:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def seen(self, which: Which) -> list[Request]:
        """The requests so far that `which` wants."""
        return [request for request in self.requests if which(request)]

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        headers = {name.lower(): value for name, value in handler.headers.items()}
        if self.refuses_early and handler.command == "PUT" and "if-none-match" in headers:
            kept = {name: headers[name] for name in ("host", "authorization", "x-amz-date") if name in headers}
            looked = self._forward(Request("HEAD", handler.path, kept, b""))
            if looked.status == 200:
                self.requests.append(Request("PUT", handler.path, headers, UNREAD))
                self._send(handler, "PUT", error(412, "PreconditionFailed"))
                handler.close_connection = True
                self._ended.wait(30)
                return
        request = Request(handler.command, handler.path, headers, _body(handler, headers))
        self.requests.append(request)
        fault = self.fault or (lambda request, forward: forward(request))
        answer = fault(request, self._forward)
        if isinstance(answer, Drop):
            handler.close_connection = True
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
            return
        self._send(handler, request.method, answer)

    def _forward(self, request: Request) -> Answer:
        connection = http.client.HTTPConnection(self.target, timeout=60)
        try:
            headers = {name: value for name, value in request.headers.items()
                       if name not in ("content-length", "transfer-encoding", "expect", "connection")}
            connection.request(request.method, request.path, request.body, headers)
            found = connection.getresponse()
            body = found.read()
            kept = {name.lower(): value for name, value in found.getheaders()}
            length = kept.get("content-length")
            answer = {name: value for name, value in kept.items() if name not in HOP_BY_HOP}
            if request.method == "HEAD" and length is not None:
                answer["content-length"] = length
            return Answer(found.status, answer, body)
        finally:
            connection.close()

    def _send(self, handler: BaseHTTPRequestHandler, method: str, answer: Answer) -> None:
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        if method != "HEAD":
            handler.send_header("content-length", str(len(answer.body)))
        handler.end_headers()
        if method != "HEAD":
            handler.wfile.write(answer.body if answer.short is None else answer.body[:answer.short])
        handler.wfile.flush()
        if answer.short is not None:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)


def _body(handler: BaseHTTPRequestHandler, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        parts = []
        while True:
            size = int(handler.rfile.readline().split(b";")[0], 16)
            parts.append(handler.rfile.read(size))
            if size == 0:
                while handler.rfile.readline().strip():
                    continue
                return b"".join(parts)
            handler.rfile.readline()
    return handler.rfile.read(int(headers.get("content-length", "0")))
