"""Runners compute a stage: the engine (torch), the engine held back to a profile's time (paced), or that time alone (timed)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol

import torch

from lambdascale.checkpoints import PackedModel
from lambdascale.checkpoints.convert import TORCH_TYPES
from lambdascale.core import NodeSpec
from lambdascale.core.checks import require
from lambdascale.core.timing import ComputeModel
from lambdascale.inference import BlockStore, TransformerStage
from lambdascale.inference.kept import KeptStages
from lambdascale.live.node.memory import tensor_of
from lambdascale.live.wire import Pass
from lambdascale.transport import Memory

# Hidden states as they come in: from a message, or in the memory that the stage before wrote them to.
Hidden = bytes | Memory


class Runner(Protocol):
    """A range of blocks, ready to compute. Used by one thread. ``layers`` are the model's layers in these blocks.

    ``kv_bytes``: size of a token's KV in a layer.
    """

    layers: range
    slots: int
    kv_bytes: int

    def run(self, work: Pass, inputs: Sequence[int] | Hidden) -> list[int] | bytes | torch.Tensor:
        """Run one iteration: token ids or hidden states in; hidden states out, or the chosen tokens of ``work.rules``.

        Hidden states come out as bytes, or as a flat tensor of bytes of their own, which may still be being computed.
        """
        ...

    def record_ahead(self, urgent: Callable[[], bool]) -> bool:
        """Prepare one more form of iterations, giving up once ``urgent()``; False if nothing is left to prepare."""
        ...

    def read_kv(self, slot: int, tokens: int, layers: range) -> bytes | torch.Tensor:
        """Return the KV of a slot's first tokens in some of the runner's layers, as ``run`` returns hidden states."""
        ...

    def write_kv(self, slot: int, layers: range, data: bytes | torch.Tensor) -> None:
        """Put what ``read_kv`` returned for these layers into a slot."""
        ...

    def close(self) -> None:
        """Release the weights and the KV memory."""
        ...


class Executor(Protocol):
    """Makes runners for a node. ``reserves``: a runner takes all its KV memory when it is made."""

    reserves: bool

    def layers(self, model: str, first_block: int, last_block: int) -> range:
        """Return the layers in a range of blocks."""
        ...

    def runner(self, model: str, first_block: int, last_block: int, slots: int) -> Runner:
        """Make a runner with ``slots`` KV slots for blocks that the node holds. OutOfMemoryError if a GPU lacks the memory."""
        ...


def _layers(packed: PackedModel, first_block: int, last_block: int) -> range:
    """Layers of the model in a range of blocks."""
    return range(packed.layouts[first_block].first_layer, packed.layouts[last_block].last_layer + 1)


class TorchExecutor:
    """Stages of the engine over the block store's device arena."""

    def __init__(self, store: BlockStore, slot_tokens: int) -> None:
        self._store = store
        self._slot_tokens = slot_tokens
        self._kept = KeptStages()
        self.reserves = store.device.type != "cpu"  # there the system commits memory page by page, as tokens are written

    def layers(self, model: str, first_block: int, last_block: int) -> range:
        """See Executor."""
        return _layers(self._store.model(model), first_block, last_block)

    def runner(self, model: str, first_block: int, last_block: int, slots: int) -> Runner:
        """See Executor."""
        return TorchRunner(self._store, model, range(first_block, last_block + 1), slots, self._slot_tokens, self._kept)


class TorchRunner:
    """A stage of the engine, which goes back to ``kept``; hidden states are the raw bytes of its element type."""

    def __init__(self, store: BlockStore, model: str, blocks: range, slots: int, slot_tokens: int, kept: KeptStages) -> None:
        packed = store.model(model)
        self._store = store
        self._architecture = packed.architecture
        self._dtype = TORCH_TYPES[packed.dtype]
        self.layers = _layers(packed, blocks.start, blocks.stop - 1)
        self.slots = slots
        self.kv_bytes = packed.spec.kv_bytes_per_token // packed.architecture.layers
        with ExitStack() as stack:
            weights = stack.enter_context(store.weights(model, list(blocks)))
            places = tuple(block.buffer.data_ptr() for block in weights)
            self._stage = stack.enter_context(
                kept.borrowed(
                    (model, blocks, slots, places),
                    lambda: TransformerStage(packed.architecture, weights, slots, slot_tokens),
                    self.kv_bytes * len(self.layers) * slots * slot_tokens,
                    store.device,
                )
            )
            self._stack = stack.pop_all()

    def run(self, work: Pass, inputs: Sequence[int] | Hidden) -> list[int] | torch.Tensor:
        """See Runner."""
        if isinstance(inputs, Hidden):
            raw = tensor_of(inputs, self._stage.device)
            given = raw.view(self._dtype).view(work.batch.rows, self._architecture.hidden).to(self._stage.device)
        else:
            given = torch.tensor(inputs, dtype=torch.long)
        if self._stage.is_last and work.rules:
            return self._stage.answer(work.batch, given, work.rules, work.positions)
        state = self._stage.run(work.batch, given)
        if self._stage.is_last:
            if state.device.type == "cuda":
                # The answer says that the inputs have been read: the stage before may write the next ones to their place.
                torch.cuda.current_stream(state.device).synchronize()
            return []
        return state.contiguous().view(torch.uint8).flatten()

    def record_ahead(self, urgent: Callable[[], bool]) -> bool:
        """See Runner. While blocks are loaded, whose threads need the interpreter, nothing is recorded."""
        if self._store.loading:
            return True
        return self._stage.record_next(lambda: urgent() or self._store.loading)

    def read_kv(self, slot: int, tokens: int, layers: range) -> torch.Tensor:
        """See Runner."""
        return self._stage.kv.read(slot, tokens, self._places(layers)).view(torch.uint8).flatten()

    def write_kv(self, slot: int, layers: range, data: bytes | torch.Tensor) -> None:
        """See Runner."""
        a = self._architecture
        raw = tensor_of(data, self._stage.device) if isinstance(data, bytes) else data
        kv = raw.view(self._dtype).view(2, len(layers), a.kv_heads, -1, a.head_dim)
        self._stage.kv.write(slot, kv.to(self._stage.device), self._places(layers))

    def _places(self, layers: range) -> slice:
        """Places of the model's layers among those of this stage."""
        first = self.layers.start
        return slice(layers.start - first, layers.stop - first)

    def close(self) -> None:
        """See Runner."""
        self._stack.close()


def _share(packed: PackedModel, first_block: int, last_block: int) -> float:
    """Part of the model's bytes that a range of blocks has."""
    return sum(packed.block_bytes[first_block : last_block + 1]) / sum(packed.block_bytes)


class PacedExecutor:
    """Stages of the engine, no faster than the cluster's compute model: a small model's tokens with a large one's timing."""

    def __init__(self, store: BlockStore, hardware: NodeSpec, slot_tokens: int) -> None:
        self._store = store
        self._hardware = hardware
        self._inner = TorchExecutor(store, slot_tokens)
        self.reserves = self._inner.reserves

    def layers(self, model: str, first_block: int, last_block: int) -> range:
        """See Executor."""
        return self._inner.layers(model, first_block, last_block)

    def runner(self, model: str, first_block: int, last_block: int, slots: int) -> Runner:
        """See Executor."""
        packed = self._store.model(model)
        compute, share = ComputeModel(self._hardware, packed.spec), _share(packed, first_block, last_block)
        return PacedRunner(self._inner.runner(model, first_block, last_block, slots), compute, share)


class PacedRunner:
    """Computes, then sleeps until the compute model's time has passed."""

    def __init__(self, inner: Runner, compute: ComputeModel, share: float) -> None:
        self._inner, self._compute, self._share = inner, compute, share
        self.layers, self.slots, self.kv_bytes = inner.layers, inner.slots, inner.kv_bytes

    def run(self, work: Pass, inputs: Sequence[int] | Hidden) -> list[int] | bytes | torch.Tensor:
        """See Runner."""
        until = time.monotonic() + self._compute.iteration_s(work, self._share)
        output = self._inner.run(work, inputs)
        time.sleep(max(0.0, until - time.monotonic()))
        return output

    def record_ahead(self, urgent: Callable[[], bool]) -> bool:
        """See Runner."""
        return self._inner.record_ahead(urgent)

    def read_kv(self, slot: int, tokens: int, layers: range) -> bytes | torch.Tensor:
        """See Runner."""
        return self._inner.read_kv(slot, tokens, layers)

    def write_kv(self, slot: int, layers: range, data: bytes | torch.Tensor) -> None:
        """See Runner."""
        self._inner.write_kv(slot, layers, data)

    def close(self) -> None:
        """See Runner."""
        self._inner.close()


class TimedExecutor:
    """Runners that take the profile's time and yield made-up tokens: messages and transfers are real, arithmetic is not."""

    reserves = False

    def __init__(self, store: BlockStore, hardware: NodeSpec, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._store = store
        self._hardware = hardware
        self._sleep = sleep

    def layers(self, model: str, first_block: int, last_block: int) -> range:
        """See Executor."""
        return _layers(self._store.model(model), first_block, last_block)

    def runner(self, model: str, first_block: int, last_block: int, slots: int) -> Runner:
        """See Executor."""
        packed = self._store.model(model)
        return TimedRunner(
            ComputeModel(self._hardware, packed.spec),
            _share(packed, first_block, last_block),
            layers=_layers(packed, first_block, last_block),
            slots=slots,
            is_last=last_block == len(packed.layouts) - 1,
            row_bytes=packed.row_bytes,
            kv_bytes=packed.spec.kv_bytes_per_token // packed.architecture.layers,
            sleep=self._sleep,
        )


class TimedRunner:
    """Sleeps for as long as the compute model says."""

    def __init__(
        self,
        compute: ComputeModel,
        share: float,
        *,
        layers: range,
        slots: int,
        is_last: bool,
        row_bytes: int,
        kv_bytes: int,
        sleep: Callable[[float], None],
    ) -> None:
        self._compute = compute
        self._share = share
        self.layers = layers
        self.slots = slots
        self._is_last = is_last
        self._row_bytes = row_bytes
        self.kv_bytes = kv_bytes
        self._sleep = sleep

    def run(self, work: Pass, inputs: Sequence[int] | Hidden) -> list[int] | bytes:
        """See Runner."""
        rows = work.batch.rows
        require(
            not isinstance(inputs, Hidden) or len(inputs) == rows * self._row_bytes,
            f"hidden states of {len(inputs)} bytes do not have {rows} rows of {self._row_bytes}",
        )
        self._sleep(self._compute.iteration_s(work, self._share))
        # Token 1 for every request: no tokenizer uses it as the end of a text.
        return [1] * len(work.rules) if self._is_last else bytes(rows * self._row_bytes)

    def record_ahead(self, urgent: Callable[[], bool]) -> bool:
        """See Runner. Nothing is computed, so nothing is to prepare."""
        return False

    def read_kv(self, slot: int, tokens: int, layers: range) -> bytes:
        """See Runner."""
        return bytes(self.kv_bytes * tokens * len(layers))

    def write_kv(self, slot: int, layers: range, data: bytes | torch.Tensor) -> None:
        """See Runner."""

    def close(self) -> None:
        """See Runner."""
