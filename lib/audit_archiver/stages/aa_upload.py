"""Put each batch's data, metadata and key list into the bucket, under names that nobody else has.

Reads batch lines of aa-serialize and their staging directories; writes the lines with `uploaded`. Objects are
create-only: a name that is taken by the same bytes is ours, so a rerun changes nothing; one that is taken by other
bytes ends the stage, and the batch needs another number. The key list goes last: where it is, the others are.
Before the first object of a run `{run}-start.json` is written, and each table's `_owner.json` is checked.
Touches no database. A batch that cannot be sent moves to s3.local_fallback_dir, and `aa-upload` sends it from there.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any, Optional, Sequence

from audit_archiver import __version__, cli, config, exits, lines, log, points
from audit_archiver.catalogue import owner
from audit_archiver.config.model import S3
from audit_archiver.exits import ConfigError, Failed, InputError, NetworkError
from audit_archiver.formats import batch as batches
from audit_archiver.formats import names, schema
from audit_archiver.objectstore.beside import Beside
from audit_archiver.objectstore.client import Store, open_store
from audit_archiver.objectstore.content import Put
from audit_archiver.objectstore.errors import Expired, NameTaken
from audit_archiver.objectstore.multipart import STATE

GZIP, JSON = "application/gzip", "application/json"


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run aa-upload."""
    return cli.run("aa-upload", build_parser, run, argv, stage=True)


def build_parser() -> cli.Parser:
    """The options of aa-upload."""
    return cli.parser("aa-upload", __doc__, reads="batch lines of aa-serialize")


def run(command: cli.Command) -> int:
    """Upload every batch that is read, one after another, and pass its line on."""
    source = command.source()
    settings = config.load(command.args.config, command.env)
    log.follow(settings.observability)
    store = open_store(settings, watch=command.sink.stream)
    upload = Upload(store, settings.s3)
    for text in source:
        line = batches.parse(text, needs=("serialized",), lacks=("uploaded",))
        log.bind(run_id=line["batch"]["run"])
        try:
            line["uploaded"] = upload.batch(line)
        except NameTaken as error:
            error.retry = command.holder is not None  # the holder begins the batch again under the next number
            raise
        except (NetworkError, Expired) as error:
            if settings.s3.local_fallback_dir is not None:
                error.hint = set_aside(line, settings.s3.local_fallback_dir)
            raise
        command.sink.emit(line)
    return exits.OK


class Upload:
    """Sends batches of any number of runs and tables to one bucket."""

    def __init__(self, store: Store, s3: S3) -> None:
        self._store, self._s3 = store, s3
        self._begun: set[tuple[str, str]] = set()
        self._owned: set[tuple[str, str, str]] = set()

    def batch(self, line: dict[str, Any]) -> dict[str, Any]:
        """Send one batch and return its `uploaded` section.

        Raises InputError or ConfigError if the line does not belong to this configuration, Mismatch if the staged
        bytes are not the line's, NameTaken, and NetworkError when the retries are spent.
        """
        batch, serialized, store = line["batch"], line["serialized"], self._store
        directory = self._directory(line)
        data, metadata, keys = (directory / os.path.basename(key) for key in batches.keys_of(line))
        described = _staged(metadata)
        self._check(line, described)
        self._own(batch)
        self._begin(batch)
        points.point("upload.data.before")
        key, metadata_key, keys_key = batches.keys_of(line)
        _staged_file(keys)
        began = time.monotonic()
        second = Beside(lambda: store.put_new(metadata_key, described, content_type=JSON,
                                              sha256=serialized["metadata_sha256"]))
        first = store.put_new(key, _staged_file(data), content_type=GZIP, bulk=True,
                              sha256=serialized["data"]["gz_sha256"], state=directory / STATE)
        points.point("upload.data.put")
        puts: list[Put] = [first, second.result()]
        points.point("upload.metadata.put")
        puts.append(store.put_new(keys_key, keys, content_type=JSON, bulk=True, sha256=serialized["manifest_sha256"]))
        points.point("upload.manifest.put")
        log.info("upload.done", f"{batches.name(batch)}: {serialized['data']['gz_bytes']} bytes to '{store.url(key)}'",
                 key=key, bytes=serialized["data"]["gz_bytes"], seconds=round(time.monotonic() - began, 3))
        return {"bucket": store.bucket, "etags": [put.etag for put in puts], "versions": [put.version for put in puts],
                "create_only": all(store.guards(size) for size in (serialized["data"]["gz_bytes"], len(described)))}

    def _directory(self, line: dict[str, Any]) -> Path:
        if "dir" not in line["serialized"]:
            raise InputError(f"{batches.name(line['batch'])} has no staging directory: it was rebuilt from the bucket",
                             hint="pass it to aa-verify")
        return Path(line["serialized"]["dir"])

    def _check(self, line: dict[str, Any], described: bytes) -> None:
        """Refuse a line made under another bucket or prefix, and metadata that describe another batch."""
        batch, stem = line["batch"], line["serialized"]["stem"]
        ours = names.stem(self._s3.prefix, batch["database"], batch["schema"], batch["table"], batch["archived_at"],
                          batch["number"])
        value = lines.parse(described, f"the metadata of {batches.name(batch)}")
        path = value.get("deletion_manifest_path") if isinstance(value, dict) else None
        expected = f"s3://{self._s3.bucket}/{ours}{names.KEYS}"
        if stem != ours or path != expected:
            raise ConfigError(f"{batches.name(batch)} was serialized for '{path}', the configuration says '{expected}'",
                              hint="use the configuration it was serialized with, or select again", at=self._s3.at)
        if value.get("batch") != batch:
            raise InputError(f"the staged metadata of {batches.name(batch)} describe another batch", hint="select again")

    def _begin(self, batch: dict[str, Any]) -> None:
        """Say that a run writes about a database, once: recovery finds what it left by this (contracts.md 5).

        Raises ConfigError for a run that has ended: nobody would find what it leaves now.
        """
        run, database = batch["run"], batch["database"]
        if (run, database) in self._begun:
            return
        key = names.run_start_key(self._s3.prefix, database, run)
        value = {"format": "aa-run", "version": 1, "run": run, "database": database, "event": "start",
                 "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "by": "aa-upload",
                 "archiver_version": __version__, "held": batch["txn"] is not None,
                 "system": batch["server"]["system"], "database_oid": batch["server"]["database_oid"]}
        try:
            self._store.put_record(key, lines.dump(value))
        except NameTaken:
            found = lines.parse(self._store.get_bytes(key), f"'{self._store.url(key)}'")
            schema.validate("run", found, f"'{self._store.url(key)}'")
            if (found["run"], found["database"]) != (run, database):
                raise
        if self._store.head(names.run_end_key(self._s3.prefix, database, run)) is not None:
            raise ConfigError(f"run '{run}' has ended, so nothing more can be sent for it", hint="plan and select again")
        points.point("upload.start.put")
        self._begun.add((run, database))

    def _own(self, batch: dict[str, Any]) -> None:
        """Make the table's prefix ours, once, or refuse it as another server's or table's (S12)."""
        table = batch["database"], batch["schema"], batch["table"]
        if table not in self._owned:
            owner.claim(self._store, batch, self._s3.at)
            self._owned.add(table)


def set_aside(line: dict[str, Any], fallback: Path) -> str:
    """Move a batch's staging directory to the same tree under `fallback` (REQ-NET-008); a hint that says where it is.

    Its batch.json then names the new place, so that `aa-upload` sends it from there (REQ-NET-009). A directory that
    cannot be moved stays where it is: what stopped the upload must be said, not this.
    """
    import shutil

    old, new = line["serialized"]["dir"], os.path.abspath(names.staging_dir(str(fallback), line["batch"]))
    try:
        if os.path.abspath(old) != new:
            os.makedirs(os.path.dirname(new), mode=0o700, exist_ok=True)
            if os.path.exists(new):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
            shutil.move(old, new)
        temporary = os.path.join(new, "batch.json.tmp")
        with open(temporary, "wb") as file:
            file.write(lines.dump({**line, "serialized": {**line["serialized"], "dir": new}}))
        os.replace(temporary, os.path.join(new, "batch.json"))
    except OSError as error:
        log.warning("upload.kept", f"cannot keep {batches.name(line['batch'])} in '{new}': {error.strerror or error}", dir=old)
        return f"the batch is still in '{old}'"
    log.warning("upload.kept", f"{batches.name(line['batch'])} was kept in '{new}'", dir=new)
    return (f"the batch waits in '{new}': 'aa-upload {new}/batch.json | aa-verify | aa-delete | aa-record' finishes it, and so does the next "
            "run, which selects its rows anew")


def _staged_file(path: Path) -> Path:
    if not path.is_file():
        raise Failed(f"the staged file '{path}' is missing", hint="select again")
    return path


def _staged(path: Path) -> bytes:
    return _staged_file(path).read_bytes()
