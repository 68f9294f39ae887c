"""Stages that nobody uses any more, kept for the next one of the same blocks in the same memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

from lambdascale.inference.stage import TransformerStage

#: Bytes that a GPU has free beside kept stages: what iterations and their recordings take.
ROOM_BYTES = 4 << 30


def free_bytes(device: torch.device) -> int:
    """Return the memory of a GPU that torch can still give out: what is free, and what torch keeps of freed tensors."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


class KeptStages:
    """The newest stages with recordings, at most ``most``. Used by one thread.

    A recording reads weights and KV at fixed addresses and takes 20 to 40 ms under load, for each form of iterations
    (results/LOG.md). A model that comes back to a node mostly gets the memory that it had. ``free``: free bytes of a device.
    """

    def __init__(self, most: int = 4, free: Callable[[torch.device], int] = free_bytes) -> None:
        self._most = most
        self._free = free
        self._stages: dict[Hashable, TransformerStage] = {}

    def __len__(self) -> int:
        """Number of stages kept."""
        return len(self._stages)

    @contextmanager
    def borrowed(
        self, key: Hashable, make: Callable[[], TransformerStage], kv_bytes: int, device: torch.device
    ) -> Iterator[TransformerStage]:
        """Yield the stage kept under a key, with its KV cleared, or a new one; keep it afterwards.

        ``kv_bytes``: size of the new one's KV. Others are dropped if the device has no room for it beside them. A stage of which
        nothing is recorded, or that leaves too little memory, is not kept. Raises what ``make`` raises.
        """
        stage = self._stages.pop(key, None)
        if stage is not None:
            stage.kv.both.zero_()
        else:
            if self._stages and self._free(device) < kv_bytes + ROOM_BYTES:
                self._stages.clear()
            stage = make()
        yield stage
        if stage.recordings and self._free(stage.device) >= ROOM_BYTES:
            self._stages[key] = stage
            if len(self._stages) > self._most:
                del self._stages[next(iter(self._stages))]
