"""Memory for what a stage computes on the way, kept from one iteration to the next.

Fresh memory costs a page fault for each 4 KiB, and a prefill of 1,024 tokens of a small model would write 19 MB of it in every
layer (results/LOG.md has what that costs).
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


class Scratch:
    """Named buffers that grow to the largest iteration so far; a name's next use overwrites its last."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """[rows, columns], contiguous, with anything in it; of the stage's type unless ``dtype`` says otherwise."""
        size, buffer = rows * columns, self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            # The old one goes first: both at once need not fit.
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = torch.empty(size, dtype=dtype or self._dtype, device=self._device)
        return buffer[:size].view(rows, columns)
