"""Key-value memory of a stage: fixed slots, allocated once. A slot holds one sequence up to ``slot_tokens`` tokens."""

from __future__ import annotations

import mmap
from contextlib import suppress
from math import prod

import torch

from lambdascale.checkpoints import Architecture
from lambdascale.core.checks import require

Tensor = torch.Tensor


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory of zeros, so that masked places never hold a NaN.

    The system zeroes host memory page by page as it is used, so that a replica starts at once. Pages are small, if possible: a
    sequence begins in many places, one for each layer and head, and zeroing a huge page for each takes up to 0.3 s before a
    slot's first token.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        raw.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(raw, dtype=dtype).view(shape)


class KvCache:
    """KV memory. ``keys`` and ``values`` are views of ``both`` (keys, then values).

    Their shape is [layers of the stage, slots, kv heads, slot tokens, head size].
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

    def read(self, slot: int, tokens: int, layers: slice = slice(None)) -> Tensor:
        """Return a copy of a slot's first ``tokens`` tokens in some layers: [2, layers, kv heads, tokens, head size]."""
        return torch.stack((self.keys[layers, slot, :, :tokens], self.values[layers, slot, :, :tokens]))

    def write(self, slot: int, kv: Tensor, layers: slice = slice(None)) -> None:
        """Write to a slot what ``read`` returned for the same number of layers."""
        tokens = kv.shape[3]
        self.keys[layers, slot, :, :tokens] = kv[0]
        self.values[layers, slot, :, :tokens] = kv[1]
