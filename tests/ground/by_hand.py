"""Batches exported by hand: real aa-plan, aa-select, aa-serialize, aa-upload and aa-verify, one after another, no holder.

    hand = ByHand(db, config_file(db, bucket))
    lines = hand.export()              # verified batch lines
    result = hand.delete(lines)        # aa-delete's guarded path, in process
"""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

from audit_archiver import config, lines
from audit_archiver.formats import names
from audit_archiver.objectstore.client import Store
from tests.ground.run import Result, run_stage
from tests.ground.wait import until

STAGES = ("aa-select", "aa-serialize", "aa-upload", "aa-verify")


class ByHand:
    """The commands on one configuration, in process."""

    def __init__(self, db: Any, path: Path) -> None:
        self.db, self.path = db, path
        self.settings = config.load(str(path), {})
        self.staging = self.settings.staging_dir
        self.env = {"AA_CONFIG": str(path)}
        self.store = Store(self.settings.s3)
        self._second = 0

    def run(self, name: str, argv: Sequence[str] = (), stdin: bytes = b"", env: Optional[Mapping[str, str]] = None) -> Result:
        """One command."""
        return run_stage(name, argv, stdin, {**self.env, **(env or {})})

    def export(self, *plan: str, upto: str = "aa-verify", run: Optional[str] = None) -> list[dict[str, Any]]:
        """Every batch of a plan as the stages up to `upto` leave it."""
        until(lambda: int(time.time()) != self._second, "a new second has begun: exported by hand, a batch's name is its second and number")
        data = self.must("aa-plan", plan, env={"AA_RUN": run} if run else None).out
        for stage in STAGES[:STAGES.index(upto) + 1]:
            data = self.must(stage, stdin=data).out
        self._second = int(time.time())
        return [json.loads(line) for line in data.split(b"\n") if line]

    def must(self, name: str, argv: Sequence[str] = (), stdin: bytes = b"", env: Optional[Mapping[str, str]] = None) -> Result:
        """One command that must succeed."""
        result = self.run(name, argv, stdin, env)
        assert result.rc == 0, f"{name}: {result.rc}: {result.err}"
        return result

    def delete(self, batch_lines: Sequence[Mapping[str, Any]], *argv: str) -> Result:
        """aa-delete without a holder."""
        return self.run("aa-delete", argv, dump(batch_lines))

    def record(self, batch_lines: Sequence[Mapping[str, Any]]) -> Result:
        """aa-record."""
        return self.must("aa-record", stdin=dump(batch_lines))

    def recover(self, *argv: str) -> Result:
        """aa-recover."""
        return self.run("aa-recover", ["--output", "json", *argv])

    def has(self, line: Mapping[str, Any], suffix: str) -> bool:
        """Whether an object of a batch lies in the bucket."""
        return self.store.head(line["serialized"]["stem"] + suffix) is not None

    def read(self, line: Mapping[str, Any], suffix: str) -> Any:
        """A JSON object of a batch."""
        return json.loads(self.store.get_bytes(line["serialized"]["stem"] + suffix))

    def states(self, line: Mapping[str, Any]) -> list[str]:
        """Which markers a batch has: of commit, abandoned, intent_1."""
        suffixes = {"commit": names.COMMIT, "abandoned": names.ABANDONED, "intent_1": names.intent(1)}
        return [word for word, suffix in suffixes.items() if self.has(line, suffix)]

    def ended(self, run: str) -> bool:
        """Whether a run has ended."""
        return self.store.head(names.run_end_key(self.store.prefix, self.db.name, run)) is not None


def dump(batch_lines: Sequence[Mapping[str, Any]]) -> bytes:
    """Batch lines as a stage reads them."""
    return b"".join(map(lines.dump, batch_lines))


def verified_ago(line: Mapping[str, Any], hours: float) -> dict[str, Any]:
    """The line with a `verified` mark that is so old."""
    at = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(hours=hours)
    return {**line, "verified": {**line["verified"], "at": f"{at:%Y-%m-%dT%H:%M:%SZ}"}}
