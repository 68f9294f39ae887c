"""Arenas: extents of memory that are taken and given back."""

from __future__ import annotations

import torch

from lambdascale.inference.arena import Arena, Extents
from tests.store.stores import PAGE


class TestExtents:
    def test_neighbours_are_joined_again(self) -> None:
        extents = Extents(4 * PAGE)
        offsets = [extents.take(PAGE) for _ in range(4)]
        assert offsets == [0, PAGE, 2 * PAGE, 3 * PAGE]
        assert extents.take(1) is None
        for offset in (0, 2 * PAGE, PAGE):
            extents.give_back(offset)
        assert extents.take(3 * PAGE) == 0

    def test_the_smallest_hole_that_fits(self) -> None:
        extents = Extents(10 * PAGE)
        first, second, third, _ = (extents.take(size * PAGE) for size in (4, 1, 2, 3))
        extents.give_back(first)
        extents.give_back(third)
        assert extents.take(2 * PAGE) == third
        assert second == 4 * PAGE


def test_an_arena_in_memory_that_is_given() -> None:
    """Whole pages of it."""
    memory = torch.zeros(3 * PAGE + 5, dtype=torch.uint8)
    arena = Arena(3 * PAGE + 5, torch.device("cpu"), "an arena", memory)
    assert arena.extents.capacity == arena.bytes.numel() == 3 * PAGE
    arena.view(PAGE, 2)[:] = 7
    assert memory[PAGE : PAGE + 2].tolist() == [7, 7]
