"""Read rows streams and stage each batch as three files: gzip'd JSON Lines, metadata and key list.

Reads rows streams (man 5 aa-rows); writes a batch line per batch (man 5 aa-batch); touches the staging
directory only. Every row line gets `_archived_at`, `_batch_id`, `_source_database` and `_source_table` at its
end. A stream that ends without its end frame, or whose count or digest differs, leaves nothing behind. Run
again on the same stream it makes the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from typing import Any, BinaryIO, Optional, Sequence

from audit_archiver import cli, config, exits, lines, log
from audit_archiver.cli import Command
from audit_archiver.exits import ConfigError, InputError, Mismatch
from audit_archiver.formats import batch as batches
from audit_archiver.formats import frames, keys, members, metadata, names
from audit_archiver.formats.find import Finder
from audit_archiver.formats.rows import Appender, added_fields
from audit_archiver.points import point

NAME = "aa-serialize"


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command."""
    return cli.run(NAME, build_parser, run, argv, stage=True)


def build_parser() -> cli.Parser:
    """The options."""
    parser = cli.parser(NAME, __doc__, reads="rows streams")
    parser.add_argument("--staging", metavar="DIR", help="staging directory (default: $AA_STAGING, staging_dir of the configuration, "
                        "$STATE_DIRECTORY, /var/lib/audit-archiver, $XDG_STATE_HOME/audit-archiver)")
    parser.add_argument("--compression-level", metavar="1-9", type=int, choices=range(1, 10),
                        help="wished level on gzip's scale (default: s3.compression_level of the configuration, 6)")
    return parser


def run(command: Command) -> int:
    """Stage every batch of the input."""
    settings = config.load(command.args.config, command.env)
    log.follow(settings.observability)
    root = str(config.staging_root(settings, command.args.staging, command.env))
    level = command.args.compression_level or settings.s3.compression_level
    source = command.source()
    while (line := source.line()) is not None:
        frame = frames.parse(line, frames.OPEN)
        command.sink.emit(stage_batch(source, frame, root, settings.s3.bucket, settings.s3.prefix, level))
    return exits.OK


def stage_batch(source: lines.Source, frame: dict[str, Any], root: str, bucket: str, prefix: str, level: int) -> dict[str, Any]:
    """Stage the batch whose opening frame was just read and return its line.

    Raises InputError (no row, no end frame, keys not in front) or Mismatch (count or digest differ); then the
    batch's directory is removed again.
    """
    batch = frame["batch"]
    if batch["id"] != batches.identity(batch):
        raise InputError(f"the id of {batches.name(batch)} does not belong to its frame")
    started = time.monotonic()
    directory = names.staging_dir(root, batch)
    stem = names.stem(prefix, batch["database"], batch["schema"], batch["table"], batch["archived_at"], batch["number"])
    _make(directory)
    try:
        line = _stage(source, frame, directory, stem, bucket, level)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    data = line["serialized"]["data"]
    log.info("batch.serialized", f"{batches.name(batch)}: {batch['rows']} rows, {data['bytes']} bytes as {data['gz_bytes']}",
             batch=batch["id"], rows=batch["rows"], bytes=data["bytes"], gz_bytes=data["gz_bytes"],
             seconds=round(time.monotonic() - started, 3))
    return line


def _stage(source: lines.Source, frame: dict[str, Any], directory: str, stem: str, bucket: str, level: int) -> dict[str, Any]:
    batch = frame["batch"]
    base = os.path.join(directory, os.path.basename(stem))
    with open(base + names.DATA + ".tmp", "wb", buffering=0) as out:
        finder = Finder(batch["key"], frame["table"].get("find", ()), frame["table"]["columns"])
        writer, rows_sha256, key_texts = _write_rows(source, batch, finder, out, level)
    end = frames.parse(_line(source), frames.END)
    digest = keys.Digest()
    digest.update(key_texts)
    _compare(batch, end, writer.rows, rows_sha256, digest.hexdigest())
    os.rename(base + names.DATA + ".tmp", base + names.DATA)
    point("serialize.data.written")
    serialized: dict[str, Any] = {"dir": directory, "stem": stem, "rows": writer.rows, "rows_sha256": rows_sha256, "data": writer.summary()}
    described = metadata.dump(metadata.build(frame, serialized, finder.found(), bucket, level))
    serialized["metadata_sha256"] = _put(base + names.METADATA, described)
    serialized["manifest_sha256"] = _put(base + names.KEYS, metadata.key_list(batch, key_texts))
    line = batches.new(batch, serialized)
    _put(os.path.join(directory, "batch.json"), lines.dump(line))
    point("serialize.staged")
    return line


def _write_rows(source: lines.Source, batch: dict[str, Any], finder: Finder, out: BinaryIO,
                level: int) -> tuple[members.Writer, str, list[bytes]]:
    """The batch's rows into gzip members; chunk by chunk, no row is handled by itself in Python."""
    writer = members.Writer(out, level)
    matcher, key_columns = keys.pattern(finder.columns, bodies=True), len(batch["key"])
    appender = Appender(added_fields(batch))
    digest = hashlib.sha256()
    key_texts: list[bytes] = []
    left = batch["rows"]
    held = bytearray()  # grown in place: of a large row there shall not be one copy more
    while left:
        data = source.chunk()
        if not data:
            raise InputError(f"{batches.name(batch)}: the rows end without their end frame",
                             hint="the command before was cut off; nothing was staged")
        cut = data.rfind(b"\n") + 1
        if not cut:
            held += data
            continue
        chunk: Any = held
        if len(held) < lines.CHUNK_BYTES:
            chunk = b"".join((held, memoryview(data)[:cut]))
        else:
            held += memoryview(data)[:cut]
        rest = data[cut:]
        try:
            bodies, *values = keys.values(chunk, matcher)
            rows = len(bodies)
        except InputError:
            rows = chunk.count(b"\n")
            if rows <= left:
                raise
        if rows > left:  # the end frame follows, and maybe more
            end = members.after_line(chunk, 0, left)
            rest, chunk, rows = bytes(chunk[end:]) + rest, chunk[:end], left
            bodies, *values = keys.values(chunk, matcher)
        digest.update(chunk)
        held = bytearray(rest)
        key_texts += keys.joined(values[:key_columns])
        finder.add(values)
        chunk = appender.extend(bodies)
        del bodies, values  # each as large as the rows
        writer.write(chunk, rows)
        left -= rows
    source.push_back(rest)
    writer.close()
    return writer, digest.hexdigest(), key_texts


def _compare(batch: dict[str, Any], end: dict[str, Any], rows: int, rows_sha256: str, keys_sha256: str) -> None:
    """What arrived must be what PostgreSQL counted and digested (REQ-VER-002, 004, 005)."""
    title = batches.name(batch)
    if end["id"] != batch["id"]:
        raise Mismatch(f"{title}: the end frame belongs to another batch")
    if not end["rows"] == rows == batch["rows"]:
        raise Mismatch(f"{title}: {batch['rows']} rows were locked, {end['rows']} copied and {rows} arrived")
    if end["rows_sha256"] != rows_sha256:
        raise Mismatch(f"{title}: the rows that arrived are not the rows that were copied")
    if batch["keys_sha256"] != keys_sha256:
        raise Mismatch(f"{title}: the keys in the rows are not the keys that were locked")


def _line(source: lines.Source) -> bytes:
    line = source.line()
    if line is None:
        raise InputError("the rows end without their end frame", hint="the command before was cut off; nothing was staged")
    return line


def _make(directory: str) -> None:
    """An empty 0700 directory; what an earlier, unfinished attempt left under this name is forgotten."""
    try:
        if os.path.isdir(directory):
            shutil.rmtree(directory)
        os.makedirs(directory, mode=0o700)
    except OSError as error:
        if error.errno in cli.RESOURCE_ERRNOS:
            raise  # another directory is not what helps
        raise ConfigError(f"cannot make the staging directory '{directory}': {error.strerror}",
                          hint="choose a writable one with --staging, AA_STAGING or staging_dir") from None


def _put(path: str, content: bytes) -> str:
    """Write a small file under a temporary name and rename it; staging is never the truth, so no fsync."""
    with open(path + ".tmp", "wb") as out:
        out.write(content)
    os.rename(path + ".tmp", path)
    return hashlib.sha256(content).hexdigest()
