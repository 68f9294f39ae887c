"""Loads through a ring of host memory, as to a GPU: here to its stand-in, with the same ring and the same order."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec.structs import replace as changed

from lambdascale.checkpoints import PackedModel
from lambdascale.inference import BlockError, BlockStore
from tests.store.stores import BLOCKS, PAGE, PART, packed, right


def flip(model: PackedModel, block: int, at: int) -> None:
    """Flip a bit of a block on the disk, ``at`` bytes from its begin or (negative) from its end."""
    described = model.blocks[block]
    with model.path(block).open("r+b") as file:
        file.seek(described.data_offset + (at if at >= 0 else described.size_bytes + at))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.fixture(params=["digests", "hashes"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> PackedModel:
    """A packed model. Without digests, as older ones are, it is compared by the hashes of its parts on the way."""
    found = packed(tmp_path, "c", 9)
    if request.param == "digests":
        return found
    return replace(found, blocks=tuple(changed(block, digests=()) for block in found.blocks))


@pytest.mark.parametrize("chunk", [PAGE, PART, PART + PAGE, 100 * PART])
def test_blocks_are_right_and_leave_nothing_in_host_memory(
    make: Callable[..., BlockStore], model: PackedModel, chunk: int
) -> None:
    """Chunks are shorter and longer than parts, more of them than the ring has pieces; the host arena has no room at all."""
    store = make(host=0, gpu=3, chunk_bytes=chunk, readers=2, staged=True)
    store.add(model)
    landed: list[int] = []
    store.load("c", range(BLOCKS), keep_host=False, on_block=lambda _, block: landed.append(block)).wait(30)
    assert landed == list(range(BLOCKS))
    assert store.resident("c", "gpu") == set(range(BLOCKS))
    assert not store.resident("c", "host")
    assert right(store, "c", "gpu")


@pytest.mark.parametrize("at", [5 * PART, -1])
def test_a_flipped_bit(make: Callable[..., BlockStore], model: PackedModel, at: int) -> None:
    """Blocks before it stay, and the memory of the others is free again."""
    flip(model, 3, at)
    store = make(host=0, gpu=3, staged=True)
    store.add(model)
    free = store.free_bytes("gpu")
    load = store.load("c", range(BLOCKS), keep_host=False)
    with pytest.raises(BlockError, match=r"is damaged: (its digest|checksum)") as failure:
        load.wait(30)
    assert (failure.value.block, load.landed) == (3, [0, 1, 2])
    store.evict("c", "gpu")
    assert store.free_bytes("gpu") == free
    assert not store.loading


def test_without_verification_a_flipped_bit_goes_unnoticed(make: Callable[..., BlockStore], model: PackedModel) -> None:
    flip(model, 3, 0)
    store = make(host=0, gpu=3, staged=True, verify="off")
    store.add(model)
    store.load("c", range(BLOCKS), keep_host=False).wait(30)
    assert not right(store, "c", "gpu")


def test_host_memory_is_kept_where_asked(make: Callable[..., BlockStore], two: dict[str, PackedModel]) -> None:
    """Blocks for both tiers do not pass the ring."""
    store = make(staged=True)
    store.load("a", range(BLOCKS), keep_host=True).wait(30)
    assert store.resident("a", "gpu") == store.resident("a", "host") == set(range(BLOCKS))
    assert right(store, "a", "host")
    assert right(store, "a", "gpu")
