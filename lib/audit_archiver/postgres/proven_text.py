"""The text of a value of a type that nobody here knows, with the proof that the type reads the same value out of it.

The proof is part of the expression that makes the text: there is no line, on any path, whose text is not exact.
"""

from __future__ import annotations

from audit_archiver.postgres.quoting import literal


def proven(x: str, sql: str) -> str:
    """An expression for the text of `x`, an expression of the type `sql`; NULL for NULL.

    It raises (SQLSTATE class 22) where the type's input function does not give back the same bytes. Texts that are
    equal again prove nothing: a lossy output function writes the same text of two values.
    """
    text = f"concat({x})"  # the output function itself; '::text' would take a cast that somebody made
    back = f"(SELECT _p.v FROM json_to_record(json_build_object('v', {text})) AS _p(v {sql}))"
    said = literal(f"a value of the type {sql} that its text does not give back")
    # hangs on x, lest the planner evaluate it beforehand; and it is the server's log that gets to see it
    refuse = f"concat(left({text}, 0), {said})::int4::text"
    return f"CASE WHEN {x} IS NOT NULL THEN CASE WHEN record_image_eq(ROW({x}), ROW({back})) THEN {text} ELSE {refuse} END END"
