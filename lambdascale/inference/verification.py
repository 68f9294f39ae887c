"""The choice of the blocks whose checksums a store compares."""

from __future__ import annotations

from typing import Literal

Verify = Literal["off", "sampled", "full"]
SAMPLED_STEP = 8


def is_verified(verify: Verify, block: int, blocks: int) -> bool:
    """True if the checksum of ``block`` (of ``blocks`` in its model) is compared.

    "full" compares every block, "off" none. "sampled" compares the first, the last and every eighth block (0, 8, 16, ...): the
    same blocks on every node and in every run.
    """
    if verify == "sampled":
        return block % SAMPLED_STEP == 0 or block == blocks - 1
    return verify == "full"
