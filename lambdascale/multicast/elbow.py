"""Number of blocks at the elbow between a multicast's fill (few blocks) and costs per send (many); reference, section 2.1."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2

from lambdascale.core.checks import require


def multicast_s(size_bytes: int, blocks: int, nodes: int, rate: float, overhead_s: float) -> float:
    """Return the seconds of a binomial pipeline among ``nodes`` nodes (source included): each round, a block and an overhead."""
    return (blocks + ceil(log2(nodes)) - 1) * (size_bytes / blocks / rate + overhead_s)


def elbow(size_bytes: int, choices: Sequence[int], nodes: int, rate: float, overhead_s: float, tolerance: float = 0.1) -> int:
    """Return the fewest blocks whose multicast takes at most ``tolerance`` longer than the best choice.

    ``rate`` in bytes/s, ``overhead_s`` per send. UserError without choices or with fewer than 2 nodes. (The point of the curve
    farthest from its chord, another notion of an elbow, was tried: it is near 6 blocks for any large model and 40 % slower than
    the best.)
    """
    require(bool(choices) and nodes >= 2, f"an elbow needs choices and at least 2 nodes, not {list(choices)} and {nodes}")
    times = {blocks: multicast_s(size_bytes, blocks, nodes, rate, overhead_s) for blocks in choices}
    enough = (1 + tolerance) * min(times.values())
    return min(blocks for blocks, time_s in times.items() if time_s <= enough)
