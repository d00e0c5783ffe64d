"""The flags of a command that reads objects which may lie in a cold storage class."""

from __future__ import annotations

from typing import Any, Optional

from audit_archiver import cli
from audit_archiver.exits import ConfigError
from audit_archiver.restore import thaw
from audit_archiver.restore.thaw import Thaw


def add(parser: cli.Parser) -> None:
    """--thaw and what belongs to it."""
    parser.add_argument("--thaw", action="store_true",
                        help="ask for objects of the storage classes GLACIER and DEEP_ARCHIVE, which the store charges for; exit 7 with the time "
                             "by which they should be ready")
    parser.add_argument("--wait", action="store_true", help="with --thaw: wait until they are ready, and go on")
    parser.add_argument("--thaw-tier", choices=(thaw.EXPEDITED, thaw.STANDARD, thaw.BULK),
                        help=f"with --thaw: how fast, and how dear (default: {thaw.STANDARD}, 3 to 5 hours for GLACIER and 12 for DEEP_ARCHIVE)")
    parser.add_argument("--thaw-days", metavar="DAYS", type=cli.at_least_one,
                        help=f"with --thaw: for how many days they can be read (default: {thaw.DAYS})")


def chosen(args: Any) -> Optional[Thaw]:
    """What they ask for; None without --thaw. Raises ConfigError for one of the others alone."""
    if args.thaw:
        return Thaw(args.thaw_tier or thaw.STANDARD, args.thaw_days or thaw.DAYS, args.wait)
    for flag, given in (("--wait", args.wait), ("--thaw-tier", args.thaw_tier), ("--thaw-days", args.thaw_days)):
        if given:
            raise ConfigError(f"{flag} belongs to --thaw", hint="add --thaw")
    return None
