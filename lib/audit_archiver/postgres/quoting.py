"""The one place where names and texts become SQL: COPY and DDL take no parameters (SEC-010)."""

from __future__ import annotations


def ident(name: str) -> str:
    """A quoted identifier; always quoted, so that case, keywords and odd characters stay what they are."""
    _check(name)
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A string constant that means the same under either setting of standard_conforming_strings."""
    _check(text)
    quoted = text.replace("'", "''")
    if "\\" in text:
        return " E'" + quoted.replace("\\", "\\\\") + "'"
    return f"'{quoted}'"


def _check(text: str) -> None:
    if "\0" in text:
        raise ValueError("PostgreSQL has no names or texts with NUL")
