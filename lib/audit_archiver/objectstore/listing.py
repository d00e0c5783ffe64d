"""List objects in key order, a page of 1,000 at a time."""

from __future__ import annotations

from typing import Any, Iterator, NamedTuple, Optional
from urllib.parse import unquote_plus

from audit_archiver.objectstore.connection import Connection
from audit_archiver.objectstore.errors import Unreadable
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
    for page in _pages(connection, prefix, **({"StartAfter": start_after} if start_after else {})):
        for found in page.get("Contents", ()):
            yield Entry(found["Key"], int(found["Size"]), found["LastModified"], etag_of(found), found.get("StorageClass") or "STANDARD")


def directories(connection: Connection, prefix: str) -> Iterator[str]:
    """The key prefixes one level below `prefix`, each ending in '/'."""
    for page in _pages(connection, prefix, Delimiter="/"):
        for found in page.get("CommonPrefixes", ()):
            yield found["Prefix"]


def _pages(connection: Connection, prefix: str, **asked: str) -> Iterator[dict[str, Any]]:
    while True:
        page = _page(connection, prefix, **asked)
        yield page
        if not page.get("IsTruncated"):
            return
        asked.pop("StartAfter", None)
        asked["ContinuationToken"] = page["NextContinuationToken"]


def _page(connection: Connection, prefix: str, **asked: str) -> dict[str, Any]:
    """One page, with the keys as they are.

    botocore would ask for keys in the encoding of URLs: then LocalStack compares encoded keys with the place to go on from,
    which is not encoded, and leaves out every key with `year=` in it. Only where somebody's key has a character that XML
    cannot carry is the page asked for like that.
    """
    what = f"list '{connection.url(prefix)}'"
    try:
        return connection.safely("list_objects_v2", what, Prefix=prefix, **asked)
    except Unreadable:
        page = connection.safely("list_objects_v2", what, Prefix=prefix, EncodingType="url", **asked)
    for name, field in (("Contents", "Key"), ("CommonPrefixes", "Prefix")):
        for found in page.get(name, ()):
            found[field] = unquote_plus(found[field])
    return page
