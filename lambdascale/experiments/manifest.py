"""What a run needs to be understood and repeated: code, versions, host, configuration, times."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import lambdascale

_PACKAGES = ("hydra-core", "matplotlib", "msgspec", "numpy", "pandas", "pyarrow", "seaborn", "torch", "wandb")
# Settings that say where results go or how a run is watched, not what it computes.
_NOT_IDENTITY = ("out", "force", "results", "logger")


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that determines the results."""
    return {key: value for key, value in config.items() if key not in _NOT_IDENTITY}


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of the identity and of the package's version."""
    document = {"version": lambdascale.__version__, "config": identity(config)}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def git_state(folder: Path) -> dict[str, Any]:
    """Commit and whether the tree has changes; nulls outside a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    status = git("status", "--porcelain")
    return {"sha": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def versions() -> dict[str, str]:
    """The versions of this package and of what results depend on."""
    found = {"python": platform.python_version(), "lambdascale": lambdascale.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def environment() -> dict[str, Any]:
    """Code, versions and host of this process."""
    host = {"system": platform.system(), "release": platform.release(), "machine": platform.machine(), "name": platform.node()}
    return {
        "git": git_state(Path(lambdascale.__file__).resolve().parent),
        "versions": versions(),
        "host": host,
        "command": sys.argv,
    }
