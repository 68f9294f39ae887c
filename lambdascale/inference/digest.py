"""Digests of blocks in the memory that holds them: on a GPU by one kernel, at its memory's rate, on a CPU by numpy.

Both give the same numbers. lambdascale.checkpoints.checksums defines them; blocks.json has those of packed models.
"""

from __future__ import annotations

import numpy as np
import torch

from lambdascale.checkpoints.checksums import WORD_BYTES, Checksums, Words, combined, finished, mixed_sum
from lambdascale.checkpoints.packing import PART_BYTES
from lambdascale.core.checks import require
from lambdascale.inference import devices

Tensor = torch.Tensor
_BLOCK, _ROUNDS = 1024, 8


def block_digest(data: Tensor, part_bytes: int = PART_BYTES) -> int:
    """Return the digest of a block, a flat uint8 tensor on any device, with parts of ``part_bytes``: 64 bits, unsigned."""
    return combined(part_digests(data, part_bytes))


def part_digests(data: Tensor, part_bytes: int = PART_BYTES) -> Words:
    """Return the digest of each part of ``part_bytes`` bytes (whole words) of a flat uint8 tensor, as uint64.

    The last part may be shorter. On a GPU they are computed in the calling thread's current stream, and the call waits for
    them. UserError for other tensors.
    """
    require(data.dtype is torch.uint8 and data.dim() == 1, f"digests are of flat uint8 tensors, not {data.dtype} {data.dim()}-d")
    require(part_bytes > 0 and part_bytes % WORD_BYTES == 0, f"part_bytes must be a multiple of {WORD_BYTES}, not {part_bytes}")
    if not data.numel():
        return np.empty(0, dtype=np.uint64)
    if data.device.type == "cpu":
        checksums = Checksums(part_bytes)
        checksums.update(data.numpy().data)
        return np.array([int(digest, 16) for digest in checksums.digests], dtype=np.uint64)
    return _on_gpu(data, part_bytes)


def _on_gpu(data: Tensor, part_bytes: int) -> Words:
    from lambdascale.inference import kernels

    require(data.data_ptr() % WORD_BYTES == 0, "the memory of a digest on a GPU must begin with a whole word")
    devices.use(data.device)
    size, part_words = data.numel(), part_bytes // WORD_BYTES
    parts, whole = -(-size // part_bytes), size // WORD_BYTES * WORD_BYTES
    sums = torch.zeros(parts, dtype=torch.long, device=data.device)
    words = data[:whole].view(torch.long)
    if len(words):
        grid = (parts, -(-part_words // (_BLOCK * _ROUNDS)))
        kernels.digest_kernel[grid](words, sums, len(words), part_words, BLOCK=_BLOCK, ROUNDS=_ROUNDS, num_warps=4)
    totals: Words = sums.cpu().numpy().view(np.uint64)
    if whole < size:
        last = torch.zeros(WORD_BYTES, dtype=torch.uint8)
        last[: size - whole] = data[whole:]
        totals[-1:] += np.uint64(mixed_sum(last.numpy().view("<u8"), whole % part_bytes // WORD_BYTES))
    sizes = np.full(parts, part_bytes, dtype=np.uint64)
    sizes[-1] = size - (parts - 1) * part_bytes
    return finished(totals, sizes)
