"""Rehearsed kernels are all that iterations need: one that is compiled while serving takes half a second."""

from __future__ import annotations

import pytest
import torch

from lambdascale.inference.fused import rehearsed_rows, splits_of, tile

MOST = 2000
SHARED_BYTES = 232_448  # of a program, on Hopper


@pytest.mark.parametrize("kv_heads", [1, 2, 8, 32, 40])
def test_every_number_of_splits(kv_heads: int) -> None:
    rehearsed = {splits_of(rows, kv_heads) for rows in rehearsed_rows(kv_heads)}
    assert {splits_of(rows, kv_heads) for rows in range(1, MOST)} == rehearsed


@pytest.mark.parametrize("outputs", [4096, 5120, 32000])
@pytest.mark.parametrize(("added", "gated"), [(False, False), (True, False), (False, True)])
def test_every_tile(outputs: int, added: bool, gated: bool) -> None:
    rehearsed = {tile(rows, outputs, added=added, gated=gated) for rows in rehearsed_rows(32)}
    assert {tile(rows, outputs, added=added, gated=gated) for rows in range(1, MOST)} <= rehearsed


@pytest.mark.parametrize("outputs", [4096, 5120, 32000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("added", "gated"), [(False, False), (True, False), (False, True)])
def test_a_tile_fits_shared_memory(outputs: int, dtype: torch.dtype, added: bool, gated: bool) -> None:
    """All steps of the software pipeline but one have rows and weights there."""
    tiles = {tile(rows, outputs, added=added, gated=gated) for rows in range(2, MOST)} - {None}
    for each in tiles:
        assert each is not None
        t = each.of(dtype)
        assert (t.rows + t.outputs * (2 if gated else 1)) * t.inputs * dtype.itemsize * (t.stages - 1) <= SHARED_BYTES
