"""Small changes to valid messages: bits, cuts, splices, headers that promise too much, and fields of other types."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec

# What a field may become; whole numbers at the edges of types, and what formats have besides.
_NUMBERS = (0, 1, -1, 2, 127, 255, 1 << 16, (1 << 31) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, -(1 << 63), (1 << 64) - 1)
_OTHERS: tuple[Any, ...] = (None, True, False, 0.5, -0.0, 1e308, "", "m", "\0", "x" * 3000, [], {}, [[]], {"a": None})
# Headers of msgpack that announce 4 GiB or 4 billion items, and levels of nesting.
_PROMISES = (
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\1",
)
_LEVELS = (b"\x91", b"\x81\xa1a", b"[", b'{"a":')
_DEPTHS = (3, 200, 2000, 50_000)
LARGEST_BYTES = 1 << 20


class Mutator:
    """Seeded changes. ``decode`` and ``encode`` are those of the messages' format, for changes of fields; None: bytes alone."""

    def __init__(self, rng: Random, decode: Callable[[bytes], Any] | None, encode: Callable[[Any], bytes] | None) -> None:
        self._rng = rng
        self._decode = decode
        self._encode = encode
        self._changes = (self._flip, self._cut, self._splice, self._overwrite, self._insert, self._repeat)

    def __call__(self, data: bytes, other: bytes) -> bytes:
        """Return ``data`` changed in one to three places, 1 MiB at most; parts of ``other``, another message, may be in it."""
        rng = self._rng
        if self._decode is not None and self._encode is not None and rng.random() < 0.5:
            data = self._encode(self._swapped(self._decode(data), self._decode(other)))
            if rng.random() < 0.7:
                return data
        for _ in range(rng.randint(1, 3)):
            data = rng.choice(self._changes)(data, other)[:LARGEST_BYTES]
        return data

    # -- bytes -------------------------------------------------------------------------------------------------------

    def _at(self, data: bytes) -> int:
        return self._rng.randint(0, len(data))

    def _flip(self, data: bytes, other: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(self._rng.choice((1, 1, 2, 8)) if data else 0):
            changed[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
        return bytes(changed)

    def _cut(self, data: bytes, other: bytes) -> bytes:
        begin, end = sorted((self._at(data), self._at(data)))
        return data[:begin] if self._rng.random() < 0.5 else data[:begin] + data[end:]

    def _splice(self, data: bytes, other: bytes) -> bytes:
        return data[: self._at(data)] + other[self._at(other) :]

    def _overwrite(self, data: bytes, other: bytes) -> bytes:
        at, new = (
            self._at(data),
            self._rng.choice((b"\0", b"\xff", b"\xff" * 4, b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\xc0", b'"')),
        )
        return data[:at] + new + data[at + len(new) :]

    def _insert(self, data: bytes, other: bytes) -> bytes:
        rng, at = self._rng, self._at(data)
        new = rng.choice((rng.choice(_PROMISES), rng.choice(_LEVELS) * rng.choice(_DEPTHS), rng.randbytes(rng.randint(1, 9))))
        return data[:at] + new + data[at:]

    def _repeat(self, data: bytes, other: bytes) -> bytes:
        begin, end = sorted((self._at(data), self._at(data)))
        return data[:end] + data[begin:end] * self._rng.choice((1, 1, 50)) + data[end:]

    # -- fields ------------------------------------------------------------------------------------------------------

    def _swapped(self, tree: Any, other: Any) -> Any:
        """Replace, drop, rename or double a field somewhere, or take one of another message for it."""
        places = list(_places(tree))
        if not places:
            return self._value(tree, other)
        container, key = self._rng.choice(places)
        kind = self._rng.random()
        if isinstance(container, dict) and kind < 0.2:
            moved = container.pop(key)
            if kind < 0.1:
                container[f"{key}x"] = moved
        else:
            container[key] = self._value(container[key], other)
        return tree

    def _value(self, old: Any, other: Any) -> Any:
        rng, kind = self._rng, self._rng.random()
        if kind < 0.4:
            return rng.choice(_NUMBERS)
        if kind < 0.7:
            return rng.choice(_OTHERS)
        if kind < 0.9:
            return rng.choice([container[key] for container, key in _places(other)] or [other])
        return [old] * rng.choice((2, 100)) if kind < 0.95 else {"a": old}


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of everything inside."""
    found: list[tuple[Any, Any]] = []
    todo = [tree]
    while todo:
        each = todo.pop()
        keys = list(each) if isinstance(each, dict) else list(range(len(each))) if isinstance(each, list) else []
        found += [(each, key) for key in keys]
        todo += [each[key] for key in keys]
    return found


def of_msgpack(rng: Random) -> Mutator:
    """Return a mutator of msgpack."""
    return Mutator(rng, msgspec.msgpack.decode, msgspec.msgpack.encode)


def of_json(rng: Random) -> Mutator:
    """Return a mutator of JSON."""
    return Mutator(rng, json.loads, lambda tree: json.dumps(tree).encode())


def of_bytes(rng: Random) -> Mutator:
    """Return a mutator of anything else."""
    return Mutator(rng, None, None)
