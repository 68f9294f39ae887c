"""k-way transmission: members of the sub-groups, and orders in which their sources inject the blocks (paper, section 4.3)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

Order = Literal["shift", "half", "none"]
Chunks = Literal["contiguous", "round_robin"]


def near_equal_groups(sources: int, destinations: int) -> tuple[tuple[int, ...], ...]:
    """Split destinations sources..sources+destinations-1 over the sources, as evenly as it goes, each source first in its group.

    Returns as many groups as sources, but no more than destinations (and at least one).
    """
    count = max(1, min(sources, destinations))
    bounds = [sources + destinations * i // count for i in range(count + 1)]
    return tuple((i, *range(bounds[i], bounds[i + 1])) for i in range(count))


def chunk_blocks(blocks: int, count: int, chunks: Chunks = "contiguous") -> tuple[tuple[int, ...], ...]:
    """Deal blocks to ``count`` chunks: contiguous and near-equal, or one by one in turn (the prototype's way)."""
    if chunks == "round_robin":
        return tuple(tuple(range(i, blocks, count)) for i in range(count))
    bounds = [blocks * i // count for i in range(count + 1)]
    return tuple(tuple(range(bounds[i], bounds[i + 1])) for i in range(count))


def injection_orders(
    blocks: int, groups: int, order: Order = "shift", chunks: Chunks = "contiguous"
) -> tuple[tuple[int, ...], ...]:
    """Order in which the source of each sub-group sends the blocks.

    "shift": sub-group i starts with chunk i and goes round; "half": every odd sub-group starts half-way; "none": all alike.
    """
    dealt = chunk_blocks(blocks, groups, chunks)
    if order == "none":
        starts = [0] * groups
    elif order == "half":
        starts = [i % 2 * (groups // 2) for i in range(groups)]
    else:
        starts = list(range(groups))
    return tuple(tuple(b for step in range(groups) for b in dealt[(start + step) % groups]) for start in starts)


def orders_between(blocks: int, starts: Collection[int], count: int) -> tuple[tuple[int, ...], ...]:
    """``count`` further orders of the blocks, which begin as far as possible behind those that begin with ``starts``.

    Each goes round from its first block. So the nodes that receive by all of them soon hold the model together.
    """
    if not starts:
        return injection_orders(blocks, count)
    begins = sorted(set(starts))
    gaps = [(after - begin - 1) % blocks + 1 for begin, after in zip(begins, (*begins[1:], begins[0]), strict=True)]
    within = [0] * len(gaps)
    for _ in range(count):
        widest = max(range(len(gaps)), key=lambda i: (gaps[i] / (within[i] + 1), -i))
        within[widest] += 1
    first = [
        (begin + gap * step // (orders + 1)) % blocks
        for begin, gap, orders in zip(begins, gaps, within, strict=True)
        for step in range(1, orders + 1)
    ]
    return tuple((*range(start, blocks), *range(start)) for start in first)
