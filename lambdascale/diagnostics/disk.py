"""Read speed of a disk: through the cold page cache, past the page cache, and from the page cache alone."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lambdascale.core import UserError
from lambdascale.diagnostics.checks import Check

MIB = 2**20
_READ = 8 * MIB  # bytes asked of the kernel at once
_LARGEST_BUFFER = 2**30  # bytes; a larger file is read into the same memory again


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """Bytes per second of reading one file from its start to its end, in one thread."""

    cold: float
    """Buffered, with nothing of the file in the page cache."""
    direct: float | None
    """Past the page cache (O_DIRECT); None if the file system does not support it."""
    warm: float
    """Buffered, with all of the file in the page cache."""


def disk(directory: Path, mib: int) -> Check:
    """Line of the report for the disk that holds ``directory``, measured with a file of ``mib`` MiB; UserError on failure."""
    speed = measure(directory, mib * MIB)
    direct = "O_DIRECT not supported here" if speed.direct is None else f"{_rate(speed.direct)} with O_DIRECT"
    found = f"{_rate(speed.cold)} cold, {direct}, {_rate(speed.warm)} from the page cache ({mib} MiB in {directory})"
    return Check("disk", "ok", found)


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s"


def check_request(directory: Path, mib: int) -> None:
    """Raise UserError, before anything slow starts, unless ``directory`` is writable and ``mib`` is positive."""
    if mib <= 0:
        raise UserError(f"--disk-mib must be positive, not {mib}")
    if not directory.is_dir():
        raise UserError(f"--disk {directory} is not a directory")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"--disk {directory} is not writable")


def measure(directory: Path, size: int) -> DiskSpeed:
    """Write a file of ``size`` bytes (whole MiB) into ``directory`` and read it back in three ways.

    The file is removed in every case. UserError if writing or reading fails.
    """
    try:
        with _nameless_file(directory) as (buffered, direct):
            _fill(buffered, size)
            buffer = _touched_memory(min(size, _LARGEST_BUFFER))
            _drop_cache(buffered)
            cold = _read(buffered, size, buffer)
            _drop_cache(buffered)
            past = _read_direct(direct, size, buffer)
            _read(buffered, size, buffer)
            return DiskSpeed(cold, past, _read(buffered, size, buffer))
    except OSError as error:
        raise UserError(f"cannot measure the disk with {size // MIB} MiB in {directory}: {error.strerror or error}") from error


@contextmanager
def _nameless_file(directory: Path) -> Iterator[tuple[int, int | None]]:
    """Descriptors of a new file, buffered and direct. The file is unlinked at once, so that no crash leaves it behind."""
    with ExitStack() as stack:
        buffered, name = tempfile.mkstemp(prefix="lambdascale-doctor-", suffix=".tmp", dir=directory)
        stack.callback(os.close, buffered)
        try:
            direct = _open_direct(name)
        finally:
            os.unlink(name)
        if direct is not None:
            stack.callback(os.close, direct)
        yield buffered, direct


def _open_direct(name: str) -> int | None:
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise


def _fill(descriptor: int, size: int) -> None:
    """Write random bytes, which no file system can compress or deduplicate, and flush them to the disk."""
    with os.fdopen(os.dup(descriptor), "wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())


def _touched_memory(size: int) -> mmap.mmap:
    """Page-aligned memory (required by O_DIRECT) with its pages already mapped, so that reads do not pay for page faults."""
    memory = mmap.mmap(-1, size)
    for offset in range(0, size, mmap.PAGESIZE):
        memory[offset] = 1
    return memory


def _drop_cache(descriptor: int) -> None:
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _read(descriptor: int, size: int, buffer: mmap.mmap) -> float:
    """Read ``size`` bytes of the file into ``buffer``, which wraps around when full; return the rate in bytes per second."""
    with memoryview(buffer) as view:
        done, start = 0, time.perf_counter()
        while done < size:
            at = done % len(view)
            with view[at : at + min(_READ, size - done)] as part:
                got = os.preadv(descriptor, [part], done)
            if not got:
                raise OSError(errno.EIO, "the file ended early")
            done += got
        return size / (time.perf_counter() - start)


def _read_direct(descriptor: int | None, size: int, buffer: mmap.mmap) -> float | None:
    """Do what ``_read`` does; return None if O_DIRECT is not supported, which some file systems report only when reading."""
    try:
        return None if descriptor is None else _read(descriptor, size, buffer)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
