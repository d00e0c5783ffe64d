"""Weigh a table and its archive: rows in the table plus rows in the archive are the rows that ever were, each in one place.

Reads the table, in a session that can only read, and the archive; writes a line for each row that is in neither, in
both or changed, and the sum. With --make-baseline it writes what there is into a file; with --baseline it compares with
such a file; with neither it looks for rows that are in both. Refuses to weigh while a run is at work. Run again it
weighs anew.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Optional, Sequence

from audit_archiver import __version__, cli, config, exits, log
from audit_archiver.cli import Command
from audit_archiver.config.model import Database, Table
from audit_archiver.exits import ConfigError, Mismatch
from audit_archiver.objectstore.client import open_store
from audit_archiver.preflight.plan import Selection, selected
from audit_archiver.validate import baseline
from audit_archiver.validate.balance import Scale, now
from audit_archiver.validate.ledger import BEFORE, CHANGED, DOUBLED, LOST, TWICE, RowLedger, Sums

NAME = "aa-balance"
WRONGS = (LOST, DOUBLED, TWICE, CHANGED)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command."""
    return cli.run(NAME, build_parser, run, argv)


def build_parser() -> cli.Parser:
    """The options."""
    parser = cli.parser(NAME, __doc__)
    parser.add_argument("--database", metavar="DB", required=True, type=cli.text, help="the database of the table, as the configuration names it")
    parser.add_argument("--table", metavar="[SCHEMA.]TABLE", required=True, type=cli.text,
                        help="the table, as the configuration names it; of a partitioned one all partitions")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--baseline", metavar="FILE", type=Path, help="compare with this file: every row in it must be in one place only, unchanged")
    which.add_argument("--make-baseline", metavar="FILE", type=Path, help="write key and digest of every row in table and archive into this new file")
    parser.add_argument("--output", choices=("text", "json"), help="form of the lines (default: text on a terminal, json elsewhere)")
    return parser


def run(command: Command) -> int:
    """Weigh one table."""
    args = command.args
    settings = config.load(args.config, command.env)
    log.follow(settings.observability)
    [(database, tables)] = selected(settings, Selection(databases=(args.database,), tables=(args.table,)))
    if len(tables) > 1:
        raise ConfigError(f"'{args.table}' means several tables", hint="name it with its schema")
    header, rows = baseline.read(args.baseline) if args.baseline else (None, iter(()))
    if header is not None and header["database"] != database.name:
        raise ConfigError(f"'{args.baseline}' is a baseline of database '{header['database']}'")
    store = open_store(settings, watch=command.sink.stream)
    scale = Scale(store, database, tables[0], header["tables"] if header else ())
    ledger = RowLedger()
    try:
        for number, lines in rows:
            ledger.add(BEFORE, number, lines)
        content_too = bool(args.baseline or args.make_baseline)
        scale.weigh(ledger, content_too=content_too)
        return _weighed(command, database, tables[0], scale, ledger, header)
    finally:
        ledger.close()
        scale.close()


def _weighed(command: Command, database: Database, table: Table, scale: Scale, ledger: RowLedger, header: Optional[dict[str, Any]]) -> int:
    """Say each row that is not where it must be, then the sum; write the baseline if all is well."""
    args = command.args
    wrong: Counter[str] = Counter()
    for leaf, key, what in ledger.uneven(against=header is not None):
        wrong[what] += 1
        if not args.quiet:
            _say_row(command, f"{scale.leaves[leaf].schema}.{scale.leaves[leaf].table}", key, what)
    sums = ledger.sums(against=header is not None)
    code = exits.FAILED if wrong else exits.OK
    if not args.quiet:
        _say_sum(command, database, table, scale, sums, wrong, header, code)
    if scale.undecided:
        log.warning("balance.undecided", f"{scale.undecided} batches have no commit record and are not counted", hint="aa-recover decides them")
    if wrong:
        log.error("balance.uneven", f"{database.name} {table.label}: " + ", ".join(f"{wrong[each]} rows {each}" for each in WRONGS if wrong[each]),
                  hint="the rows are named on standard output", code=code, **{each.replace(" ", "_"): wrong[each] for each in WRONGS})
    if args.make_baseline:
        _make(args.make_baseline, database, scale, ledger, wrong)
    return code


def _make(path: Path, database: Database, scale: Scale, ledger: RowLedger, wrong: Counter[str]) -> None:
    if wrong:
        raise Mismatch("rows are in two places already, so no baseline was written", hint="settle them first")
    header = {"format": "aa-baseline", "version": 1, "database": database.name, "made_at": now(), "archiver_version": __version__,
              "tables": [leaf.as_json() for leaf in scale.leaves]}
    rows = baseline.write(path, header, ((number, ledger.lines(number)) for number in range(len(scale.leaves))))
    log.info("balance.baseline", f"{rows} rows in '{path}'", rows=rows)


def _say_row(command: Command, table: str, key: bytes, what: str) -> None:
    if command.as_text:
        command.sink.write(f"{what}: {table} ".encode() + key + b"\n")
    else:  # the key as it stands: no number of it goes through Python
        command.sink.write(b'{"table":%s,"key":[%s],"row":"%s"}\n' % (json.dumps(table, ensure_ascii=False).encode(), key, what.encode()))


def _say_sum(command: Command, database: Database, table: Table, scale: Scale, sums: Sums, wrong: Counter[str],
             header: Optional[dict[str, Any]], code: int) -> None:
    if not command.as_text:
        command.sink.emit({
            "format": "aa-balance", "version": 1, "archiver_version": __version__, "database": database.name, "schema": table.schema,
            "table": table.name, "exit": code, "in_table": sums.in_table, "archived": sums.archived, "undecided": scale.undecided,
            "wrong": {each.replace(" ", "_"): wrong[each] for each in WRONGS},
            "baseline": None if header is None else {"made_at": header["made_at"], "rows": sums.before, "new": sums.new,
                                                     "sha256": sums.before_sha256, "now_sha256": sums.now_sha256}})
        return
    told = [f"{database.name} {table.label}: {sums.in_table:,} rows in the table + {sums.archived:,} in the archive = "
            f"{sums.in_table + sums.archived:,}"]
    if header is not None:
        told.append(f"baseline of {header['made_at']}: {sums.before:,} rows; {sums.new:,} are new since; digest {_short(sums.before_sha256)}, "
                    f"now {_short(sums.now_sha256)}: {'EQUAL' if not wrong else 'NOT EQUAL'}")
    told.append(", ".join(f"{wrong[each]:,} {each}" for each in WRONGS if wrong[each]) or "each row is in one place")
    command.sink.write("".join(f"{line}\n" for line in told).encode())


def _short(digest: Optional[str]) -> str:
    return "unknown" if digest is None else f"{digest[:8]}...{digest[-8:]}"
