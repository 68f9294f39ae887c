"""Run folders: written under a temporary name and renamed when complete, so that a killed run never looks finished."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from lambdascale.core import UserError
from lambdascale.core.checks import shown

MANIFEST = "manifest.json"
SUMMARY = "summary.json"
FILES = "files"  # of the manifest: name -> size and checksum of every other file that the run wrote


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; UserError if it is missing or damaged."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"cannot read {path}: it holds a {type(document).__name__} instead of a JSON object")
    return document


def is_finished(folder: Path, digest: str) -> bool:
    """True if ``folder`` holds a finished run of the configuration with this digest."""
    if not (folder / MANIFEST).is_file() or not (folder / SUMMARY).is_file():
        return False
    return bool(read_json(folder / MANIFEST).get("run_sha256") == digest)


def check_usable(folder: Path, digest: str) -> None:
    """Raise UserError if ``folder`` exists and is not a finished run of this configuration, so that no files are overwritten."""
    try:
        exists = folder.exists()
    except OSError as error:
        raise UserError(f"{shown(str(folder))} cannot be a folder: {error.strerror}") from error
    if exists and not is_finished(folder, digest):
        raise UserError(f"{folder} exists and is not a finished run of this configuration; choose another out= or remove it")


def fingerprints(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum (xxh3-64) of every file in ``folder``, for its manifest."""
    return {path.name: _fingerprint(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}


def check_whole(folder: Path) -> None:
    """Raise UserError if a file of a finished run is missing or has other bytes than its manifest says."""
    for name, written in read_json(folder / MANIFEST).get(FILES, {}).items():
        path = folder / name
        if not path.is_file() or _fingerprint(path) != written:
            raise UserError(f"the finished run in {folder} is damaged: {name} is not as it was written; remove it, or force=true")


def _fingerprint(path: Path) -> dict[str, Any]:
    checksum, size = xxhash.xxh3_64(), 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            checksum.update(piece)
            size += len(piece)
    return {"bytes": size, "xxh3_64": checksum.hexdigest()}


@contextmanager
def new_run_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``folder`` when the block ends without an exception, and is deleted otherwise.

    With ``replace``, an older run in ``folder`` is deleted once the new one is complete. Without it, if another process has
    finished the same run meanwhile, that run stays and this one is deleted.
    """
    temporary = folder.parent / f".{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"cannot write {shown(str(folder))}: {error.strerror}") from error
    try:
        yield temporary
        if replace and (folder / MANIFEST).is_file():
            _set_aside(folder, temporary)
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _set_aside(folder: Path, temporary: Path) -> None:
    """Rename an older run out of the way and delete it."""
    aside = temporary.with_name(temporary.name.replace(".tmp", "-old.tmp"))
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _publish(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / SUMMARY).is_file():
            raise


def _remove_stale(folder: Path) -> None:
    """Delete the temporary folders of killed runs of this host."""
    for leftover in folder.parent.glob(f".{folder.name}.{socket.gethostname()}.*.tmp"):
        pid = leftover.name.split(".")[-2].removesuffix("-old")
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
