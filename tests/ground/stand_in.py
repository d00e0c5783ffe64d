"""Commands for pipes under a holder in tests: `python stand_in.py WHAT [ARG]...` with WHAT one of

    vouch                 what aa-upload and aa-verify would add to each line, without a store
    say STAGE CODE        hello as STAGE, then bye with CODE; CODE `nothing`: disappear without a word
    wait FILE             pass the input on once FILE exists
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from audit_archiver import lines  # noqa: E402
from audit_archiver.exits import Failed  # noqa: E402
from audit_archiver.holder.client import Client  # noqa: E402
from tests.ground.held import vouched  # noqa: E402
from tests.ground.wait import until  # noqa: E402


def main(what: str, *args: str) -> None:
    """Do it."""
    if what == "vouch":
        for text in sys.stdin.buffer:
            sys.stdout.buffer.write(lines.dump(vouched(json.loads(text))))
            sys.stdout.buffer.flush()
    elif what == "say":
        client = Client(os.environ["AA_TXN"], args[0])
        if args[1] != "nothing":
            client.bye(int(args[1]), Failed(f"{args[0]} was told to fail"))
    elif what == "wait":
        for text in sys.stdin.buffer:
            until(Path(args[0]).exists, f"'{args[0]}' is there")
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
    else:
        raise SystemExit(f"stand_in.py knows no '{what}'")


if __name__ == "__main__":
    main(*sys.argv[1:])
