"""Operators of a stage's layers in torch: CPUs use them, and they are the reference of the kernels that GPUs use.

An object of operators reuses the memory of its results: use a result before you call the same method again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from lambdascale.checkpoints import Architecture
from lambdascale.inference.linear import add_linear, linear
from lambdascale.inference.scratch import Scratch
from lambdascale.inference.weights import LayerWeights

Tensor = torch.Tensor
Window = int | None


@dataclass(frozen=True)
class RopeTables:
    """Cosines and sines of the rotary embedding by position: [tokens, head size / 2] each."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Places:
    """Slot and position of every row [rows]. Position -1 is padding: such a row writes no KV and attends nothing.

    ``cos`` and ``sin`` [rows, 1, head size / 2] are those of the positions. ``live``: rows that are not padding; None if all are.
    """

    slots: Tensor
    positions: Tensor
    cos: Tensor
    sin: Tensor
    live: Tensor | None = None


class TorchOperators:
    """Operators by torch, for any device."""

    # True: ``attend`` is fast, and serves decoding rows of every iteration.
    attends = False

    def __init__(self, architecture: Architecture, tables: RopeTables, scratch: Scratch) -> None:
        self.architecture = architecture
        self.scratch = scratch
        self._tables = tables
        device = tables.cos.device
        self._kv_heads = torch.arange(2 * architecture.kv_heads, device=device)[None]

    def places(self, slots: Tensor, positions: Tensor, *, padded: bool = False) -> Places:
        """Return the places of an iteration's rows, some of which may be padding if ``padded``."""
        live = (positions >= 0).nonzero()[:, 0] if padded else None
        clamped = positions.clamp(min=0) if padded else positions
        return Places(slots, positions, self._tables.cos[clamped, None], self._tables.sin[clamped, None], live)

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """RMS norm of ``hidden`` [rows, hidden]."""
        return rms_norm(hidden, weight, self.architecture.norm_eps, self.scratch.take("normed", *hidden.shape))

    def project(self, hidden: Tensor, layer: LayerWeights) -> Tensor:
        """Queries, keys and values of normed hidden states: [rows, heads + 2 kv heads, head size]."""
        a = self.architecture
        states = self._wide(self.norm(hidden, layer.input_norm), layer.qkv, layer.qkv_bias)
        return states.view(-1, a.heads + 2 * a.kv_heads, a.head_dim)

    def _wide(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias, self.scratch.take("wide", len(x), len(weight)))

    def add_product(self, total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None = None) -> None:
        """Add ``x`` times ``weight`` transposed, plus ``bias``, to ``total`` [rows, outputs].

        ``norm``: weights of the RMS norm of ``total`` that follows, if any; kernels prepare it.
        """
        add_linear(total, x, weight, bias)

    def gated(self, hidden: Tensor, layer: LayerWeights) -> Tensor:
        """silu(gate) times up of normed hidden states: [rows, intermediate]."""
        gate, up = self._wide(self.norm(hidden, layer.post_norm), layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
        return torch.mul(functional.silu(gate, inplace=True), up, out=self.scratch.take("gated", *gate.shape))

    def rotate(self, states: Tensor, places: Places, kv: Tensor) -> Tensor:
        """Rotate queries and keys of ``states`` in place; write keys and values to ``kv`` [slots, 2 kv heads, tokens, head size].

        Returns the queries, a view of ``states``.
        """
        a = self.architecture
        low, high = states[:, : a.heads + a.kv_heads].chunk(2, dim=-1)
        turned_high = (high * places.cos).addcmul_(low, places.sin)
        low.mul_(places.cos).addcmul_(high, places.sin, value=-1)
        high.copy_(turned_high)
        slots, positions, found = places.slots, places.positions, states[:, a.heads :]
        if places.live is not None:
            slots, positions, found = slots[places.live], positions[places.live], found[places.live]
        kv.index_put_((slots[:, None], self._kv_heads, positions[:, None]), found)
        return states[:, : a.heads]

    def attend(self, query: Tensor, places: Places, kv: Tensor, window: Window) -> Tensor:
        """Attention of one token a row over its slot's context: from [rows, heads, head size] to [rows, heads x head size]."""
        a = self.architecture
        found = torch.zeros(len(query), a.heads * a.head_dim, dtype=query.dtype, device=query.device)
        for row, (slot, position) in enumerate(zip(places.slots.tolist(), places.positions.tolist(), strict=True)):
            begin = 0 if window is None else max(0, position + 1 - window)
            keys, values = kv[slot, :, begin : position + 1].chunk(2)
            if position >= 0:
                grouped = query[row].reshape(a.kv_heads, a.heads // a.kv_heads, a.head_dim)
                found[row] = functional.scaled_dot_product_attention(grouped, keys, values).flatten()
        return found

    def rotate_and_attend(self, states: Tensor, places: Places, kv: Tensor, window: Window) -> Tensor:
        """Rotate and write KV as ``rotate`` does, then attend: ``states`` may be left as they were."""
        return self.attend(self.rotate(states, places, kv), places, kv, window)

    def logits(self, hidden: Tensor, norm: Tensor, head: Tensor) -> Tensor:
        """Logits of normed hidden states: [rows, vocabulary], float32."""
        return linear(self.norm(hidden, norm), head).float()


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Return ``x`` [rows, hidden] over the root of its mean square, times ``weight``. ``out``: memory that the result may use."""
    if x.dtype is not torch.float32 or x.device.type != "cpu":
        return functional.rms_norm(x, weight.shape, weight, eps)
    # Here torch composes its rms_norm of nine operators, each of which costs more than the arithmetic of a decode step.
    size = x.shape[-1]
    scale: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()
    return torch.mul(x, scale, out=out).mul_(weight)
