"""Objects out of the cold: which of those that are needed cannot be read yet, ask for them, wait for them.

Asked before anything else is done, so that nothing stops half way. A listing says the storage class of each object; only
those that are cold are looked at one by one.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import time
from dataclasses import dataclass
from typing import Callable, Iterable, Optional, Sequence, TypeVar

from audit_archiver import log
from audit_archiver.catalogue.archived import Batch
from audit_archiver.exits import ConfigError
from audit_archiver.formats import names
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.errors import NotThawed
from audit_archiver.objectstore.listing import Entry
from audit_archiver.objectstore.thaw import FROZEN, FROZEN_CLASSES, READY, state

EXPEDITED, STANDARD, BULK = "Expedited", "Standard", "Bulk"
HOURS = {("GLACIER", EXPEDITED): 0.1, ("GLACIER", STANDARD): 5, ("GLACIER", BULK): 12, ("DEEP_ARCHIVE", STANDARD): 12, ("DEEP_ARCHIVE", BULK): 48}
"""How long it takes at most, as the Amazon S3 User Guide has it ("Understanding archive retrieval options")."""
DAYS = 3
POLL_S = 60.0
AT_ONCE = 8
WHOLE = (names.COMMIT, names.METADATA, names.KEYS, names.DATA)
RESTORED = (names.COMMIT, names.METADATA, names.DATA)
"""The objects of a batch that a restore reads."""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Thaw:
    """What to do about cold objects: ask for a copy that lasts `days`, and wait for it."""

    tier: str = STANDARD
    days: int = DAYS
    wait: bool = False


def require(store: Store, batches: Sequence[Batch], suffixes: Iterable[str], wanted: Optional[Thaw], *, ask: bool = True) -> None:
    """Return when these objects of every batch can be read.

    Raises NotThawed if some cannot: they were not asked for (`wanted` is None, or `ask` False: a dry run), or were and are
    not ready yet; the message says when they should be. ConfigError for a tier that a storage class does not have.
    """
    cold = _cold(store, batches, frozenset(suffixes))
    if not cold:
        return
    states = _each(cold, lambda entry: _state(store, entry))
    left = [entry for entry, found in zip(cold, states) if found != READY]
    if not left:
        log.info("thaw.ready", f"{_many(cold)} lie in a cold storage class, and can be read for now")
        return
    frozen = [entry for entry, found in zip(cold, states) if found == FROZEN]
    words = f"{_many(left)} of {len({_stem(entry) for entry in left})} batches have to be thawed first"
    if wanted is None:
        raise NotThawed(words, detail=f"{len(left) - len(frozen)} of them are asked for already; storage class "
                        + ", ".join(sorted({entry.storage_class for entry in left})),
                        hint=f"--thaw asks for them, for {DAYS} days, which the store charges for; --wait waits until they are there")
    hours = [HOURS.get((entry.storage_class, wanted.tier)) for entry in left]
    if None in hours:
        raise ConfigError(f"--thaw-tier {wanted.tier} is not for objects of class DEEP_ARCHIVE", hint=f"use {STANDARD} or {BULK}")
    if not ask:
        raise NotThawed(words, detail="a dry run asks for nothing", hint="leave --dry-run out, or look again when they are thawed")
    _each(frozen, lambda entry: store.thaw(entry.key, wanted.days, wanted.tier))
    ready = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=max(hour for hour in hours if hour is not None))
    log.info("thaw.asked", f"{_many(frozen)} are asked for, for {wanted.days} days; all should be ready by {ready:%Y-%m-%dT%H:%M:%SZ}",
             objects=len(frozen), of=len(left), ready_by=f"{ready:%Y-%m-%dT%H:%M:%SZ}", tier=wanted.tier)
    if wanted.wait:
        left = _waited(store, left, ready)
    else:
        left = [entry for entry, found in zip(left, _each(left, lambda entry: _state(store, entry))) if found != READY]
    if left:
        raise NotThawed(f"{_many(left)} are asked for and not thawed yet", detail=f"they should be by {ready:%Y-%m-%dT%H:%M:%SZ}",
                        hint="run the same again then; nothing was done")


def _waited(store: Store, left: list[Entry], ready: datetime.datetime) -> list[Entry]:
    """What is still not ready after twice the time that it takes at most."""
    now = datetime.datetime.now(datetime.timezone.utc)
    deadline = time.monotonic() + 2 * (ready - now).total_seconds() + POLL_S
    while True:
        left = [entry for entry, found in zip(left, _each(left, lambda entry: _state(store, entry))) if found != READY]
        if not left or time.monotonic() > deadline:
            return left
        log.info("thaw.waiting", f"{_many(left)} are not thawed yet; looked at again every {POLL_S:g} s", objects=len(left))
        time.sleep(POLL_S)


def _cold(store: Store, batches: Sequence[Batch], suffixes: frozenset[str]) -> list[Entry]:
    """The objects of these batches whose storage class cannot be read at once."""
    wanted = {batch.stem + suffix for batch in batches for suffix in suffixes}
    days = dict.fromkeys(batch.stem.rpartition("/")[0] + "/" for batch in batches)
    return [entry for day in days for entry in store.list(day) if entry.storage_class in FROZEN_CLASSES and entry.key in wanted]


def _state(store: Store, entry: Entry) -> str:
    head = store.head(entry.key)
    return READY if head is None else state(head.storage_class, head.restore)  # who reads it says that it is gone


def _each(entries: Sequence[Entry], work: Callable[[Entry], Answer]) -> list[Answer]:
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE, "thaw") as pool:
        return list(pool.map(work, entries))


def _stem(entry: Entry) -> str:
    return next(entry.key[:-len(suffix)] for suffix in WHOLE if entry.key.endswith(suffix))


def _many(entries: Sequence[Entry]) -> str:
    return f"{len(entries)} objects with {sum(entry.size for entry in entries) / 1e6:,.1f} MB"
