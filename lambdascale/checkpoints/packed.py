"""A packed model directory: one shard per block, described by blocks.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from lambdascale.checkpoints.architecture import Architecture, load_architecture
from lambdascale.checkpoints.layout import BlockLayout, block_layouts, model_spec
from lambdascale.core import ModelSpec, UserError

MANIFEST = "blocks.json"
FORMAT = 1


class PackedBlock(msgspec.Struct, frozen=True):
    """A block on disk: ``size_bytes`` bytes of ``file`` from ``data_offset``, with their xxh3-64 checksum in hexadecimal."""

    file: str
    data_offset: int
    size_bytes: int
    xxh3_64: str
    first_layer: int
    last_layer: int


class Manifest(msgspec.Struct, frozen=True):
    """The content of blocks.json."""

    format: int
    dtype: str
    source: str
    blocks: tuple[PackedBlock, ...]


@dataclass(frozen=True)
class PackedModel:
    """An opened packed model. ``layouts[i]`` says where the tensors of block i lie in its bytes."""

    directory: Path
    name: str
    architecture: Architecture
    dtype: str
    blocks: tuple[PackedBlock, ...]
    layouts: tuple[BlockLayout, ...]

    @classmethod
    def open(cls, directory: Path, name: str | None = None) -> PackedModel:
        """Read and check the description; block data is checked when it is loaded. UserError if it is no packed model."""
        path = directory / MANIFEST
        try:
            manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
        except FileNotFoundError:
            raise UserError(f"{directory} is not a packed model (no {MANIFEST}); make one with: lambdascale pack") from None
        except (OSError, msgspec.MsgspecError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if manifest.format != FORMAT:
            raise UserError(f"{path} has format {manifest.format}; this version reads {FORMAT}: pack the model again")
        architecture = load_architecture(directory)
        layouts = block_layouts(architecture, manifest.dtype, len(manifest.blocks))
        for layout, block in zip(layouts, manifest.blocks, strict=True):
            _check(directory, layout, block)
        return cls(directory, name or directory.resolve().name, architecture, manifest.dtype, manifest.blocks, layouts)

    @property
    def block_bytes(self) -> tuple[int, ...]:
        """Bytes of each block."""
        return tuple(block.size_bytes for block in self.blocks)

    @property
    def spec(self) -> ModelSpec:
        """The model as the control plane knows it."""
        return model_spec(self.architecture, self.dtype, self.name)

    def path(self, block: int) -> Path:
        """The file of a block."""
        return self.directory / self.blocks[block].file


def _check(directory: Path, layout: BlockLayout, block: PackedBlock) -> None:
    """UserError unless the shard is there, as long as it must be, and of the layers that config.json implies."""
    path = directory / block.file
    if (layout.first_layer, layout.last_layer, layout.size_bytes) != (block.first_layer, block.last_layer, block.size_bytes):
        raise UserError(f"block {layout.index} in {directory / MANIFEST} does not fit config.json; pack the model again")
    size = path.stat().st_size if path.is_file() else 0
    if size != block.data_offset + block.size_bytes:
        wanted = block.data_offset + block.size_bytes
        raise UserError(f"block {layout.index}: {path} should have {wanted} bytes and has {size}: it is truncated or missing")
