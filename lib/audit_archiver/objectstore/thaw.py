"""Objects that have to be thawed before they can be read (S3 API: RestoreObject; storage classes GLACIER and DEEP_ARCHIVE)."""

from __future__ import annotations

from typing import Optional

from audit_archiver.objectstore.connection import Connection
from audit_archiver.objectstore.errors import Thawing

FROZEN_CLASSES = ("GLACIER", "DEEP_ARCHIVE")
FROZEN, THAWING, READY = "frozen", "thawing", "ready"


def state(storage_class: str, restore: Optional[str]) -> str:
    """Whether an object can be read: by its class and by the header x-amz-restore of a HEAD, None if there was none."""
    if storage_class not in FROZEN_CLASSES:
        return READY
    if not restore:
        return FROZEN
    return READY if 'ongoing-request="false"' in restore else THAWING


def ask(connection: Connection, key: str, days: int, tier: str) -> None:
    """Ask for a readable copy of an object for so many days. That it is asked for already is fine."""
    try:
        connection.safely("restore_object", f"thaw '{connection.url(key)}'", Key=key,
                          RestoreRequest={"Days": days, "GlacierJobParameters": {"Tier": tier}})
    except Thawing:
        return
