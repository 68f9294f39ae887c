"""Permission for a peer to write to this node's memory: memory windows, each open as long as a plan has the peer write.

A window of type 2 belongs to one queue pair: its key is of no use to anybody else, and of none to the peer once the window is
closed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lambdascale.transport.rdma.device import Region
    from lambdascale.transport.rdma.lane import Lane, Window
    from lambdascale.transport.rdma.outbox import Outbox


def pack_keys(keys: Sequence[int]) -> bytes:
    """Encode the keys of all rails for a frame. No keys: the windows are closed."""
    return struct.pack(f"!{len(keys)}I", *keys)


def unpack_keys(data: memoryview) -> list[int]:
    """Decode what pack_keys made. ValueError for anything else."""
    if len(data) % 4:
        raise ValueError(f"keys of {len(data)} bytes")
    return list(struct.unpack(f"!{len(data) // 4}I", data))


class _Opening:
    """Windows on all rails, opened together."""

    def __init__(self, windows: list[Window]) -> None:
        self.windows = windows
        self.unbound = len(windows)
        self.wanted = True

    def close(self) -> None:
        for window in self.windows:
            window.close()


class Gate:
    """Windows for one peer, open while at least one plan admits it. Called under the connection's lock, which is re-entrant."""

    def __init__(self, lanes: Sequence[Lane], outbox: Outbox, region: Region | None, lock: AbstractContextManager[bool]) -> None:
        self._lanes, self._outbox, self._region, self._lock = lanes, outbox, region, lock
        self._plans = 0
        self._openings: list[_Opening] = []  # the last may be open, those before are to be closed once they are bound

    def admit(self) -> None:
        """Open the window for one more plan."""
        self._plans += 1
        if self._plans > 1 or self._region is None:
            return
        opening = _Opening([lane.window(self._region, rail) for rail, lane in enumerate(self._lanes)])
        self._openings.append(opening)
        for rail, window in enumerate(opening.windows):
            self._outbox.bind(rail, window, lambda: self._bound(opening))

    def dismiss(self) -> None:
        """Close the window for one plan. Everything that the peer had to write for it has arrived.

        A plan that an earlier connection admitted does not count here.
        """
        self._plans = max(0, self._plans - 1)
        if self._plans or not self._openings:
            return
        opening = self._openings[-1]
        opening.wanted = False
        if not opening.unbound:
            self._outbox.tell_keys(b"")
            self._close(opening)

    def _bound(self, opening: _Opening) -> None:
        with self._lock:  # completions come without it
            opening.unbound -= 1
            if opening.unbound:
                return
            if opening.wanted:
                self._outbox.tell_keys(pack_keys([window.key for window in opening.windows]))
            else:
                self._close(opening)

    def _close(self, opening: _Opening) -> None:
        self._openings.remove(opening)
        opening.close()

    def close(self) -> None:
        """Close all windows, before the queue pairs they are bound to."""
        for opening in self._openings:
            opening.close()
        self._openings.clear()
