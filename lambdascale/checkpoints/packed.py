"""A packed model directory: one shard per block, described by blocks.json."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from lambdascale.checkpoints.architecture import Architecture, load_architecture
from lambdascale.checkpoints.checksums import combined
from lambdascale.checkpoints.documents import inside
from lambdascale.checkpoints.layout import WEIGHT_TYPES, BlockLayout, block_layout, model_spec
from lambdascale.checkpoints.safetensors_file import ALIGNMENT, ITEM_BYTES
from lambdascale.core import ModelSpec, UserError

MANIFEST = "blocks.json"
FORMAT = 2
_HEX = re.compile("[0-9a-f]{16}")


class PackedBlock(msgspec.Struct, frozen=True):
    """A block on disk: ``size_bytes`` bytes of ``file`` from ``data_offset``, with their xxh3-64 checksum in hexadecimal.

    ``parts``: the checksums of its parts of the manifest's ``part_bytes`` each (the last may be shorter), so that several threads
    can verify a block in any order. ``digests``: of the same parts, for blocks in a GPU's memory (lambdascale.inference.digest);
    empty in models packed before digests existed.
    """

    file: str
    data_offset: int
    size_bytes: int
    xxh3_64: str
    first_layer: int
    last_layer: int
    parts: tuple[str, ...]
    digests: tuple[str, ...] = ()

    @property
    def digest(self) -> int | None:
        """Digest of the whole block; None if the model was packed without any."""
        if not self.digests:
            return None
        return combined(np.array([int(digest, 16) for digest in self.digests], dtype=np.uint64))


class _Version(msgspec.Struct, frozen=True):
    """The field that every version of blocks.json has."""

    format: int


class Manifest(msgspec.Struct, frozen=True):
    """The content of blocks.json."""

    format: int
    dtype: str
    source: str
    part_bytes: int
    blocks: tuple[PackedBlock, ...]


@dataclass(frozen=True)
class PackedModel:
    """An opened packed model. ``layouts[i]`` says where the tensors of block i lie in its bytes."""

    directory: Path
    name: str
    architecture: Architecture
    dtype: str
    part_bytes: int
    blocks: tuple[PackedBlock, ...]
    layouts: tuple[BlockLayout, ...]

    @classmethod
    def open(cls, directory: Path, name: str | None = None) -> PackedModel:
        """Read and check the description; block data is checked when it is loaded. UserError if it is no packed model."""
        path = directory / MANIFEST
        try:
            content = path.read_bytes()
            found = msgspec.json.decode(content, type=_Version).format
            if found != FORMAT:
                raise UserError(f"{path} has format {found}; this version reads {FORMAT}: pack the model again")
            manifest = msgspec.json.decode(content, type=Manifest)
        except FileNotFoundError:
            raise UserError(f"{directory} is not a packed model (no {MANIFEST}); make one with: lambdascale pack") from None
        except RecursionError:
            raise UserError(f"{path} cannot be read: it is nested too deeply") from None
        except (OSError, UnicodeError, msgspec.MsgspecError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        architecture = load_architecture(directory)
        layouts = tuple(_layout(directory, architecture, manifest, index) for index in range(len(manifest.blocks)))
        layers = [layer for layout in layouts for layer in range(layout.first_layer, layout.last_layer + 1)]
        if layers != list(range(architecture.layers)):
            raise UserError(f"the blocks in {path} do not cover the {architecture.layers} layers of config.json once, in order")
        model = name or directory.resolve().name
        return cls(directory, model, architecture, manifest.dtype, manifest.part_bytes, manifest.blocks, layouts)

    @property
    def block_bytes(self) -> tuple[int, ...]:
        """Bytes of each block."""
        return tuple(block.size_bytes for block in self.blocks)

    @property
    def row_bytes(self) -> int:
        """Size of a token's hidden states."""
        return self.architecture.hidden * ITEM_BYTES[self.dtype]

    @property
    def spec(self) -> ModelSpec:
        """The model as the control plane knows it."""
        return model_spec(self.architecture, self.dtype, self.name)

    def path(self, block: int) -> Path:
        """The file of a block."""
        return self.directory / self.blocks[block].file


def _layout(directory: Path, architecture: Architecture, manifest: Manifest, index: int) -> BlockLayout:
    """A block's layout; UserError unless its size fits the layers it claims and its shard exists in full length."""
    block = manifest.blocks[index]
    if manifest.dtype not in WEIGHT_TYPES or not 0 <= block.first_layer <= block.last_layer < architecture.layers:
        raise UserError(f"block {index} in {directory / MANIFEST} does not fit config.json; pack the model again")
    layout = block_layout(architecture, manifest.dtype, index, range(block.first_layer, block.last_layer + 1))
    parts_fit = manifest.part_bytes > 0 and manifest.part_bytes % ALIGNMENT == 0
    count = -(-block.size_bytes // manifest.part_bytes) if parts_fit else 0
    if layout.size_bytes != block.size_bytes or len(block.parts) != count or len(block.digests) not in (0, count):
        raise UserError(f"block {index} in {directory / MANIFEST} does not fit config.json; pack the model again")
    if not all(_HEX.fullmatch(each) for each in (block.xxh3_64, *block.parts, *block.digests)):
        raise UserError(f"block {index} in {directory / MANIFEST}: a checksum is not 16 hexadecimal digits; pack the model again")
    if block.data_offset < 0 or block.data_offset % ALIGNMENT:
        raise UserError(f"block {index} in {directory / MANIFEST} begins at {block.data_offset}, no whole page; pack again")
    path = inside(directory, block.file, directory / MANIFEST)
    size, wanted = path.stat().st_size if path.is_file() else 0, block.data_offset + block.size_bytes
    if size != wanted:
        raise UserError(f"block {index}: {path} should have {wanted} bytes and has {size}: it is truncated or missing")
    return layout
