"""Key-value memory of a stage: fixed slots, allocated once. A slot holds one sequence up to ``slot_tokens`` tokens."""

from __future__ import annotations

import torch

from lambdascale.checkpoints import Architecture
from lambdascale.core.checks import require

Tensor = torch.Tensor


class KvCache:
    """``keys`` and ``values``: [layers of the stage, slots, kv heads, slot tokens, head size]."""

    def __init__(
        self, architecture: Architecture, layers: int, slots: int, slot_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        require(slots >= 1 and slot_tokens >= 1, f"a KV cache needs slots and tokens, not {slots} x {slot_tokens}")
        shape = (layers, slots, architecture.kv_heads, slot_tokens, architecture.head_dim)
        self.slots = slots
        self.slot_tokens = slot_tokens
        # Zeros, so that masked places never hold a NaN, and so that the pages are touched before the first request.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def read(self, slot: int, tokens: int) -> Tensor:
        """A copy of a slot's first ``tokens`` tokens: [2, layers, kv heads, tokens, head size]."""
        return torch.stack((self.keys[:, slot, :, :tokens], self.values[:, slot, :, :tokens]))

    def write(self, slot: int, kv: Tensor) -> None:
        """Put what ``read`` gave into a slot."""
        tokens = kv.shape[3]
        self.keys[:, slot, :, :tokens] = kv[0]
        self.values[:, slot, :, :tokens] = kv[1]
