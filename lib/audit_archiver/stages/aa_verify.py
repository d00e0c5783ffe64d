"""Read each uploaded batch back from the bucket and mark it verified if it is what was selected.

Reads batch lines of aa-upload; writes the lines with `verified`. Needs the line and the bucket only, no staging: the
data are unpacked as they arrive, and rows, digests and keys are taken from what came back, never from what was
sent. The key list and the metadata are read back too. Writes nothing to the bucket; a rerun, also over lines that
are verified already, reads again and marks anew. A difference ends the stage with exit 2 and without a line, so
nothing of that batch can be deleted.
"""

from __future__ import annotations

from typing import Optional, Sequence

from audit_archiver import cli, config, exits, log, points
from audit_archiver.catalogue import readback
from audit_archiver.exits import ConfigError
from audit_archiver.formats import batch as batches
from audit_archiver.objectstore.client import open_store


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run aa-verify."""
    return cli.run("aa-verify", build_parser, run, argv, stage=True)


def build_parser() -> cli.Parser:
    """The options of aa-verify."""
    parser = cli.parser("aa-verify", __doc__, reads="batch lines of aa-upload")
    parser.add_argument("--how", choices=("read", "head"),
                        help="read: read everything back and compare (default, s3.verify); head: compare sizes and ETags "
                             "only, which proves nothing about the content")
    return parser


def run(command: cli.Command) -> int:
    """Verify every batch that is read and pass its line on."""
    source = command.source()
    settings = config.load(command.args.config, command.env)
    log.follow(settings.observability)
    how = command.args.how or settings.verify_how
    store = open_store(settings, watch=command.sink.stream)
    if how == "head":
        log.warning("verify.head", "batches are verified by size and ETag only: their content is not read back",
                    hint="use 's3.verify: read' before rows that matter are deleted")
    for text in source:
        line = batches.parse(text, needs=("uploaded",), lacks=("deleted", "committed"))
        batch = line["batch"]
        log.bind(run_id=batch["run"])
        if line["uploaded"]["bucket"] != store.bucket:
            raise ConfigError(f"{batches.name(batch)} lies in bucket '{line['uploaded']['bucket']}', the configuration "
                              f"says '{store.bucket}'", hint="use the configuration it was uploaded with", at=settings.s3.at)
        line["verified"] = readback.look(store, line) if how == "head" else readback.read_back(store, line)
        points.point("verify.done")
        command.sink.emit(line)
    return exits.OK
