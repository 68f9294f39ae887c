"""Reading a range of a file into memory, in chunks, by several threads, past the page cache where that is wanted and possible."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from lambdascale.checkpoints.safetensors_file import ALIGNMENT
from lambdascale.core import UserError

Direct = Literal["auto", "always", "never"]


class ChunkReader:
    """``threads`` readers of ``chunk_bytes`` at a time.

    ``direct``: "always" reads with O_DIRECT (UserError where the file system cannot), "never" through the page cache, "auto" with
    O_DIRECT where the file system can; ``used_direct`` tells what the last file was read with.
    """

    def __init__(self, threads: int, chunk_bytes: int, direct: Direct) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="block-reader")
        self._chunk_bytes = max(ALIGNMENT, chunk_bytes // ALIGNMENT * ALIGNMENT)
        self._direct = direct
        self.used_direct: bool | None = None

    def close(self) -> None:
        """Wait for chunks under way and stop the threads."""
        self._pool.shutdown()

    @contextmanager
    def open(self, path: Path) -> Iterator[int]:
        """A descriptor to read chunks from."""
        descriptor = self._open(path)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self, path: Path) -> int:
        if self._direct != "never":
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
        self, descriptor: int, offset: int, target: memoryview, size: int, after: Callable[[int, int], None]
    ) -> list[tuple[int, int, Future[None]]]:
        """Read ``size`` bytes from ``offset`` into ``target``; (begin, end, future) for each chunk, in order.

        ``target`` may be longer, by up to a page: whole pages are read. ``after(begin, end)`` runs in the reader's thread as soon
        as a chunk is there.
        """

        def chunk(begin: int, end: int) -> None:
            whole, at = -(-end // ALIGNMENT) * ALIGNMENT, begin
            while at < end:
                count = os.preadv(descriptor, [target[at:whole]], offset + at)
                if count == 0:
                    raise EOFError(f"the file ends {end - at} bytes too early")
                at += count
            after(begin, end)

        return self.each_chunk(size, chunk)

    def each_chunk(self, size: int, work: Callable[[int, int], None]) -> list[tuple[int, int, Future[None]]]:
        """Have the readers' threads do ``work(begin, end)`` for each chunk of ``size`` bytes; (begin, end, future), in order."""
        ranges = [(begin, min(begin + self._chunk_bytes, size)) for begin in range(0, size, self._chunk_bytes)]
        return [(begin, end, self._pool.submit(work, begin, end)) for begin, end in ranges]
