"""Key-value memory of a stage: fixed slots, allocated once. A slot holds one sequence up to ``slot_tokens`` tokens."""

from __future__ import annotations

from math import prod

import numpy as np
import torch

from lambdascale.checkpoints import Architecture
from lambdascale.core.checks import require

Tensor = torch.Tensor


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, so that masked places never hold a NaN. Host memory is zeroed by the system page by page as it is used: a replica
    starts at once.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


class KvCache:
    """``keys`` and ``values``: [layers of the stage, slots, kv heads, slot tokens, head size], views of ``both`` (keys, then
    values).
    """

    def __init__(
        self, architecture: Architecture, layers: int, slots: int, slot_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        require(slots >= 1 and slot_tokens >= 1, f"a KV cache needs slots and tokens, not {slots} x {slot_tokens}")
        shape = (layers, slots, 2 * architecture.kv_heads, slot_tokens, architecture.head_dim)
        self.slots = slots
        self.slot_tokens = slot_tokens
        self.both = _zeros(shape, dtype, device)
        self.keys, self.values = self.both.chunk(2, dim=2)

    def read(self, slot: int, tokens: int) -> Tensor:
        """A copy of a slot's first ``tokens`` tokens: [2, layers, kv heads, tokens, head size]."""
        return torch.stack((self.keys[:, slot, :, :tokens], self.values[:, slot, :, :tokens]))

    def write(self, slot: int, kv: Tensor) -> None:
        """Put what ``read`` gave into a slot."""
        tokens = kv.shape[3]
        self.keys[:, slot, :, :tokens] = kv[0]
        self.values[:, slot, :, :tokens] = kv[1]
