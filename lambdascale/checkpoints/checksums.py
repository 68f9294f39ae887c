"""Checksums of a block as a whole and of its parts, from pieces in order.

Two kinds: xxh3-64, the fastest on a CPU, and a digest that thousands of threads can compute together, for blocks in a GPU's
memory. The digest of a part is the sum, modulo 2^64, of its 8-byte little-endian words, each mixed together with its place (the
finaliser of splitmix64, by Steele, Lea and Flood, OOPSLA 2014, of word + (place + 1) x the golden ratio); the sum is then mixed
with the length. Mixing is a bijection: a change within one word, of a single bit for instance, always changes the digest; words
that change places, or several that change, go undetected once in 2^64. It guards against faults, not against attackers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WORD_BYTES = 8
_MASK = (1 << 64) - 1
# Words mixed at a time: few enough that the passes over them stay in a core's nearest cache.
_STEP = 1 << 13

Words = np.ndarray[Any, np.dtype[np.uint64]]


class Checksums:
    """Feed it a block with ``update``; ``part_bytes``, whole words: the length of every part but the last."""

    def __init__(self, part_bytes: int) -> None:
        self._part_bytes = part_bytes
        self._whole = xxhash.xxh3_64()
        self._part = _Part()
        self._left = part_bytes  # of the part under way
        self._ended: list[_Part] = []

    def update(self, data: bytes | memoryview) -> None:
        """Add the next bytes."""
        self._whole.update(data)
        view = memoryview(data)
        while view:
            piece, view = view[: self._left], view[self._left :]
            self._part.update(piece)
            self._left -= len(piece)
            if not self._left:
                self._ended.append(self._part)
                self._part, self._left = _Part(), self._part_bytes

    @property
    def whole(self) -> str:
        """xxh3-64 of all bytes so far, in hexadecimal."""
        return self._whole.hexdigest()

    @property
    def parts(self) -> tuple[str, ...]:
        """xxh3-64 of each part, in hexadecimal, the one under way included."""
        return tuple(part.xxh3_64.hexdigest() for part in self._all())

    @property
    def digests(self) -> tuple[str, ...]:
        """Digest of each part, in hexadecimal, the one under way included."""
        return tuple(f"{part.digest():016x}" for part in self._all())

    def _all(self) -> list[_Part]:
        return self._ended if self._left == self._part_bytes else [*self._ended, self._part]


class _Part:
    """The two checksums of a part."""

    def __init__(self) -> None:
        self.xxh3_64 = xxhash.xxh3_64()
        self._sum = self._size = 0
        self._rest = b""  # of a word that is not complete

    def update(self, piece: memoryview) -> None:
        self.xxh3_64.update(piece)
        place = self._size // WORD_BYTES
        self._size += len(piece)
        if self._rest:
            begin = min(len(piece), WORD_BYTES - len(self._rest))
            self._rest, piece = self._rest + bytes(piece[:begin]), piece[begin:]
            if len(self._rest) < WORD_BYTES:
                return
            self._add(memoryview(self._rest), place)
            place += 1
        whole = len(piece) // WORD_BYTES * WORD_BYTES
        self._add(piece[:whole], place)
        self._rest = bytes(piece[whole:])

    def _add(self, words: memoryview, place: int) -> None:
        self._sum = (self._sum + mixed_sum(np.frombuffer(words, dtype="<u8"), place)) & _MASK

    def digest(self) -> int:
        """Digest of the bytes so far; a last word is filled up with zeros."""
        total = self._sum
        if self._rest:
            last = np.frombuffer(self._rest.ljust(WORD_BYTES, b"\0"), dtype="<u8")
            total += mixed_sum(last, self._size // WORD_BYTES)
        return int(finished(np.array([total & _MASK], dtype=np.uint64), np.array([self._size], dtype=np.uint64))[0])


def mixed_sum(words: Words, place: int) -> int:
    """Sum of the mixed ``words``, the first of which is word ``place`` of its part."""
    count = min(_STEP, len(words))
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    mixed, shifted = np.empty(count, dtype=np.uint64), np.empty(count, dtype=np.uint64)
    total = 0
    for begin in range(0, len(words), _STEP):
        size = min(_STEP, len(words) - begin)
        x, y = mixed[:size], shifted[:size]
        np.add(words[begin : begin + size], np.uint64((place + begin) * GOLDEN & _MASK), out=x)
        np.add(x, steps[:size], out=x)
        for shift, factor in ((30, FIRST), (27, SECOND)):
            np.right_shift(x, np.uint64(shift), out=y)
            np.bitwise_xor(x, y, out=x)
            np.multiply(x, np.uint64(factor), out=x)
        np.right_shift(x, np.uint64(31), out=y)
        np.bitwise_xor(x, y, out=x)
        total += int(np.add.reduce(x))
    return total & _MASK


def finished(totals: Words, sizes_bytes: Words) -> Words:
    """Digests of parts of these sizes whose mixed words add up to ``totals`` (uint64, one element a part)."""
    return _mixed(totals + sizes_bytes * np.uint64(GOLDEN))


def combined(digests: Words) -> int:
    """Digest of a block out of those of its parts, in order."""
    places = np.arange(1, len(digests) + 1, dtype=np.uint64)
    total = int(np.add.reduce(_mixed(digests + places * np.uint64(GOLDEN)))) + len(digests) * GOLDEN
    return int(_mixed(np.array([total & _MASK], dtype=np.uint64))[0])


def _mixed(values: Words) -> Words:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(SECOND)
    return values ^ (values >> np.uint64(31))
