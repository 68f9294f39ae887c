"""Reads of a range of a file into memory, in chunks, by several threads, past the page cache if asked and possible."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import xxhash
from torch import Tensor

from lambdascale.checkpoints.safetensors_file import ALIGNMENT
from lambdascale.core import UserError
from lambdascale.inference.staging import Staging

Direct = Literal["auto", "always", "never"]
# Bytes read at a time through the page cache when they are to be hashed: few enough to be still in a core's cache then. Where
# plain reads keep all cores busy, verified reads are so 85 % as fast, instead of 65 % (tests/benchmarks/test_bench_store.py).
_HOT_BYTES = 512 << 10
# Number of pages probed, and the largest share of them that may be missing from the page cache in a file that counts as cached.
# Such a file is read through the cache: missing pages a third slower than past it, cached ones many times faster
# (results/LOG.md).
_PROBES = 64
_MOST_MISSING = 0.1


class ChecksumError(Exception):
    """Bytes on disk that differ from those that were packed."""


@dataclass(frozen=True)
class Parts:
    """Checksums to verify a range against: the xxh3-64 checksums of its parts of ``size`` bytes each, the last may be shorter."""

    size: int
    checksums: Sequence[str]


class ChunkReader:
    """A pool of ``threads`` that read ``chunk_bytes`` at a time.

    ``direct``: "always" reads with O_DIRECT (UserError where the file system cannot), "never" through the page cache, "auto" with
    O_DIRECT where the file system can and the file is not in the page cache; ``used_direct`` is how the last file was read.
    """

    def __init__(self, threads: int, chunk_bytes: int, direct: Direct) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="block-reader")
        self.threads = threads
        self.chunk_bytes = max(ALIGNMENT, chunk_bytes // ALIGNMENT * ALIGNMENT)
        self._direct = direct
        self.used_direct: bool | None = None

    def close(self) -> None:
        """Wait for chunks under way and stop the threads."""
        self._pool.shutdown()

    @contextmanager
    def open(self, path: Path) -> Iterator[int]:
        """Yield a descriptor to read chunks from."""
        descriptor = self._open(path)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self, path: Path) -> int:
        if self._direct == "always" or (self._direct == "auto" and not cached(path)):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                if self._direct == "always":
                    raise UserError(f"the file system of {path} does not support O_DIRECT; use direct=auto or never") from error
            else:
                self.used_direct = True
                return descriptor
        self.used_direct = False
        return os.open(path, os.O_RDONLY)

    def read(
        self,
        descriptor: int,
        offset: int,
        target: memoryview,
        size: int,
        after: Callable[[int, int], None],
        parts: Parts | None = None,
    ) -> list[Future[None]]:
        """Read ``size`` bytes from ``offset`` into ``target``, verified if ``parts`` are given; return a future for each chunk.

        ``target`` may be longer, by up to a page: whole pages are read. ``after(begin, end)`` runs in the reader's thread as soon
        as a chunk has arrived. The futures raise OSError, EOFError and ChecksumError.
        """
        # Past the page cache the disk is the bottleneck, and long reads are faster.
        hot = self.chunk_bytes if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT else _HOT_BYTES

        def chunk(begin: int, end: int) -> None:
            if parts is None:
                _read(descriptor, offset, target, begin, end)
            else:
                for part in range(begin, end, parts.size):
                    _read_part(descriptor, offset, target, part, min(part + parts.size, end), hot, parts)
            after(begin, end)

        return self.each_chunk(size, chunk, 1 if parts is None else parts.size)

    def read_staged(
        self, descriptor: int, offset: int, target: Tensor, size: int, staging: Staging, parts: Parts | None = None
    ) -> list[Future[None]]:
        """Read as ``read`` does, into memory of a GPU by way of ``staging``; the last copies may still be under way."""

        def chunk(begin: int, end: int) -> None:
            unit = end - begin if parts is None else parts.size
            for part in range(begin, end, unit):
                _stage_part(descriptor, offset, target, part, min(part + unit, end), staging, parts)

        return self.each_chunk(size, chunk, 1 if parts is None else parts.size)

    def each_chunk(self, size: int, work: Callable[[int, int], None], unit: int = 1) -> list[Future[None]]:
        """Call ``work(begin, end)`` in the readers' threads for each chunk, of whole units; return the futures in order."""
        step = max(unit, self.chunk_bytes // unit * unit)
        return [self._pool.submit(work, begin, min(begin + step, size)) for begin in range(0, size, step)]


def cached(path: Path) -> bool:
    """True if nearly all sampled pages of a file are in the page cache; False where the system cannot tell."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        places = range(0, size, max(ALIGNMENT, size // _PROBES))
        missing = sum(not _in_memory(descriptor, place) for place in places)
    except OSError:  # a file system or kernel that cannot answer without reading
        return False
    finally:
        os.close(descriptor)
    return missing <= len(places) * _MOST_MISSING


def _in_memory(descriptor: int, offset: int) -> bool:
    """True if a byte can be read without waiting for the disk."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False


def _read(descriptor: int, offset: int, target: memoryview, begin: int, end: int) -> None:
    """Read bytes [begin, end) of the range that starts at ``offset``, and the rest of the last page."""
    whole, at = -(-end // ALIGNMENT) * ALIGNMENT, begin
    while at < end:
        count = os.preadv(descriptor, [target[at:whole]], offset + at)
        if count == 0:
            raise EOFError(f"the file ends {end - at} bytes too early")
        at += count


def _read_part(descriptor: int, offset: int, target: memoryview, begin: int, end: int, hot: int, parts: Parts) -> None:
    """Read a part ``hot`` bytes at a time, and hash each piece right away."""
    checksum = xxhash.xxh3_64()
    for at in range(begin, end, hot):
        until = min(at + hot, end)
        _read(descriptor, offset, target, at, until)
        checksum.update(target[at:until])
    _compare(checksum, begin, end, parts)


def _stage_part(
    descriptor: int, offset: int, target: Tensor, begin: int, end: int, staging: Staging, parts: Parts | None
) -> None:
    """Read a part by way of ``staging``, one piece at a time. A part that turns out damaged has been copied all the same."""
    checksum = None if parts is None else xxhash.xxh3_64()
    for at in range(begin, end, staging.piece_bytes):
        size = min(staging.piece_bytes, end - at)
        with staging.piece() as piece:
            memory = piece.memory.numpy().data
            _read(descriptor, offset + at, memory, 0, size)
            if checksum is not None:
                checksum.update(memory[:size])
            staging.send(piece, target[at : at + size])
    if checksum is not None and parts is not None:
        _compare(checksum, begin, end, parts)


def _compare(checksum: xxhash.xxh3_64, begin: int, end: int, parts: Parts) -> None:
    found, wanted = checksum.hexdigest(), parts.checksums[begin // parts.size]
    if found != wanted:
        raise ChecksumError(f"checksum of bytes {begin} to {end - 1} is {found}, the manifest says {wanted}")
