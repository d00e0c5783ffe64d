"""A table archived by hand and restored by aa-restore, with the server as the judge of both.

    scene = Restored(db, bucket, config_file(db, bucket)); scene.archive()
    report = scene.restore("--restore-all", "--table", "audit_logs", "--into", "again", "--create-table")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from audit_archiver.formats import schema
from tests.ground.by_hand import ByHand
from tests.ground.run import Result, run_stage


class Restored:
    """One configuration: what is archived with it, and what comes back."""

    def __init__(self, db: Any, bucket: Any, path: Path) -> None:
        self.db, self.bucket, self.path = db, bucket, path
        self.hand = ByHand(db, path)

    def archive(self, *plan: str) -> list[dict[str, Any]]:
        """Archive what is due; the commit records' lines."""
        lines = self.hand.export(*plan)
        deleted = self.hand.delete(lines)
        assert deleted.rc == 0, deleted.err
        return [json.loads(line) for line in self.hand.must("aa-record", stdin=deleted.out).out.split(b"\n") if line]

    def run(self, *argv: Any) -> Result:
        """aa-restore in process."""
        return run_stage("aa-restore", ["-c", self.path, "--output", "json", *argv])

    def restore(self, *argv: Any, code: int = 0) -> dict[str, Any]:
        """aa-restore of one table, which ends with `code`; its report."""
        result = self.run(*argv)
        assert result.rc == code, f"{result.rc}: {result.err}"
        report, = result.lines
        schema.validate("restore", report, "the report")
        assert report["exit"] == code
        return dict(report)

    def listed(self, *argv: Any, code: int = 0) -> list[dict[str, Any]]:
        """aa-ls, which ends with `code`; its lines."""
        result = run_stage("aa-ls", ["-c", self.path, "--output", "json", *argv])
        assert result.rc == code, result.err
        for line in result.lines:
            schema.validate("archived", line, "the line")
        return result.lines
