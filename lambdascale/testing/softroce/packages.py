"""Packages of the distribution that the virtual machine needs; root on Debian or Ubuntu installs them automatically."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from lambdascale.core import UserError

# Required command or file -> the Debian package that contains it.
NEEDED = {
    "qemu-system-x86_64": "qemu-system-x86",
    "cpio": "cpio",
    "/bin/busybox": "busybox-static",
    "modprobe": "kmod",
    "ip": "iproute2",
    "ibv_devices": "ibverbs-utils",
    "ib_write_bw": "perftest",
    "/usr/lib/x86_64-linux-gnu/libibverbs/librxe-rdmav34.so": "ibverbs-providers",
    "/usr/lib/python3/dist-packages/pyverbs": "python3-pyverbs",
}
PYVERBS = Path("/usr/lib/python3/dist-packages/pyverbs")
_ADMIN = os.pathsep.join(("/usr/sbin", "/sbin"))


def ensure_packages() -> None:
    """Install missing packages (as root on Debian or Ubuntu); UserError names those still missing and how to install them."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise UserError(f"the Soft-RoCE machine needs Linux on x86_64, this is {platform.system()} on {platform.machine()}")
    packages = missing()
    if packages and os.geteuid() == 0 and shutil.which("apt-get"):
        _install(packages)
        packages = missing()
    if packages:
        raise UserError(
            f"the Soft-RoCE machine lacks {', '.join(packages)}: "
            f"as root on Debian or Ubuntu, apt-get install --no-install-recommends {' '.join(packages)}"
        )
    _check_pyverbs()


def missing() -> list[str]:
    """Names of the missing packages."""
    return [package for wanted, package in NEEDED.items() if not find(wanted)]


def find(command: str) -> str | None:
    """Path of a command, also of one on root's path only, or of a file; None if it does not exist."""
    if command.startswith("/"):
        return command if Path(command).exists() else None
    return shutil.which(command, path=os.pathsep.join((os.environ.get("PATH", os.defpath), _ADMIN)))


def apt(*arguments: str, cwd: Path | None = None) -> None:
    """Run apt-get quietly; UserError with its last line if it fails."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(["apt-get", "-qq", *arguments], capture_output=True, text=True, env=environment, cwd=cwd)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"apt-get {' '.join(arguments)} failed: {last}")


def _install(packages: list[str]) -> None:
    print(f"installing {', '.join(packages)} ...", file=sys.stderr)
    apt("update")
    apt("install", "--yes", "--no-install-recommends", *packages)


def _check_pyverbs() -> None:
    """Raise UserError unless the distribution's pyverbs, compiled for its own Python, fits this Python's version."""
    ours = sys.implementation.cache_tag  # cpython-311
    if not list(PYVERBS.glob(f"device.{ours}-*.so")):
        raise UserError(f"{PYVERBS} is not built for {ours}: make .venv with the distribution's version of Python (PYTHON=...)")
