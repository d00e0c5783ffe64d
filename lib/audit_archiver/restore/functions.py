"""What a person wants done with rows that do not fit as they are: SQL expressions in a JSON file (`--functions`).

    {"transform": {"full_name": "a.first_name || ' ' || a.last_name"},
     "merge":     {"seen": "greatest(t.seen, v.seen)"}}

The server evaluates them, set by set. In `transform` a is the row as it was archived; in `merge` t is the row in the table and
v the archived one, in the table's types. Functions of your own are called with their schema: search_path is pg_catalog.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Mapping

from audit_archiver import lines
from audit_archiver.exits import ConfigError, InputError

HINT = "see man aa-restore, FUNCTIONS"


@dataclass(frozen=True)
class Functions:
    """Expressions by column of the table."""

    transform: Mapping[str, str] = field(default_factory=dict)
    merge: Mapping[str, str] = field(default_factory=dict)


def read(path: str) -> Functions:
    """The file's expressions. Raises ConfigError if it cannot be read or holds anything else."""
    try:
        with open(path, "rb") as file:
            value = lines.parse(file.read(), f"'{path}'")
    except OSError as error:
        raise ConfigError(f"cannot read '{path}': {error.strerror}") from None
    except InputError as error:
        raise ConfigError(error.msg, hint=HINT) from None
    if not isinstance(value, dict) or set(value) - {"transform", "merge"} or not all(map(_expressions, value.values())):
        raise ConfigError(f"'{path}' holds other things than expressions under 'transform' and 'merge'", hint=HINT)
    for column, expression in (pair for part in value.values() for pair in part.items()):
        if ";" in expression or "--" in expression or "\0" in expression:
            raise ConfigError(f"the expression for column '{column}' in '{path}' holds ';', '--' or a NUL, which no expression needs",
                              hint="it is one SQL expression and no statement; write chr(59) for a semicolon in a text")
    return Functions(value.get("transform", {}), value.get("merge", {}))


def _expressions(part: Any) -> bool:
    return isinstance(part, dict) and all(isinstance(each, str) and each.strip() for each in part.values())
