"""A stage: a contiguous range of a model's blocks, run on one device over an iteration of prefills and decodes mixed."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cached_property
from math import pi

import torch
from torch.nn import functional

from lambdascale.checkpoints import Architecture
from lambdascale.checkpoints.convert import TORCH_TYPES
from lambdascale.core.checks import require
from lambdascale.inference import devices
from lambdascale.inference.attention import BatchAttention, Parts
from lambdascale.inference.batch import Segment, StageBatch
from lambdascale.inference.compiling import COMPILER
from lambdascale.inference.fused import TritonOperators, has_triton
from lambdascale.inference.kv_cache import KvCache
from lambdascale.inference.operators import Places, RopeTables, TorchOperators
from lambdascale.inference.replay import Replays, Step
from lambdascale.inference.scratch import Scratch
from lambdascale.inference.weights import BlockWeights, LayerWeights

Tensor = torch.Tensor


class TransformerStage:
    """Blocks ``first`` to ``last`` of a model with their KV memory.

    Input: token ids [rows], best on the host, if the stage has the first block, else hidden states [rows, hidden]. Output: hidden
    states, or logits [wanted rows, vocabulary] (float32) if it has the last block. The weights stay where their buffers are.

    On a GPU, iterations that only decode are replayed as CUDA graphs as soon as the kernels are compiled, which happens in the
    background after the first iteration; until then torch's operators serve. ``replays``: pad and replay decodes on a CPU too
    (without graphs, for tests).
    """

    def __init__(
        self,
        architecture: Architecture,
        blocks: Sequence[BlockWeights],
        slots: int,
        slot_tokens: int,
        dtype: torch.dtype | None = None,
        *,
        replays: bool = False,
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
        devices.use(self.device)
        self._layers = [layer for block in blocks for layer in block.layers]
        first = blocks[0].layout.first_layer
        self._windows = architecture.windows[first : first + len(self._layers)]
        self.kv = KvCache(architecture, len(self._layers), slots, slot_tokens, self.dtype, self.device)
        self._tables = rope_tables(architecture, slot_tokens, self.dtype, self.device)
        scratch = Scratch(self.dtype, self.device)
        self._attention = BatchAttention(architecture, self.kv, self._windows, scratch)
        self._operators = TorchOperators(architecture, self._tables, scratch)
        self._replays = Replays() if replays else None

    @cached_property
    def is_first(self) -> bool:
        """True if it takes token ids."""
        return self.blocks[0].layout.first_layer == 0

    @cached_property
    def is_last(self) -> bool:
        """True if it returns logits."""
        return self.blocks[-1].layout.last_layer == self.architecture.layers - 1

    @property
    def recordings(self) -> int:
        """Number of decode steps prepared for replay so far."""
        return 0 if self._replays is None else len(self._replays)

    @property
    def operators(self) -> str:
        """The operators in use: torch's, or kernels."""
        return "kernels" if self._operators.attends else "torch"

    @torch.inference_mode()
    def run(self, batch: StageBatch, inputs: Tensor) -> Tensor:
        """Run one iteration: KV of its tokens is written, then attended to."""
        devices.use(self.device)
        if self.device.type == "cuda" and self._replays is None and has_triton():
            return self._run_and_compile(batch, inputs)
        return self._run(batch, inputs)

    def _run(self, batch: StageBatch, inputs: Tensor) -> Tensor:
        if self._replays is not None and 0 < batch.decodes == len(batch.segments):
            return self._replay(batch, inputs)
        return self._iterate(batch, inputs)

    def _run_and_compile(self, batch: StageBatch, inputs: Tensor) -> Tensor:
        """Run an iteration, by the kernels if they are compiled; else begin to compile them once it has been launched.

        The first token of a replica does not share the interpreter with a compilation that it does not need.
        """
        key = self.architecture, self.dtype, self.device
        if COMPILER.done(*key):
            self._use_kernels()
        output = self._run(batch, inputs)
        COMPILER.ready(*key)
        return output

    @torch.inference_mode()
    def rehearse(self, batch: StageBatch, inputs: Tensor) -> Tensor:
        """Run one iteration by torch's operators, which loads their libraries and compiles nothing."""
        devices.use(self.device)
        return self._iterate(batch, inputs)

    def prepare(self, rows: Sequence[int] = ()) -> None:
        """Wait for the kernels, and record decode steps for these numbers of rows: for tests and measurements on a GPU."""
        if self.device.type == "cuda" and has_triton():
            COMPILER.wait(self.architecture, self.dtype, self.device)
            self._use_kernels()
        if self._replays is not None:
            with torch.inference_mode():
                for count in rows:
                    self._replays.take(count, self._step, self._inputs)

    def _use_kernels(self) -> None:
        """Use the kernels, which are compiled, from now on."""
        self._operators = TritonOperators(self.architecture, self._tables, self._operators.scratch)
        self._replays = Replays()

    # -- decodes alone -----------------------------------------------------------------------------------------------

    def _replay(self, batch: StageBatch, inputs: Tensor) -> Tensor:
        assert self._replays is not None, "the caller has checked"
        slots, positions = [s.slot for s in batch.segments], [s.start for s in batch.segments]
        output = self._replays.take(batch.rows, self._step, self._inputs)(inputs, slots, positions)
        if not self.is_last or batch.wanted == tuple(range(batch.rows)):
            return output
        return output[self._there(torch.tensor(batch.wanted, dtype=torch.long))]

    def _inputs(self, rows: int) -> Tensor:
        """Return memory for the input of a replay."""
        if self.is_first:
            return torch.zeros(rows, dtype=torch.long, device=self.device)
        return torch.zeros(rows, self.architecture.hidden, dtype=self.dtype, device=self.device)

    def _step(self) -> Step:
        """Return a decode step with scratch memory of its own, since that of a recording must not move.

        The step has only a weak reference to the stage, so that a stage's KV memory is free at once when the stage is dropped.
        """
        operators = type(self._operators)(self.architecture, self._tables, Scratch(self.dtype, self.device))
        stage = weakref.proxy(self)

        def step(inputs: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
            hidden: Tensor = stage._entering(inputs)
            places = operators.places(slots, positions, padded=True)
            for index, layer in enumerate(stage._layers):
                kv = stage.kv.both[index]
                query = operators.rotate(operators.project(hidden, layer), places, kv)
                stage._rest(operators, layer, hidden, operators.attend(query, places, kv, stage._windows[index]))
            result: Tensor = stage._leaving(operators, hidden)
            return result

        return step

    # -- prefills and decodes ----------------------------------------------------------------------------------------

    def _iterate(self, batch: StageBatch, inputs: Tensor) -> Tensor:
        operators = self._operators
        # All copies from the host come first, so that nothing waits for the device between two layers.
        places = operators.places(*self._places(batch))
        parts = self._attention.parts(batch, decodes=not operators.attends)
        pruned = answering(batch) if self.is_last and len(batch.wanted) < batch.rows else None
        wanted = self._there(torch.tensor(batch.wanted, dtype=torch.long))
        last_parts = self._attention.parts(pruned) if pruned is not None and not operators.attends else None
        hidden = self._entering(inputs)
        for index, layer in enumerate(self._layers):
            query = operators.rotate(operators.project(hidden, layer), places, self.kv.both[index])
            if pruned is not None and index == len(self._layers) - 1:
                # Keys and values are all that is needed of the other rows, and those are written.
                hidden, query = hidden[wanted], query[wanted]
                batch, parts = pruned, last_parts or Parts((), None)
                places = Places(places.slots[wanted], places.positions[wanted], places.cos, places.sin)
            self._rest(operators, layer, hidden, self._attend(index, query, places, parts))
        return self._leaving(operators, hidden)

    def _attend(self, index: int, query: Tensor, places: Places, parts: Parts) -> Tensor:
        """Attend by torch's operator, decodes by the operators' own attention where that is fast."""
        begin = parts.prefilled
        if not self._operators.attends or begin == len(query):
            return self._attention.attend(index, query, parts)
        lone = Places(places.slots[begin:], places.positions[begin:], places.cos, places.sin)
        found = self._operators.attend(query[begin:], lone, self.kv.both[index], self._windows[index])
        return self._attention.attend(index, query[:begin], parts, found)

    def _places(self, batch: StageBatch) -> tuple[Tensor, Tensor]:
        """Return slot and position of every row."""
        slots = [s.slot for s in batch.segments for _ in range(s.tokens)]
        positions = [p for s in batch.segments for p in range(s.start, s.start + s.tokens)]
        places = self._there(torch.tensor((slots, positions), dtype=torch.long))
        return places[0], places[1]

    # -- parts of both -----------------------------------------------------------------------------------------------

    def _there(self, tensor: Tensor) -> Tensor:
        """Copy to the device, without waiting (from pageable memory, CUDA has read the source when the call returns)."""
        return tensor.to(self.device, non_blocking=True)

    def _entering(self, inputs: Tensor) -> Tensor:
        """Return the hidden states that the layers add to, in memory of this iteration's own."""
        if not self.is_first:
            return inputs.clone()
        assert self.blocks[0].embedding is not None, "the first block has the embedding"
        return functional.embedding(self._there(inputs), self.blocks[0].embedding)

    def _rest(self, operators: TorchOperators, layer: LayerWeights, hidden: Tensor, attended: Tensor) -> None:
        """Compute the part of a layer that follows attention."""
        operators.add_product(hidden, attended, layer.output, layer.output_bias)
        operators.add_product(hidden, operators.gated(hidden, layer), layer.down, layer.down_bias)

    def _leaving(self, operators: TorchOperators, hidden: Tensor) -> Tensor:
        if not self.is_last:
            return hidden
        block = self.blocks[-1]
        assert block.norm is not None, "the last block has the norm"
        assert block.head is not None, "the last block has the head"
        return operators.logits(hidden, block.norm, block.head)


def answering(batch: StageBatch) -> StageBatch:
    """Return a batch of the wanted rows, each a segment of one token; ``wanted`` still counts the rows of ``batch``."""
    places = [(s.slot, s.start + token) for s in batch.segments for token in range(s.tokens)]
    segments = tuple(Segment(*places[row], 1) for row in batch.wanted)
    decodes = sum(row >= batch.rows - batch.decodes for row in batch.wanted)
    return StageBatch(segments, decodes, batch.wanted)


def rope_tables(architecture: Architecture, tokens: int, dtype: torch.dtype, device: torch.device) -> RopeTables:
    """Return the rotary embedding's tables for positions below ``tokens``, [tokens, head size / 2] each, computed in float32."""
    half = torch.arange(0, architecture.head_dim, 2, dtype=torch.int64).float() / architecture.head_dim
    frequencies = _stretched(architecture, 1.0 / architecture.rope_theta**half)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float32), frequencies)
    return RopeTables(angles.cos().to(device, dtype), angles.sin().to(device, dtype))


def _stretched(architecture: Architecture, frequencies: Tensor) -> Tensor:
    """Apply Llama 3's scaling: long waves by ``factor``, short ones not, a linear blend between (Llama 3.1 release notes)."""
    scaling = architecture.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position * frequencies / (2 * pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return frequencies * (blend + (1 - blend) / scaling.factor)
