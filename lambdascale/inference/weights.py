"""A block's weights: views into the one contiguous buffer that the block's bytes arrived in (tensor packing)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from lambdascale.checkpoints import BlockLayout, HfCheckpoint, PackedModel, block_layouts
from lambdascale.checkpoints.convert import TORCH_TYPES
from lambdascale.checkpoints.layout import EMBEDDING, HEAD, NORM, TensorSlot
from lambdascale.checkpoints.packing import block_pieces
from lambdascale.core import UserError

Tensor = torch.Tensor


@dataclass(frozen=True)
class LayerWeights:
    """One layer's tensors. ``qkv`` is query, key and value stacked, ``gate_up`` likewise; biases may be None."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class BlockWeights:
    """The tensors of a block as views of ``buffer`` (uint8, at least the layout's size; on any device). Nothing is copied."""

    def __init__(self, layout: BlockLayout, buffer: Tensor) -> None:
        if buffer.dtype is not torch.uint8 or buffer.dim() != 1 or buffer.numel() < layout.size_bytes:
            raise UserError(f"block {layout.index} needs a flat uint8 buffer of {layout.size_bytes} bytes")
        self.layout = layout
        self.buffer = buffer
        self._slots = {slot.name: slot for slot in layout.slots}
        self.embedding = self._optional(EMBEDDING)
        self.norm = self._optional(NORM)
        self.head = self._optional(HEAD) if HEAD in self._slots else self.embedding if self.norm is not None else None
        self.layers = [self._layer(layer) for layer in range(layout.first_layer, layout.last_layer + 1)]

    def _layer(self, layer: int) -> LayerWeights:
        prefix = f"model.layers.{layer}."
        qkv = [f"{prefix}self_attn.{name}_proj." for name in "qkv"]
        gate_up = [f"{prefix}mlp.{name}_proj." for name in ("gate", "up")]
        return LayerWeights(
            input_norm=self._view(prefix + "input_layernorm.weight"),
            qkv=self._stacked([name + "weight" for name in qkv]),
            qkv_bias=self._stacked([name + "bias" for name in qkv]) if qkv[0] + "bias" in self._slots else None,
            output=self._view(prefix + "self_attn.o_proj.weight"),
            output_bias=self._optional(prefix + "self_attn.o_proj.bias"),
            post_norm=self._view(prefix + "post_attention_layernorm.weight"),
            gate_up=self._stacked([name + "weight" for name in gate_up]),
            gate_up_bias=self._stacked([name + "bias" for name in gate_up]) if gate_up[0] + "bias" in self._slots else None,
            down=self._view(prefix + "mlp.down_proj.weight"),
            down_bias=self._optional(prefix + "mlp.down_proj.bias"),
        )

    def _optional(self, name: str) -> Tensor | None:
        return self._view(name) if name in self._slots else None

    def _view(self, name: str) -> Tensor:
        slot = self._slots[name]
        return self._bytes(slot.offset, slot.size_bytes).view(slot.shape)

    def _stacked(self, names: Sequence[str]) -> Tensor:
        """Return adjacent tensors of equal width as one."""
        slots = [self._slots[name] for name in names]
        assert _adjacent(slots), f"{names} do not lie next to each other"
        rows = sum(slot.shape[0] for slot in slots)
        return self._bytes(slots[0].offset, sum(slot.size_bytes for slot in slots)).view(rows, *slots[0].shape[1:])

    def _bytes(self, offset: int, size: int) -> Tensor:
        return self.buffer[offset : offset + size].view(TORCH_TYPES[self.layout.dtype])


def _adjacent(slots: Sequence[TensorSlot]) -> bool:
    return all(a.offset + a.size_bytes == b.offset for a, b in pairwise(slots))


def load_blocks(model: PackedModel | HfCheckpoint, blocks: int | None = None, dtype: str | None = None) -> list[BlockWeights]:
    """Return all blocks of a model in plain memory, without a store: for tests, tools and single-node use.

    A Hugging Face directory is cut into ``blocks`` (default 1) and converted to ``dtype``. UserError if a packed model has
    another number of blocks or another type.
    """
    if isinstance(model, PackedModel):
        if blocks not in (None, len(model.blocks)) or dtype not in (None, model.dtype):
            raise UserError(f"{model.name} is packed as {len(model.blocks)} blocks of {model.dtype}, not {blocks} of {dtype}")
        return [_read_packed(model, index) for index in range(len(model.blocks))]
    layouts = block_layouts(model.architecture, dtype or model.dtype, blocks or 1)
    return [_read_checkpoint(model, layout) for layout in layouts]


def _read_packed(model: PackedModel, index: int) -> BlockWeights:
    block = model.blocks[index]
    buffer = torch.empty(block.size_bytes, dtype=torch.uint8)
    with model.path(index).open("rb") as file:
        file.seek(block.data_offset)
        if file.readinto(buffer.numpy().data) != block.size_bytes:
            raise UserError(f"block {index}: {model.path(index)} is truncated")
    return BlockWeights(model.layouts[index], buffer)


def _read_checkpoint(checkpoint: HfCheckpoint, layout: BlockLayout) -> BlockWeights:
    buffer = torch.empty(layout.size_bytes, dtype=torch.uint8)
    position = 0
    for piece in block_pieces(checkpoint, layout):
        buffer[position : position + len(piece)] = torch.frombuffer(bytearray(piece), dtype=torch.uint8)
        position += len(piece)
    return BlockWeights(layout, buffer)
