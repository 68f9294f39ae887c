"""Arenas: extents of memory that are taken and given back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lambdascale.inference.arena import Arena, Extents
from lambdascale.inference.residency import Residency
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

    def test_a_piece_goes_back_to_its_home(self) -> None:
        """The home must be free as a whole; what is left of its hole stays free, on both sides."""
        extents = Extents(10 * PAGE)
        assert extents.take(2 * PAGE, home=3 * PAGE) == 3 * PAGE
        assert extents.take(PAGE, home=4 * PAGE) == 0, "another piece lies there: the smallest hole that fits"
        assert extents.take(5 * PAGE, home=5 * PAGE) == 5 * PAGE
        assert extents.free_bytes == 2 * PAGE
        assert extents.take(2 * PAGE, home=9 * PAGE) == PAGE
        for offset in (0, PAGE, 3 * PAGE, 5 * PAGE):
            extents.give_back(offset)
        assert extents.take(10 * PAGE) == 0


class TestResidency:
    @pytest.mark.parametrize("missing", [(1, 2, 7), (1, 2, 6, 7), (7, 2, 1, 0), (3, 5, 6, 0)])
    def test_blocks_that_come_again_have_room(self, missing: tuple[int, ...]) -> None:
        """A model's ends are larger than its middle: block 1 in the place of block 7 left that none, and the transfer failed."""
        model: Any = SimpleNamespace(block_bytes=tuple(pages * PAGE for pages in (3, 2, 2, 2, 2, 2, 2, 3)))
        residency = Residency("gpu", Arena(18 * PAGE, torch.device("cpu"), "an arena"))
        residency.take_all(model, [("m", block) for block in range(8)])
        for _ in range(2):
            for block in missing:
                residency.drop(("m", block))
            residency.take_all(model, [("m", block) for block in missing])
        assert residency.arena.extents.free_bytes == 0

    def test_a_new_block_does_not_take_the_home_of_one_that_comes_again(self) -> None:
        model: Any = SimpleNamespace(block_bytes=(2 * PAGE, PAGE, PAGE))
        residency = Residency("gpu", Arena(4 * PAGE, torch.device("cpu"), "an arena"))
        residency.take_all(model, [("m", 1), ("m", 0)])
        residency.drop(("m", 1))
        residency.drop(("m", 0))
        residency.take_all(model, [("m", 2), ("m", 0), ("m", 1)])
        assert residency.offsets == {("m", 1): 0, ("m", 0): PAGE, ("m", 2): 3 * PAGE}


def test_an_arena_in_memory_that_is_given() -> None:
    """Whole pages of it."""
    memory = torch.zeros(3 * PAGE + 5, dtype=torch.uint8)
    arena = Arena(3 * PAGE + 5, torch.device("cpu"), "an arena", memory)
    assert arena.extents.capacity == arena.bytes.numel() == 3 * PAGE
    arena.view(PAGE, 2)[:] = 7
    assert memory[PAGE : PAGE + 2].tolist() == [7, 7]
