"""How a value of each PostgreSQL type becomes JSON on the server and comes back as the same value.

A `Codec` is a pair of SQL expressions over an expression. The table is closed: of a type that is not in it each
value is proven to survive the way out and back, or it is refused by name where such a proof is worth nothing. What
plain JSON cannot carry is wrapped: {"$json": text} and {"$array": text} hold the value's own text (postgres.md C8,
docs/types.md).

The expressions rely on the pinned session of connect.py: with search_path pg_catalog alone, functions and
operators are the server's own, and `format_type` writes the names of user types with their schema.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable, Mapping, NamedTuple, Optional, Sequence

from audit_archiver.postgres.proven_text import proven
from audit_archiver.postgres.quoting import ident, literal

FIRST_USER_OID = 16384

NATIVE = frozenset(
    "bool int2 int4 int8 oid xid cid tid xid8 float4 float8 money text varchar bpchar name uuid date time timetz "
    "timestamp timestamptz interval inet cidr macaddr macaddr8 bit varbit point line lseg box path polygon circle "
    "tsvector pg_lsn txid_snapshot pg_snapshot refcursor".split())
"""row_to_json writes these exactly and json_to_record reads them exactly, under the pins."""

PARSED = frozenset("tsquery jsonpath aclitem abstime reltime tinterval".split())
"""As NATIVE, but their text is a little language (or names roles): no proof that each text is read back."""

EXTENSIONS = frozenset({("citext", "citext"), ("hstore", "hstore"), ("ltree", "ltree")})
"""(extension, type) of which every value's text is read back exactly."""

PLAIN = {**dict.fromkeys(("int2", "int4", "int8"), ""), **dict.fromkeys(("uuid", "inet", "cidr", "macaddr", "macaddr8", "pg_lsn"), '"')}
"""What to_json puts around the text of these types, in which nothing ever needs an escape."""

UNIFORM = frozenset("bool int2 int4 int8 text varchar name uuid date time timestamp timestamptz inet cidr macaddr macaddr8 bytea".split())
"""Types whose equal values are always written alike, so that a value can be looked for by its text."""

VECTORS = frozenset({"int2vector", "oidvector"})
TINY_JSONB_BYTES = 13
"""A jsonb smaller than this can be JSON null but cannot hold the key "$json"; pg_column_size does not detoast."""

WORKAROUND = ("change the column's type (ALTER TABLE ... ALTER COLUMN ... TYPE text or jsonb), move it to a table of "
              "its own, or leave the table out; see docs/types.md")

Expression = Callable[[str], str]


class Refused(Exception):
    """A type that is not archived: reason and remedy."""

    def __init__(self, reason: str, remedy: str = WORKAROUND) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


class Type(NamedTuple):
    """What pg_type and its neighbours say about one type."""

    oid: int
    sql: str
    schema: str
    name: str
    kind: str
    base: int
    element: int
    fields: Sequence[str]
    field_types: Sequence[int]
    subtype: int
    range: int
    constructor: Optional[str]
    own_canonical: bool
    extension: Optional[str]
    json_cast: bool
    unvalidated: bool
    receives: bool
    text_cast: bool
    immutable: bool

    @property
    def builtin(self) -> bool:
        """True for the server's own types."""
        return self.schema == "pg_catalog" and self.oid < FIRST_USER_OID


def _same(expression: str) -> str:
    return expression


def _as_text(expression: str) -> str:
    return f"{expression}::text"


@dataclass(frozen=True)
class Codec:
    """SQL for one type. `encode` gives what row_to_json shall write, `decode` turns the field of json_to_record,
    declared as `record_type`, into the value, typed `sql`; _same means that the server does it right by itself.

    `image`: what must be equal afterwards. `scalar`: the JSON is one string, number or boolean. `doubt`: why one
    value may come back and another not, None where every value does. `loose`: the text of an array or composite
    around it is not exact; `array_as`: the element type through which an array's text is exact nevertheless.
    `around`: what to_json puts around the text of an encoded value, where that is all it does; else None.
    `encodes_json`: an encoded value is json already, and NULL just where the value is.
    `raises`: `encode` raises for a value that would not come back, so that each value has to pass through it.
    `comparable`: the `=` and `<` of pg_catalog compare two values, as a key's must be. `ranked_as`: the type as which they
    do, where ORDER BY would take an order of the type's own. `uniform`: equal values have one JSON text.
    """

    sql: str
    record_type: str
    encode: Expression = _same
    decode: Expression = _same
    image: Expression = _same
    scalar: bool = True
    doubt: Optional[str] = None
    loose: bool = False
    array_as: Optional[str] = None
    around: Optional[str] = None
    encodes_json: bool = False
    raises: bool = False
    comparable: bool = True
    ranked_as: Optional[str] = None
    direct: Optional[str] = None
    uniform: bool = False

    def fragments(self, x: str, before: str) -> list[str]:
        """Expressions whose texts together, NULLs left out, are `before` and what row_to_json writes for `x`."""
        value = self.encode(x)
        if self.encodes_json:
            return [literal(before), f"coalesce({value}, 'null')"]
        if self.around is None:
            return [literal(before), f"coalesce(to_json({value}), 'null')"]
        begin = f"CASE WHEN {x} IS NULL THEN {literal(before + 'null')} ELSE {literal(before + self.around)} END"
        return [begin, value] + ([f"CASE WHEN {x} IS NOT NULL THEN {literal(self.around)} END"] if self.around else [])


class Codecs:
    """The codecs of the types of one table, made from what the catalog says (`types` by oid)."""

    def __init__(self, types: Mapping[int, Type]) -> None:
        self._types = types

    def of(self, oid: int, depth: int = 0) -> Codec:
        """The codec of a type; depth 0 is a column of its own. Raises Refused."""
        kind = self._types[oid]
        if kind.kind == "d":
            return self._domain(kind, depth)
        if kind.element:
            return _array(kind, self._within(kind.element, depth + 1, f"an element of '{kind.sql}'"), depth)
        if kind.kind == "c":
            return self._composite(kind, depth)
        if kind.kind == "r":
            return _range(kind, self._within(kind.subtype, depth + 1, f"a bound of '{kind.sql}'"), depth)
        if kind.kind == "m":
            return _multirange(kind, self._within(kind.range, depth + 1, f"a part of '{kind.sql}'"), depth)
        if kind.kind == "e":
            return _enum(kind)
        if kind.builtin:
            return _builtin(kind, depth)
        return _of_others(kind)

    def _within(self, oid: int, depth: int, where: str) -> Codec:
        try:
            return self.of(oid, depth)
        except Refused as refused:
            raise Refused(f"{refused.reason}, and it is {where}", refused.remedy) from None

    def _domain(self, kind: Type, depth: int) -> Codec:
        base = self._within(kind.base, depth, f"what the domain '{kind.sql}' is made of")
        made = replace(base, sql=kind.sql, direct=None, image=lambda x: base.image(f"({x})::{base.sql}"))
        if kind.unvalidated:
            made = replace(made, doubt=f"the domain '{kind.sql}' has a constraint that is NOT VALID")
        if self._types[kind.base].kind == "e":  # the operators of enums take no domain
            made = replace(made, comparable=False)
        if base.encode not in (_same, _as_text):
            made = replace(made, encode=lambda x: base.encode(f"({x})::{base.sql}"))
        if base.decode is _same and self._types[kind.base].receives:  # else json_to_record cannot check the domain
            return replace(made, record_type=kind.sql)
        return replace(made, decode=lambda x: f"({base.decode(x)})::{kind.sql}")

    def _composite(self, kind: Type, depth: int) -> Codec:
        fields = [(ident(name), self._within(oid, depth + 1, f"the field '{name}' of '{kind.sql}'"))
                  for name, oid in zip(kind.fields, kind.field_types)]
        alias = f"_c{depth}"

        def encode(x: str) -> str:
            listed = ", ".join(f"{codec.encode(f'({x}).{name}')} AS {name}" for name, codec in fields)
            # not IS NULL, which is true of ROW(NULL, NULL) too
            return (f"CASE WHEN {x} IS DISTINCT FROM NULL THEN (SELECT row_to_json({alias}.*) "
                    f"FROM (SELECT {listed}) {alias}) END")

        def decode(x: str) -> str:
            values = ", ".join(codec.decode(f"{alias}.{name}") for name, codec in fields)
            record = ", ".join(f"{name} {codec.record_type}" for name, codec in fields)
            source = f" FROM json_to_record({x}) AS {alias}({record})" if fields else ""
            return f"CASE WHEN {x} IS NOT NULL THEN (SELECT ROW({values})::{kind.sql}{source}) END"

        reads_itself = fields and all(codec.decode is _same for _, codec in fields)
        return Codec(
            kind.sql, kind.sql if reads_itself else "json",
            _same if all(codec.encode is _same for _, codec in fields) else encode,
            _same if reads_itself else decode, scalar=False, loose=any(codec.loose for _, codec in fields),
            doubt=next((codec.doubt for _, codec in fields if codec.doubt), None), raises=any(codec.raises for _, codec in fields))


def _array(kind: Type, item: Codec, depth: int) -> Codec:
    """A JSON array of the elements as they would stand alone; {"$array": text} for lower bounds other than 1, and
    for several dimensions of elements that have to be encoded one by one."""
    alias = f"_a{depth}"
    one_by_one = item.encode not in (_same, _as_text)

    def encode(x: str) -> str:
        if one_by_one:
            odd = f"array_lower({x}, 1) <> 1 OR array_ndims({x}) > 1"
            plain = (f"CASE WHEN {x} IS NOT NULL THEN array_to_json(ARRAY(SELECT {item.encode(f'{alias}.v')} "
                     f"FROM (SELECT unnest({x}) AS v) {alias})) END")
        else:
            odd = f"array_lower({x}, 1) <> 1 OR array_ndims({x}) > 1 AND array_dims({x}) ~ '[[](?!1:)'"
            plain = f"array_to_json({x})" if item.encode is _same else f"array_to_json({x}::text[])"
        text = f"{x}::{item.array_as}[]::text" if item.array_as else f"{x}::text"
        whole = f"json_build_object('$array', {text})"
        if item.raises:
            whole = f"CASE WHEN ({plain}) IS NOT NULL THEN {whole} END"
        return f"CASE WHEN {odd} THEN {whole} ELSE {plain} END"

    def decode(x: str) -> str:
        if item.decode is _same:
            plain = f"(SELECT {alias}.v FROM json_to_record(json_build_object('v', {x})) AS {alias}(v {kind.sql}))"
        elif not one_by_one:
            plain = f"(SELECT {alias}.v FROM json_to_record(json_build_object('v', {x})) AS {alias}(v text[]))::{kind.sql}"
        else:
            plain = (f"ARRAY(SELECT {item.decode(f'{alias}r.v')} FROM json_array_elements({x}) WITH ORDINALITY AS {alias}(j, n), "
                     f"json_to_record(json_build_object('v', {alias}.j)) AS {alias}r(v {item.record_type}) "
                     f"ORDER BY {alias}.n)::{kind.sql}")
        through = f"::{item.array_as}[]" if item.array_as else ""
        return (f"CASE json_typeof({x}) WHEN 'array' THEN {plain} "
                f"WHEN 'object' THEN ({x} ->> '$array'){through}::{kind.sql} END")

    doubt = item.doubt
    if item.loose and not item.array_as:
        doubt = doubt or f"the text of several dimensions of '{item.sql}' is not exact"
    return Codec(kind.sql, "json", encode, decode, scalar=False, loose=item.loose, doubt=doubt, encodes_json=True, raises=item.raises,
                 direct=kind.sql if item.decode is _same else None)


def _range(kind: Type, bound: Codec, depth: int) -> Codec:
    if kind.constructor is None:
        raise Refused(f"the range type '{kind.sql}' has lost its constructor function")
    alias = f"_r{depth}"

    def encode(x: str) -> str:
        return (f"CASE WHEN isempty({x}) THEN '{{\"empty\":true}}'::json WHEN NOT isempty({x}) THEN "
                f"(SELECT row_to_json({alias}.*) FROM (SELECT {bound.encode(f'lower({x})')} AS lower, "
                f"{bound.encode(f'upper({x})')} AS upper, CASE WHEN lower_inc({x}) THEN '[' ELSE '(' END || "
                f"CASE WHEN upper_inc({x}) THEN ']' ELSE ')' END AS bounds) {alias}) END")

    def decode(x: str) -> str:
        low, high = bound.decode(f"{alias}.lower"), bound.decode(f"{alias}.upper")
        return (f"CASE WHEN {x} IS NOT NULL THEN (SELECT CASE WHEN {alias}.empty THEN 'empty'::{kind.sql} "
                f"ELSE {kind.constructor}({low}, {high}, {alias}.bounds) END FROM json_to_record({x}) "
                f"AS {alias}(lower {bound.record_type}, upper {bound.record_type}, bounds text, empty bool)) END")

    doubt = f"the range type '{kind.sql}' has a canonical function of its own" if kind.own_canonical else bound.doubt
    return Codec(kind.sql, "json", encode, decode, scalar=False, loose=bound.loose, doubt=doubt, raises=bound.raises)


def _multirange(kind: Type, part: Codec, depth: int) -> Codec:
    alias = f"_m{depth}"

    def encode(x: str) -> str:
        return (f"CASE WHEN {x} IS NOT NULL THEN array_to_json(ARRAY(SELECT {part.encode(f'{alias}.v')} "
                f"FROM (SELECT unnest({x}) AS v) {alias})) END")

    def decode(x: str) -> str:
        return (f"CASE WHEN {x} IS NOT NULL THEN (SELECT coalesce(range_agg({part.decode(f'{alias}.v')}), "
                f"'{{}}'::{kind.sql}) FROM json_array_elements({x}) AS {alias}(v)) END")

    return Codec(kind.sql, "json", encode, decode, scalar=False, loose=part.loose, doubt=part.doubt, raises=part.raises)


def _enum(kind: Type) -> Codec:
    # row_to_json would use a cast to json, if somebody made one
    return Codec(kind.sql, kind.sql, (lambda x: f"textin(enum_out({x}))") if kind.json_cast else _same, uniform=True)


def _of_others(kind: Type) -> Codec:
    """A base type of an extension or of a user. Where only its authors know its text, each value is proven; but what the
    text depends on besides the value (settings, other tables) may be another thing on the day it comes back."""
    if (kind.extension, kind.name) in EXTENSIONS and not (kind.json_cast and kind.text_cast):
        # row_to_json would use a cast to json, which hstore brings along
        return Codec(kind.sql, kind.sql, _as_text if kind.json_cast else _same, comparable=kind.name == "citext",
                     ranked_as="text" if kind.name == "citext" else None)
    if kind.immutable:
        return Codec(kind.sql, kind.sql, lambda x: proven(x, kind.sql), raises=True, comparable=False,
                     doubt=f"only the authors of '{kind.sql}' know whether each of its texts is read back")
    whose = f" of the extension '{kind.extension}'" if kind.extension else ""
    raise Refused(f"the text of the type '{kind.sql}'{whose} may depend on more than the value (its input or output function "
                  "is not IMMUTABLE), so nothing shows that it would come back exactly")


def _builtin(kind: Type, depth: int) -> Codec:
    name = kind.name
    if name in NATIVE:
        return Codec(kind.sql, kind.sql, around=PLAIN.get(name), uniform=name in UNIFORM)
    if name in PARSED:
        return Codec(kind.sql, kind.sql, doubt=f"nobody has proven that every text of a '{name}' is read back")
    if name == "numeric":
        return Codec(kind.sql, kind.sql, _as_text, around='"')
    if name == "xml":  # its output function drops the XML declaration, the cast does not
        return Codec(kind.sql, kind.sql, _as_text, image=_as_text, loose=True, array_as="text",
                     doubt="the XML parser may refuse what was stored under another setting or by an older one")
    if name == "jsonb":
        return _jsonb(kind)
    if name == "json":
        return _json(kind, depth)
    if name == "bytea":
        return Codec(kind.sql, "text", lambda x: f"'base64:' || replace(encode({x}, 'base64'), E'\\n', '')",
                     lambda x: f"decode(substr({x}, 8), 'base64')", around='"', uniform=True)
    if name == "char":  # bytes over 127 are no UTF-8, and come out raw before PostgreSQL 15
        return Codec(kind.sql, "text", lambda x: f"CASE WHEN {x}::int4 < 0 THEN {x}::int4::text ELSE {x}::text END",
                     lambda x: f"CASE WHEN length({x}) > 1 THEN {x}::int4::\"char\" ELSE {x}::\"char\" END",
                     loose=True, array_as="int4")
    if name in VECTORS:  # an empty oidvector is read as garbage by json_to_record, not by its input function
        return Codec(kind.sql, "text", _as_text, lambda x: f"{x}::{kind.sql}")
    if name.startswith("reg"):  # the oid is the value; the name is for the reader, and may be gone
        return Codec(kind.sql, "json",
                     lambda x: (f"CASE WHEN {x} IS NOT NULL THEN (SELECT row_to_json(_n.*) FROM "
                                f"(SELECT {x}::oid::int8 AS oid, {x}::text AS name) _n) END"),
                     lambda x: f"({x} ->> 'oid')::oid::{kind.sql}", scalar=False, loose=True, array_as="oid")
    raise Refused(f"the type '{kind.sql}' holds working data of the server and cannot be written back")


def _jsonb(kind: Type) -> Codec:
    """jsonb is exact as nested JSON, but JSON null would become NULL; and our own wrapper must stay unambiguous."""
    return Codec(
        kind.sql, "jsonb",
        lambda x: (f"CASE WHEN CASE WHEN pg_column_size({x}) < {TINY_JSONB_BYTES} THEN {x} = 'null' ELSE {x} ? '$json' END "
                   f"THEN jsonb_build_object('$json', {x}::text) ELSE {x} END"),
        lambda x: f"CASE WHEN {x} ? '$json' THEN ({x} ->> '$json')::jsonb ELSE {x} END", scalar=False, around="")


def _json(kind: Type, depth: int) -> Codec:
    """json keeps its text. json_to_record drops white space around it and rewrites the escapes of a lone string, and
    no server function reads a line with \\u0000 in it: such values are wrapped. A raw line break would end the line:
    in a column it becomes a space, as ruled (TYPE-003); deeper down the value is wrapped and keeps it."""
    def flat(x: str) -> str:
        return f"replace(replace({x}::text, E'\\n', ' '), E'\\r', ' ')"

    def encode(x: str) -> str:
        wrapped = f"json_build_object('$json', {x}::text)"
        # white space at either end by bytes: btrim and right count characters and cost thrice as much
        ends = f"ascii({x}::text) <= 32 OR get_byte(json_send({x}), octet_length(json_send({x})) - 1) <= 32"
        unfit = (f"strpos({x}::text, E'\\\\') > 0 OR strpos({x}::text, '\"$json\"') > 0 OR json_typeof({x}) = 'null' "
                 f"OR {ends}")
        broken = f"strpos({x}::text, E'\\n') > 0 OR strpos({x}::text, E'\\r') > 0"
        if depth:
            return f"CASE WHEN {unfit} OR {broken} THEN {wrapped} ELSE {x} END"
        return f"CASE WHEN {unfit} THEN {wrapped} WHEN {broken} THEN {flat(x)}::json ELSE {x} END"

    def decode(x: str) -> str:
        return f"CASE WHEN strpos({x}::text, '\"$json\"') > 0 THEN ({x} ->> '$json')::json ELSE {x} END"

    return Codec(kind.sql, "json", encode, decode, image=_same if depth else flat, scalar=False, around="")
