"""List objects in key order, a page of 1,000 at a time."""

from __future__ import annotations

from typing import Any, Iterator, NamedTuple, Optional

from audit_archiver.objectstore.connection import Connection
from audit_archiver.objectstore.get import etag_of


class Entry(NamedTuple):
    """One object of a listing; `modified` is the store's clock, a datetime in UTC; etag without its quotes."""

    key: str
    size: int
    modified: Any
    etag: str = ""
    storage_class: str = "STANDARD"


def entries(connection: Connection, prefix: str, start_after: Optional[str] = None) -> Iterator[Entry]:
    """The objects whose key begins with `prefix`, after the key `start_after`, in key order."""
    place: dict[str, str] = {"StartAfter": start_after} if start_after else {}
    while True:
        page = connection.safely("list_objects_v2", f"list '{connection.url(prefix)}'", Prefix=prefix, **place)
        for found in page.get("Contents", ()):
            yield Entry(found["Key"], int(found["Size"]), found["LastModified"], etag_of(found), found.get("StorageClass") or "STANDARD")
        if not page.get("IsTruncated"):
            return
        place = {"ContinuationToken": page["NextContinuationToken"]}


def directories(connection: Connection, prefix: str) -> Iterator[str]:
    """The key prefixes one level below `prefix`, each ending in '/'."""
    place: dict[str, str] = {}
    while True:
        page = connection.safely("list_objects_v2", f"list '{connection.url(prefix)}'", Prefix=prefix, Delimiter="/", **place)
        for found in page.get("CommonPrefixes", ()):
            yield found["Prefix"]
        if not page.get("IsTruncated"):
            return
        place = {"ContinuationToken": page["NextContinuationToken"]}
