"""Models on disk: contents of checkpoint files, layout of blocks, packing. This package reads and writes files and runs nothing.

A packed model is an ordinary Hugging Face directory with one safetensors shard per block and ``blocks.json`` beside it. The
data of a shard is, byte for byte, the block as it lies in memory, so that a node can read it into a buffer and compute from it.
"""

from lambdascale.checkpoints.architecture import ARCHITECTURES, Architecture, RopeScaling, load_architecture, parse_architecture
from lambdascale.checkpoints.layout import BlockLayout, TensorSlot, block_layouts, model_spec
from lambdascale.checkpoints.packed import PackedBlock, PackedModel
from lambdascale.checkpoints.packing import pack
from lambdascale.checkpoints.source import HfCheckpoint

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "BlockLayout",
    "HfCheckpoint",
    "PackedBlock",
    "PackedModel",
    "RopeScaling",
    "TensorSlot",
    "block_layouts",
    "load_architecture",
    "model_spec",
    "pack",
    "parse_architecture",
]
