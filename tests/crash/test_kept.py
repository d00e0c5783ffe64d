"""Batches that could not be sent: kept in local_fallback_dir, finished by hand or by the next run, and never in the way for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from audit_archiver import exits
from tests.crash.scene import OLD, YOUNG, Scene, trouble
from tests.crash.test_faults import LONG, Make, faulty, make, through
from tests.ground.faulty_s3 import FaultyS3, answers, drops, error, on

__all__ = ["faulty", "make"]
FINISH = "set -e; for each in $(find {} -name batch.json); do aa-upload $each | aa-verify | aa-delete | aa-record; done"


def kept(scene: Scene) -> list[Path]:
    """The batches in the fallback directory, the oldest first."""
    return sorted(scene.path.parent.glob("fallback/**/batch.json"))


def with_fallback(store: FaultyS3, place: Path, **more: Any) -> dict[str, Any]:
    """A configuration whose batches of all rows that are due go through `store` or stay in a fallback directory."""
    s3 = {**through(store)["s3"], "local_fallback_dir": str(place / "fallback"), "retries": 1, **more.pop("s3", {})}
    return {"s3": s3, "defaults": {"batch_size": OLD}, **more}


@pytest.mark.req("REQ-NET-008", "REQ-NET-009", "REQ-REL-007", "T45")
@pytest.mark.parametrize("mode", ["held"] + ["late"] * LONG)
def test_a_batch_that_a_run_could_not_send_is_finished_by_hand(make: Make, faulty: FaultyS3, tmp_path: Path, mode: str) -> None:
    """GIVEN a store that goes away when the first batch is sent WHEN it is back THEN the kept batch goes all the way, and no row twice."""
    scene = make(**with_fallback(faulty, tmp_path, locking={"mode": mode}))
    faulty.fault = drops(lambda request: "/year=" in request.key)
    failed = scene.go()
    assert (failed.rc, scene.left()) == (exits.NETWORK, OLD + YOUNG), trouble(failed.err)
    first, *others = kept(scene)
    for other in others:  # of the attempts that followed, each with the same rows in other sizes
        other.rename(other.with_suffix(".set-aside"))
    faulty.fault = None
    finished = scene.go(FINISH.format(tmp_path / "fallback"))
    assert finished.rc == 0, trouble(finished.err)
    assert scene.left() == YOUNG and [line["committed"]["by"] for line in scene.archive.commits()] == ["aa-delete"]
    assert not first.parent.exists(), "it is archived"
    assert scene.go().rc == 0
    scene.must_be_whole()


@pytest.mark.req("REQ-NET-008", "REQ-REL-002", "REQ-REL-007", "T57")
def test_a_kept_batch_does_not_hinder_the_next_run_and_is_swept_when_its_run_has_ended(make: Make, faulty: FaultyS3, tmp_path: Path) -> None:
    scene = make(**with_fallback(faulty, tmp_path))
    faulty.fault = answers(on("PUT", ".jsonl.gz"), error(503, "SlowDown"))
    assert scene.go().rc == exits.NETWORK
    assert kept(scene) and scene.left() == OLD + YOUNG
    faulty.fault = None
    assert scene.go().rc == 0
    scene.must_be_whole()
    assert not kept(scene), "the run that kept it has ended, and its rows are archived"
