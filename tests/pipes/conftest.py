"""What the tests of the transaction holder share: a table, its configuration, holders that are closed, a pipe."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from tests.conftest import ConfigFile, TestDatabase
from tests.ground import tables
from tests.ground.held import Holder, NoServer

Make = Callable[..., Holder]


@pytest.fixture()
def path(request: pytest.FixtureRequest, db: TestDatabase, config_file: ConfigFile) -> Path:
    """A configuration for public.audit_logs: as many rows as the test's module says in ROWS, half of them before 2025."""
    tables.create(db.connection, rows=request.module.ROWS, first="2024-01-01", last="2025-12-31")
    return config_file(db, NoServer)  # type: ignore[arg-type]


@pytest.fixture()
def holding(path: Path) -> Iterator[Make]:
    """Holders for this test, closed at its end; `path` names another configuration."""
    with contextlib.ExitStack() as stack:
        def make(path: Path = path, **more: Any) -> Holder:
            return stack.enter_context(Holder(path, **more))
        yield make


@pytest.fixture()
def pipe(holding: Make) -> Iterator[tuple[int, int]]:
    """A pipe, closed before the holders are: they wait for a copy that still writes into it."""
    ends = os.pipe()
    yield ends
    for each in ends:
        with contextlib.suppress(OSError):
            os.close(each)


def rows_left(db: TestDatabase) -> int:
    """Rows in the table."""
    return int(db.scalar("SELECT count(*) FROM audit_logs"))
