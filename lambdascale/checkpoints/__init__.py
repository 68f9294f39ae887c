"""Models on disk: what a checkpoint's files hold, how blocks are cut and laid out, packing. Reads and writes files, runs nothing.

A packed model is an ordinary Hugging Face directory with one safetensors shard per block and ``blocks.json`` beside it. The
data of a shard is, byte for byte, the block as it lies in memory: whoever reads it into a buffer can compute from there.
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
