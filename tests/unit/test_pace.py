"""How fast the store is asked, and when not at all: token buckets and the circuit breaker, on a clock of the test's."""

from __future__ import annotations

import pytest

from audit_archiver.config.model import S3
from audit_archiver.objectstore.breaker import Breaker
from audit_archiver.objectstore.pace import LEAST_PER_S, READS_PER_S, WRITES_PER_S, Bucket, Pace


class Clock:
    """A time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def requests_in(seconds: float, pace: Pace, clock: Clock, operation: str) -> int:
    """How many requests a caller that waits as it is told gets through."""
    end, count = clock.now + seconds, 0
    while True:
        clock.now += pace.request(operation)
        if clock.now > end:
            return count
        count += 1


@pytest.mark.req("REQ-NET-011", "REQ-NET-012")
def test_a_bucket_gives_a_second_s_worth_at_once_and_then_its_rate() -> None:
    clock = Clock()
    bucket = Bucket(10, clock)
    assert [bucket.take() for _ in range(10)] == [0.0] * 10
    assert bucket.take() == pytest.approx(0.1)
    assert bucket.take(5) == pytest.approx(0.6)
    clock.now += 100
    assert [bucket.take() for _ in range(10)] == [0.0] * 10, "what was not used is not saved beyond a second"
    assert bucket.take() > 0


@pytest.mark.req("REQ-NET-010", "REQ-NET-011")
@pytest.mark.parametrize(("operation", "per_s"), [("put_object", WRITES_PER_S), ("delete_object", WRITES_PER_S), ("upload_part", WRITES_PER_S),
                                                  ("get_object", READS_PER_S), ("head_object", READS_PER_S), ("list_parts", READS_PER_S)])
def test_without_a_setting_the_limits_of_s3_are_kept(operation: str, per_s: float) -> None:
    clock = Clock()
    assert requests_in(3, Pace(None, None, clock), clock, operation) == pytest.approx(per_s * 4, rel=0.01)  # one second's worth in advance


@pytest.mark.req("REQ-NET-010", "REQ-NET-012")
def test_a_configured_rate_holds_for_reads_and_writes_together() -> None:
    clock = Clock()
    pace = Pace(50, None, clock)
    waited = [pace.request(operation) for _ in range(30) for operation in ("put_object", "get_object")]
    assert waited[:50] == [0.0] * 50 and all(each > 0 for each in waited[50:])


def test_bytes_wait_for_their_rate_also_where_one_part_is_more_than_a_second_s_worth() -> None:
    clock = Clock()
    pace = Pace(None, 1_000_000, clock)
    assert pace.request("put_object", 5_000_000) == pytest.approx(4)
    assert pace.bytes(1_000_000) == pytest.approx(5)
    assert Pace(None, None, clock).bytes(10**12) == 0


@pytest.mark.req("REQ-NET-012", "REQ-NET-013")
def test_a_store_that_is_busy_gets_half_of_what_it_got_and_more_with_every_answer() -> None:
    clock = Clock()
    pace = Pace(None, None, clock)
    for _ in range(200):  # 100 requests a second for two seconds
        pace.request("put_object")
        clock.now += 0.01
    slower = pace.refused("put_object")
    assert 30 < slower < 60
    assert pace.refused("put_object") == slower, "what was under way when the first refusal came is no further one"
    assert requests_in(2, pace, clock, "put_object") <= 3 * slower
    assert pace.request("get_object") == 0.0, "reads were not refused"
    clock.now += 2
    assert pace.refused("put_object") < slower
    for _ in range(100):
        pace.answered("put_object")
    clock.now += 1
    assert requests_in(3, pace, clock, "put_object") == pytest.approx(WRITES_PER_S * 4, rel=0.01)


def test_a_store_that_is_always_busy_is_still_asked_once_a_second() -> None:
    clock = Clock()
    pace = Pace(None, None, clock)
    for _ in range(50):
        clock.now += 2
        assert pace.refused("put_object") >= LEAST_PER_S
    assert pace.request("put_object") <= 1


def test_the_breaker_opens_after_failures_in_a_row_and_lets_one_through_after_a_while() -> None:
    clock = Clock()
    breaker = Breaker(3, 60, clock)
    for _ in range(2):
        breaker.failed()
    breaker.answered()  # not in a row
    for _ in range(2):
        assert breaker.admits()
        breaker.failed()
    assert breaker.admits()
    breaker.failed()
    assert not breaker.admits()
    clock.now += 59
    assert not breaker.admits()
    clock.now += 1
    assert (breaker.admits(), breaker.admits()) == (True, False), "half open: one is tried"
    breaker.failed()
    clock.now += 59
    assert not breaker.admits()
    clock.now += 1
    assert breaker.admits()
    breaker.answered()
    assert breaker.admits() and breaker.given_up == 0


def test_a_breaker_of_zero_never_opens() -> None:
    breaker = Breaker(0, 60, Clock())
    for _ in range(10):
        breaker.failed()
    assert breaker.admits()


@pytest.mark.req("REQ-ERR-005", "REQ-S3-023")
def test_pauses_are_powers_of_two_with_a_bound_and_never_twice_the_same() -> None:
    s3 = S3(bucket="b")
    for tried, longest in enumerate([2, 4, 8, 16, 30, 30], 1):
        found = [s3.pause_s(tried) for _ in range(50)]
        assert all(0.75 * longest <= each <= longest for each in found) and len(set(found)) > 40
