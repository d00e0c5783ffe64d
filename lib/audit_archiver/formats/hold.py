"""The hold: restored rows of a table that no run may archive again before a time (man 5 aa-restored)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from audit_archiver.formats import schema


@dataclass(frozen=True)
class Hold:
    """Rows of a table, or of the partitions below it, whose `timestamp` column lies in first..last, both included, as texts
    of the server that archived them. `hold` is the id of the restore, `until` RFC 3339 UTC."""

    hold: str
    database: str
    schema: str
    table: str
    timestamp: str
    first: str
    last: str
    until: str

    @property
    def range(self) -> tuple[str, str]:
        """first and last."""
        return self.first, self.last

    @property
    def words(self) -> str:
        """What is held and until when."""
        return f"rows from {self.first} to {self.last} are held until {self.until}: restore {self.hold} brought them back"

    def as_json(self, at: str, by: dict[str, str]) -> dict[str, Any]:
        """The record in the bucket, checked against its schema."""
        value = {"format": "aa-hold", "version": 1, **asdict(self), "at": at, "by": by}
        schema.validate("hold", value, "the record of the hold")
        return value


def parse(value: Any, what: str) -> Hold:
    """The hold in a record; `what` is its name in messages. Raises InputError."""
    schema.validate("hold", value, what)
    return Hold(**{name: value[name] for name in Hold.__dataclass_fields__})
