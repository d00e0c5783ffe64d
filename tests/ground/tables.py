"""A realistic audit table made by the server, and digests of tables computed by the server.

    tables.create(connection, "public.audit_logs", rows=5000, first="2024-11-25", last="2025-12-30")
    before = tables.digest(connection, "public.audit_logs")

About 480 bytes a row as JSON; created_at rises with id and spreads evenly over the dates, so a cutoff splits
the table where one expects it. The same arguments give the same rows on the same server version.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

COLUMNS = """
    id bigint PRIMARY KEY,
    created_at timestamptz NOT NULL,
    user_id integer,
    action text NOT NULL,
    session uuid,
    old_value jsonb,
    new_value jsonb,
    client inet,
    amount numeric(14,4),
    tags text[],
    payload bytea
"""

FILL = """
INSERT INTO {table}
SELECT i,
       {first}::timestamptz + ({last}::timestamptz - {first}::timestamptz) * ((i - {start} + 0.5) / {rows})
           + interval '1 microsecond' * (r * 1000)::int,
       (r3 * 20000)::int,
       act,
       (substr(h, 1, 12) || '4' || substr(h, 14, 3) || 'a' || substr(h, 18, 15))::uuid,
       CASE WHEN act IN ('login', 'logout') THEN NULL WHEN i % 97 = 0 THEN 'null'::jsonb
            ELSE jsonb_build_object('status', was, 'owner', 'user-' || (r3 * 900)::int, 'limit', (r4 * 5000)::int,
                                    'note', note) END,
       CASE WHEN act = 'delete' THEN NULL
            ELSE jsonb_build_object('status', now, 'owner', 'user-' || (r2 * 900)::int, 'limit', (r2 * 5000)::int,
                                    'seen', i % 3 = 0, 'trace', substr(md5('trace' || i), 1, 16),
                                    'origin', jsonb_build_object('app', app, 'build', 4000 + i % 250)) END,
       ('10.' || i % 8 || '.' || (r3 * 255)::int || '.' || (r4 * 255)::int)::inet,
       CASE WHEN i % 11 = 0 THEN NULL ELSE (r4 * 100000)::numeric(14,4) END,
       CASE WHEN i % 13 = 0 THEN '{{}}'::text[]
            ELSE ARRAY[app, was, CASE WHEN i % 17 = 0 THEN NULL ELSE 'x"y,z' END] END,
       CASE WHEN i % 19 = 0 THEN NULL ELSE decode(substr(md5('payload' || i), 1, 32), 'hex') END
FROM (SELECT i, r, r2, r3, r4, md5('audit' || i) AS h,
             (ARRAY['login', 'view', 'update', 'update', 'update', 'create', 'export', 'delete', 'logout', 'approve']
             )[1 + i % 10] AS act,
             (ARRAY['open', 'pending', 'closed', 'blocked', 'review'])[1 + (r * 4.99)::int % 5] AS was,
             (ARRAY['open', 'pending', 'closed', 'blocked', 'review'])[1 + (r2 * 4.99)::int % 5] AS now,
             (ARRAY['web', 'mobile', 'batch', 'api', 'crm-import'])[1 + i % 5] AS app,
             (ARRAY['changed by the owner after a call', 'limit raised on request',
                    'Prüfung abgeschlossen — keine Beanstandung', 'path C:\\temp\\new, "quoted"', 'two lines
of text'])[1 + (r * 4.99)::int % 5] AS note
      FROM (SELECT i, random() AS r, random() AS r2, random() AS r3, random() AS r4
            FROM generate_series({start}, {start} + {rows} - 1) AS i) AS dice) AS row
"""


class Digest(NamedTuple):
    """What `digest` says of one or several tables."""

    rows: int
    sha256: str


def create(connection: Any, table: str = "public.audit_logs", *, rows: int = 1000, first: str = "2024-01-01",
           last: str = "2025-12-30", start: int = 1, index: bool = True) -> None:
    """Create `table` (an SQL name, quoted by the caller where needed) and fill it."""
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE TABLE {table} ({COLUMNS})")
        fill(connection, table, rows=rows, first=first, last=last, start=start)
        if index:
            cursor.execute(f"CREATE INDEX ON {table} (created_at, id)")
        cursor.execute(f"ANALYZE {table}")


def fill(connection: Any, table: str = "public.audit_logs", *, rows: int, first: str, last: str,
         start: int = 1) -> None:
    """Add `rows` rows with ids from `start` on and created_at from `first` to `last` (UTC)."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT set_config('timezone', 'UTC', false), setseed(0.42)")
        cursor.execute(FILL.format(table=table, rows=rows, start=start, first=_literal(first), last=_literal(last)))


def digest(connection: Any, *tables: str, where: Optional[str] = None) -> Digest:
    """Row count and SHA-256 over all rows of the tables together, whatever their order: made by the server.

    Equal only if the tables hold the same rows equally often: every row is hashed as text with the columns in
    table order, and the sorted hashes are hashed. NULL, '' and JSON null differ in it.
    """
    parts = " UNION ALL ".join(f"SELECT ROW(t.*)::text AS line FROM {table} AS t" + (f" WHERE {where}" if where else "")
                               for table in tables)
    with connection.cursor() as cursor:
        cursor.execute("SELECT set_config(name, value, false) FROM (VALUES ('timezone', 'UTC'), ('datestyle', 'ISO'), "
                       "('intervalstyle', 'postgres'), ('extra_float_digits', '3'), ('bytea_output', 'hex')) "
                       "AS pins(name, value)")
        cursor.execute(f"""
            SELECT count(*), encode(sha256(coalesce(string_agg(hash, ''::bytea ORDER BY hash), ''::bytea)), 'hex')
            FROM (SELECT sha256(textsend(line)) AS hash FROM ({parts}) AS texts) AS hashes""")
        rows, sha256 = cursor.fetchone()
    return Digest(rows, sha256)


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
