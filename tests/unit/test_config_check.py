"""Errors against the schema: each at its file:line, in words, with what to write instead."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from audit_archiver import config
from audit_archiver.config import check
from audit_archiver.formats import schema
from tests.unit import configs

pytestmark = pytest.mark.req("REQ-CFG-007", "REQ-CFG-008")

S3 = "s3:\n  bucket: audit-archives\n"


def with_s3(line: str) -> str:
    return configs.SOUND.replace("  bucket: audit-archives\n", f"  bucket: audit-archives\n  {line}\n")


def with_database(line: str) -> str:
    return configs.SOUND.replace("    host: db1.example.com\n", f"    {line}\n")


def with_table(line: str) -> str:
    return configs.SOUND.replace("        primary_key: id\n", f"        primary_key: id\n        {line}\n")


@pytest.mark.parametrize("line, says", [
    ("regoin: x", "unknown key 'regoin' in 's3'. did you mean 'region'?"),
    ("host: x", "unknown key 'host' in 's3'. 'host' belongs to 'databases'"),
    ("batch_size: 5", "unknown key 'batch_size' in 's3'. 'batch_size' belongs to 'defaults' or 'databases' or "
                      "'tables'"),
    ("compression_level: 12", "'s3.compression_level' must be between 1 and 9, not 12. "
                              "Compression from 1 (fast) to 9 (small), on the scale of gzip"),
    ("compression_level: 6.5", "'s3.compression_level' must be a whole number, not 6.5. "
                               "Compression from 1 (fast) to 9 (small), on the scale of gzip"),
    ("retries: '3'", "'s3.retries' must be a whole number, not '3'. remove the quotes or leading zeros"),
    ("retries: 03", "'s3.retries' must be a whole number, not '03'. remove the quotes or leading zeros"),
    ("retries:", "'s3.retries' has no value. How often a request is tried again after a failure that can pass"),
    ("verify: heads", "'s3.verify' must be one of read, head, not 'heads'. did you mean 'head'?"),
    ("storage_class: standard_ia", "'s3.storage_class' must be one of STANDARD, STANDARD_IA, ONEZONE_IA, "
     "INTELLIGENT_TIERING, GLACIER_IR, GLACIER, DEEP_ARCHIVE, null, not 'standard_ia'. did you mean 'STANDARD_IA'?"),
    ("endpoint: s3.example.com", "'s3.endpoint' has a form that is not allowed. URL of an S3-compatible store, "
                                 "http:// or https://, without user and query"),
    ("prefix: 7", "'s3.prefix' must be text, not 7. put it in quotes"),
    ("prefix: yes", "'s3.prefix' must be text, not true. put it in quotes"),
    ("prefix: [a]", "'s3.prefix' must be text, not a list. What every object key starts with"),
    ("multipart_part_mb: 1", "'s3.multipart_part_mb' must be between 5 and 5000, not 1. Size of a part in MB"),
    ("region: ''", "'s3.region' is empty. Region"),
])
def test_what_is_wrong_in_s3_is_said(tmp_path: Path, line: str, says: str) -> None:
    assert configs.refused(tmp_path, with_s3(line)) == [f"prod.yaml:3: {says}"]


@pytest.mark.parametrize("line, says", [
    ("hsot: x", "unknown key 'hsot' in database 'prod'. did you mean 'host'?"),
    ("port: 70000", "'port' of database 'prod' must be between 1 and 65535, not 70000. Port of the server"),
    ("port: 0", "'port' of database 'prod' must be between 1 and 65535, not 0. Port of the server"),
    ("host: db 1", "'host' of database 'prod' has a form that is not allowed. "
                   "Host name or address, or directory of the Unix-domain socket; no URL"),
    ("sslmode: verify_full", "'sslmode' of database 'prod' must be one of disable, allow, prefer, require, "
     "verify-ca, verify-full, null, not 'verify_full'. did you mean 'verify-full'?"),
    ("lock_timeout: 0", "'lock_timeout' of database 'prod' must be between 0.1 and 3600, not 0. Seconds to wait for a "
                        "lock of PostgreSQL before a batch gives up and is tried again"),
])
def test_what_is_wrong_in_a_database_is_said(tmp_path: Path, line: str, says: str) -> None:
    assert configs.refused(tmp_path, with_database(line)) == [f"prod.yaml:5: {says}"]


@pytest.mark.req("REQ-VAL-006")
@pytest.mark.parametrize("line, says", [
    ("retension_days: 5", "unknown key 'retension_days' in table 'audit_logs' in database 'prod'. "
                          "did you mean 'retention_days'?"),
    ("retention_days: 0", "'retention_days' of table 'audit_logs' in database 'prod' must be between 1 and 36499, "
                          "not 0. Age in days, 1 to 36499, beyond which rows are archived; safety_buffer_days is "
                          "added to it"),
    ("retention_days: 36500", "'retention_days' of table 'audit_logs' in database 'prod' must be between 1 and 36499, "
                              "not 36500. Age in days, 1 to 36499, beyond which rows are archived; "
                              "safety_buffer_days is added to it"),
    ("batch_size: 50001", "'batch_size' of table 'audit_logs' in database 'prod' must be between 1 and 50000, not "
                          "50001. Rows of the first batch of a table, at most 50000"),
    ("vacuum_strategy: analyse", "'vacuum_strategy' of table 'audit_logs' in database 'prod' must be one of none, "
                                 "analyze, standard, full, not 'analyse'. did you mean 'analyze'?"),
    ("classification: secret", "'classification' of table 'audit_logs' in database 'prod' must be one of PUBLIC, "
     "INTERNAL, CONFIDENTIAL, PII, FINANCIAL, null, not 'secret'. Not used yet: a label of the data"),
    ("schema: ''", "'schema' of table 'audit_logs' in database 'prod' is empty. Schema of the table"),
])
def test_what_is_wrong_in_a_table_is_said(tmp_path: Path, line: str, says: str) -> None:
    assert configs.refused(tmp_path, with_table(line)) == [f"prod.yaml:10: {says}"]


@pytest.mark.req("REQ-TBL-002")
@pytest.mark.parametrize("line, says", [
    ("name: audit_logs", "'name' of table no. 1 in database 'prod' is missing. "
                         "write 'name: audit_logs': Name of the table, without its schema"),
    ("timestamp_column: created_at", "'timestamp_column' of table 'audit_logs' in database 'prod' is missing. write "
     "'timestamp_column: created_at': Column that says how old a row is: timestamp, timestamptz or date"),
    ("primary_key: id", "'primary_key' of table 'audit_logs' in database 'prod' is missing. write 'primary_key: id': "
                        "Column, or list of columns, of a primary key or of a unique index without NULLs"),
])
def test_a_key_that_a_table_needs_is_named_where_the_table_is(tmp_path: Path, line: str, says: str) -> None:
    text = configs.SOUND.replace(f"- {line}\n", "- critical: false\n").replace(f"        {line}\n", "")
    assert configs.refused(tmp_path, text) == [f"prod.yaml:7: {says}"]


@pytest.mark.parametrize("key, says", [
    ("[]", "is empty"), ("[id, id]", "names the same thing twice"), ("[1]", None), ("{a: b}", None), ("''", "is empty"),
    ("x" * 64, "is longer than 63 characters")])
def test_a_key_of_no_use_is_refused(tmp_path: Path, key: str, says: str) -> None:
    found = configs.refused(tmp_path, configs.SOUND.replace("primary_key: id", f"primary_key: {key}"))
    assert len(found) == 1 and found[0].startswith("prod.yaml:9: 'primary_key")
    assert says is None or f" of table 'audit_logs' in database 'prod' {says}. " in found[0]


@pytest.mark.parametrize("text, says", [
    (S3, "prod.yaml:1: 'databases' is missing. write 'databases:': The databases, worked through in this order"),
    (S3 + "databases: []\n", "prod.yaml:3: 'databases' is empty. The databases, worked through in this order"),
    (S3 + "databases:\n", "prod.yaml:3: 'databases' has no value. The databases, worked through in this order"),
    (S3 + "databases: prod\n", "prod.yaml:3: 'databases' must be a list, not 'prod'. "
                               "The databases, worked through in this order"),
    (S3 + "databases:\n  - prod\n", "prod.yaml:4: database no. 1 must be a mapping, not 'prod'. "
                                    "One database and its tables"),
    (S3 + "databases:\n  - name: d\n", "prod.yaml:4: 'tables' of database 'd' is missing. write 'tables:': "
                                       "The tables to archive"),
    (S3 + "databases:\n  - name: d\n    tables: []\n", "prod.yaml:3: no table is configured. "
                                                       "list at least one under 'tables' of a database"),
    (configs.SOUND.replace(S3, "s3:\n"), "prod.yaml:1: 's3' has no value. The bucket and how to reach it"),
    (configs.SOUND.replace(S3, "s3: {}\n"), "prod.yaml:1: 's3.bucket' is missing. write 'bucket: audit-archives': "
                                            "Name of the bucket, without 's3://'"),
    (configs.SOUND.replace("bucket: audit", "bucket: s3://audit"),
     "prod.yaml:2: 's3.bucket' has a form that is not allowed. Name of the bucket, without 's3://'"),
    (configs.with_lines("observabilty: {}"), "prod.yaml:10: unknown key 'observabilty'. "
                                             "did you mean 'observability'?"),
    (configs.with_lines("bucket: x"), "prod.yaml:10: unknown key 'bucket'. 'bucket' belongs to 's3'"),
    (configs.with_lines("zzz: x"), "prod.yaml:10: unknown key 'zzz'. known keys are: version, s3, defaults, "
     "staging_dir, in_flight_batches, roundtrip, resources, observability, notifications, locking, databases, "
     "legal_holds, restore_watermark, compliance"),
])
def test_what_is_wrong_at_the_top_is_said(tmp_path: Path, text: str, says: str) -> None:
    assert configs.refused(tmp_path, text) == [says]


@pytest.mark.req("REQ-CFG-009")
@pytest.mark.parametrize("version", ['"1.0"', "1", "3.0", '"2.1"', "null", "true"])
def test_a_version_that_is_not_known_is_refused(tmp_path: Path, version: str) -> None:
    found = configs.refused(tmp_path, f"version: {version}\n" + configs.SOUND)
    assert found == [f"prod.yaml:1: version {check_shown(version)} of the configuration is not known. "
                     "write 'version: \"2.0\"' and the keys of aa-config(5)"]


def check_shown(version: str) -> str:
    return version.replace('"', "'")


@pytest.mark.req("REQ-CFG-009")
@pytest.mark.parametrize("version", ['"2.0"', "2.0", '"2"', "2"])
def test_the_version_of_this_release_is_accepted_however_it_is_written(tmp_path: Path, version: str) -> None:
    assert configs.load(tmp_path, f"version: {version}\n" + configs.SOUND).databases[0].name == "prod"


def test_all_errors_are_reported_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = configs.refused(tmp_path, """\
        s3:
          bucket: b
          compression_level: 0
        defaults:
          retention_days: ${DAYS}
          retention_days: 3
        databases:
          - name: prod
            prot: 5432
            password_env: NOWHERE
            tables:
              - name: a
                timestamp_column: t
                primary_key: id
                retention_days: 3
        legal_holds: {enabled: true}
        """)
    assert [line.split(". ")[0] for line in found] == [
        "prod.yaml:2: 's3.bucket' has a form that is not allowed",
        "prod.yaml:3: 's3.compression_level' must be between 1 and 9, not 0",
        "prod.yaml:5: the environment variable 'DAYS' is not set",
        "prod.yaml:6: key 'retention_days' is written twice (line 5)",
        "prod.yaml:9: unknown key 'prot' in database 'prod'",
        "prod.yaml:10: the environment variable 'NOWHERE' is not set",
        "prod.yaml:15: 'retention_days' 3 of table 'a' in database 'prod' is less than the minimum of 7",
        "prod.yaml:16: 'legal_holds' does not work yet, and rows under a hold would be deleted"]


def test_several_errors_are_one_exception_whose_text_holds_them_all(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigErrors) as caught:
        configs.load(tmp_path, "s3: {bucket: b}\ndatabases: []\n")
    assert str(caught.value) == (
        "prod.yaml:1: 2 errors in the configuration; prod.yaml:1: 's3.bucket' has a form that is not allowed. Name of "
        "the bucket, without 's3://'; prod.yaml:2: 'databases' is empty. The databases, worked through in this order")


@pytest.mark.req("REQ-DB-007")
@pytest.mark.parametrize("line", ["password: 12345678", "password: [hunter2]", "password_env: hunter2 x",
                                  "password_env: hunter2", "host: postgres://me:hunter2@db1", "port: ${SECRET}",
                                  "sslmode: ${SECRET}", "lock_timeout: me@hunter2"])
def test_a_secret_in_the_wrong_place_is_not_printed(tmp_path: Path, line: str) -> None:
    found = " ".join(configs.refused(tmp_path, with_database(line), {"SECRET": "hunter2"}))
    assert found.startswith("prod.yaml:5: ")
    assert "hunter2" not in found and "12345678" not in found


# -- what is no error


def test_values_from_the_environment_take_the_type_of_their_key(tmp_path: Path) -> None:
    text = configs.SOUND.replace("host: db1.example.com", "port: ${PORT}\n    password: ${PW}\n    lock_timeout: ${LT}")
    found = configs.load(tmp_path, text + "locking: {enabled: \"${ON}\"}\nstaging_dir: ${NONE:-}\n",
                         {"PORT": "6543", "PW": "0123", "LT": "2.5", "ON": "true"})
    assert found.databases[0].port == 6543
    assert found.databases[0].lock_timeout_s == 2.5
    assert found.databases[0].password == config.Secret("0123")
    assert found.locking.enabled is True and found.staging_dir is None


@pytest.mark.parametrize("value", ["many", "6 543", "1e3", "99999999999999999999"])
def test_a_value_from_the_environment_that_has_another_type_is_not_shown(tmp_path: Path, value: str) -> None:
    found = configs.refused(tmp_path, with_database("port: ${PORT}"), {"PORT": value})
    assert found == ["prod.yaml:5: 'port' of database 'prod' must be a whole number, not what ${PORT} holds. "
                     "Port of the server"]


@pytest.mark.parametrize("section", ["defaults:", "locking: null", "compliance:", "notifications:", "legal_holds:",
                                     "restore_watermark:", "resources:", "observability:"])
def test_a_section_whose_lines_are_commented_out_is_none(tmp_path: Path, section: str) -> None:
    assert configs.load(tmp_path, configs.with_lines(section)).warnings == ()


def test_keys_that_start_with_x_hold_anchors(tmp_path: Path) -> None:
    text = textwrap.dedent("""\
        x-table: &table {timestamp_column: created_at, primary_key: id, retention_days: 30}
        s3: {bucket: audit-archives}
        databases:
          - name: prod
            tables:
              - {<<: *table, name: a}
              - {<<: *table, name: b, retention_days: 40}
        """)
    tables = configs.load(tmp_path, text).databases[0].tables
    assert [(table.name, table.retention_days) for table in tables] == [("a", 30), ("b", 40)]


@pytest.mark.parametrize("line", ["name: |\n      prod", 'user: "a\\nb"', 'dbname: "a\\0"'])
def test_a_line_break_in_a_value_is_refused(tmp_path: Path, line: str) -> None:
    text = configs.SOUND.replace("name: prod\n", f"{line}\n") if line.startswith("name") else with_database(line)
    found = configs.refused(tmp_path, text)
    assert len(found) == 1 and found[0].startswith(f"prod.yaml:{4 if line.startswith('name') else 5}: ")


def test_a_line_break_out_of_the_environment_is_refused(tmp_path: Path) -> None:
    assert configs.refused(tmp_path, with_database("password: ${PW}"), {"PW": "hunter2\n"}) == [
        "prod.yaml:5: 'password' of database 'prod' holds a line break or another control character. "
        "write it on one line, and mind how the variable is set"]


def test_every_key_of_the_schema_says_what_it_means_and_what_holds_without_it() -> None:
    whole = schema.load("config")
    missing = [f"{where}.{key}" for where, section in check._sections() for key, described in section["properties"].items()
               for described in [check._resolved(described)]
               if not described.get("description", "").endswith(".")
               or ("default" not in described and key not in section.get("required", ()))]
    assert missing == []
    assert whole["additionalProperties"] is False
    assert all(section["additionalProperties"] is False for where, section in check._sections()
               if where != "'legal_holds'")


def test_every_default_of_the_schema_is_allowed_by_it() -> None:
    import jsonschema

    whole = schema.load("config")
    for _, section in check._sections():
        for described in section["properties"].values():
            described = check._resolved(described)
            if described.get("default") is not None:
                jsonschema.Draft202012Validator({**described, "$defs": whole["$defs"]}).validate(described["default"])
            for example in described.get("examples", []):
                jsonschema.Draft202012Validator({**described, "$defs": whole["$defs"]}).validate(example)
