"""Print archived rows, out of the store or out of a copy of it, without bringing them back into a database.

Rows are printed as they were archived, one JSON object a line. What need not be read is not: batches are left out by their dates
and by the ranges in their metadata, and where the table has find_columns only those gzip members are fetched that may hold the
value. At the end it says on stderr how much of the archive it has read.

Nothing is written, neither to the store nor to a database.
"""

from __future__ import annotations

import json
import re
from typing import Any, Callable, Iterable, Iterator, Optional, Sequence

from audit_archiver import cli, config, exits, log
from audit_archiver.catalogue.archived import ARCHIVED, MISSING, Batch
from audit_archiver.cli import Command
from audit_archiver.commands import selection_flags
from audit_archiver.exits import ConfigError, Failed
from audit_archiver.objectstore.client import Store, open_store
from audit_archiver.query import copies
from audit_archiver.query.rows import fields, picked
from audit_archiver.query.search import Search
from audit_archiver.restore import choose

NAME = "aa-cat"
_TO_QUOTE = re.compile('[",\r\n]')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command."""
    return cli.run(NAME, build_parser, run, argv)


def build_parser() -> cli.Parser:
    """The options."""
    parser = cli.parser(NAME, __doc__)
    selection_flags.add(parser, "print rows of")
    selection_flags.add_where(parser, "only rows whose column answers this")
    parser.add_argument("--columns", metavar="COL,...", type=lambda text: cli.text(text).split(","),
                        help="only these columns, in this order (default: all, and _archived_at, _batch_id, _source_database, _source_table)")
    parser.add_argument("--local", metavar="DIR", help="read a copy of the bucket in this directory; no configuration is read, nothing is sent")
    parser.add_argument("--output", choices=("jsonl", "csv"), default="jsonl",
                        help="form of the rows; in csv NULL is empty and an empty text is \"\" (default: %(default)s)")
    return parser


def run(command: Command) -> int:
    """Print the rows of one table."""
    args = command.args
    selection = selection_flags.chosen(args)
    store, databases = _opened(command)
    batches = list(_chosen(store, databases, args, selection))
    if len({(batch.database, batch.schema, batch.table) for batch in batches}) > 1:
        named = sorted({f"{batch.database} {batch.schema}.{batch.table}" for batch in batches})
        raise ConfigError("rows of several tables are meant", detail=", ".join(named), hint="name one with --database and --table")
    lost = [batch for batch in batches if batch.state == MISSING]
    search = Search(store, args.where, selection.start, selection.end)
    write = _csv(args.columns) if args.output == "csv" else _jsonl(args.columns)
    for rows in search.rows(batch for batch in batches if batch.state == ARCHIVED):
        command.sink.write(b"".join(write(rows)))
    search.figures.say()
    if search.figures.of_batches and not search.figures.batches and search.figures.lacking:
        raise ConfigError(f"no batch has a column '{min(search.figures.lacking)}'", hint="aa-cat without --where shows the columns")
    if lost:
        raise Failed(f"{len(lost)} batches have lost their commit record, their rows are missing here", detail=lost[0].key,
                     hint="restore the objects of the bucket from a version or a replica")
    return exits.OK


def _opened(command: Command) -> tuple[Store, list[str]]:
    """The store, or a copy of one, and the databases in it that are meant."""
    args = command.args
    if args.local is not None:
        copy: Any = copies.store(args.local)
        return copy, args.database or [found[len(copy.prefix):-1] for found in copy.directories(copy.prefix)]
    settings = config.load(args.config, command.env)
    log.follow(settings.observability)
    return open_store(settings, watch=command.sink.stream), args.database or [database.name for database in settings.databases]


def _chosen(store: Store, databases: Iterable[str], args: Any, selection: choose.Selection) -> Iterator[Batch]:
    if args.s3_key:
        yield choose.one(store, args.s3_key)
        return
    for database in databases:
        for schema, table in choose.tables(store, database, selection.tables):
            yield from choose.batches(store, database, schema, table, selection)


def _jsonl(columns: Optional[Sequence[str]]) -> Callable[[list[bytes]], Iterator[bytes]]:
    """Rows as JSON lines; what stands in a row is passed on byte for byte."""
    if columns is None:
        return lambda rows: (line + b"\n" for line in rows)
    names = {name: json.dumps(name, ensure_ascii=False) for name in columns}

    def written(rows: list[bytes]) -> Iterator[bytes]:
        for line in rows:
            yield ("{" + ",".join(f"{names[name]}:{text or 'null'}" for name, text in picked(line, columns).items()) + "}\n").encode()
    return written


def _csv(columns: Optional[Sequence[str]]) -> Callable[[list[bytes]], Iterator[bytes]]:
    """Rows as CSV (RFC 4180 with LF) behind a header of the columns, which are those of the first row if none were named."""
    header: list[str] = []

    def written(rows: list[bytes]) -> Iterator[bytes]:
        for line in rows:
            found = fields(line.decode())
            if not header:
                header.extend(found if columns is None else columns)
                yield (",".join(map(_quoted, header)) + "\n").encode()
            if columns is None and list(found) != header:
                raise ConfigError("the rows have other columns from here on: the table was changed", detail=f"{', '.join(found)}",
                                  hint="name those that are meant with --columns")
            yield (",".join(_cell(found.get(name)) for name in header) + "\n").encode()
    return written


def _cell(text: Optional[str]) -> str:
    if text is None or text == "null":
        return ""
    return _quoted(json.loads(text)) if text.startswith('"') else _quoted(text)


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if not text or _TO_QUOTE.search(text) else text
