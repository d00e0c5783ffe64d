"""Where the configuration is looked for, and where batches are staged (contracts.md, section 1)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Mapping, Optional

from audit_archiver.config.model import Config
from audit_archiver.config.resolve import home
from audit_archiver.exits import ConfigError

SYSTEM_CONFIG = "/etc/audit-archiver/config.yaml"
SYSTEM_STATE = "/var/lib/audit-archiver"
LOCAL_CONFIG = "audit-archiver.yaml"


def find(flag: Optional[str], env: Mapping[str, str], cwd: Optional[str] = None) -> str:
    """The configuration's path: the flag, AA_CONFIG, or the first that exists of the usual places.

    What the flag or AA_CONFIG names must exist. The path is returned as it was given, since messages quote it.
    Raises ConfigError, naming the places, where there is none.
    """
    directory = cwd or os.getcwd()
    for asked, by in ((flag, "--config"), (env.get("AA_CONFIG"), "AA_CONFIG")):
        if asked:
            if not os.path.exists(os.path.join(directory, asked)):
                raise ConfigError(f"there is no configuration '{asked}'", detail=f"{by} names it",
                                  hint="give the path of an existing file")
            return asked
    usual = [LOCAL_CONFIG, _xdg(env, "XDG_CONFIG_HOME", ".config", "config.yaml"), SYSTEM_CONFIG]
    for path in usual:
        if os.path.exists(os.path.join(directory, path)):
            return path
    raise ConfigError("there is no configuration", detail=f"looked for ./{', '.join(usual)}",
                      hint="name one with --config FILE or AA_CONFIG")


def staging_root(config: Config, flag: Optional[str], env: Mapping[str, str]) -> Path:
    """The staging directory, absolute: the flag, AA_STAGING, the configuration's, systemd's, the system's, the account's.

    It need not exist yet.
    """
    asked = flag or env.get("AA_STAGING")
    if asked:
        return Path(os.path.abspath(asked))
    if config.staging_dir is not None:
        return config.staging_dir
    by_systemd = env.get("STATE_DIRECTORY", "").split(":")[0]
    if by_systemd:
        return Path(os.path.abspath(by_systemd))
    if os.path.isdir(SYSTEM_STATE) and os.access(SYSTEM_STATE, os.W_OK | os.X_OK):
        return Path(SYSTEM_STATE)
    return Path(_xdg(env, "XDG_STATE_HOME", ".local/state"))


def _xdg(env: Mapping[str, str], variable: str, below_home: str, *rest: str) -> str:
    """A path of ours below an XDG base directory; a relative base counts as unset, as that specification says."""
    base = env.get(variable, "")
    if not os.path.isabs(base):
        base = os.path.join(home(env), below_home)
    return os.path.join(base, "audit-archiver", *rest)
