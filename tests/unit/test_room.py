"""Free space on the disks that batches pass through: when it is looked at, and what is said where it is short."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from audit_archiver import exits
from audit_archiver.driver import room


@pytest.mark.req("REQ-RES-007", "REQ-RES-008")
def test_it_looks_once_a_second_until_one_of_the_disks_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, free, looked = 0.0, {tmp_path: 5.0, Path("/"): 5.0}, []

    def disk_usage(path: Path) -> SimpleNamespace:
        looked.append(path)
        return SimpleNamespace(free=free[path] * 1e9)

    monkeypatch.setattr(room.shutil, "disk_usage", disk_usage)
    watched = room.Room([tmp_path / "staging", Path("/no/such/fallback")], 5, clock=lambda: now)
    assert watched.short() is None and looked == [tmp_path, Path("/")], "of a directory that is not there yet the next one above"
    free[Path("/")] = 4.99
    now = 0.9
    assert watched.short() is None
    now = 1.0
    short = watched.short()
    assert short is not None and short.code == exits.RESOURCE and not short.retry
    assert "'/no/such/fallback' has 4.99 GB free and min_free_disk_gb is 5" in str(short) and "local_fallback_dir" in str(short)
    free[Path("/")], now = 100.0, 10.0
    assert watched.short() is short, "what has been stopped is not begun again"


def test_who_wants_no_room_is_never_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert room.Room([tmp_path], 0).short() is None
    assert room.Room([tmp_path], 0.001).short() is not None
