"""Which holds concern a table now: by the server's clock, for the table itself and for the parents it is a partition of."""

from __future__ import annotations

from typing import Sequence

from audit_archiver.exits import ConfigError
from audit_archiver.formats.hold import Hold
from audit_archiver.postgres import connect, partitions

_OPEN_SQL = "SELECT u.n::int FROM unnest(%s::timestamptz[]) WITH ORDINALITY AS u(until, n) WHERE u.until > now() ORDER BY u.n"


def of_table(connection: connect.Connection, holds: Sequence[Hold], schema: str, table: str, timestamp: str) -> tuple[Hold, ...]:
    """The holds that concern rows of a table which is archived by its column `timestamp`. Asks nothing where there are none.

    Raises ConfigError if rows are held by another column: nobody could say which these are.
    """
    if not holds:
        return ()
    names = partitions.lineage(connection, schema, table)
    lasting = [row[0] - 1 for row in connect.rows(connection, _OPEN_SQL, ([hold.until for hold in holds],))]
    found = tuple(holds[place] for place in lasting if (holds[place].schema, holds[place].table) in names)
    for hold in found:
        if hold.timestamp != timestamp:
            raise ConfigError(f"'{schema}.{table}' is archived by '{timestamp}', and by its '{hold.timestamp}' {hold.words}",
                              hint="wait until then, or archive all of them with --force-rearchive")
    return found
