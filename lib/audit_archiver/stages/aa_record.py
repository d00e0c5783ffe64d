"""Write the commit record of each committed batch: from then on it is archived.

Reads batch lines with `committed` (of aa-txn, aa-delete or aa-recover); writes the lines with `recorded`. The commit
record `_commit.json` is the line itself, created once. Then the batch's staging directory is removed, and at the end
of the input, or per 1,000 batches, an index segment is written. A rerun over the same lines changes nothing. Where
the store has no conditional writes the data and the key list are looked at again first: a late write of somebody
else's must not be recorded as ours. Touches no database.
"""

from __future__ import annotations

import time
from typing import Any, Optional, Sequence

from audit_archiver import cli, config, exits, log, points
from audit_archiver.catalogue import index
from audit_archiver.catalogue.record import record, remove_staging
from audit_archiver.exits import ConfigError, InputError, Mismatch
from audit_archiver.formats import batch as batches
from audit_archiver.objectstore.client import Store, open_store


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run aa-record."""
    return cli.run("aa-record", build_parser, run, argv, stage=True)


def build_parser() -> cli.Parser:
    """The options of aa-record."""
    return cli.parser("aa-record", __doc__, reads="batch lines of aa-txn, aa-delete or aa-recover")


def run(command: cli.Command) -> int:
    """Record every batch that is read, pass its line on, and write the index at the end."""
    source = command.source()
    settings = config.load(command.args.config, command.env)
    log.follow(settings.observability)
    store = open_store(settings)
    segments = index.Segments(store)
    try:
        for text in source:
            line = batches.parse(text, needs=("committed",), lacks=("recorded",))
            log.bind(run_id=line["batch"]["run"])
            _belongs(line, store, settings.s3.at)
            points.point("record.before")
            record(store, line)
            points.point("record.commit.put")
            segments.add(line)
            remove_staging(line)
            points.point("record.staging.removed")
            line["recorded"] = {"at": _now()}
            command.sink.emit(line)
    except (ConfigError, InputError, Mismatch):
        segments.close()  # what is recorded should be found without a search
        raise
    segments.close()
    points.point("record.index.put")
    return exits.OK


def _now() -> str:
    """RFC 3339 UTC with milliseconds: aa-archive reads out of these times how long recording took."""
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"


def _belongs(line: dict[str, Any], store: Store, at: Optional[str]) -> None:
    if line["uploaded"]["bucket"] != store.bucket:
        raise ConfigError(f"{batches.name(line['batch'])} lies in bucket '{line['uploaded']['bucket']}', the configuration "
                          f"says '{store.bucket}'", at=at,
                          hint="record it with the configuration it was uploaded with: its rows are deleted already")
