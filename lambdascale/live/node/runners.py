"""What computes a stage: the engine (torch), the engine held back to a profile's time (paced), or that time alone (timed)."""

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
from lambdascale.inference.sampling import choose
from lambdascale.live.wire import Pass


class Runner(Protocol):
    """A range of blocks, ready to compute. Used by one thread."""

    first_layer: int
    layers: int

    def run(self, work: Pass, inputs: Sequence[int] | bytes) -> list[int] | bytes:
        """One iteration: token ids or hidden states in; hidden states out, or the chosen tokens of ``work.rules``."""
        ...

    def read_kv(self, slot: int, tokens: int) -> bytes:
        """The KV of a slot's first tokens."""
        ...

    def write_kv(self, slot: int, parts: Sequence[bytes]) -> None:
        """KV as ``read_kv`` gave it, of all the runner's layers: parts in order of their layers."""
        ...

    def close(self) -> None:
        """Let go of the weights."""
        ...


class Executor(Protocol):
    """Makes runners for a node."""

    def runner(self, model: str, first_block: int, last_block: int, slots: int) -> Runner:
        """A runner for blocks the node holds, with ``slots`` KV slots."""
        ...


class TorchExecutor:
    """Stages of the engine over the block store's device arena."""

    def __init__(self, store: BlockStore, slot_tokens: int) -> None:
        self._store = store
        self._slot_tokens = slot_tokens

    def runner(self, model: str, first_block: int, last_block: int, slots: int) -> Runner:
        """See Executor."""
        return TorchRunner(self._store, model, range(first_block, last_block + 1), slots, self._slot_tokens)


class TorchRunner:
    """A stage; hidden states travel as the raw bytes of its element type."""

    def __init__(self, store: BlockStore, model: str, blocks: range, slots: int, slot_tokens: int) -> None:
        packed = store.model(model)
        self._architecture = packed.architecture
        self._dtype = TORCH_TYPES[packed.dtype]
        self._stack = ExitStack()
        weights = self._stack.enter_context(store.weights(model, list(blocks)))
        self._stage = TransformerStage(packed.architecture, weights, slots, slot_tokens)
        self.first_layer = weights[0].layout.first_layer
        self.layers = weights[-1].layout.last_layer + 1 - self.first_layer

    def run(self, work: Pass, inputs: Sequence[int] | bytes) -> list[int] | bytes:
        """See Runner."""
        if isinstance(inputs, bytes):
            hidden = torch.frombuffer(bytearray(inputs), dtype=self._dtype).view(work.batch.rows, self._architecture.hidden)
        else:
            hidden = torch.tensor(inputs, dtype=torch.long)
        state = self._stage.run(work.batch, hidden.to(self._stage.device))
        if self._stage.is_last:
            return choose(state, work.rules, work.positions) if work.rules else []
        return _raw(state)

    def read_kv(self, slot: int, tokens: int) -> bytes:
        """See Runner."""
        return _raw(self._stage.kv.read(slot, tokens))

    def write_kv(self, slot: int, parts: Sequence[bytes]) -> None:
        """See Runner."""
        a = self._architecture
        tensors = []
        for part in parts:
            flat = torch.frombuffer(bytearray(part), dtype=self._dtype)
            # [key or value, layers, kv heads, tokens, head size]; parts differ in their layers only.
            tensors.append(flat.view(2, -1, a.kv_heads, self._tokens(parts), a.head_dim))
        self._stage.kv.write(slot, torch.cat(tensors, dim=1).to(self._stage.device))

    def _tokens(self, parts: Sequence[bytes]) -> int:
        a, size = self._architecture, sum(len(part) for part in parts)
        return size // (2 * self.layers * a.kv_heads * a.head_dim * self._dtype.itemsize)

    def close(self) -> None:
        """See Runner."""
        self._stack.close()


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _share(packed: PackedModel, first_block: int, last_block: int) -> float:
    """The part of the model that a range of blocks is."""
    return sum(packed.block_bytes[first_block : last_block + 1]) / sum(packed.block_bytes)


class PacedExecutor:
    """The engine's stages, no faster than the cluster's compute model: a small model's tokens with a large one's timing."""

    def __init__(self, store: BlockStore, hardware: NodeSpec, slot_tokens: int) -> None:
        self._store = store
        self._hardware = hardware
        self._inner = TorchExecutor(store, slot_tokens)

    def runner(self, model: str, first_block: int, last_block: int, slots: int) -> Runner:
        """See Executor."""
        packed = self._store.model(model)
        compute, share = ComputeModel(self._hardware, packed.spec), _share(packed, first_block, last_block)
        return PacedRunner(self._inner.runner(model, first_block, last_block, slots), compute, share)


class PacedRunner:
    """Computes, then sleeps until the compute model's time has passed."""

    def __init__(self, inner: Runner, compute: ComputeModel, share: float) -> None:
        self._inner, self._compute, self._share = inner, compute, share
        self.first_layer, self.layers = inner.first_layer, inner.layers

    def run(self, work: Pass, inputs: Sequence[int] | bytes) -> list[int] | bytes:
        """See Runner."""
        until = time.monotonic() + self._compute.iteration_s(work, self._share)
        output = self._inner.run(work, inputs)
        time.sleep(max(0.0, until - time.monotonic()))
        return output

    def read_kv(self, slot: int, tokens: int) -> bytes:
        """See Runner."""
        return self._inner.read_kv(slot, tokens)

    def write_kv(self, slot: int, parts: Sequence[bytes]) -> None:
        """See Runner."""
        self._inner.write_kv(slot, parts)

    def close(self) -> None:
        """See Runner."""
        self._inner.close()


class TimedExecutor:
    """Runners that take the profile's time and yield made-up tokens: messages and transfers are real, arithmetic is not."""

    def __init__(self, store: BlockStore, hardware: NodeSpec, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._store = store
        self._hardware = hardware
        self._sleep = sleep

    def runner(self, model: str, first_block: int, last_block: int, slots: int) -> Runner:
        """See Executor."""
        packed = self._store.model(model)
        layouts = packed.layouts
        return TimedRunner(
            ComputeModel(self._hardware, packed.spec),
            _share(packed, first_block, last_block),
            first_layer=layouts[first_block].first_layer,
            layers=layouts[last_block].last_layer + 1 - layouts[first_block].first_layer,
            is_last=last_block == len(layouts) - 1,
            row_bytes=packed.architecture.hidden * TORCH_TYPES[packed.dtype].itemsize,
            kv_bytes=packed.spec.kv_bytes_per_token,
            all_layers=packed.architecture.layers,
            sleep=self._sleep,
        )


class TimedRunner:
    """Sleeps for as long as the compute model says."""

    def __init__(
        self,
        compute: ComputeModel,
        share: float,
        *,
        first_layer: int,
        layers: int,
        is_last: bool,
        row_bytes: int,
        kv_bytes: int,
        all_layers: int,
        sleep: Callable[[float], None],
    ) -> None:
        self._compute = compute
        self._share = share
        self.first_layer = first_layer
        self.layers = layers
        self._is_last = is_last
        self._row_bytes = row_bytes
        self._kv_bytes = kv_bytes * layers // all_layers
        self._sleep = sleep

    def run(self, work: Pass, inputs: Sequence[int] | bytes) -> list[int] | bytes:
        """See Runner."""
        rows = work.batch.rows
        require(not isinstance(inputs, bytes) or len(inputs) == rows * self._row_bytes, "hidden states of another size")
        self._sleep(self._compute.iteration_s(work, self._share))
        # Token 1 for everybody: no tokenizer's end of a text.
        return [1] * len(work.rules) if self._is_last else bytes(rows * self._row_bytes)

    def read_kv(self, slot: int, tokens: int) -> bytes:
        """See Runner."""
        return bytes(self._kv_bytes * tokens)

    def write_kv(self, slot: int, parts: Sequence[bytes]) -> None:
        """See Runner."""

    def close(self) -> None:
        """See Runner."""
