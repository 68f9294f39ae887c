"""Small packed models and what their stores should hold."""

from __future__ import annotations

from pathlib import Path

import xxhash

from lambdascale.checkpoints import PackedModel, pack
from lambdascale.checkpoints.synthetic import PRESETS, write_random
from lambdascale.inference import BlockStore

BLOCKS = 8
PAGE = 4096
PART = 4 * PAGE


def packed(root: Path, name: str, seed: int) -> PackedModel:
    source = root / f"{name}-source"
    source.mkdir()
    write_random(PRESETS["tiny"], source, seed)
    pack(source, root / name, BLOCKS, part_bytes=PART)
    return PackedModel.open(root / name)


def pages(model: PackedModel) -> int:
    return sum(-(-size // PAGE) * PAGE for size in model.block_bytes)


def right(store: BlockStore, name: str, tier: str) -> bool:
    """Return True if every resident block of the model has the bytes its manifest says."""
    model = store.model(name)
    for block in store.resident(name, tier):
        with store.using(name, [block], tier) as (buffer,):
            if xxhash.xxh3_64_hexdigest(buffer.numpy().tobytes()) != model.blocks[block].xxh3_64:
                return False
    return True
