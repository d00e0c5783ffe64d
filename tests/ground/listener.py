"""A transaction holder that only listens: it answers every operation with ok and keeps what it was told."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
import threading
from typing import Any


class Holder:
    """Listens on a socket in a short directory of its own; `requests` are the operations so far."""

    def __init__(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="aa-")
        self.path = f"{self._directory}/txn"
        self.requests: list[dict[str, Any]] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen(5)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        shutil.rmtree(self._directory)

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, client.makefile("rwb") as lines:
                for line in lines:
                    self.requests.append(json.loads(line))
                    lines.write(b'{"ok":true,"holder":"h-test"}\n')
                    lines.flush()
