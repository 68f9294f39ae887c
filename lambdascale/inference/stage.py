"""A stage: a contiguous range of a model's blocks, run on one device over an iteration of prefills and decodes mixed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from math import pi

import torch
from torch.nn import functional

from lambdascale.checkpoints import Architecture
from lambdascale.checkpoints.convert import TORCH_TYPES
from lambdascale.core.checks import require
from lambdascale.inference import devices
from lambdascale.inference.attention import BatchAttention, Parts, attend_whole
from lambdascale.inference.batch import Segment, StageBatch
from lambdascale.inference.choosing import choose
from lambdascale.inference.compiling import COMPILER
from lambdascale.inference.forms import MOST_REPLAYED, Form, first_answer, form_of, usual_forms
from lambdascale.inference.fused import TritonOperators, has_triton
from lambdascale.inference.kv_cache import KvCache
from lambdascale.inference.operators import Places, RopeTables, TorchOperators
from lambdascale.inference.replay import Replay, Replays, Step
from lambdascale.inference.sampling import Sampling
from lambdascale.inference.scratch import Scratch
from lambdascale.inference.weights import BlockWeights, LayerWeights

Tensor = torch.Tensor


class TransformerStage:
    """Blocks ``first`` to ``last`` of a model with their KV memory.

    Input: token ids [rows], best on the host, if the stage has the first block, else hidden states [rows, hidden]. Output: hidden
    states, or logits [wanted rows, vocabulary] (float32) if it has the last block. The weights stay where their buffers are.

    On a GPU, iterations that decode, prefill one prompt or do both are replayed as CUDA graphs as soon as the kernels are
    compiled, which happens in the background after the first iteration; until then torch's operators serve. A graph is recorded
    behind the first iteration of its form, or ahead of it by ``record_next``. ``replays``: pad and replay on a CPU too (without
    graphs, for tests).
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
        self._most_replayed = min((MOST_REPLAYED, *(window for window in self._windows if window is not None)))
        self._replays = self._no_replays() if replays else None
        self._is_full = False

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
        """Number of forms of iterations prepared for replay so far."""
        return 0 if self._replays is None else len(self._replays)

    @property
    def operators(self) -> str:
        """The operators in use: torch's, or kernels."""
        return "kernels" if self._operators.attends else "torch"

    @torch.inference_mode()
    def run(self, batch: StageBatch, inputs: Tensor) -> Tensor:
        """Run one iteration: KV of its tokens is written, then attended to. The result has memory of its own."""
        output, replay = self._run(batch, inputs)
        return output if replay is None else output.clone()

    @torch.inference_mode()
    def answer(self, batch: StageBatch, inputs: Tensor, rules: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
        """Run one iteration of the last stage, and choose the next token of each wanted row; see ``choose``."""
        output, replay = self._run(batch, inputs)
        if replay is None:
            return choose(output, rules, positions)
        found = replay.greedy()
        return choose(output, rules, positions, [found[row] for row in _answers(batch)])

    def _run(self, batch: StageBatch, inputs: Tensor) -> tuple[Tensor, Replay | None]:
        """Run one iteration. The output of a replay is in memory that the next one may overwrite."""
        devices.use(self.device)
        if self.device.type == "cuda" and self._replays is None and has_triton():
            return self._run_and_compile(batch, inputs)
        return self._replay_or_iterate(batch, inputs)

    def _replay_or_iterate(self, batch: StageBatch, inputs: Tensor) -> tuple[Tensor, Replay | None]:
        form = None if self._replays is None else form_of(batch, self._most_replayed)
        if self._replays is None or form is None or not self._replays.serves(form):
            return self._iterate(batch, inputs), None
        output, replay = self._replays.run(form, batch, inputs)
        if not self.is_last:
            return output[: batch.rows], replay
        rows = _answers(batch)
        if rows == list(range(len(rows))):
            return output[: len(rows)], replay
        return output[self._there(torch.tensor(rows, dtype=torch.long))], replay

    def _run_and_compile(self, batch: StageBatch, inputs: Tensor) -> tuple[Tensor, Replay | None]:
        """Run an iteration, by the kernels if they are compiled; else begin to compile them once it has been launched.

        The first token of a replica does not share the interpreter with a compilation that it does not need.
        """
        key = self.architecture, self.dtype, self.device
        if COMPILER.done(*key):
            self._use_kernels()
        found = self._replay_or_iterate(batch, inputs)
        COMPILER.ready(*key)
        return found

    @torch.inference_mode()
    def rehearse(self, batch: StageBatch, inputs: Tensor, *, kernels: bool = False) -> Tensor:
        """Run one iteration without replays, by torch's operators or by the ``kernels``, which are compiled. Compile nothing."""
        devices.use(self.device)
        if kernels:
            self._operators = self._kernels()
        return self._iterate(batch, inputs)

    def prepare(self, forms: Iterable[Form] = ()) -> None:
        """Wait for the kernels, and record these forms: for tests and measurements on a GPU."""
        if self.device.type == "cuda" and has_triton():
            COMPILER.wait(self.architecture, self.dtype, self.device)
            if self._replays is None:
                self._use_kernels()
        if self._replays is not None:
            with torch.inference_mode():
                for form in forms:
                    self._replays.record(form)

    def prepare_for(self, batch: StageBatch) -> None:
        """Do the same for the form of an iteration, if it has one."""
        form = form_of(batch, self._most_replayed)
        self.prepare([] if form is None else [form])

    def record_next(self, urgent: Callable[[], bool]) -> bool:
        """Record one more form ahead of its first use, unless ``urgent`` between two layers. Return False if nothing is left.

        That is also the case before anything has begun to compile the kernels.
        """
        devices.use(self.device)
        key = self.architecture, self.dtype, self.device
        if self._replays is None and self.device.type == "cuda":
            if not COMPILER.done(*key):
                return COMPILER.busy(*key)
            self._use_kernels()
        if self._replays is None:
            return False
        form = self._replays.next_of(usual_forms(self.kv.slots, self._most_replayed))
        if form is None or self._is_full:
            return False
        try:
            with torch.inference_mode():
                self._replays.record(form, urgent)
        except torch.OutOfMemoryError:
            self._is_full = True  # from now on a form is recorded when an iteration needs it
        return True

    def _use_kernels(self) -> None:
        """Use the kernels, which are compiled, from now on."""
        self._operators = self._kernels()
        self._replays = self._no_replays()

    def _kernels(self) -> TritonOperators:
        return TritonOperators(self.architecture, self._tables, self._operators.scratch)

    # -- replays -----------------------------------------------------------------------------------------------------

    def _no_replays(self) -> Replays:
        """Return replays by the operators in use, none of which is made yet.

        Steps have only a weak reference to the stage, so that a stage's KV memory is free at once when the stage is dropped.
        """
        # Results of recordings, which must not move, have memory of their own.
        scratch = Scratch(self.dtype, self.device, rows=MOST_REPLAYED)
        operators = type(self._operators)(self.architecture, self._tables, scratch)
        step_of = partial(_step_of, weakref.proxy(self), operators)
        hidden = None if self.is_first else self.architecture.hidden
        return Replays(step_of, self.dtype, self.device, hidden, is_last=self.is_last)

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
            self._rest(operators, layer, hidden, self._attend(index, query, places, parts), self._norm_after(index))
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

    def _norm_after(self, index: int) -> Tensor | None:
        """Return the weights of the norm that follows a layer, if this stage has them."""
        return self._layers[index + 1].input_norm if index + 1 < len(self._layers) else self.blocks[-1].norm

    def _rest(
        self, operators: TorchOperators, layer: LayerWeights, hidden: Tensor, attended: Tensor, norm: Tensor | None
    ) -> None:
        """Compute the part of a layer that follows attention. ``norm``: weights of the norm that follows the layer."""
        operators.add_product(hidden, attended, layer.output, layer.output_bias, layer.post_norm)
        operators.add_product(hidden, operators.gated(hidden, layer), layer.down, layer.down_bias, norm)

    def _leaving(self, operators: TorchOperators, hidden: Tensor) -> Tensor:
        if not self.is_last:
            return hidden
        block = self.blocks[-1]
        assert block.norm is not None, "the last block has the norm"
        assert block.head is not None, "the last block has the head"
        return operators.logits(hidden, block.norm, block.head)


def _step_of(stage: TransformerStage, operators: TorchOperators, form: Form) -> Step:
    """Return the step of a form: an iteration over padded rows that needs nothing of the host."""
    heads, kv_heads, last = stage.architecture.heads, stage.architecture.kv_heads, len(stage._layers) - 1

    def step(inputs: Tensor, slots: Tensor, positions: Tensor, answering: Tensor, between: Callable[[], None]) -> Tensor:
        hidden = stage._entering(inputs)
        places = operators.places(slots, positions, padded=True)
        decodes = answering[1:]
        lone = operators.places(slots[decodes], positions[decodes], padded=True) if form.decodes else None
        for index, layer in enumerate(stage._layers):
            between()
            kv, window = stage.kv.both[index], stage._windows[index]
            states = operators.project(hidden, layer)
            if not form.prompt:
                attended = operators.rotate_and_attend(states, places, kv, window)
            else:
                query = operators.rotate(states, places, kv)
                # Rows that decode follow the prompt, so that it does not see them; their results are replaced.
                attended = attend_whole(states, heads, kv_heads)
                if lone is not None:
                    attended.index_copy_(0, decodes, operators.attend(query[decodes], lone, kv, window))
                if stage.is_last and index == last:
                    hidden, attended = hidden[answering], attended[answering]
            stage._rest(operators, layer, hidden, attended, stage._norm_after(index))
        return stage._leaving(operators, hidden)

    return step


def _answers(batch: StageBatch) -> list[int]:
    """Return the places of wanted rows among those that a form gives results for."""
    first = first_answer(batch)
    return [row - first for row in batch.wanted]


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
