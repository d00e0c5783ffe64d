"""Values at the edges of every built-in type, and of types made by users.

`VALUES` maps a type of pg_catalog to texts for its input function; a text that begins with "sql:" is an
expression instead. `SINCE` says from which major version on a value exists.
"""

from __future__ import annotations

from typing import Sequence

from audit_archiver.postgres.quoting import ident
from tests.stages.type_session import Session

KEPT = "n int PRIMARY KEY, created_at timestamptz NOT NULL DEFAULT '2024-01-01 00:00:00+00'"
"""What a table needs beside, to be archived."""

TEXTS = ["", "\\N", "NULL", "null", "a", "  a  ", "tab\there", "line\nbreak", "cr\r\nlf", "back\\slash", "'single'", '"double"',
         "\\.", "\x01\x02\x1f\x7f", "Grüße, 世界 🐘", "\u2028\u2029\u0085\ufeff", "{}", "[1,2]", "{\"$json\":\"x\"}", "base64:", "x" * 5000]

JSONS = ["null", "{}", "[]", "\"\"", "\"null\"", "true", "0", "-0", "1.10", "1e5", "9007199254740993",
         "12345678901234567890.12345678901234567890", "[null]", "{\"a\":null}", "{\"b\":1,\"a\":2}", "[1, 2.50, [3]]",
         "{\"$json\":\"null\"}", "{\"$json\":{\"a\":null}}", "{\"$json\":null}", "[\"$json\"]", "\"$json\"", "{\"a\":{\"$json\":\"1\"}}",
         "{\"$array\":\"{1}\"}", "\"tab\\there\\\\ \\\"quoted\\\" \\u0001\"", "{\"ü\":\"Grüße 🐘 \u2028\"}", "\"\\ud83d\\ude00 \\u00e9\"",
         "{\"big\":\"" + "y" * 6000 + "\"}", "[" * 200 + "]" * 200]

TIMES = ["infinity", "-infinity", "4714-11-24 00:00:00 BC", "0044-03-15 12:00:00 BC", "0001-01-01 00:00:00", "1970-01-01 00:00:00",
         "2024-02-29 23:59:59.999999", "2024-01-01 00:00:00.000001", "1999-12-31 24:00:00", "10000-01-01 00:00:00",
         "294276-12-31 23:59:59.999999"]

VALUES: dict[str, list[str]] = {
    "bool": ["true", "false"],
    "int2": ["0", "-32768", "32767"],
    "int4": ["0", "-2147483648", "2147483647"],
    "int8": ["0", "-9223372036854775808", "9223372036854775807", "9007199254740993"],
    "float4": ["0", "-0", "NaN", "Infinity", "-Infinity", "0.1", "1.4e-45", "3.4028235e38", "1.17549435e-38", "16777217"],
    "float8": ["0", "-0", "NaN", "Infinity", "-Infinity", "0.1", "5e-324", "1.7976931348623157e308", "1e15", "9007199254740993",
               "0.30000000000000004", "-2.2250738585072014e-308"],
    "numeric": ["0", "0.000", "1.10", "1.100", "-1", "NaN", "Infinity", "-Infinity", "12345678901234567890.12345678901234567890123",
                "1e300", "1e-300", "1" + "0" * 2000 + ".5", "9" * 400 + "." + "0" * 400],
    "money": ["$0.00", "-$0.01", "$1,234,567.89", "-92233720368547758.08", "92233720368547758.07"],
    "text": TEXTS,
    "varchar": TEXTS,
    "bpchar": TEXTS,
    "name": TEXTS[:-1] + ["x" * 63],
    "char": ["", "a", "-", "\\", "\"", "\n", "\x7f", 'sql:(-1)::"char"', 'sql:(-128)::"char"', 'sql:(-56)::"char"'],
    "uuid": ["00000000-0000-0000-0000-000000000000", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"],
    "bytea": ["", "\\x00", "\\x" + "ab" * 57, "\\x" + "cd" * 58, "\\x" + "".join(f"{n:02x}" for n in range(256)) * 9, "\\x0a0d5c22"],
    "date": ["infinity", "-infinity", "4714-11-24 BC", "0044-03-15 BC", "0001-01-01", "2024-02-29", "10000-01-01", "5874897-12-31"],
    "time": ["00:00:00", "23:59:59.999999", "24:00:00", "12:00:00.5"],
    "timetz": ["00:00:00+00", "24:00:00-15:59", "12:34:56.000001+15:59:59", "23:59:59.999999-05:30"],
    "timestamp": TIMES,
    "timestamptz": [text if "inf" in text else text.replace(" BC", "") + "+00" + (" BC" if " BC" in text else "") for text in TIMES],
    "interval": ["0", "1 year -2 mons 3 days -04:05:06.000007", "-1 mons +2 days", "-00:00:00.000001", "178000000 years",
                 "-178000000 years", "sql:make_interval(months => 2147483647)", "sql:make_interval(months => -2147483647)",
                 "2147483647:59:59.999999", "-2147483647:59:59.999999", "2562047788:00:54.775807", "-2562047788:00:54.775807",
                 "infinity", "-infinity"],
    "inet": ["10.0.0.1", "10.1.2.3/8", "0.0.0.0/0", "255.255.255.255", "::1", "2001:db8::1/32", "::ffff:1.2.3.4", "::/0"],
    "cidr": ["10.0.0.0/8", "192.168.1.1", "0.0.0.0/0", "2001:db8::/32", "::ffff:1.2.3.0/120"],
    "macaddr": ["08:00:2b:01:02:03", "ff:ff:ff:ff:ff:ff"],
    "macaddr8": ["08:00:2b:01:02:03:04:05", "00:00:00:00:00:00:00:00"],
    "bit": ["", "1", "0101", "1" * 70],
    "varbit": ["", "1", "0101", "0" * 70],
    "point": ["(0,0)", "(-0,1e-300)", "(NaN,Infinity)", "(0.1,-Infinity)"],
    "line": ["{1,-1,0}", "{0.1,0.2,0.30000000000000004}"],
    "lseg": ["[(0,0),(1,1)]", "[(0.1,-0.2),(1e300,-0)]"],
    "box": ["(1,1),(0,0)", "(0,0),(0,0)", "(1e300,0.1),(-1e300,-0.1)"],
    "path": ["[(0,0),(1,1)]", "((0,0),(1,1),(2,0))", "((0.1,0.2))"],
    "polygon": ["((0,0))", "((0,0),(1,1),(2,0))", "((0.1,-0.1),(1e10,0.30000000000000004))"],
    "circle": ["<(0,0),0>", "<(0.1,-0.1),1e300>"],
    "tsvector": ["", "'a':1A 'b':2B,3C 'cat'", "'it''s' 'back\\\\slash' 'Grüße':16383", "'with space':1"],
    "tsquery": ["", "'a' & !'b' | 'c':*AB", "'fat' <-> 'cat' <2> !('rat' & 'mat')", "'it''s' | 'back\\\\slash'"],
    "pg_lsn": ["0/0", "16/B374D848", "FFFFFFFF/FFFFFFFF"],
    "oid": ["0", "4294967295"],
    "xid": ["0", "4294967295"],
    "cid": ["0", "4294967295"],
    "tid": ["(0,1)", "(4294967295,65535)"],
    "xid8": ["0", "18446744073709551615"],
    "txid_snapshot": ["10:20:10,14,15", "1:1:"],
    "pg_snapshot": ["10:20:10,14,15", "1:1:"],
    "refcursor": ["", "my \"cursor\" 1"],
    "jsonpath": ["$", "strict $.a[*].b", "$.a[*] ? (@.b > 1.5 && @.\"$json\" like_regex \"^x\\\\d\" flag \"i\")", "$.keyvalue().key"],
    "aclitem": ["=r/postgres", "postgres=arwdDxt/postgres", "postgres=r*w/postgres"],
    "xml": ["", "text only", "<a/>", "<a/><b/>", "<?xml version=\"1.0\"?><a>ü</a>", "<a b='\"'>\n<!-- c --><![CDATA[<x>]]>&amp;</a>",
            "<?xml version=\"1.0\" encoding=\"UTF-8\" standalone=\"yes\"?>\n<a>\n</a>\n", "<!DOCTYPE a><a/>"],
    "json": [*JSONS, " null ", "\"\\u0000\"", "{\"a\":\"\\ud800\"}", "{\"a\":1,\"a\":2}", "{\"a\":1 , \"b\" :\t[ ]}", " {\"a\":1}", "[1] ",
             "\t\"x\" ", "\"\\/\"", "{\n  \"a\": 1,\r\n  \"b\": [\n  ]\n}", "{\"a\":1}\n", "\"\\ud83d\"", "1E+5", "[\"\\u00e9\", \"é\"]"],
    "jsonb": [*JSONS, "1e300", "{\"zz\":1,\"a\":[{\"b\":[]},{\"c\":{}}]}", "[" + ",".join(str(n) for n in range(500)) + "]"],
    "int2vector": ["", "1 2 -3", "7"],
    "oidvector": ["", "1 4294967295", "7"],
    "regclass": ["pg_catalog.pg_class", "-", "sql:999999::regclass"],
    "regtype": ["pg_catalog.int4", "\"char\"", "sql:999999::regtype"],
    "regproc": ["pg_catalog.now", "sql:(SELECT min(oid::int8)::oid FROM pg_proc WHERE proname = 'sum')::regproc", "sql:999999::regproc"],
    "regprocedure": ["pg_catalog.now()", "pg_catalog.sum(int4)", "sql:999999::regprocedure"],
    "regoper": ["pg_catalog.||/", "sql:96::oid::regoper"],
    "regoperator": ["pg_catalog.=(int4,int4)", "sql:999999::oid::regoperator"],
    "regrole": ["postgres", "sql:999999::oid::regrole"],
    "regnamespace": ["pg_catalog", "sql:999999::oid::regnamespace"],
    "regconfig": ["pg_catalog.simple", "sql:999999::oid::regconfig"],
    "regdictionary": ["pg_catalog.simple", "sql:999999::oid::regdictionary"],
    "regcollation": ["pg_catalog.\"C\"", "sql:999999::oid::regcollation"],
    "int4range": ["empty", "(,)", "[1,5)", "(1,5]", "[1,)", "(,1]", "[2147483646,2147483647)"],
    "int8range": ["empty", "[9007199254740993,9223372036854775806]"],
    "numrange": ["empty", "(,)", "[1.10,1.100]", "(1,2)", "[NaN,]", "(-1e300,12345678901234567890.5]"],
    "daterange": ["empty", "[2024-01-01,2024-01-31]", "[-infinity,infinity]", "(,0044-03-15 BC)"],
    "tsrange": ["empty", "[2024-01-01 00:00:00,)", "(-infinity,infinity]", "[4714-11-24 00:00:00 BC,294276-12-31 23:59:59.999999]"],
    "tstzrange": ["empty", "[2024-01-01 00:00:00.5+00,)", "(-infinity,infinity]", "(,)"],
    "int4multirange": ["{}", "{[1,3),[5,9)}", "{(,)}", "{(,1),[4,)}"],
    "int8multirange": ["{}", "{[1,3),[9007199254740993,)}"],
    "nummultirange": ["{}", "{[1.10,1.100],(2,3)}"],
    "datemultirange": ["{}", "{[2024-01-01,2024-01-31],[2025-01-01,infinity]}"],
    "tsmultirange": ["{}", "{[2024-01-01 00:00:00,2024-01-02 00:00:00),(2025-01-01 00:00:00,)}"],
    "tstzmultirange": ["{}", "{(-infinity,2024-01-02 00:00:00+00),(2025-01-01 00:00:00+00,infinity]}"],
    "abstime": ["2024-01-01 00:00:00+00", "infinity", "-infinity"],
    "reltime": ["1 day", "-1 year"],
    "tinterval": ["[\"2000-01-01 00:00:00+00\" \"2001-01-01 00:00:00+00\"]"],
}

SINCE = {("numeric", "Infinity"): 14, ("numeric", "-Infinity"): 14, ("interval", "infinity"): 17, ("interval", "-infinity"): 17,
         ("interval", "2562047788:00:54.775807"): 15, ("interval", "-2562047788:00:54.775807"): 15}

REFUSED = frozenset("pg_node_tree pg_ndistinct pg_dependencies pg_mcv_list pg_brin_bloom_summary pg_brin_minmax_multi_summary "
                    "gtsvector smgr".split())
"""Built-in types that hold the server's own working data."""


def values(name: str, major: int) -> list[str]:
    """SQL expressions of the values of a type, for a server of a major version."""
    found = [text for text in VALUES[name] if SINCE.get((name, text), 0) <= major]
    return [text[4:] if text.startswith("sql:") else f"{_literal(text)}" for text in found]


def known(session: Session) -> list[str]:
    """The types that the server has, and can have values of."""
    there = {name for name, in session.rows("SELECT typname::text FROM pg_type WHERE typnamespace = 'pg_catalog'::regnamespace")}
    unbuilt = set() if session.has_xml else {"xml"}
    return [name for name in sorted(VALUES) if name in there and name not in REFUSED | unbuilt]


def create(session: Session, names: Sequence[str], major: int) -> None:
    """Make public.zoo: a column of each type with the values that a major version knows, and a row of NULLs."""
    texts = {name: values(name, major) for name in names}
    session.rows(f"CREATE TABLE public.zoo ({KEPT}, %s)" % ", ".join(f"{ident('a ' + name)} pg_catalog.{ident(name)}" for name in names))
    columns = ", ".join(ident("a " + name) for name in names)
    for n in range(max(map(len, texts.values()))):
        row = ", ".join(f"{texts[name][n % len(texts[name])]}::pg_catalog.{ident(name)}" for name in names)
        session.rows(f"INSERT INTO public.zoo (n, {columns}) VALUES ({n}, {row})")
    session.rows("INSERT INTO public.zoo (n) VALUES (-1)")


def _literal(text: str) -> str:
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"
