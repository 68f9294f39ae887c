"""Decode steps as CUDA graphs: the hundreds of launches of a step are recorded once for each batch size and replayed by one call.

A recorded step has fixed addresses and a fixed number of rows, so batches are padded to a power of two and the input is copied
to where the recording expects it. One recording serves contexts of any length, since kernels read positions on the device.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

Tensor = torch.Tensor
# From inputs, slots [rows] and positions [rows] (-1: padding) to hidden states or logits, without the host.
Step = Callable[[Tensor, Tensor, Tensor], Tensor]


class Replay:
    """A step over input memory of its own, like ``inputs`` [rows, ...], for at most as many rows; recorded if that is on a GPU.

    On a CPU every call computes the step, with the same padding and copies, for tests. ``pool``: memory that recordings share.
    """

    def __init__(self, step: Step, inputs: Tensor, pool: Any) -> None:
        self._step = step
        rows, device = len(inputs), inputs.device
        # Slots, positions and, where the inputs are token ids, those: one copy from the host brings all.
        self._given = torch.tensor([[0] * rows, [-1] * rows, [0] * rows]).to(device)
        self._places = self._given[:2]
        self._inputs = self._given[2] if inputs.dtype is torch.long else inputs
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Tensor | None = None
        if device.type == "cuda":
            self._record(pool)

    def __call__(self, inputs: Tensor, slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Return the step's output, one row for each of ``slots``, in memory of its own."""
        count, rows = len(slots), len(self._inputs)
        unused = [0] * (rows - count)
        given = [[*slots, *unused], [*positions, *(-1 for _ in unused)]]
        if inputs.dtype is torch.long and inputs.device.type == "cpu":
            self._given.copy_(torch.tensor([*given, [*inputs.tolist(), *unused]]), non_blocking=True)
        else:
            self._inputs[:count].copy_(inputs, non_blocking=True)
            self._places.copy_(torch.tensor(given), non_blocking=True)
        if self._graph is None:
            return self._compute()[:count]
        self._graph.replay()
        assert self._output is not None, "recording leaves an output"
        return self._output[:count].clone()

    def _compute(self) -> Tensor:
        return self._step(self._inputs, self._places[0], self._places[1])

    def _record(self, pool: Any) -> None:
        """Run the step once over padding, which loads libraries and changes no KV; then record it."""
        stream, before = torch.cuda.Stream(self._inputs.device), torch.cuda.current_stream()
        stream.wait_stream(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream), _without_collection():
            self._compute()
            # Other threads may allocate meanwhile; this one must not wait for the device.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self._output = self._compute()
            finally:
                graph.capture_end()
        before.wait_stream(stream)
        self._graph = graph


@contextmanager
def _without_collection() -> Iterator[None]:
    """Suspend garbage collection, which might free CUDA objects and so break the recording."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class Replays:
    """The replays of a stage by numbers of rows, each made at its first use."""

    def __init__(self) -> None:
        self._made: dict[int, Replay] = {}
        self._pool: Any = None

    def __len__(self) -> int:
        """Number of replays made so far."""
        return len(self._made)

    def take(self, rows: int, step: Callable[[], Step], inputs_of: Callable[[int], Tensor]) -> Replay:
        """Return the smallest replay that has room for ``rows`` rows, made if it is missing.

        ``step()`` returns a step with memory of its own for results, ``inputs_of(rows)`` memory for the input.
        """
        size = 1 << (rows - 1).bit_length()
        if size not in self._made:
            inputs = inputs_of(size)
            if self._pool is None and inputs.is_cuda:
                self._pool = torch.cuda.graph_pool_handle()
            self._made[size] = Replay(step(), inputs, self._pool)
        return self._made[size]
