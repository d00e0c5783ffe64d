"""The holder's socket: one thread per client, the roll call of the stages, and the watch over everything.

The holder judges whether a pipeline succeeded, not the shell: `sh` has no pipefail and a killed stage can end
with exit 0. Every stage says `hello` and `bye`; end of file without `bye`, or a code other than 0, fails the
pipeline, and then nothing commits any more (design, section 3).
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import tempfile
import threading
import time
from typing import Any, Mapping, Optional, Sequence

from audit_archiver import exits, log
from audit_archiver.exits import ArchiverError, ConfigError, Failed, Retryable
from audit_archiver.holder.batch import Batch
from audit_archiver.holder.callers import Caller, refusal, same_user
from audit_archiver.holder.contention import Contention
from audit_archiver.holder.operations import Operations
from audit_archiver.holder.session import DatabaseSession

SOCKET_PATH_BYTES = 107
WATCH_EVERY_S = 1.0
THREADS_END_S = 1.0
DELETE_HELLO_S = 60.0
_HANG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
_NEEDED = ("aa-select", "aa-delete")
_PHASES = {"lock": "select", "copy": "select", "delete": "delete"}  # of operations; the other stages say theirs


class Server:
    """Serves `operations` on a Unix-domain socket of its own, from `serve` until closed."""

    def __init__(self, operations: Operations, env: Mapping[str, str]) -> None:
        self.operations = operations
        self._directory = _socket_directory(env)
        self.path = os.path.join(self._directory, "s")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if len(os.fsencode(self.path)) > SOCKET_PATH_BYTES:
                raise ConfigError(f"the socket path '{self.path}' is longer than {SOCKET_PATH_BYTES} bytes",
                                  hint="set XDG_RUNTIME_DIR to a shorter directory")
            self._listener.bind(self.path)
        except BaseException:
            self._listener.close()
            shutil.rmtree(self._directory, ignore_errors=True)
            raise
        self._listener.listen(64)
        self._guard = threading.Lock()
        self._clients: dict[int, Caller] = {}
        self._said_bye: dict[str, list[int]] = {}
        self._closing = threading.Event()
        self._news = threading.Event()
        self._threads = [threading.Thread(target=self._accept, name="accept", daemon=True),
                         threading.Thread(target=self._watch_clients, name="clients", daemon=True),
                         threading.Thread(target=self._watch_transactions, name="watchdog", daemon=True),
                         threading.Thread(target=self._beat, name="heartbeat", daemon=True)]

    def serve(self) -> None:
        """Begin; who has called since the socket was made, waits for this."""
        for thread in self._threads:
            thread.start()

    def verdict(self) -> Optional[ArchiverError]:
        """Why the pipeline did not succeed, now that its command has ended; None if it did."""
        operations = self.operations
        if operations.failure is not None:
            return operations.failure
        with self._guard:
            silent = [client.stage for client in self._clients.values()]
            missing = [stage for stage in _NEEDED if 0 not in self._said_bye.get(stage, [])]
        if silent:
            return Failed(f"{silent[0]} did not say how it ended")
        if missing:
            return Failed(f"{' and '.join(missing)} never took part and ended well",
                          hint="the command must be a pipeline from aa-select to aa-delete")
        if operations.open_batches():
            return Failed(f"{operations.open_batches()[0].title} was still open when the command ended")
        return None

    def timings(self) -> dict[str, float]:
        """Seconds of work per phase until now: select, serialize, upload, verify, delete; they overlap."""
        with self.operations.changed:
            return dict(self.operations.seconds)

    def present(self) -> list[str]:
        """The stages that said hello and not yet bye."""
        with self._guard:
            return [client.stage or "" for client in self._clients.values()]

    def wait_for_news(self, seconds: float) -> None:
        """Wait until a client comes or goes, at most `seconds`."""
        self._news.wait(max(0.0, seconds))
        self._news.clear()

    def close(self) -> None:
        """Stop serving and remove the socket; open batches are the operations' to roll back."""
        self._closing.set()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            log.debug("holder.close", f"the listener was closed already: {error.strerror}")
        self._listener.close()
        with self._guard:
            clients = list(self._clients.values())
        for client in clients:
            client.hang_up()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(THREADS_END_S)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            connection.set_inheritable(False)
            if not same_user(connection):
                log.warning("holder.stranger", "another user's process tried to use the holder and was refused")
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(Caller(connection),), daemon=True).start()

    def _serve(self, client: Caller) -> None:
        said_bye = False
        try:
            while not said_bye:
                request, descriptor = client.receive()
                if request is None:
                    break
                began = time.monotonic()
                client.serving = True
                try:
                    answer = {"ok": True, **self._answer(client, request, descriptor)}
                except ArchiverError as error:
                    answer = refusal(error)
                except Exception as error:  # a request that is not what the protocol says
                    answer = refusal(Failed(f"the request could not be served: {type(error).__name__}: {error}"))
                    self.operations.fail(Failed(f"{client.stage}: a request to the holder could not be served ({type(error).__name__})"))
                finally:
                    client.serving = False
                    if descriptor is not None:
                        os.close(descriptor)
                phase = _PHASES.get(str(request.get("op")))
                if phase is not None:
                    self.operations.spent(phase, time.monotonic() - began)
                said_bye = client.ended or (request.get("op") == "bye" and bool(answer["ok"]))
                client.send(answer)
        finally:
            self._gone(client, said_bye)

    def _answer(self, client: Caller, request: dict[str, Any], descriptor: Optional[int]) -> dict[str, Any]:
        operations, op = self.operations, request.get("op")
        if op == "hello":
            client.stage = str(request["stage"])
            with self._guard:
                self._clients[client.number] = client
            return {"holder": operations.name}
        if client.stage is None:
            raise Failed("say hello first")
        if op == "bye":
            self._bye(client, request)
            return {}
        if op == "begin":
            return operations.begin(request["job"])
        if op == "lock":
            return operations.lock(request["handle"], request["cursor"], int(request["limit"]))
        if op == "copy":
            if descriptor is None:
                raise Failed("copy needs a descriptor")
            return operations.copy(request["handle"], descriptor)
        if op == "delete":
            return operations.delete(request["handle"], request["batch"])
        if op == "refuse":
            return operations.refuse(request["job"])
        if op == "probe":
            return operations.probe(request["handle"])
        if op == "abandon":
            return operations.abandon(request["handle"])
        raise Failed(f"there is no operation '{op}'")

    def _bye(self, client: Caller, request: dict[str, Any]) -> None:
        code = int(request["code"])
        with self._guard:
            self._clients.pop(client.number, None)
            self._said_bye.setdefault(client.stage or "", []).append(code)
        if client.stage not in _NEEDED:
            self.operations.spent((client.stage or "").removeprefix("aa-"), float(request.get("busy_s", 0)))
        if code:
            words = request.get("msg") or "it did not say why"
            error = Failed(f"{client.stage} ended with code {code}: {words}")
            error.code, error.retry = (code if code in exits.TABLE and code < 128 else exits.FAILED), bool(request.get("retry"))
            self.operations.fail(error)

    def _gone(self, client: Caller, said_bye: bool) -> None:
        with self._guard:
            known = self._clients.pop(client.number, None) is not None
        if known and not said_bye and not self._closing.is_set():
            error = Failed(f"{client.stage} disappeared without a word", hint="it was killed; its log may say more")
            error.retry = True
            self.operations.fail(error)
        client.close()
        self._news.set()

    def _known(self, stage: str) -> bool:
        with self._guard:
            return stage in self._said_bye or any(client.stage == stage for client in self._clients.values())

    def _watch_clients(self) -> None:
        """Notice a client that dies while its thread is inside an operation, e.g. a long copy."""
        while not self._closing.is_set():
            poller = select.poll()
            with self._guard:
                clients = {client.fileno(): client for client in self._clients.values()}
            for descriptor in clients:
                if descriptor >= 0:
                    poller.register(descriptor, _HANG_UP)
            if not clients:
                self._closing.wait(0.05)
                continue
            for descriptor, event in poller.poll(200):
                client = clients[descriptor]
                with self._guard:
                    alive = client.number in self._clients
                if alive and event & _HANG_UP:
                    self._hung_up(client)

    def _hung_up(self, client: Caller) -> None:
        """The client is gone. What it said last lies in the socket, where its own thread may come only after a long copy."""
        words = client.last_words()
        if words is None:
            self._gone(client, said_bye=False)
        elif client.serving and words.get("op") == "bye":
            client.ended = True
            self._bye(client, words)
        else:
            self._closing.wait(0.01)  # its thread is about to read it

    def _watch_transactions(self) -> None:
        """End transactions that are too old, give way to DDL that waits for us (S6, T35)."""
        warned: set[str] = set()
        blamed: Optional[Batch] = None
        contention: dict[str, Contention] = {}
        while not self._closing.wait(WATCH_EVERY_S):
            try:
                sessions = list(self.operations.sessions.values())
                for session in sessions:
                    session.lock.require_awake()
                for batch in self.operations.open_batches():
                    blamed = batch
                    self._end_old(batch, warned)
                    blamed = None
                    self._require_delete(batch)
                self._look_who_waits(sessions, contention)
            except ArchiverError as error:
                if not self._closing.is_set():
                    self.operations.fail(error, blamed)
                return

    def _beat(self) -> None:
        """Keep the locks alive, in a thread of its own: the control connection may have to wait, and the watchdog must not."""
        beaten = time.monotonic()
        while not self._closing.wait(WATCH_EVERY_S):
            if time.monotonic() - beaten < self.operations.config.locking.heartbeat_s:
                continue
            beaten = time.monotonic()
            try:
                for session in list(self.operations.sessions.values()):
                    session.lock.beat()
            except ArchiverError as error:
                if not self._closing.is_set():
                    self.operations.fail(error)
                return

    def _end_old(self, batch: Batch, warned: set[str]) -> None:
        """Warn at half of the transaction's time, or at held_warning_s, and end it at its end (REQ-TXN-009, 010, REQ-LOCK-008).

        PostgreSQL ends an idle transaction itself, but no statement whose rows nobody takes from it.
        """
        age, limit = batch.age_s, batch.session.database.transaction_timeout_s
        if limit and age > limit:
            raise Retryable(f"{batch.title} is rolled back: its transaction is {age:.0f} s old and the limit is {limit:.0f} s",
                            hint="a smaller batch_size makes shorter transactions; transaction_timeout sets the limit")
        long = self.operations.config.locking.held_warning_s
        if age > (min(limit / 2, long) if limit else long) and batch.handle not in warned:
            warned.add(batch.handle)
            end = f"the limit is {limit:.0f} s" if limit else "there is no limit"
            log.warning("transaction.old", f"the transaction of {batch.title} is {age:.0f} s old, and so long its rows are locked; {end}",
                        hint="a smaller batch_size makes shorter transactions")

    def _look_who_waits(self, sessions: Sequence[DatabaseSession], contention: dict[str, Contention]) -> None:
        """Give way to who alters a table; say, pause or end where others wait for rows, as is configured."""
        locking, pause = self.operations.config.locking, False
        for session in sessions:
            own = [batch for batch in self.operations.open_batches() if batch.session is session]
            pause = contention.setdefault(session.database.name, Contention(locking)).look(session, own) or pause
        self.operations.pause(pause)

    def _require_delete(self, batch: Batch) -> None:
        """End the batch if its rows are locked for nobody."""
        if batch.age_s > DELETE_HELLO_S and not self._known("aa-delete"):
            raise Failed(f"{batch.title} is rolled back: its rows were locked for {batch.age_s:.0f} s and there is no aa-delete to wait for",
                         hint="the command must be a pipeline from aa-select to aa-delete")


def _socket_directory(env: Mapping[str, str]) -> str:
    """A fresh 0700 directory under $RUNTIME_DIRECTORY, $XDG_RUNTIME_DIR or /tmp; never in staging, whose path may be long."""
    for root in (env.get("RUNTIME_DIRECTORY"), env.get("XDG_RUNTIME_DIR"), "/tmp"):
        if root and os.path.isdir(root) and os.access(root, os.W_OK | os.X_OK):
            return tempfile.mkdtemp(prefix="aa-", dir=root)
    raise ConfigError("no directory for the holder's socket can be written", hint="set XDG_RUNTIME_DIR")
