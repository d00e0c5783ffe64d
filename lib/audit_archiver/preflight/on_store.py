"""Checks of the bucket."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Iterator, Union

from audit_archiver.objectstore.client import BucketCheck
from audit_archiver.preflight.check import Check, Good, Said, declare
from audit_archiver.preflight.findings import FAIL, WARN

SKEW_S = 60
Answers = Iterator[Union[Said, Good]]

CHECKS: list[Check] = []
check = functools.partial(declare, CHECKS)


@dataclass(frozen=True)
class Look:
    """The bucket after it was used: what Store.check_bucket found."""

    found: BucketCheck
    bucket: str


@check("s3.bucket", FAIL, "the bucket is there, and put, get, list and delete work under the prefix")
def bucket(look: Look) -> Answers:
    """REQ-VAL-003, REQ-VAL-010, REQ-S3-003, REQ-S3-006; every error of Store.check_bucket is a failure of this check."""
    yield Good("put, get, delete, list")


@check("s3.create_only", WARN, "the store refuses to overwrite",
       "each name is looked up before it is written; give no other program this prefix")
def create_only(look: Look) -> Answers:
    """Conditional writes are probed and never assumed."""
    if look.found.capabilities.create_only:
        yield Good("If-None-Match honoured")
    else:
        yield Said("the store does not honour If-None-Match")


@check("s3.clock", WARN, "the store's clock and ours agree", "set the clock of this machine (NTP)")
def clock(look: Look) -> Answers:
    """S3 refuses requests that are 15 minutes off."""
    skew = look.found.clock_skew_s
    if skew is None:
        return
    yield Said(f"the store's clock is {skew:.0f} s off") if skew > SKEW_S else Good(f"clock {skew:.1f} s off")


@check("s3.versions", WARN, "the bucket keeps versions, where the store has any")
def versions(look: Look) -> Answers:
    """REQ-S3-005. Nothing here overwrites or deletes what is archived, but somebody else might."""
    if look.found.versioned:
        yield Good("versioned")
    elif look.found.versioned is not None:
        yield Said("the bucket keeps no versions, or the store has none: what anybody deletes there is gone",
                   f"aws s3api put-bucket-versioning --bucket {look.bucket} --versioning-configuration Status=Enabled")
