"""The fixtures of config.v1, Appendix A, and every example of the documentation.

An invalid fixture breaks one rule and says so in its first line: `# expect LINE: message`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from audit_archiver import config, exits
from tests.unit import configs

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "contracts" / "config.v1"
APPENDIX_ENV = {"PROD_DB_PASSWORD": "p1", "ANALYTICS_DB_PASSWORD": "p2", "REDIS_URL": "redis://:p3@cache.example.com:6379/0"}
DOCUMENT = ROOT / "docs" / "configuration.md"
DOCUMENTED = re.findall(r"^```yaml\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("config-*.yaml"))
EXAMPLE_ENV = {**APPENDIX_ENV, "DB_PASSWORD": "p", "ENVIRONMENT": "prod"}


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("valid-*.yaml")), ids=lambda path: path.stem)
def test_a_valid_fixture_is_loaded(path: Path) -> None:
    assert config.load(path.name, APPENDIX_ENV, cwd=str(FIXTURES)).databases


@pytest.mark.req("REQ-CFG-007", "REQ-CFG-008")
@pytest.mark.parametrize("path", sorted(set(FIXTURES.glob("invalid-*.yaml")) - {FIXTURES / "invalid-appendix-a.yaml"}),
                         ids=lambda path: path.stem)
def test_an_invalid_fixture_is_refused_for_its_one_reason_at_its_line(path: Path) -> None:
    found = re.match(r"# expect ([0-9:]+): (.*)\n", path.read_text())
    assert found, f"{path.name} does not say what it breaks"
    with pytest.raises(exits.ConfigError) as caught:
        config.load(path.name, {}, cwd=str(FIXTURES))
    assert not isinstance(caught.value, config.ConfigErrors)
    assert (caught.value.at, caught.value.msg) == (f"{path.name}:{found.group(1)}", found.group(2))
    assert caught.value.hint, "no word on what to write instead"


@pytest.mark.req("REQ-CFG-001")
def test_appendix_a_as_it_stands_is_refused_for_legal_holds(tmp_path: Path) -> None:
    found = configs.refused(tmp_path, (FIXTURES / "invalid-appendix-a.yaml").read_text(), APPENDIX_ENV)
    assert found == [
        "prod.yaml:112: 'legal_holds' does not work yet, and rows under a hold would be deleted. write 'enabled: "
        "false' under 'legal_holds', and leave tables under a hold out of 'databases'"]


@pytest.mark.req("REQ-CFG-001", "REQ-CFG-002", "REQ-TBL-001")
def test_appendix_a_without_holds_is_accepted_with_a_warning_for_each_comfort(tmp_path: Path) -> None:
    original = (FIXTURES / "invalid-appendix-a.yaml").read_text()
    changed = original.replace("legal_holds:\n  enabled: true", "legal_holds:\n  enabled: false")
    assert changed == (FIXTURES / "valid-appendix-a-without-holds.yaml").read_text()
    found = configs.load(tmp_path, changed, APPENDIX_ENV)
    assert [(db.name, [(table.name, table.retention_days, table.batch_size) for table in db.tables])
            for db in found.databases] == [
        ("production_db", [("audit_logs", 90, 10000), ("user_activity", 180, 5000)]),
        ("analytics_db", [("click_events", 30, 20000), ("session_logs", 60, 10000)])]
    assert found.s3.encryption == "SSE-S3" and found.compliance.enforce_encryption
    about = [re.search(r"'([a-z_.]+)'", warning).group(1) for warning in found.warnings]  # type: ignore[union-attr]
    assert (found.locking.backend, found.locking.lock_timeout_minutes, found.locking.stale_s) == ("redis", 120, 14400)
    assert found.locking.redis_url is not None and found.locking.redis_url.reveal() == APPENDIX_ENV["REDIS_URL"]
    assert "p3" not in repr(found)
    assert sorted(about) == ["classification", "notifications", "observability.heartbeat_interval",
                             "observability.log_file", "observability.prometheus_port", "read_replica",
                             "resources.max_disk_space_gb"]


@pytest.mark.parametrize("lines", [
    "defaults: {batch_size: 20000, sleep_between_batches: 1, parallel_databases: true, max_parallel_databases: 3, "
    "connection_pool_size: 20}",
    "restore_watermark: {enabled: true, storage_type: both}",
    "compliance: {retention_policy: {enabled: true, min_retention_days: 30, max_retention_days: 2555}}"])
def test_the_keys_of_the_faq_are_known(tmp_path: Path, lines: str) -> None:
    assert configs.load(tmp_path, configs.with_lines(lines)).path == "prod.yaml"


def test_the_keys_of_the_faq_in_s3_are_known(tmp_path: Path) -> None:
    text = configs.SOUND.replace("archives\n", "archives\n  encryption: SSE-KMS\n  kms_key_id: arn:aws:kms:eu:1:key/2\n"
                                 "  local_fallback_dir: /var/archiver/fallback\n")
    found = configs.load(tmp_path, text).s3
    assert (found.encryption, found.kms_key_id) == ("SSE-KMS", "arn:aws:kms:eu:1:key/2")
    assert found.local_fallback_dir == Path("/var/archiver/fallback")


@pytest.mark.parametrize("text", DOCUMENTED, ids=lambda text: text.split("\n")[0][:40])
def test_an_example_of_the_documentation_is_loaded(tmp_path: Path, text: str) -> None:
    configs.write(tmp_path, "- {name: logins, schema: audit, timestamp_column: at, primary_key: id}\n", "tables.yaml")
    assert configs.load(tmp_path, text, EXAMPLE_ENV).databases


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_file_is_loaded_without_a_warning(path: Path) -> None:
    assert config.load(str(path), EXAMPLE_ENV).warnings == ()


def test_the_documentation_has_examples() -> None:
    assert len(DOCUMENTED) >= 3 and len(EXAMPLES) >= 2
