"""Rules between keys, and keys of what this release cannot do: refused where they guard rows, else one warning."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Iterator

import pytest
import yaml

from audit_archiver import config, exits
from audit_archiver.formats import names, schema
from tests.unit import configs


def warned(directory: Path, *lines: str) -> list[str]:
    return list(configs.load(directory, configs.with_lines(*lines)).warnings)


# -- retention


def retention(days: str, *lines: str) -> str:
    return configs.with_lines(*lines).replace("primary_key: id\n", f"primary_key: id\n        retention_days: {days}\n")


@pytest.mark.req("REQ-CMP-001", "REQ-CMP-003")
def test_a_retention_below_the_minimum_of_seven_days_is_refused_where_it_is_written(tmp_path: Path) -> None:
    assert configs.refused(tmp_path, retention("6")) == [
        "prod.yaml:10: 'retention_days' 6 of table 'audit_logs' in database 'prod' is less than the minimum of 7. "
        "write 7 to 2555, or change 'min_retention_days' of 'compliance'"]
    assert configs.load(tmp_path, retention("7")).databases[0].tables[0].retention_days == 7


@pytest.mark.req("REQ-CMP-002")
def test_a_retention_above_the_maximum_of_seven_years_is_refused_where_it_is_written(tmp_path: Path) -> None:
    assert configs.refused(tmp_path, retention("2556")) == [
        "prod.yaml:10: 'retention_days' 2556 of table 'audit_logs' in database 'prod' is more than the maximum of "
        "2555. write 7 to 2555, or change 'max_retention_days' of 'compliance'"]
    assert configs.load(tmp_path, retention("2555")).databases[0].tables[0].retention_days == 2555


@pytest.mark.req("REQ-CMP-001", "REQ-CMP-002")
@pytest.mark.parametrize("section", [
    ("compliance:", "  min_retention_days: 30", "  max_retention_days: 60"),
    ("compliance:", "  retention_policy: {enabled: true, min_retention_days: 30, max_retention_days: 60}")])
def test_the_bounds_can_be_set_in_both_forms(tmp_path: Path, section: tuple[str, ...]) -> None:
    found = configs.load(tmp_path, retention("30", *section))
    assert (found.compliance.min_retention_days, found.compliance.max_retention_days) == (30, 60)
    for days, says in (("29", "less than the minimum of 30"), ("61", "more than the maximum of 60")):
        refused = configs.refused(tmp_path, retention(days, *section))
        assert len(refused) == 1 and refused[0].startswith("prod.yaml:10: ") and says in refused[0]
        assert "write 30 to 60" in refused[0] and f"(prod.yaml:{12 if len(section) == 2 or days == '29' else 13})" in refused[0]


def test_a_retention_of_the_defaults_is_refused_there_once_for_all_its_tables(tmp_path: Path) -> None:
    text = """\
        s3: {bucket: audit-archives}
        defaults:
          retention_days: 3
        databases:
          - name: prod
            tables:
              - {name: a, timestamp_column: t, primary_key: id}
              - {name: b, timestamp_column: t, primary_key: id}
              - {name: c, timestamp_column: t, primary_key: id, retention_days: 9}
        """
    assert configs.refused(tmp_path, text) == [
        "prod.yaml:3: 'retention_days' 3 of table 'a' in database 'prod' and 1 more is less than the minimum of 7. "
        "write 7 to 2555, or change 'min_retention_days' of 'compliance'"]


def test_a_default_that_every_table_overrides_is_no_error(tmp_path: Path) -> None:
    assert configs.load(tmp_path, retention("30", "defaults: {retention_days: 3}")).databases[0].tables[0].retention_days == 30


def test_a_retention_that_nobody_wrote_keeps_the_bounds_too(tmp_path: Path) -> None:
    assert configs.refused(tmp_path, configs.with_lines("compliance: {min_retention_days: 100}")) == [
        "prod.yaml:7: 'retention_days' 90 of table 'audit_logs' in database 'prod' is less than the minimum of 100. "
        "write 100 to 2555, or change 'min_retention_days' of 'compliance' (prod.yaml:10)"]


def test_bounds_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    assert configs.refused(tmp_path, configs.with_lines("compliance:", "  min_retention_days: 60",
                                                        "  max_retention_days: 30")) == [
        "prod.yaml:12: 'max_retention_days' 30 is less than 'min_retention_days' 60. swap the two"]


def test_a_bound_given_twice_with_two_values_is_refused(tmp_path: Path) -> None:
    lines = ("compliance:", "  min_retention_days: 8", "  retention_policy:", "    min_retention_days: {}")
    assert configs.refused(tmp_path, configs.with_lines(*lines).format(9)) == [
        "prod.yaml:13: 'min_retention_days' is given twice, with different values. keep one (prod.yaml:11)"]
    assert configs.load(tmp_path, configs.with_lines(*lines).format(8)).compliance.min_retention_days == 8


def test_bounds_that_are_switched_off_warn_and_do_not_bind(tmp_path: Path) -> None:
    found = configs.load(tmp_path, retention("3", "compliance:", "  retention_policy: {enabled: false}"))
    assert found.databases[0].tables[0].retention_days == 3
    assert (found.compliance.min_retention_days, found.compliance.max_retention_days) == (None, None)
    assert found.warnings == ("prod.yaml:12: the bounds of retention are switched off",)


# -- refused, since it guards rows


@pytest.mark.parametrize("line, at", [("legal_holds: {enabled: true}", 10), ("legal_holds: {check_table: holds}", 10),
                                      ("legal_holds: {enabled: true, source: database, table: legal_holds}", 10)])
def test_legal_holds_are_refused_until_they_work(tmp_path: Path, line: str, at: int) -> None:
    assert configs.refused(tmp_path, configs.with_lines(line)) == [
        f"prod.yaml:{at}: 'legal_holds' does not work yet, and rows under a hold would be deleted. write 'enabled: "
        "false' under 'legal_holds', and leave tables under a hold out of 'databases'"]


def test_legal_holds_that_are_switched_off_say_nothing(tmp_path: Path) -> None:
    assert warned(tmp_path, "legal_holds: {enabled: false, check_table: legal_holds, database: prod}") == []


@pytest.mark.parametrize("lines, says", [
    (("locking: {backend: redis, redis_url_env: REDIS_URL}",),
     "prod.yaml:10: the environment variable 'REDIS_URL' is not set. 'locking.redis_url_env' takes the name of a variable, not the secret; "
     "set it, in cron and systemd too"),
    (("locking: {backend: redis}",), "prod.yaml:10: the locking backend 'redis' needs 'redis_url_env'. "
                                     "write 'redis_url_env: REDIS_URL' under 'locking'"),
    (("locking:", "  backend: file"), "prod.yaml:11: the locking backend 'file' needs 'lock_dir'. "
                                      "write 'lock_dir: /srv/shared/locks' under 'locking'"),
    (("locking: {heartbeat_s: 3601}",), "prod.yaml:10: 'locking.heartbeat_s' must be between 0.1 and 3600, "
     "not 3601. Seconds between two heartbeats of a lock that is held"),
    (("locking: {lock_timeout_minutes: 0.5}",), "prod.yaml:10: a lock times out after 30 s and is to be beaten every 30 s: a run that works "
     "would seem dead. let 'lock_timeout_minutes' be at least twice as long as 'heartbeat_s'"),
    (("locking: {enabled: false}",), "prod.yaml:10: 'locking.enabled: false' would let two runs delete the same rows. "
                                     "remove the line, or write 'enabled: true'"),
    (("compliance: {enforce_encryption: true}",),
     "prod.yaml:10: 'compliance.enforce_encryption' needs 's3.encryption'. "
     "write 'encryption: SSE-S3' or 'encryption: SSE-KMS' under 's3'"),
    (("compliance: {data_classifications: {PII: 365}}",),
     "prod.yaml:10: rules by classification do not work yet, and rows would be archived against them. "
     "remove 'data_classifications', and give each table its 'retention_days'"),
    (("in_flight_batches: 4",), "prod.yaml:10: 4 batches in flight need 6 connections, and "
     "'resources.max_connections_per_db' is 5. write 'max_connections_per_db: 6' under 'resources', or fewer batches "
     "in flight"),
    (("resources: {max_connections_per_db: 3}",), "prod.yaml:10: 2 batches in flight need 4 connections, and "
     "'resources.max_connections_per_db' is 3. write 'max_connections_per_db: 4' under 'resources', or fewer batches "
     "in flight"),
])
def test_what_guards_rows_and_does_not_work_is_refused(tmp_path: Path, lines: tuple[str, ...], says: str) -> None:
    assert configs.refused(tmp_path, configs.with_lines(*lines)) == [says]


@pytest.mark.parametrize("line, says", [
    ("storage_class: GLACIER", "objects of class 'GLACIER' cannot be read back at once, and nothing is deleted that "
     "was not read back. write 'storage_class: GLACIER_IR', or let a lifecycle rule of the bucket move the objects "
     "later"),
    ("storage_class: DEEP_ARCHIVE", "objects of class 'DEEP_ARCHIVE' cannot be read back at once, and nothing is "
     "deleted that was not read back. write 'storage_class: GLACIER_IR', or let a lifecycle rule of the bucket move "
     "the objects later"),
    ("kms_key_id: abc", "'s3.kms_key_id' has no effect without 's3.encryption: SSE-KMS'. write 'encryption: SSE-KMS', "
                        "or remove 'kms_key_id'"),
    ("partition_by: record", "'s3.partition_by: record' does not work yet. write 'partition_by: execution'; restores "
                             "select by the rows' own dates all the same"),
])
def test_settings_of_s3_that_would_not_hold_are_refused(tmp_path: Path, line: str, says: str) -> None:
    assert configs.refused(tmp_path, configs.SOUND.replace("archives\n", f"archives\n  {line}\n")) == [
        f"prod.yaml:3: {says}"]


def test_retries_that_wait_less_than_their_base_are_refused(tmp_path: Path) -> None:
    text = configs.SOUND.replace("archives\n", "archives\n  retry_base_s: 9\n  retry_max_s: 3\n")
    assert configs.refused(tmp_path, text) == [
        "prod.yaml:4: 's3.retry_max_s' is less than 's3.retry_base_s'. swap the two"]


def test_enforced_encryption_is_content_with_encryption(tmp_path: Path) -> None:
    text = configs.with_lines("compliance: {enforce_encryption: true}").replace("archives\n", "archives\n  encryption: SSE-KMS\n")
    assert configs.load(tmp_path, text).compliance.enforce_encryption is True


def test_verification_by_head_warns_and_is_refused_for_a_critical_table(tmp_path: Path) -> None:
    text = configs.SOUND.replace("archives\n", "archives\n  verify: head\n")
    found = configs.load(tmp_path, text)
    assert found.verify_how == "head"
    assert found.warnings == ("prod.yaml:3: 's3.verify: head' deletes rows whose archived content was never read back",)
    assert configs.refused(tmp_path, text + "        critical: true\n") == [
        "prod.yaml:11: table 'audit_logs' in database 'prod' is critical and 's3.verify' is head. "
        "write 'verify: read' (prod.yaml:3)"]


# -- one warning each, since it is comfort


@pytest.mark.parametrize("lines, says", [
    (("observability: {log_file: /var/log/a.log}",), "'observability.log_file' is not written yet; the log goes to "
                                                     "stderr, so let cron or systemd keep it"),
    (("observability: {prometheus_port: 9090}",), "'observability.prometheus_port' has no effect yet: there is no "
                                                  "metrics endpoint"),
    (("observability: {heartbeat_interval: 60}",), "'observability.heartbeat_interval' has no effect yet"),
    (("observability: {enable_profiling: true}",), "'observability.enable_profiling' has no effect yet"),
    (("resources: {max_disk_space_gb: 50}",), "'resources.max_disk_space_gb' has no effect yet; put 'staging_dir' on "
                                              "a file system of its own"),
    (("defaults: {connection_pool_size: 20}",), "'defaults.connection_pool_size' has no effect: a run opens one "
                                                "connection per batch in flight"),
    (("notifications: {slack: {enabled: true, channel: x}}",), "'notifications' are not sent yet; cron mails what a "
                                                               "failing run prints"),
    (("notifications: {webhooks: [{url: 'https://x'}]}",), "'notifications' are not sent yet; cron mails what a "
                                                           "failing run prints"),
    (("locking: {lock_dir: /srv/locks}",), "'locking.lock_dir' has no effect: the backend is postgres"),
    (("locking: {backend: postgres, redis_url_env: REDIS_URL}",), "'locking.redis_url_env' has no effect: the "
                                                                  "backend is postgres"),
    (("resources: {max_memory_mb: 400, max_row_mb: 200}",), "'resources.max_row_mb' 200 is lowered to 100, which fits "
                                                            "'max_memory_mb' 400"),
])
def test_what_is_comfort_and_does_not_work_logs_one_warning(tmp_path: Path, lines: tuple[str, ...], says: str) -> None:
    assert warned(tmp_path, *lines) == [f"prod.yaml:10: {says}"]


@pytest.mark.parametrize("line", ["notifications: {enabled: false, slack: {channel: x}}",
                                  "notifications: {slack: {enabled: false}, email: {enabled: false}}",
                                  "restore_watermark: {enabled: false, storage_type: both}", "observability: {enable_profiling: false}",
                                  "observability: {prometheus_port: null}", "defaults: {parallel_databases: true}",
                                  "compliance: {data_classifications: {}}"])
def test_comfort_that_is_switched_off_says_nothing(tmp_path: Path, line: str) -> None:
    assert warned(tmp_path, line) == []


@pytest.mark.parametrize("line, says", [
    ("read_replica: r1", "'read_replica' of database 'prod' is not used yet: planning reads the primary too"),
    ("connection_pool_size: 9", "'connection_pool_size' of database 'prod' has no effect: a run opens one connection "
                                "per batch in flight")])
def test_comfort_of_a_database_logs_one_warning(tmp_path: Path, line: str, says: str) -> None:
    text = configs.SOUND.replace("host: db1.example.com", line)
    assert configs.load(tmp_path, text).warnings == (f"prod.yaml:5: {says}",)


def test_a_classification_is_a_label_and_warns_once(tmp_path: Path) -> None:
    text = configs.SOUND + "        classification: PII\n" + """\
      - {name: b, timestamp_column: t, primary_key: id, classification: FINANCIAL}
"""
    found = configs.load(tmp_path, text)
    assert [table.classification for table in found.databases[0].tables] == ["PII", "FINANCIAL"]
    assert found.warnings == ("prod.yaml:10: 'classification' is a label only: no rule depends on it yet",)


# -- nothing twice


def two(first: str, second: str) -> str:
    return f"s3: {{bucket: audit-archives}}\ndatabases:\n  - {{{first}}}\n  - {{{second}}}\n"


TABLE = "{timestamp_column: t, primary_key: id, name: a"


def test_a_database_that_is_configured_twice_is_refused(tmp_path: Path) -> None:
    text = two(f"name: prod, tables: [{TABLE}}}]", f"name: prod, host: other, tables: [{TABLE}}}]")
    assert configs.refused(tmp_path, text) == [
        "prod.yaml:4: database 'prod' is configured twice (prod.yaml:3). put its tables under one entry, or give this "
        "one another 'name' and its 'dbname'"]


@pytest.mark.parametrize("second", ["", ", schema: public"])
def test_a_table_that_is_configured_twice_is_refused(tmp_path: Path, second: str) -> None:
    text = f"s3: {{bucket: audit-archives}}\ndatabases:\n  - name: prod\n    tables:\n      - {TABLE}}}\n      - {TABLE}{second}}}\n"
    assert configs.refused(tmp_path, text) == [
        "prod.yaml:6: table 'a' in database 'prod' is configured twice (prod.yaml:5). keep one of the two"]


def test_a_table_that_two_names_of_one_database_configure_is_refused(tmp_path: Path) -> None:
    text = two(f"name: prod, host: h, tables: [{TABLE}}}]", f"name: again, dbname: prod, host: h, tables: [{TABLE}}}]")
    assert configs.refused(tmp_path, text) == [
        "prod.yaml:4: table 'a' in database 'again' is configured twice (prod.yaml:3). keep one of the two"]


@pytest.mark.req("REQ-DB-002", "REQ-TBL-001")
def test_equal_table_names_in_other_schemas_databases_and_servers_are_different_tables(tmp_path: Path) -> None:
    text = two(f"name: one, host: h, tables: [{TABLE}}}, {TABLE}, schema: audit}}]",
               f"name: two, dbname: one, host: h2, port: 5433, user: u, tables: [{TABLE}}}]")
    found = configs.load(tmp_path, text).databases
    assert [(db.name, db.dbname, db.host, db.port, db.user, [table.label for table in db.tables]) for db in found] == [
        ("one", "one", "h", 5432, None, ["public.a", "audit.a"]), ("two", "one", "h2", 5433, "u", ["public.a"])]


# -- object keys


def test_a_prefix_that_leaves_no_room_for_the_longest_key_is_refused_where_it_is_written(tmp_path: Path) -> None:
    room = names.KEY_BYTES - names.BELOW_DATABASE_BYTES - len("/prod/")
    for prefix in ("ß" * (room // 2), "//" + "ß" * (room // 2) + "//"):
        assert configs.load(tmp_path, configs.SOUND.replace("s3:\n", f"s3:\n  prefix: {prefix}\n")).databases
    assert configs.refused(tmp_path, configs.SOUND.replace("s3:\n", f"s3:\n  prefix: {'ß' * 270}\n")) == [
        f"prod.yaml:2: 's3.prefix' and the name of database 'prod' take 546 bytes of every object key, of which S3 allows 1024. "
        f"choose a prefix that is {546 - room - len('/prod/')} bytes shorter"]


# -- whatever is written, it is a configuration or an error in words


WHOLE = Path(__file__).parents[1] / "contracts" / "config.v1" / "valid-appendix-a-without-holds.yaml"
ODD: list[Any] = [None, [], {}, "", "x", 0, -1, 10**12, 0.5, True, [[]], ["x", "x"], {"x": None}, [None], [{}]]


def paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from paths(each, path + (key,))


def test_no_value_anywhere_makes_anything_but_a_configuration_or_a_configuration_error(tmp_path: Path) -> None:
    whole = yaml.safe_load(WHOLE.read_text())
    env = {"PROD_DB_PASSWORD": "p", "ANALYTICS_DB_PASSWORD": "p", "REDIS_URL": "redis://cache"}
    file, loaded, refused = tmp_path / "c.yaml", 0, 0
    file.touch(mode=0o600)
    for number, path in enumerate(paths(whole)):
        odd = ODD[number % len(ODD):] + ODD[:number % len(ODD)]
        for value in odd[:4]:
            changed = copy.deepcopy(whole)
            parent = changed
            for part in path[:-1]:
                parent = parent[part]
            parent[path[-1]] = value
            file.write_text(yaml.safe_dump(changed))
            try:
                config.load(str(file), env)
                loaded += 1
            except exits.ConfigError as error:
                assert str(file) in str(error)
                refused += 1
    assert loaded and refused


def test_what_the_quick_check_of_a_configuration_accepts_jsonschema_accepts_too() -> None:
    whole = yaml.safe_load(WHOLE.read_text())
    whole["x-anchor"] = {"any": ["thing"]}
    assert schema._quick("config")(whole), "the quick check does not know the whole schema"
    accepted = refused = 0
    for path in paths(whole):
        for value in ODD:
            changed = copy.deepcopy(whole)
            parent = changed
            for part in path[:-1]:
                parent = parent[part]
            parent[path[-1]] = value
            slow = next(schema.iter_errors("config", changed), None) is None
            assert schema._quick("config")(changed) == slow, (path, value)
            accepted, refused = accepted + slow, refused + (not slow)
    assert accepted and refused
