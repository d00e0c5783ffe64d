"""The log: one JSON object per line on stderr, or short lines for a person at a terminal.

Every record carries a stable `event` id (man 7 audit-archiver lists them). Counts, object keys and digests
are logged; rows, DSNs and secrets never. stdout is never written here.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any, Callable, Optional, TextIO

from pythonjsonlogger.json import JsonFormatter

_logger = logging.getLogger("audit_archiver")
_logger.propagate = False
_context: dict[str, Any] = {}
_asked = "auto"


class _Json(JsonFormatter):
    """ts, level, run_id, stage, event, msg, then the call's own fields; what is None is left out."""

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        log_data.update(_head(record), msg=record.getMessage())
        log_data.update((key, value) for key, value in _fields(record).items()
                        if value is not None and key not in log_data)


class _Text(logging.Formatter):
    """STAGE: [LEVEL:] [AT:] MESSAGE; DETAIL. HINT - always one line, without a control character."""

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        text = f"{_context.get('stage') or 'audit-archiver'}: "
        origin = record.__dict__.get("origin")
        text += f"{origin}: " if origin else ""
        if record.levelno >= logging.WARNING:
            text += f"{record.levelname.lower()}: "
        at = fields.get("at")
        text += (f"{at}: " if at else "") + record.getMessage()
        for part, lead in (("detail", "; "), ("hint", ". ")):
            if fields.get(part):
                text += lead + str(fields[part])
        return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in " ".join(text.split()))


def setup(stage: str, *, style: str = "auto", quiet: bool = False, verbose: int = 0,
          stream: Optional[TextIO] = None) -> None:
    """Send the log of this process to `stream` (stderr). `style` is auto, text or json; auto is text on a terminal.

    `quiet` leaves errors only; `verbose` 1 or more adds debug lines (levels: REQ-OBS-002, REQ-EXE-006).
    """
    global _asked
    stream = stream or sys.stderr or open(os.devnull, "w")  # sys.stderr is None where descriptor 2 was closed
    _asked = style
    if style == "auto":
        style = "text" if stream.isatty() else "json"
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_formatter(style, stream))
    _logger.handlers[:] = [handler]
    _logger.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)
    _context.clear()
    _context.update(stage=stage, run_id=None)


def bind(**fields: Any) -> None:
    """Add fields to every later record of this process, e.g. bind(run_id=...)."""
    _context.update(fields)


def bound(field: str) -> Any:
    """The value given to `bind` for `field`, or None."""
    return _context.get(field)


def follow(observability: Any) -> None:
    """Apply the configuration's log_level and log_format."""
    set_level(observability.log_level)
    set_style(observability.log_format)


def set_level(name: str) -> None:
    """Apply the configuration's observability.log_level (DEBUG..CRITICAL) unless -q or -v chose already.

    CRITICAL counts as ERROR: why a command stopped is always said.
    """
    if _logger.level == logging.INFO:
        _logger.setLevel(min(logging.getLevelName(name), logging.ERROR))


def before_each(act: Callable[[], None]) -> None:
    """Call `act` before each record is written, in the thread that writes it: a progress bar makes way."""
    def make_way(_record: logging.LogRecord) -> bool:
        act()
        return True

    for handler in _logger.handlers:
        handler.addFilter(make_way)


def divert(send: Callable[[tuple[int, str, str, dict[str, Any]]], bool]) -> None:
    """Hand each later record to `send` instead of writing it; one that it cannot take (False) is written after all.

    For a worker, whose parent says it with `pass_on`: only one process writes, and only it knows what stands on the terminal.
    """
    def sent(record: logging.LogRecord) -> bool:
        return not send((record.levelno, record.__dict__["event"], record.getMessage(), _fields(record)))

    for handler in _logger.handlers:
        handler.filters[:] = [sent]


def pass_on(origin: str, told: tuple[int, str, str, dict[str, Any]]) -> None:
    """Write a record that another process has handed to `divert`; `origin` is the database it works on."""
    level, event, msg, fields = told
    _logger.log(level, "%s", msg, extra={"event": event, "fields": fields, "origin": origin})


def set_style(name: str) -> None:
    """Apply the configuration's observability.log_format (auto, json, text) unless --log-format chose already."""
    if name != "auto" and _asked == "auto":
        for handler in _logger.handlers:
            handler.setFormatter(_formatter(name, getattr(handler, "stream", sys.stderr)))


def _formatter(style: str, stream: TextIO) -> logging.Formatter:
    return _Json(json_ensure_ascii=not _is_utf8(stream), json_default=str) if style == "json" else _Text()


def _head(record: logging.LogRecord) -> dict[str, Any]:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
    head = {"ts": stamp, "level": record.levelname, "run_id": None, "stage": None,
            "event": record.__dict__.get("event"), "database": record.__dict__.get("origin"), **_context}
    return {key: value for key, value in head.items() if value is not None}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return record.__dict__.get("fields", {})


def _is_utf8(stream: TextIO) -> bool:
    """Elsewhere (LC_ALL=C) stderr writes what it cannot encode as \\xe9, which is no JSON escape."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"


def _log(level: int, event: str, msg: str, fields: dict[str, Any]) -> None:
    if _logger.isEnabledFor(level):
        _logger.log(level, "%s", msg, extra={"event": event, "fields": fields})


def debug(event: str, msg: str, /, **fields: Any) -> None:
    """What a developer wants to see (-v)."""
    _log(logging.DEBUG, event, msg, fields)


def info(event: str, msg: str, /, **fields: Any) -> None:
    """What happened."""
    _log(logging.INFO, event, msg, fields)


def warning(event: str, msg: str, /, **fields: Any) -> None:
    """What a person should look at, though the work goes on."""
    _log(logging.WARNING, event, msg, fields)


def error(event: str, msg: str, /, **fields: Any) -> None:
    """Why something was not done. Shown under --quiet too."""
    _log(logging.ERROR, event, msg, fields)


def failure(event: str, msg: str, heard: bool, /, **fields: Any) -> None:
    """Why something was not done: an error, or a warning where a holder has `heard` it, which may begin anew and has the last word."""
    _log(logging.WARNING if heard else logging.ERROR, event, msg, fields)
