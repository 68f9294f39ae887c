"""Duration of an iteration on a node: a roofline with efficiencies, or tables measured on real hardware. Simulated and timed
nodes share it.

Roofline: an iteration reads the weights once and does 2 FLOP per parameter and token, whichever takes longer; on top come
the KV cache that decoding sequences read (memory-bound) and the attention of prefills (compute-bound). The GPUs of a node
hold consecutive layers and an iteration visits them one after another, so that it takes as long as on one GPU that held
everything (reference, section 4: 140 ms a token for 70B on four GPUs); other batches may be on the other GPUs meanwhile.
Tensor parallelism, which divides the time of one iteration by the GPUs, is not modelled: the paper's system has none.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Protocol

from lambdascale.core.specs import ComputeTable, ModelSpec, NodeSpec


def interpolate(xs: tuple[float, ...], ys: tuple[float, ...], x: float) -> float:
    """Interpolate linearly between the points (xs, ys); outside them, extend the outer slope, never below zero."""
    if len(xs) == 1:
        return ys[0]
    right = min(max(bisect_right(xs, x), 1), len(xs) - 1)
    slope = (ys[right] - ys[right - 1]) / (xs[right] - xs[right - 1])
    return max(0.0, ys[right - 1] + slope * (x - xs[right - 1]))


class IterationSize(Protocol):
    """Sizes of an iteration that determine its duration."""

    @property
    def decodes(self) -> int:
        """Number of sequences that decode one token each."""

    @property
    def context_tokens(self) -> int:
        """Number of KV tokens that the decodes read."""

    @property
    def prefill_tokens(self) -> int:
        """Number of tokens prefilled."""

    @property
    def attended_tokens(self) -> int:
        """Number of query-key pairs in the prefills."""


@dataclass(frozen=True)
class Iteration:
    """Sizes of an iteration that is only thought of: see IterationSize."""

    prefill_tokens: int = 0
    attended_tokens: int = 0
    decodes: int = 0
    context_tokens: int = 0


class ComputeModel:
    """Iteration times of one model on one node, in seconds. ``share`` is the part of the model a stage holds.

    ``slowdown``: all of them are so many times as long as the node's engine takes.
    """

    def __init__(self, node: NodeSpec, model: ModelSpec, slowdown: float = 1.0) -> None:
        gpu, reached = node.gpu, node.compute
        flops = gpu.peak_flops * reached.flops_efficiency / slowdown
        bandwidth = float(gpu.hbm_bytes_per_s) * reached.bandwidth_efficiency / slowdown
        self._slowdown = slowdown
        self._overhead_s = slowdown * reached.iteration_overhead_s
        self._weights_s = model.size_bytes / bandwidth
        self._token_s = 2 * model.params / flops
        self._kv_token_s = model.kv_bytes_per_token / bandwidth
        # Scores and weighted values: 2 FLOP each per query-key pair and hidden unit, in every layer.
        self._pair_s = 4 * model.layers * model.hidden / flops
        self._table = next((table for table in reached.measured if table.model == model.name), None)
        if self._table is not None:
            self._kv_token_s = slowdown * self._table.decode_s_per_context_token
        self._decodes = _Bases(self)

    @property
    def kv_token_s(self) -> float:
        """Seconds by which a token of KV cache makes a decode longer."""
        return self._kv_token_s

    def iteration_s(self, iteration: IterationSize, share: float = 1.0) -> float:
        """Seconds for one iteration on a node that holds ``share`` of the model."""
        decodes, prefill = iteration.decodes, iteration.prefill_tokens
        base = self.base_s(decodes, prefill) if prefill else self._decodes[decodes]
        work = base + iteration.context_tokens * self._kv_token_s
        if prefill and self._table is None:
            work += iteration.attended_tokens * self._pair_s
        return self._overhead_s + share * work

    def decode_run_s(self, batch: int, context_tokens: int, steps: int) -> float:
        """Seconds for ``steps`` decode iterations of an unchanged batch whose KV starts at ``context_tokens`` in total."""
        grown = batch * steps * (steps - 1) // 2
        return steps * (self._overhead_s + self._decodes[batch]) + (steps * context_tokens + grown) * self._kv_token_s

    def decode_steps_by(self, batch: int, context_tokens: int, elapsed_s: float) -> tuple[int, float]:
        """Smallest number of iterations (at least 1) for which :meth:`decode_run_s` reaches ``elapsed_s``, and that time."""
        growth = batch * self._kv_token_s / 2
        first = self._overhead_s + self._decodes[batch] + context_tokens * self._kv_token_s - growth
        root = elapsed_s / first if growth == 0 else (sqrt(first * first + 4 * growth * elapsed_s) - first) / (2 * growth)
        steps = ceil(root) or 1
        # The root is exact up to rounding, so that at most one step has to be added or removed.
        if steps > 1 and (run_s := self.decode_run_s(batch, context_tokens, steps - 1)) >= elapsed_s:
            return steps - 1, run_s
        if (run_s := self.decode_run_s(batch, context_tokens, steps)) >= elapsed_s:
            return steps, run_s
        return steps + 1, self.decode_run_s(batch, context_tokens, steps + 1)

    def base_s(self, decodes: int, prefill_tokens: int) -> float:
        """Seconds for an iteration of the whole model without its overhead, reads of KV cache and attention of prefills."""
        if self._table is not None:
            return self._slowdown * _measured_s(self._table, decodes, prefill_tokens)
        compute = (decodes + prefill_tokens) * self._token_s
        return compute if compute > self._weights_s else self._weights_s


class _Bases(dict[int, float]):
    """Base time of iterations that decode only, by batch size; worked out when first asked for."""

    def __init__(self, model: ComputeModel) -> None:
        super().__init__()
        self._model = model

    def __missing__(self, batch: int) -> float:
        base = self[batch] = self._model.base_s(batch, 0)
        return base


def _measured_s(table: ComputeTable, decodes: int, prefill_tokens: int) -> float:
    """Seconds for an iteration; with a prefill, each decode counts as one more token, but never less than the decodes alone."""
    decode = interpolate(table.decode_batch, table.decode_s, decodes) if decodes else 0.0
    if not prefill_tokens:
        return decode
    return max(decode, interpolate(table.prefill_tokens, table.prefill_s, prefill_tokens + decodes))
