"""Rehearsed kernels are all that iterations need: one that is compiled while serving takes half a second."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from lambdascale.inference.fused import rehearsed_rows, splits_of, tile

MOST = 2000
SHARED_BYTES = 232_448  # of a program, on Hopper


@pytest.mark.parametrize("kv_heads", [1, 2, 8, 32, 40, 300])
def test_divided_attention_and_whole(kv_heads: int) -> None:
    """Variants for one row, whose kernels may start early, and for more."""

    def variants(counts: Iterable[int]) -> set[tuple[bool, bool]]:
        return {(rows == 1, splits_of(rows, kv_heads) == 1) for rows in counts}

    assert variants(range(1, MOST)) == variants(rehearsed_rows(kv_heads))


@pytest.mark.parametrize(("added", "gated"), [(False, False), (True, False), (False, True)])
def test_every_tile(added: bool, gated: bool) -> None:
    rehearsed = {tile(rows, added=added, gated=gated) for rows in rehearsed_rows(32)}
    assert {tile(rows, added=added, gated=gated) for rows in range(1, MOST)} <= rehearsed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("added", "gated"), [(False, False), (True, False), (False, True)])
def test_a_tile_fits_shared_memory(dtype: torch.dtype, added: bool, gated: bool) -> None:
    """Rows and weights of every step of the software pipeline."""
    tiles = {tile(rows, added=added, gated=gated) for rows in range(1, MOST)} - {None}
    for each in tiles:
        assert each is not None
        t = each.of(dtype)
        held = t.stages if t.swapped else t.stages - 1
        assert (t.rows + t.outputs * (2 if gated else 1)) * t.inputs * dtype.itemsize * held <= SHARED_BYTES
