"""Memory for the intermediate results of a stage, kept from one iteration to the next.

New memory costs a page fault for each 4 KiB, and a prefill of 1,024 tokens of a small model would write 19 MB of it in every
layer (results/LOG.md says what that costs).
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


class Scratch:
    """Named buffers that grow to the largest iteration so far; a name's next use overwrites its last.

    ``rows``: they have room for so many from the start, and remain where they are also when larger ones replace them, for
    recordings, which hold addresses.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, rows: int = 0) -> None:
        self._dtype, self._device, self._rows = dtype, device, rows
        self._buffers: dict[str, Tensor] = {}
        self._outgrown: list[Tensor] = []

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialised contiguous buffer [rows, columns], of the stage's type unless ``dtype`` is given."""
        size, buffer = rows * columns, self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            # The old buffer is freed first: the device may not have room for both.
            self._buffers.pop(name, None)
            room = max(rows, self._rows) * columns
            if self._rows and buffer is not None:
                self._outgrown.append(buffer)
            buffer = self._buffers[name] = torch.empty(room, dtype=dtype or self._dtype, device=self._device)
        return buffer[:size].view(rows, columns)
