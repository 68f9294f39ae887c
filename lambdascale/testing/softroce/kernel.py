"""The guest's kernel and initial file system, built once and kept in the user's cache."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lambdascale.core import UserError
from lambdascale.testing.softroce.packages import apt, find

# crc32_generic: without it the rxe driver refuses to add a link, with no message.
_MODULES = (
    "virtio_pci",
    "9pnet_virtio",
    "9p",
    "overlay",
    "virtio_net",
    "dummy",
    "crc32_generic",
    "rdma_rxe",
    "ib_uverbs",
    "rdma_ucm",
)
_INIT = Path(__file__).with_name("init.sh")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Files that QEMU boots from."""

    image: Path
    initrd: Path


def cache_folder() -> Path:
    """Folder of cached kernels: $XDG_CACHE_HOME/lambdascale/softroce, by default below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lambdascale" / "softroce"


def ensure_kernel() -> Kernel:
    """Kernel of this distribution's linux-image-amd64 (linux-image-generic on Ubuntu), from the cache or downloaded.

    UserError if the download fails.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    roots = sorted(folder.glob("linux-image-*"))
    root = roots[-1] if roots else _download(folder)
    image = next((root / "boot").glob("vmlinuz-*"))
    version = image.name.removeprefix("vmlinuz-")
    initrd = root / f"initrd-{_fingerprint()}.gz"
    if not initrd.exists():
        _build(root, version, initrd)
    return Kernel(image=image, initrd=initrd)


def _fingerprint() -> str:
    """Hash of the contents of the initrd, so that no stale one is booted."""
    import xxhash

    return xxhash.xxh64_hexdigest(_INIT.read_bytes() + repr(_MODULES).encode())


def _download(folder: Path) -> Path:
    """Download and unpack the kernel package without installing it; UserError if that fails."""
    if not find("apt-get") or not find("dpkg"):
        raise UserError("the Soft-RoCE machine needs a kernel package of Debian or Ubuntu, but this machine has no apt-get")
    package = _package()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as new:
        os.chmod(new, 0o755)
        apt("download", package, cwd=Path(new))
        (archive,) = Path(new).glob("*.deb")
        unpacked = Path(new) / "root"
        subprocess.run(["dpkg", "-x", str(archive), str(unpacked)], check=True)
        target = folder / package
        unpacked.rename(target)
    return target


def _package() -> str:
    """Package that the distribution's kernel meta-package depends on; UserError if none is found."""
    for meta in ("linux-image-amd64", "linux-image-generic"):
        shown = subprocess.run(["apt-cache", "depends", meta], capture_output=True, text=True).stdout
        if match := re.search(r"Depends: (linux-image-\d\S+)", shown):
            return match[1]
    raise UserError("no kernel package found: run apt-get update, then try again")


def _build(root: Path, version: str, initrd: Path) -> None:
    """Build an initramfs of busybox, the modules numbered in load order, and the init script."""
    subprocess.run([find("depmod") or "depmod", "-b", str(root), version], check=True)
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        for folder in ("bin", "modules", "proc", "sys", "dev", "lower", "upper", "root"):
            (top / folder).mkdir()
        shutil.copy("/bin/busybox", top / "bin/busybox")
        shutil.copy(_INIT, top / "init")
        (top / "init").chmod(0o755)
        for number, module in enumerate(_modules(root, version)):
            shutil.copy(module, top / "modules" / f"{number:03d}-{module.name}")
        names = "\n".join(str(path.relative_to(top)) for path in sorted(top.rglob("*")))
        packed = subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], input=names.encode(), cwd=top, capture_output=True)
        packed.check_returncode()
    partial = initrd.with_suffix(".tmp")
    partial.write_bytes(gzip.compress(packed.stdout, 1))
    partial.rename(initrd)


def _modules(root: Path, version: str) -> list[Path]:
    """Module files, each after those it depends on."""
    files: dict[Path, None] = {}
    for name in _MODULES:
        command = [find("modprobe") or "modprobe", "-d", str(root), "-S", version, "--show-depends", name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for line in shown.splitlines():
            if line.startswith("insmod "):  # "builtin NAME" needs nothing
                files[Path(line.split()[1])] = None
    return list(files)
