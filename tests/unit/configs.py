"""Configurations in tests: a sound one to vary, and what loading them says."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Mapping, Optional

import pytest

from audit_archiver import config, exits

SOUND = """\
s3:
  bucket: audit-archives
databases:
  - name: prod
    host: db1.example.com
    tables:
      - name: audit_logs
        timestamp_column: created_at
        primary_key: id
"""


def load(directory: Path, text: str = SOUND, env: Optional[Mapping[str, str]] = None) -> config.Config:
    """Write `text` as prod.yaml into `directory`, and load it from there under its short name."""
    write(directory, text)
    return config.load("prod.yaml", env or {}, cwd=str(directory))


def write(directory: Path, text: str, name: str = "prod.yaml", mode: int = 0o600) -> Path:
    """Write a file that only its owner can read."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=mode)
    path.chmod(mode)
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def refused(directory: Path, text: str, env: Optional[Mapping[str, str]] = None) -> list[str]:
    """What loading `text` says: one line per error, as `file:line: message. hint`."""
    with pytest.raises(exits.ConfigError) as caught:
        load(directory, text, env)
    assert caught.value.code == 3
    return [str(part) for part in getattr(caught.value, "parts", (caught.value,))]


def with_lines(*lines: str) -> str:
    """SOUND with more lines at its end."""
    return SOUND + "".join(line + "\n" for line in lines)


def number_of(text: str, wanted: str) -> int:
    """The number of the first line that holds `wanted`."""
    return next(number for number, line in enumerate(textwrap.dedent(text).split("\n"), 1) if wanted in line)
