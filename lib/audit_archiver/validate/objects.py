"""What lies under a table's prefix, object by object: which batch each belongs to, and which belong to nothing."""

from __future__ import annotations

import itertools
import re
from typing import Iterator, NamedTuple

from audit_archiver.catalogue import leftovers
from audit_archiver.objectstore.client import Store
from audit_archiver.objectstore.listing import Entry

RESTORES = ".restores/"
_BESIDE = re.compile(r"\.index/[0-9]{8}T[0-9]{6}Z-[0-9]+_[0-9]{3,}\.json|_owner\.json|\.restore_watermark\.json|\.restores/[^/]+\.json")


class Directory(NamedTuple):
    """What one listing step found: the objects of each batch by suffix, and foreign objects."""

    batches: dict[str, dict[str, Entry]]
    foreign: list[Entry]


def listed(store: Store, table_dir: str, only: str = "") -> Iterator[Directory]:
    """Everything under a table's prefix, a directory (a day) at a time; or what begins with the name of `only` one batch."""
    for _, entries in itertools.groupby(store.list(only or table_dir), key=lambda entry: entry.key.rpartition("/")[0]):
        batches: dict[str, dict[str, Entry]] = {}
        foreign: list[Entry] = []
        for entry in entries:
            name = entry.key[len(table_dir):]
            match = leftovers.OBJECT.fullmatch(entry.key) if name.startswith("year=") else None
            if match is not None:
                batches.setdefault(match.group(1), {})[match.group(2)] = entry
            elif _BESIDE.fullmatch(name) is None:
                foreign.append(entry)
        yield Directory(batches, foreign)
