"""xxh3-64 of a block as a whole and of its parts, from pieces in order."""

from __future__ import annotations

import xxhash


class Checksums:
    """Feed it a block with ``update``; ``part_bytes``: the length of every part but the last."""

    def __init__(self, part_bytes: int) -> None:
        self._part_bytes = part_bytes
        self._whole, self._part = xxhash.xxh3_64(), xxhash.xxh3_64()
        self._left = part_bytes  # of the part under way
        self._ended: list[str] = []

    def update(self, data: bytes | memoryview) -> None:
        """The next bytes."""
        self._whole.update(data)
        view = memoryview(data)
        while view:
            piece, view = view[: self._left], view[self._left :]
            self._part.update(piece)
            self._left -= len(piece)
            if not self._left:
                self._ended.append(self._part.hexdigest())
                self._part, self._left = xxhash.xxh3_64(), self._part_bytes

    @property
    def whole(self) -> str:
        """Of all bytes so far, in hexadecimal."""
        return self._whole.hexdigest()

    @property
    def parts(self) -> tuple[str, ...]:
        """Of each part, in hexadecimal, the one under way included."""
        last = () if self._left == self._part_bytes else (self._part.hexdigest(),)
        return (*self._ended, *last)
