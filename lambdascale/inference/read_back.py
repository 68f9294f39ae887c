"""Checksums of what lies in a GPU's memory. They are computed by the CPU, so the bytes come back for it, piece by piece."""

from __future__ import annotations

import threading

import torch
import xxhash

from lambdascale.inference import devices

Tensor = torch.Tensor
_PIECE_BYTES = 4 << 20


class ReadBack:
    """Two small pinned buffers: while one is hashed, the next piece is copied into the other. Thread-safe, one at a time."""

    def __init__(self, device: torch.device, piece_bytes: int = _PIECE_BYTES) -> None:
        on_gpu = device.type == "cuda"
        self._device = device
        self._buffers = [torch.empty(piece_bytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        # Its own: it does not wait for what the GPU computes.
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()

    def xxh3_64(self, data: Tensor) -> str:
        """The checksum of a flat uint8 tensor on the device, in hex."""
        devices.use(self._device)
        found = xxhash.xxh3_64()
        step = self._buffers[0].numel()
        pieces = [data[begin : begin + step] for begin in range(0, data.numel(), step)]
        with self._lock:
            for index in range(len(pieces) + 1):
                if self._stream is not None:
                    self._stream.synchronize()
                if index < len(pieces):
                    self._fetch(pieces[index], index)
                if index:
                    found.update(self._buffer(pieces[index - 1], index - 1).numpy().data)
        return found.hexdigest()

    def _buffer(self, piece: Tensor, index: int) -> Tensor:
        return self._buffers[index % 2][: piece.numel()]

    def _fetch(self, piece: Tensor, index: int) -> None:
        with torch.cuda.stream(self._stream):
            self._buffer(piece, index).copy_(piece, non_blocking=True)
