"""Division of a model into blocks, and layout of a block's tensors in one contiguous buffer (tensor packing; reference, 2.1).

Within a layer, query, key and value projections are adjacent, and so are the gate and up projections, so that each group can be
used as one matrix without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from lambdascale.checkpoints.architecture import Architecture
from lambdascale.checkpoints.safetensors_file import ITEM_BYTES
from lambdascale.core import ModelSpec, UserError

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
# Element types the engine computes in.
WEIGHT_TYPES = ("F32", "F16", "BF16")
SHORT_NAMES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}  # by the names of command lines


@dataclass(frozen=True)
class TensorSlot:
    """A tensor's place in its block: ``size_bytes`` bytes from ``offset``."""

    name: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class BlockLayout:
    """Layout of a block: its layers (first to last, both included), element type and the places of its tensors."""

    index: int
    first_layer: int
    last_layer: int
    dtype: str
    slots: tuple[TensorSlot, ...]

    @property
    def size_bytes(self) -> int:
        """Length of the block's buffer in bytes."""
        last = self.slots[-1]
        return last.offset + last.size_bytes


def layer_tensors(architecture: Architecture, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a layer's tensors, in their order in the block."""
    a, prefix = architecture, f"model.layers.{layer}."
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    yield prefix + "input_layernorm.weight", (a.hidden,)
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        yield f"{prefix}self_attn.{name}_proj.weight", (rows, a.hidden)
    if a.qkv_bias:
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield f"{prefix}self_attn.{name}_proj.bias", (rows,)
    yield prefix + "self_attn.o_proj.weight", (a.hidden, q)
    if a.output_bias:
        yield prefix + "self_attn.o_proj.bias", (a.hidden,)
    yield prefix + "post_attention_layernorm.weight", (a.hidden,)
    for name in ("gate", "up"):
        yield f"{prefix}mlp.{name}_proj.weight", (a.intermediate, a.hidden)
    if a.mlp_bias:
        for name in ("gate", "up"):
            yield f"{prefix}mlp.{name}_proj.bias", (a.intermediate,)
    yield prefix + "mlp.down_proj.weight", (a.hidden, a.intermediate)
    if a.mlp_bias:
        yield prefix + "mlp.down_proj.bias", (a.hidden,)


def model_tensors(architecture: Architecture, layers: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors in a block of ``layers``: embedding before layer 0, norm and head after the last layer."""
    a = architecture
    if 0 in layers:
        yield EMBEDDING, (a.vocab, a.hidden)
    for layer in layers:
        yield from layer_tensors(a, layer)
    if a.layers - 1 in layers:
        yield NORM, (a.hidden,)
        # With tied embeddings the head equals the embedding: the last block holds a copy unless it has the embedding itself.
        if not (a.tied and 0 in layers):
            yield HEAD, (a.vocab, a.hidden)


def model_spec(architecture: Architecture, dtype: str, name: str) -> ModelSpec:
    """Sizes of the model for the control plane; ``weight_bytes`` is the total size of its blocks, head included.

    UserError for a ``dtype`` that the engine cannot compute with.
    """
    if dtype not in WEIGHT_TYPES:
        raise UserError(f"the engine does not compute with weights of type {dtype}, only {', '.join(WEIGHT_TYPES)}")
    a, item = architecture, ITEM_BYTES[dtype]
    layers = sum(prod(shape) for layer in range(a.layers) for _, shape in layer_tensors(a, layer))
    return ModelSpec(
        name=name,
        layers=a.layers,
        hidden=a.hidden,
        heads=a.heads,
        kv_heads=a.kv_heads,
        vocab=a.vocab,
        weight_bytes=(layers + 2 * a.vocab * a.hidden) * item,
        dtype_bytes=item,
    )


def block_layouts(architecture: Architecture, dtype: str, blocks: int, name: str = "model") -> tuple[BlockLayout, ...]:
    """Divide the model into ``blocks`` blocks of near-equal bytes, by the same rule as the control plane's plans.

    UserError for more blocks than layers, or for a ``dtype`` that the engine cannot compute with.
    """
    cuts = model_spec(architecture, dtype, name).partition(blocks)
    return tuple(block_layout(architecture, dtype, cut.index, range(cut.first_layer, cut.last_layer + 1)) for cut in cuts)


def block_layout(architecture: Architecture, dtype: str, index: int, layers: range) -> BlockLayout:
    """Layout of block ``index``, which holds ``layers``."""
    slots, offset = [], 0
    for name, shape in model_tensors(architecture, layers):
        size = prod(shape) * ITEM_BYTES[dtype]
        slots.append(TensorSlot(name, shape, offset, size))
        offset += size
    return BlockLayout(index, layers[0], layers[-1], dtype, tuple(slots))
