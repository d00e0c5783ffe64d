"""Names and texts that became SQL mean what they were, under either setting of standard_conforming_strings."""

from __future__ import annotations

from typing import Callable

import pytest

from audit_archiver.postgres.quoting import ident, literal
from tests.conftest import TestDatabase

ODD = ["", "plain", "it's", "\"", "back\\slash", "\\'; DROP TABLE x; --", "new\nline", "$$", "per%cent", "Grüße 🐘", "E'\\n'", "'\\'", "\\"]


@pytest.mark.parametrize("setting", ["on", "off"])
def test_a_literal_is_the_text_it_was_made_of(db: TestDatabase, setting: str) -> None:
    db.execute(f"SET standard_conforming_strings = {setting}")

    assert [db.scalar("SELECT " + literal(text)) for text in ODD] == ODD
    assert [db.scalar("SELECT 'x'||" + literal(text) + "::text") for text in ODD] == ["x" + text for text in ODD]


def test_an_identifier_is_the_name_it_was_made_of(db: TestDatabase) -> None:
    names = [text for text in [*ODD, "MiXed", "select", "a.b"] if text]

    db.execute("CREATE TABLE odd (" + ", ".join(f"{ident(name)} int" for name in names) + ")")

    assert [name for name, in db.execute("SELECT attname FROM pg_attribute WHERE attrelid = 'odd'::regclass AND attnum > 0 ORDER BY attnum")] == names


@pytest.mark.parametrize("quote", [ident, literal])
def test_a_nul_is_refused(quote: Callable[[str], str]) -> None:
    with pytest.raises(ValueError):
        quote("a\0b")
