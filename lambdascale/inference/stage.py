"""A stage: a contiguous range of a model's blocks, run on one device over an iteration of prefills and decodes mixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import pi

import torch
from torch.nn import functional

from lambdascale.checkpoints import Architecture
from lambdascale.checkpoints.convert import TORCH_TYPES
from lambdascale.core.checks import require
from lambdascale.inference.batch import Segment, StageBatch
from lambdascale.inference.kv_cache import KvCache
from lambdascale.inference.linear import add_linear, linear
from lambdascale.inference.scratch import Scratch
from lambdascale.inference.weights import BlockWeights, LayerWeights

Tensor = torch.Tensor
_Window = int | None


@dataclass(frozen=True)
class _Decodes:
    """Decoding sequences attended together: slots [low, high), each row's place among them, and masks by window."""

    low: int
    high: int
    rows: Tensor | None  # None: every slot of the range decodes, in order
    context: int
    masks: dict[_Window, Tensor | None]


@dataclass(frozen=True)
class _Prefill:
    """Segments alike in all but their slots [low, high), which follow one another: their rows, and masks by window (None: plain
    causal).
    """

    begin: int
    end: int
    low: int
    high: int
    context: int
    masks: dict[_Window, Tensor | None]


class TransformerStage:
    """Blocks ``first`` to ``last`` of a model with their KV memory.

    Input: token ids [rows] if the stage has the first block, else hidden states [rows, hidden]. Output: hidden states, or logits
    [wanted rows, vocabulary] (float32) if it has the last block. The weights stay where their buffers are.
    """

    def __init__(
        self,
        architecture: Architecture,
        blocks: Sequence[BlockWeights],
        slots: int,
        slot_tokens: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        indices = [block.layout.index for block in blocks]
        require(
            bool(blocks) and indices == list(range(indices[0], indices[-1] + 1)),
            f"a stage takes consecutive blocks, not {indices}",
        )
        require(
            slot_tokens <= architecture.max_position,
            f"slots of {slot_tokens} tokens exceed the model's {architecture.max_position} positions",
        )
        self.architecture = architecture
        self.blocks = tuple(blocks)
        self.device = blocks[0].buffer.device
        self.dtype = TORCH_TYPES[blocks[0].layout.dtype]
        require(
            dtype in (None, self.dtype), f"the blocks hold {self.dtype}, not {dtype}; pack the model as the type to compute in"
        )
        self._layers = [layer for block in blocks for layer in block.layers]
        first = blocks[0].layout.first_layer
        self._windows = architecture.windows[first : first + len(self._layers)]
        self.kv = KvCache(architecture, len(self._layers), slots, slot_tokens, self.dtype, self.device)
        self._cos, self._sin = rope_tables(architecture, slot_tokens, self.dtype, self.device)
        self._scratch = Scratch(self.dtype, self.device)

    @cached_property
    def is_first(self) -> bool:
        """Whether it takes token ids."""
        return self.blocks[0].layout.first_layer == 0

    @cached_property
    def is_last(self) -> bool:
        """Whether it returns logits."""
        return self.blocks[-1].layout.last_layer == self.architecture.layers - 1

    @torch.inference_mode()
    def run(self, batch: StageBatch, inputs: Tensor) -> Tensor:
        """One iteration; KV of its tokens is written, then attended."""
        slots, positions = self._places(batch)
        prefills, decodes = self._prefills(batch), self._decodes(batch)
        cos, sin = self._cos[positions, None], self._sin[positions, None]
        hidden = self._entering(inputs)
        for index, layer in enumerate(self._layers):
            query = self._project(index, layer, self._norm(hidden, layer.input_norm), cos, sin, slots, positions)
            if self.is_last and index == len(self._layers) - 1 and len(batch.wanted) < batch.rows:
                # The other rows have left their keys and values, which is all that is needed of them.
                batch = answering(batch)
                wanted = torch.tensor(batch.wanted, dtype=torch.long, device=self.device)
                hidden, query = hidden[wanted], query[wanted]
                prefills, decodes = self._prefills(batch), self._decodes(batch)
            add_linear(hidden, self._attend(index, query, prefills, decodes), layer.output, layer.output_bias)
            self._feed_forward(hidden, layer)
        return self._logits(hidden) if self.is_last else hidden

    def _entering(self, inputs: Tensor) -> Tensor:
        """The hidden states that the layers add to: memory of this iteration's own."""
        if not self.is_first:
            return inputs.clone()
        assert self.blocks[0].embedding is not None, "the first block has the embedding"
        return functional.embedding(inputs.to(self.device), self.blocks[0].embedding)

    def _logits(self, hidden: Tensor) -> Tensor:
        block = self.blocks[-1]
        assert block.norm is not None, "the last block has the norm"
        assert block.head is not None, "the last block has the head"
        return linear(self._norm(hidden, block.norm), block.head).float()

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Normed hidden states, to be used before the next are asked for."""
        return rms_norm(hidden, weight, self.architecture.norm_eps, self._scratch.take("normed", *hidden.shape))

    def _wide(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``linear``, its result to be used before the next is asked for."""
        return linear(x, weight, bias, self._scratch.take("wide", len(x), len(weight)))

    def _project(
        self, index: int, layer: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, positions: Tensor
    ) -> Tensor:
        """Queries [rows, heads, head size], rotated; rotated keys and values go to the cache."""
        a = self.architecture
        states = self._wide(x, layer.qkv, layer.qkv_bias).view(-1, a.heads + 2 * a.kv_heads, a.head_dim)
        low, high = states[:, : a.heads + a.kv_heads].chunk(2, dim=-1)
        turned_high = (high * cos).addcmul_(low, sin)
        low.mul_(cos).addcmul_(high, sin, value=-1)
        high.copy_(turned_high)
        self.kv.both[index].index_put_((slots[:, None], self._kv_heads, positions[:, None]), states[:, a.heads :])
        return states[:, : a.heads]

    def _feed_forward(self, hidden: Tensor, layer: LayerWeights) -> None:
        gate, up = self._wide(self._norm(hidden, layer.post_norm), layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
        gated = torch.mul(functional.silu(gate, inplace=True), up, out=self._scratch.take("gated", *gate.shape))
        add_linear(hidden, gated, layer.down, layer.down_bias)

    @cached_property
    def _kv_heads(self) -> Tensor:
        return torch.arange(2 * self.architecture.kv_heads, device=self.device)[None]

    # -- attention ---------------------------------------------------------------------------------------------------

    def _attend(self, index: int, query: Tensor, prefills: Sequence[_Prefill], decodes: _Decodes | None) -> Tensor:
        window = self._windows[index]
        parts = [self._attend_prefill(index, query[p.begin : p.end], p, window) for p in prefills]
        if decodes is not None:
            begin = prefills[-1].end if prefills else 0
            parts.append(self._attend_decodes(index, query[begin:], decodes, window))
        if not parts:  # a prefill's part that gives no token yet, in the last layer
            return query.flatten(1)
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, out=self._scratch.take("attended", len(query), query.shape[1] * query.shape[2]))

    def _attend_prefill(self, index: int, query: Tensor, part: _Prefill, window: _Window) -> Tensor:
        keys = self.kv.keys[index, part.low : part.high, :, : part.context]
        values = self.kv.values[index, part.low : part.high, :, : part.context]
        mask = part.masks[window]
        each = query.view(part.high - part.low, -1, *query.shape[1:]).transpose(1, 2)
        result = functional.scaled_dot_product_attention(
            each, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return result.transpose(1, 2).reshape(query.shape[0], -1)

    def _attend_decodes(self, index: int, query: Tensor, part: _Decodes, window: _Window) -> Tensor:
        """The queries that share a kv head stand in for the rows of one attention, so that keys are read once for all of them."""
        a = self.architecture
        count = query.shape[0]
        grouped = query.reshape(count, a.kv_heads, a.heads // a.kv_heads, a.head_dim)
        if part.rows is not None:
            spread = grouped.new_zeros((part.high - part.low, *grouped.shape[1:]))
            spread[part.rows] = grouped
            grouped = spread
        keys = self.kv.keys[index, part.low : part.high, :, : part.context]
        values = self.kv.values[index, part.low : part.high, :, : part.context]
        result = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=part.masks[window])
        if part.rows is not None:
            result = result[part.rows]
        return result.reshape(count, a.heads * a.head_dim)

    # -- what an iteration looks like --------------------------------------------------------------------------------

    def _places(self, batch: StageBatch) -> tuple[Tensor, Tensor]:
        """Slot and position of every row."""
        slots = [s.slot for s in batch.segments for _ in range(s.tokens)]
        positions = [p for s in batch.segments for p in range(s.start, s.start + s.tokens)]
        places = torch.tensor((slots, positions), dtype=torch.long).to(self.device, non_blocking=True)
        return places[0], places[1]

    def _prefills(self, batch: StageBatch) -> list[_Prefill]:
        found: list[_Prefill] = []
        begin, first = 0, None
        for segment in batch.segments[: len(batch.segments) - batch.decodes]:
            end = begin + segment.tokens
            if first is not None and segment == Segment(found[-1].high, first.start, first.tokens):
                found[-1] = replace(found[-1], end=end, high=segment.slot + 1)
            else:
                first = segment
                masks = {window: self._prefill_mask(segment, window) for window in set(self._windows)}
                found.append(_Prefill(begin, end, segment.slot, segment.slot + 1, segment.start + segment.tokens, masks))
            begin = end
        return found

    def _prefill_mask(self, segment: Segment, window: _Window) -> Tensor | None:
        context = segment.start + segment.tokens
        if segment.start == 0 and (window is None or context <= window):
            return None
        return self._mask(torch.arange(segment.start, context), context, window)

    def _decodes(self, batch: StageBatch) -> _Decodes | None:
        if not batch.decodes:
            return None
        segments = batch.segments[len(batch.segments) - batch.decodes :]
        low, high = segments[0].slot, segments[-1].slot + 1
        rows = None if high - low == len(segments) else [segment.slot - low for segment in segments]
        positions = torch.zeros(high - low, dtype=torch.long)
        positions[[segment.slot - low for segment in segments]] = torch.tensor([segment.start for segment in segments])
        context = max(segment.start for segment in segments) + 1
        masks = {window: self._decode_mask(positions, context, window) for window in set(self._windows)}
        return _Decodes(low, high, None if rows is None else torch.tensor(rows, device=self.device), context, masks)

    def _decode_mask(self, positions: Tensor, context: int, window: _Window) -> Tensor | None:
        if int(positions.min()) == context - 1 and (window is None or context <= window):
            return None
        return self._mask(positions, context, window)[:, None, None]

    def _mask(self, positions: Tensor, context: int, window: _Window) -> Tensor:
        """What is added to the scores of queries at ``positions``, [positions, context]: 0 where they may look, else -inf."""
        places = torch.arange(context)
        hidden = places > positions[:, None]
        if window is not None:
            hidden |= places <= positions[:, None] - window
        return torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, float("-inf")).to(self.device)


def answering(batch: StageBatch) -> StageBatch:
    """The rows whose logits are wanted, each a segment of one token; ``wanted`` still counts the rows of ``batch``."""
    places = [(s.slot, s.start + token) for s in batch.segments for token in range(s.tokens)]
    segments = tuple(Segment(*places[row], 1) for row in batch.wanted)
    decodes = sum(row >= batch.rows - batch.decodes for row in batch.wanted)
    return StageBatch(segments, decodes, batch.wanted)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """``x`` [rows, hidden] over the root of its mean square, times ``weight``; perhaps in ``out``, memory for it."""
    if x.dtype is not torch.float32 or x.device.type != "cpu":
        return functional.rms_norm(x, weight.shape, weight, eps)
    # torch composes its own of nine operators here, and each costs more than the arithmetic of a decode step.
    size = x.shape[-1]
    scale: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()
    return torch.mul(x, scale, out=out).mul_(weight)


def rope_tables(architecture: Architecture, tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding for positions below ``tokens``, from float32: [tokens, head size / 2] each."""
    half = torch.arange(0, architecture.head_dim, 2, dtype=torch.int64).float() / architecture.head_dim
    frequencies = _stretched(architecture, 1.0 / architecture.rope_theta**half)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float32), frequencies)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def _stretched(architecture: Architecture, frequencies: Tensor) -> Tensor:
    """Llama 3's scaling: long waves by ``factor``, short ones untouched, a linear blend between (Llama 3.1 release notes)."""
    scaling = architecture.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position * frequencies / (2 * pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return frequencies * (blend + (1 - blend) / scaling.factor)
