"""Move old rows of PostgreSQL audit tables to S3-compatible storage, and prove it before deleting them."""

__version__ = "0.1.0"
