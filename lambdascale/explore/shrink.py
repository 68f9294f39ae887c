"""Shrinking: the faults without which a failing scenario does not fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def shrink(faults: int, fails: Callable[[Sequence[int]], bool]) -> list[int]:
    """Return a subset of the indices below ``faults`` that still fails, and fails no more without any one of them.

    Delta debugging (Zeller and Hildebrandt, 2002): halves, then quarters, and so on are left out; ``fails`` runs with those kept.
    """
    kept = list(range(faults))
    parts = 2
    while kept:
        size = -(-len(kept) // parts)
        for begin in range(0, len(kept), size):
            rest = kept[:begin] + kept[begin + size :]
            if fails(rest):
                kept, parts = rest, max(parts - 1, 2)
                break
        else:
            if size == 1:
                return kept
            parts = min(2 * parts, len(kept))
    return kept
