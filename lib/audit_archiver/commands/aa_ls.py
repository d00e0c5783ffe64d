"""List what is archived: batches, rows, date ranges, sizes and runs of each table.

Reads the bucket and nothing else, no database and no row, and writes a list. Only a batch with a commit record is
archived; one that a run left open, one that recovery abandoned, one that was rolled back, and one whose commit record
is gone are shown as what they are and not counted. A rerun shows the same.
"""

from __future__ import annotations

import itertools
from typing import Any, Iterator, Optional, Sequence

from audit_archiver import cli, config, exits, log
from audit_archiver.catalogue import holds
from audit_archiver.catalogue.archived import ABANDONED, ARCHIVED, MISSING, OPEN, ROLLED_BACK, Batch
from audit_archiver.cli import Command
from audit_archiver.commands import selection_flags
from audit_archiver.objectstore.client import Store, open_store
from audit_archiver.query.search import Search
from audit_archiver.restore import choose

NAME = "aa-ls"
SAYS = {OPEN: "not archived: no commit record; aa-recover decides it", ABANDONED: "not archived: abandoned",
        ROLLED_BACK: "not archived any more: rolled back, its rows are in the table again",
        MISSING: "its commit record is gone, though the index names it"}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command."""
    return cli.run(NAME, build_parser, run, argv)


def build_parser() -> cli.Parser:
    """The options."""
    parser = cli.parser(NAME, __doc__)
    selection_flags.add(parser, "list")
    selection_flags.add_where(parser, "only batches that may hold a row whose column answers this, as far as their metadata say")
    parser.add_argument("--output", choices=("text", "json"), help="form of the list (default: text on a terminal, json elsewhere)")
    return parser


def run(command: Command) -> int:
    """List table after table, as they are read."""
    args = command.args
    settings = config.load(args.config, command.env)
    log.follow(settings.observability)
    selection = selection_flags.chosen(args)
    store = open_store(settings, watch=command.sink.stream)
    search, lost = Search(store, args.where), 0
    databases = args.database or [database.name for database in settings.databases]
    for found in [[choose.one(store, args.s3_key)]] if args.s3_key else _listed(store, databases, selection):
        lost += sum(batch.state == MISSING for batch in found)
        if args.where:
            found = [place.batch for place in search.places(batch for batch in found if batch.state == ARCHIVED)]
        if not args.quiet:
            _write(command, found)
    if not args.s3_key and not args.where:
        _say_held(store, databases, selection.tables)
    if args.where:
        search.figures.say()
    if lost:
        log.error("ls.missing", f"{lost} batches have lost their commit record", hint="the index names them; restore the objects of the "
                  "bucket from a version or a replica, and do not archive these tables until then", code=exits.FAILED)
    return exits.FAILED if lost else exits.OK


def _say_held(store: Store, databases: Sequence[str], tables: Sequence[str]) -> None:
    """What aa-restore --hold-until keeps in its table. On stderr: the list is of what is archived."""
    for database in databases:
        for hold in holds.current(store, database):
            if tables and not {hold.table, f"{hold.schema}.{hold.table}"} & set(tables):
                continue
            log.warning("ls.held", f"{database} {hold.schema}.{hold.table}: {hold.words}", until=hold.until, hold=hold.hold)


def _listed(store: Store, databases: Sequence[str], selection: choose.Selection) -> Iterator[list[Batch]]:
    for database in databases:
        for schema, table in choose.tables(store, database, selection.tables):
            yield choose.batches(store, database, schema, table, selection)


def _write(command: Command, found: list[Batch]) -> None:
    if not command.as_text:
        for batch in found:
            command.sink.emit(as_json(batch))
    elif found:
        command.sink.write("".join(line + "\n" for line in _text(found)).encode())


def as_json(batch: Batch) -> dict[str, Any]:
    """A batch as a line of the list."""
    fields = {name: value for name, value in batch._asdict().items() if name != "stem"}
    return {"format": "aa-archived", "version": 1, **fields, "s3_key": batch.key}


def _text(found: list[Batch]) -> Iterator[str]:
    """A table's batches under their runs, oldest first, with sums of what is archived."""
    yield f"{found[0].database} {found[0].schema}.{found[0].table}: {_sums([batch for batch in found if batch.state == ARCHIVED])}"
    known = [batch for batch in found if batch.run is not None]
    for name, group in itertools.groupby(sorted(known, key=lambda batch: str(batch.run)), key=lambda batch: batch.run):
        batches = list(group)
        yield f"  run {name}: {_sums([batch for batch in batches if batch.state == ARCHIVED])}"
        for batch in batches:
            assert batch.first is not None and batch.last is not None
            yield (f"    {batch.rows or 0:>9,} rows  {batch.first[0]} .. {batch.last[0]}  {batch.key}"
                   + (f"  {SAYS[batch.state]}" if batch.state in SAYS else ""))
    for batch in found:
        if batch.run is None:
            yield f"  {batch.key}  {SAYS[batch.state]}"


def _sums(batches: list[Batch]) -> str:
    if not batches:
        return "nothing archived"
    firsts, lasts = ([str(moment[0]) for batch in batches if (moment := getattr(batch, end)) is not None] for end in ("first", "last"))
    runs = len({batch.run for batch in batches})
    return (f"{_count(len(batches), 'batch', 'batches')} of {_count(runs, 'run', 'runs')}, "
            f"{_count(sum(batch.rows or 0 for batch in batches), 'row', 'rows')}, "
            f"{min(firsts, key=choose.second)} .. {max(lasts, key=choose.second)}, "
            f"{_size(sum(batch.gz_bytes or 0 for batch in batches))} ({_size(sum(batch.bytes or 0 for batch in batches))} unpacked)")


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size / 1e3:,.1f} kB"
