"""Manifest of a run, for understanding and repeating it: code, versions, host, configuration, times."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import lambdascale

_PACKAGES = ("hydra-core", "matplotlib", "msgspec", "numpy", "pandas", "pyarrow", "seaborn", "torch", "wandb")
# Subpackages whose code determines a run's results.
_RESULT_CODE = (
    "core",
    "multicast",
    "pipelines",
    "memory",
    "control",
    "sim",
    "workload",
    "metrics",
    "live",
    "transport",
    "inference",
)
# Settings for the place of results or the logging of a run, which do not change its results.
_NOT_IDENTITY = ("out", "force", "results", "logger", "tags", "objective", "traces", "study", "max_events")


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Part of a resolved configuration that determines the results."""
    return {key: value for key, value in config.items() if key not in _NOT_IDENTITY}


def run_digest(config: Mapping[str, Any], workload_sha256: str | None) -> str:
    """SHA-256 over everything that determines a run's results: configuration, trace file and code."""
    document = {"config": identity(config), "workload": workload_sha256, "code": code_digest()}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@cache
def code_digest() -> str:
    """SHA-256 of the sources that results depend on, so that a run of older code is never reused for newer code."""
    package = Path(lambdascale.__file__).resolve().parent
    folders = [*(package / name for name in _RESULT_CODE), package.parent / "baselines"]
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(str(path.relative_to(package.parent)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def git_state(folder: Path) -> dict[str, Any]:
    """Commit (``sha``) of ``folder`` and ``dirty``, true if tracked files are changed; both None outside a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    status = git("status", "--porcelain", "--untracked-files=no")
    return {"sha": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def versions() -> dict[str, str]:
    """Versions of Python, this package and the packages that results depend on."""
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
