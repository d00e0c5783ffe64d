"""The holds in the bucket: what aa-restore brought back and no run may take away again before a time (T12).

One small object for each, created once, all of a database under one prefix. The key begins with the end of the hold, so
what has ended is never listed again, and where nothing is held a run pays for one listing.
"""

from __future__ import annotations

import datetime

from audit_archiver import lines, log
from audit_archiver.exits import ArchiverError
from audit_archiver.formats import hold as formats
from audit_archiver.formats import names
from audit_archiver.formats.hold import Hold
from audit_archiver.objectstore.client import Store

CLOCKS_APART = datetime.timedelta(days=1)  # between this host, whose clock the listing begins by, and the server, whose clock decides


def put(store: Store, hold: Hold, at: str, by: dict[str, str]) -> None:
    """Leave a hold in the bucket."""
    store.put_new(names.hold_key(store.prefix, hold.database, hold.until, hold.hold), lines.dump(hold.as_json(at, by)))


def current(store: Store, database: str) -> list[Hold]:
    """Every hold of a database that has not ended for a day, the one that ends first before the others."""
    since = datetime.datetime.now(datetime.timezone.utc) - CLOCKS_APART
    after = names.hold_key(store.prefix, database, f"{since:%Y-%m-%dT%H:%M:%SZ}", "")
    return [_read(store, entry.key) for entry in store.list(names.holds_dir(store.prefix, database), after)]


def for_plan(store: Store, database: str) -> list[Hold]:
    """`current` for who only plans: a bucket that does not answer is a warning, since whoever takes rows asks again."""
    try:
        return current(store, database)
    except ArchiverError as error:
        log.warning("plan.holds", f"what is held of database '{database}' is unknown: {error.msg}", detail=error.detail, hint=error.hint)
        return []


def _read(store: Store, key: str) -> Hold:
    what = f"'{store.url(key)}'"
    return formats.parse(lines.parse(store.get_bytes(key), what), what)
