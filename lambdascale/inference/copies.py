"""Copies between a GPU and host memory that leave room for others: few are under way at a time."""

from __future__ import annotations

import queue
from typing import Any

import torch

from lambdascale.inference import devices

Tensor = torch.Tensor

# Copies of 16 MiB take 0.3 ms each over a PCIe of 52 GB/s (an H200's): few enough for iterations not to wait long, and enough to
# keep the bus busy. Measured: results/LOG.md, 2026-11-28.
MOST = 4


class BoundedCopies:
    """Copies in ``stream`` (None: on a CPU, where each is complete at once), at most ``most`` under way. Thread-safe.

    A GPU does the copies of one direction one after the other, whatever streams they are in. The few bytes that every iteration
    sends, such as token ids, wait for all that were queued before them.
    """

    def __init__(self, device: torch.device, stream: Any, most: int = MOST) -> None:
        self._device, self._stream = device, stream
        # Events behind the last copies, the oldest first.
        self._behind: queue.SimpleQueue[Any] = queue.SimpleQueue()
        if stream is not None:
            for _ in range(most):
                self._behind.put(torch.cuda.Event(blocking=True))

    def start(self, target: Tensor, source: Tensor) -> None:
        """Begin a copy, once fewer than ``most`` are under way; host memory has to be registered."""
        if self._stream is None:
            target.copy_(source)
            return
        devices.use(self._device)  # the calling thread may be one of many
        event = self._behind.get()
        try:
            event.synchronize()
            with torch.cuda.stream(self._stream):
                target.copy_(source, non_blocking=True)
                event.record(self._stream)
        finally:
            self._behind.put(event)

    def wait(self) -> None:
        """Wait until all copies are complete."""
        if self._stream is not None:
            self._stream.synchronize()
