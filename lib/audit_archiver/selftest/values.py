"""Values at the edges of the supported types, as texts for each type's input function: a column of each for the scratch table."""

from __future__ import annotations

from audit_archiver.exits import ArchiverError
from audit_archiver.postgres import connect
from audit_archiver.postgres.quoting import literal

UNKNOWN_HERE = ("42704", "0A000")  # undefined type; the server was built without it (xml)

TYPES: dict[str, tuple[str, ...]] = {
    "bool": ("true", "false"),
    "int2": ("-32768", "32767"),
    "int4": ("-2147483648", "2147483647"),
    "int8": ("-9223372036854775808", "9007199254740993"),
    "float4": ("-0", "NaN", "-Infinity", "1.17549435e-38"),
    "float8": ("-0", "Infinity", "5e-324", "0.30000000000000004"),
    "numeric": ("1.10", "NaN", "12345678901234567890.12345678901234567890123", "0.000"),
    "money": ("-0.01", "92233720368547758.07"),
    "text": ("", "NULL", "\\N", "tab\t, feed\n, quote \" ' and \\", "Grüße, 世界 🐘\u2028", "base64:"),
    "varchar(40)": ("", "  blanks  ", "{}"),
    "char(5)": ("", "a"),
    '"char"': ("a", "\\"),
    "uuid": ("00000000-0000-0000-0000-000000000000", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
    "bytea": ("", "\\x000a0d5c22ff"),
    "date": ("infinity", "0044-03-15 BC", "5874897-12-31"),
    "time": ("24:00:00", "12:34:56.000001"),
    "timetz": ("24:00:00-15:59", "23:59:59.999999-05:30"),
    "timestamp": ("-infinity", "4714-11-24 00:00:00 BC", "294276-12-31 23:59:59.999999"),
    "timestamptz": ("infinity", "0044-03-15 12:00:00+00 BC", "2024-02-29 23:59:59.999999+00"),
    "interval": ("1 year -2 mons 3 days -04:05:06.000007", "-1 mons +2 days"),
    "inet": ("10.1.2.3/8", "2001:db8::1/32"),
    "cidr": ("10.0.0.0/8", "::ffff:1.2.3.0/120"),
    "macaddr": ("08:00:2b:01:02:03",),
    "macaddr8": ("08:00:2b:01:02:03:04:05",),
    "varbit": ("", "0101"),
    "point": ("(-0,1e-300)", "(NaN,Infinity)"),
    "line": ("{0.1,0.2,0.30000000000000004}",),
    "lseg": ("[(0.1,-0.2),(1e300,-0)]",),
    "box": ("(1e300,0.1),(-1e300,-0.1)",),
    "path": ("[(0,0),(1,1)]", "((0,0),(1,1),(2,0))"),
    "polygon": ("((0,0),(1,1),(2,0))",),
    "circle": ("<(0.1,-0.1),1e300>",),
    "tsvector": ("", "'a':1A 'it''s' 'back\\\\slash'"),
    "tsquery": ("'fat' <-> 'cat' <2> !('rat' & 'mat')",),
    "json": ("null", "{\"b\":1.10, \"a\":2,\"a\":3}", "\"\\u0000\"", "{\"$json\":1}"),
    "jsonb": ("null", "{\"a\":null,\"n\":12345678901234567890.1234567890}", "[]", "\"\\\"\""),
    "jsonpath": ("$.\"a\"[*]?(@ > 1)",),
    "xml": ("<?xml version=\"1.0\"?><a>b</a>", "text"),
    "int4range": ("empty", "[1,5)", "(,)"),
    "int8range": ("[9007199254740993,9223372036854775806]",),
    "numrange": ("[1.10,1.100]",),
    "daterange": ("(,0044-03-15 BC)",),
    "tsrange": ("(-infinity,infinity]",),
    "tstzrange": ("[2024-01-01 00:00:00.5+00,)",),
    "int4multirange": ("{}", "{[1,3),[5,9)}"),
    "tstzmultirange": ("{(-infinity,2024-01-02 00:00:00+00),(2025-01-01 00:00:00+00,infinity]}",),
    "oid": ("4294967295",), "xid": ("7",), "xid8": ("18446744073709551615",), "cid": ("7",),
    "tid": ("(4294967295,65535)",), "pg_lsn": ("16/B374D848",),
    "regclass": ("pg_catalog.pg_class",),
    "int2vector": ("1 2 -3",), "oidvector": ("1 4294967295",),
    "text[]": ("{}", "{a,NULL,\"NULL\",\"x\\\"y,z\"}", "{{a,b},{c,d}}", "[2:3]={a,b}"),
    "jsonb[]": ("{\"[1,2]\",\"null\",NULL}",),
    "numeric[]": ("{1.10,NaN}",),
}


def known(connection: connect.Connection) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The types that this server has, with their values, and the names of those that it has not."""
    there, lacking = {}, []
    for name, texts in TYPES.items():
        try:
            connect.rows(connection, "SELECT " + ", ".join(f"{literal(text)}::{name} IS NULL" for text in texts))
            there[name] = texts
        except ArchiverError as error:
            if error.sqlstate not in UNKNOWN_HERE:
                raise
            lacking.append(name)
    return there, lacking
