"""The job line: what to archive of one table, or why that is refused (contracts.md, 2a)."""

from __future__ import annotations

from typing import Any

from audit_archiver import lines
from audit_archiver.exits import InputError
from audit_archiver.formats import schema

FORMAT = "aa-job"
VERSION = 1


def parse(line: bytes) -> dict[str, Any]:
    """The job in `line`. Raises InputError: not JSON, another format or version, unknown or missing keys."""
    value = lines.parse(line, "the job line")
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise InputError("the line is no job line", hint="aa-plan writes job lines")
    schema.validate("job", value, "the job line")
    return value


def build(**fields: Any) -> dict[str, Any]:
    """A job line of the given fields; checked, so that a plan never hands on what a stage would refuse."""
    value = {"format": FORMAT, "version": VERSION, **fields}
    schema.validate("job", value, "the planned job")
    return value


def name(job: dict[str, Any]) -> str:
    """What messages call a job: public.audit_logs."""
    return f"{job['schema']}.{job['table']}"
