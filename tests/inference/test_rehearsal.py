"""Rehearsed kernels are all that iterations need: one that is compiled while serving takes half a second."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from lambdascale.inference.fused import rehearsed_rows, splits_of
from lambdascale.inference.tiles import PROGRAM_BYTES, TUNED, Choice, Tile, Tuning, tile

MOST = 2000
OTHER = Tuning(
    added=(Choice(Tile(16, 16, 256, 4, 5), rows=8), Choice(Tile(16, 32, 256, 4, 5), 16, 4224), Choice(Tile(32, 32, 256, 4, 4))),
    early_rows=4,
    triggers=frozenset({"join"}),
)


@pytest.mark.parametrize("tuning", [TUNED, OTHER], ids=["tuned", "other"])
@pytest.mark.parametrize("kv_heads", [1, 2, 8, 32, 40, 300])
def test_divided_attention_and_whole(kv_heads: int, tuning: Tuning) -> None:
    """Variants for one row, for few, whose kernels may start early, and for more."""

    def variants(counts: Iterable[int]) -> set[tuple[bool, bool, bool]]:
        return {(rows == 1, rows <= tuning.early_rows, splits_of(rows, kv_heads) == 1) for rows in counts}

    assert variants(range(1, MOST)) == variants(rehearsed_rows(kv_heads, tuning))


@pytest.mark.parametrize("tuning", [TUNED, OTHER], ids=["tuned", "other"])
@pytest.mark.parametrize("outputs", [4096, 5120])
@pytest.mark.parametrize("gated", [False, True])
def test_every_tile(tuning: Tuning, outputs: int, gated: bool) -> None:
    """Tiles of the products of a step, and their starts: the two are compiled together."""

    def variants(counts: Iterable[int]) -> set[object]:
        tiles = {(tile(rows, gated=gated), tuning.adding(rows, outputs)) for rows in counts if rows > 1}
        early = {(rows <= tuning.early_rows, tuning.adding(rows, outputs)) for rows in counts if 1 < rows <= 32}
        return {*tiles, *early}

    assert variants(range(1, MOST)) == variants(rehearsed_rows(32, tuning))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_tile_fits_shared_memory(dtype: torch.dtype) -> None:
    tiles = {(tile(rows, gated=gated), gated) for rows in range(1, MOST) for gated in (False, True)}
    tiles |= {(choice.tile, False) for choice in TUNED.added}
    found = [each.shared_bytes(dtype, gated=gated) for each, gated in tiles if each is not None]
    assert min(found) > 0
    assert max(found) <= PROGRAM_BYTES


@pytest.mark.parametrize(
    ("shape", "size_bytes", "at_once"),
    [
        (Tile(16, 32, 512, 4, 4), 147_456, 1),
        (Tile(16, 32, 256, 4, 5), 98_304, 2),
        (Tile(16, 16, 256, 4, 5), 65_536, 3),
        (Tile(32, 32, 256, 4, 5), 131_072, 1),
        (Tile(32, 64, 128, 4, 4, swapped=True), 98_304, 2),
    ],
    ids=str,
)
def test_shared_memory_of_a_tile(shape: Tile, size_bytes: int, at_once: int) -> None:
    """Rows and weights in steps of the pipeline: 13B's 160 programs run at once on 132 multiprocessors if two fit each."""
    assert (shape.shared_bytes(torch.bfloat16), shape.at_once(torch.bfloat16)) == (size_bytes, at_once)


@pytest.mark.parametrize("outputs", [4096, 5120], ids=["7B", "13B"])
@pytest.mark.parametrize("rows", [1, 8, 16, 17, 32])
def test_all_programs_of_a_product_that_adds_run_at_once(rows: int, outputs: int) -> None:
    """Programs that wait for others to end, on 132 multiprocessors, made 13B's steps 4 to 7 % longer."""
    chosen = TUNED.adding(rows, outputs)
    assert chosen is not None
    assert outputs / chosen.outputs <= 132 * chosen.at_once(torch.bfloat16)


def test_the_first_choice_that_serves() -> None:
    found = [OTHER.adding(rows, 4096) for rows in (1, 8, 9, 17)]
    assert found == [OTHER.added[0].tile, OTHER.added[0].tile, OTHER.added[1].tile, OTHER.added[2].tile]
    assert [OTHER.summed(rows, 4096) for rows in (1, 8, 9, 17)] == [16, 16, 32, 32]
    assert OTHER.adding(16, 4224) != OTHER.adding(16, 4225)
    assert OTHER.adding(33, 4096) is None
