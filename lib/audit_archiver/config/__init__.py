"""Configuration: read YAML, check it against the schema, resolve defaults and secrets.

    config = load(path, env)        raises ConfigError with file:line, every error at once
    config.warnings                 for the log of the command that starts a run
    staging_root(config, flag, env)
"""

from __future__ import annotations

from typing import Mapping, Optional

from audit_archiver.config import check, reading, resolve, rules
from audit_archiver.config.credentials import Secret
from audit_archiver.config.model import S3, Compliance, Config, Database, Locking, Observability, Resources, Table
from audit_archiver.config.places import find, staging_root
from audit_archiver.config.tree import ConfigErrors

__all__ = ["S3", "Compliance", "Config", "ConfigErrors", "Database", "Locking", "Observability", "Resources", "Secret",
           "Table", "find", "load", "staging_root"]


def load(path: Optional[str], env: Mapping[str, str], *, cwd: Optional[str] = None) -> Config:
    """The configuration in `path`, or in the first of the usual places where `path` is None.

    Raises ConfigError for one error and ConfigErrors (its `parts` are the single ones) for several.
    """
    tree = reading.read(find(path, env, cwd), env, cwd)
    check.structure(tree)
    rules.apply(tree)
    return resolve.resolve(tree, env)
