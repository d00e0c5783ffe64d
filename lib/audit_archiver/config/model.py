"""What a configuration says, as plain frozen objects: the only form in which the rest of the program sees it.

`S3` and `Database` are self-contained: an object store or a connection can be opened from one of them alone.
Seconds, megabytes and days stand in the names. `at` is the FILE:LINE where a thing is configured.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from audit_archiver.config.credentials import Secret


@dataclass(frozen=True)
class Table:
    """One table to archive; every default is resolved (table > database > defaults, REQ-CFG-002)."""

    name: str
    timestamp: str
    key: tuple[str, ...]
    schema: str = "public"
    retention_days: int = 90
    safety_buffer_days: int = 1
    batch_size: int = 10_000
    sleep_s: float = 2
    vacuum: str = "standard"
    critical: bool = False
    classification: Optional[str] = None
    cascade: str = "refuse"
    find: tuple[str, ...] = ()
    at: Optional[str] = None

    @property
    def label(self) -> str:
        """schema.table, as messages write it."""
        return f"{self.schema}.{self.name}"


@dataclass(frozen=True)
class Database:
    """One database: where it is, who we are there, and its tables."""

    name: str
    dbname: str = ""
    host: Optional[str] = None
    port: int = 5432
    user: Optional[str] = None
    password: Optional[Secret] = None
    sslmode: Optional[str] = None
    sslrootcert: Optional[str] = None
    sslcert: Optional[str] = None
    sslkey: Optional[str] = None
    read_replica: Optional[str] = None
    lock_timeout_s: float = 10
    transaction_timeout_s: float = 1800
    fsync_off: str = "refuse"
    max_table_tb: float = 5
    tables: tuple[Table, ...] = ()
    at: Optional[str] = None

    def __post_init__(self) -> None:
        if not self.dbname:
            object.__setattr__(self, "dbname", self.name)

    def table(self, schema: str, name: str) -> Optional[Table]:
        """The configured table of that name, or None."""
        return next((each for each in self.tables if (each.schema, each.name) == (schema, name)), None)


@dataclass(frozen=True)
class S3:
    """The bucket and how to reach it. What is None is left to the AWS defaults (instance role, region of the host)."""

    bucket: str
    prefix: str = ""
    endpoint: Optional[str] = None
    region: Optional[str] = None
    storage_class: Optional[str] = None
    encryption: Optional[str] = None
    kms_key_id: Optional[str] = None
    profile: Optional[str] = None
    access_key_id: Optional[str] = None
    secret_access_key: Optional[Secret] = None
    session_token: Optional[Secret] = None
    addressing_style: str = "auto"
    ca_bundle: Optional[str] = None
    multipart_threshold_mb: float = 10
    multipart_part_mb: float = 5
    compression_level: int = 6
    verify: str = "read"
    multipart_timeout_hours: float = 24
    local_fallback_dir: Optional[Path] = None
    local_fallback_retention_days: float = 7
    retries: int = 3
    retry_base_s: float = 2
    retry_max_s: float = 30
    connect_timeout_s: float = 10
    read_timeout_s: float = 60
    rate_limit_requests_per_second: Optional[float] = None
    rate_limit_mb_per_second: Optional[float] = None
    circuit_breaker_failures: int = 3
    circuit_breaker_reset_s: float = 60
    at: Optional[str] = None

    def pause_s(self, tried: int) -> float:
        """Seconds before the try that follows the `tried`-th: the base, twice, four times ... up to the maximum (REQ-ERR-005), less up to
        a quarter by chance, so that those who failed together do not come back together."""
        return min(self.retry_max_s, self.retry_base_s * 2 ** (tried - 1)) * random.uniform(0.75, 1)


@dataclass(frozen=True)
class Locking:
    """Who may run beside whom, per database or per table: PostgreSQL advisory locks, and on top of them Redis or files.

    Also what a run does when it makes others wait. `redis_url` is there with backend redis, `lock_dir` with backend file.
    """

    enabled: bool = True
    backend: str = "postgres"
    mode: str = "held"
    scope: str = "database"
    lock_timeout_minutes: float = 120
    heartbeat_s: float = 30
    when_others_wait: str = "warn"
    others_wait_s: float = 5
    held_warning_s: float = 300
    redis_url: Optional[Secret] = None
    lock_dir: Optional[Path] = None

    @property
    def stale_s(self) -> float:
        """Seconds without a heartbeat after which a lock is stale (REQ-LOCK-016)."""
        return 2 * self.lock_timeout_minutes * 60


@dataclass(frozen=True)
class Resources:
    """Upper bounds of what a run may take."""

    max_row_mb: float = 256
    max_memory_mb: float = 500
    max_connections_per_db: int = 5
    max_run_hours: float = 8
    min_free_disk_gb: float = 10

    @property
    def max_row_bytes(self) -> int:
        """max_row_mb in bytes."""
        return int(self.max_row_mb * 1_000_000)


@dataclass(frozen=True)
class Observability:
    """How the log looks."""

    log_level: str = "INFO"
    log_format: str = "auto"


@dataclass(frozen=True)
class Compliance:
    """The bounds that every retention must keep (REQ-CMP-001, 002); None when they are switched off."""

    min_retention_days: Optional[int] = 7
    max_retention_days: Optional[int] = 2555
    enforce_encryption: bool = False


S3_STORAGE, DATABASE, BOTH = "s3", "database", "both"
"""Where the watermark of restores is kept."""


@dataclass(frozen=True)
class Config:
    """A whole configuration. `warnings` are sentences with their FILE:LINE, for the log of the command that starts a run."""

    path: str
    s3: S3
    databases: tuple[Database, ...]
    staging_dir: Optional[Path] = None
    in_flight_batches: int = 2
    parallel_databases: bool = False
    max_parallel_databases: int = 3
    roundtrip: str = "first"
    restore_watermark: Optional[str] = S3_STORAGE
    locking: Locking = field(default_factory=Locking)
    resources: Resources = field(default_factory=Resources)
    observability: Observability = field(default_factory=Observability)
    compliance: Compliance = field(default_factory=Compliance)
    warnings: tuple[str, ...] = ()

    @property
    def verify_how(self) -> str:
        """read (compare content) or head (compare existence and size)."""
        return self.s3.verify

    def database(self, name: str) -> Optional[Database]:
        """The configured database of that name, or None."""
        return next((each for each in self.databases if each.name == name), None)
