"""A ring of pieces of registered host memory, through which threads bring bytes to a GPU at the rate of its bus.

A GPU copies from registered memory only at that rate, and to register memory for a whole model takes seconds. The ring is
registered in milliseconds. Each thread fills a piece and has it copied; the piece is free again when the copy is complete.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lambdascale.inference import devices
from lambdascale.inference.arena import Arena

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Piece:
    """Memory of the ring. ``copied``: an event behind its last copy, None on a CPU, where copies are complete at once."""

    memory: Tensor
    copied: Any


class Staging:
    """``pieces`` pieces of ``piece_bytes`` each (whole pages), for copies to ``device`` in ``stream`` (None: on a CPU).

    Thread-safe: pieces that are free wait in a queue.
    """

    def __init__(self, device: torch.device, stream: Any, pieces: int, piece_bytes: int) -> None:
        self.piece_bytes = piece_bytes
        self._device, self._stream = device, stream
        self._arena = Arena(pieces * piece_bytes, torch.device("cpu"), "a staging ring")
        self._free: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        for index in range(pieces):
            event = None if stream is None else torch.cuda.Event()
            self._free.put(Piece(self._arena.view(index * piece_bytes, piece_bytes), event))

    def close(self) -> None:
        """Free the memory, after the last copy."""
        if self._stream is not None:
            self._stream.synchronize()
        self._arena.close()

    @contextmanager
    def piece(self) -> Iterator[Piece]:
        """Lend a piece that may be overwritten; wait until one is free."""
        piece = self._free.get()
        try:
            if piece.copied is not None:
                piece.copied.synchronize()
            yield piece
        finally:
            self._free.put(piece)

    def send(self, piece: Piece, target: Tensor) -> None:
        """Begin to copy the first bytes of a piece to ``target`` on the device."""
        source = piece.memory[: len(target)]
        if self._stream is None:
            target.copy_(source)
            return
        devices.use(self._device)  # the calling thread is one of many
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            piece.copied.record(self._stream)
