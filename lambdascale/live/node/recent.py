"""A set that forgets: keys matter only while messages sent before are still under way."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Recent(Generic[Key]):
    """The last ``limit`` keys added, oldest forgotten first.

    Messages of different senders overtake each other by no more than connections buffer; no node sees 1024 instances come and go
    in that time.
    """

    def __init__(self, limit: int = 1024) -> None:
        self._limit = limit
        self._keys: dict[Key, None] = {}

    def add(self, key: Key) -> None:
        """Add a key as the newest, and forget the oldest beyond the limit."""
        self._keys.pop(key, None)
        self._keys[key] = None
        if len(self._keys) > self._limit:
            del self._keys[next(iter(self._keys))]

    def __contains__(self, key: Key) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        """Number of keys kept."""
        return len(self._keys)
