"""The operators of a GPU as Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch

from lambdascale.checkpoints import Architecture
from lambdascale.inference.operators import Places, RopeTables, TorchOperators, Window
from lambdascale.inference.scratch import Scratch
from lambdascale.inference.weights import LayerWeights

Tensor = torch.Tensor
# Every program of linear_kernel computes all rows; tiles exist for at most this many.
MOST_ROWS = 32
# Programs that keep a GPU of 132 multiprocessors busy with attention.
_PROGRAMS = 512
_MOST_SPLITS = 64
# Number of outputs above which programs of few outputs each no longer run all at once on a GPU.
_WIDE = 8192
# Most outputs for which programs of 32 outputs, one on each of 132 multiprocessors, all run at once.
_AT_ONCE = 32 * 132
_ALL_TOKENS = 1 << 30


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth that a program of ``linear_kernel`` computes at a time, and its launch settings."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int

    def of(self, dtype: torch.dtype) -> Tile:
        """Return the tile for a type, of half the depth for float32: what a program has at a time must fit shared memory."""
        return replace(self, inputs=self.inputs // 2) if dtype is torch.float32 and self.rows > 1 else self


def tile(rows: int, outputs: int, *, added: bool = False, gated: bool = False) -> Tile | None:
    """Return the tile for a product, None where cuBLAS is as fast or faster.

    Chosen by measurement on an H100 and an H200, for the products of a 7B Llama and 1, 8 and 32 rows. One row reads its weights
    at 80 to 100 % of the memory's rate (cuBLAS: 67 to 91); from two rows on, cuBLAS is at 70 to 95 %, and the kernel is ahead
    only where it saves launches (the norm before and the gate after a product, the sum after it) or all programs run at once.
    """
    if rows == 1:
        if gated:
            return Tile(1, 4, 1024, 4, 1)
        return Tile(1, 4, 2048, 8, 1) if outputs > _WIDE else Tile(1, 8, 1024, 8, 1)
    if rows <= 16 and gated:
        return Tile(16, 128, 64, 4, 4)
    if added and outputs <= _WIDE and rows <= MOST_ROWS:
        if rows <= 16:
            return Tile(16, 16, 256, 2, 4)
        return Tile(32, 32, 256, 4, 5) if outputs <= _AT_ONCE else Tile(32, 16, 128, 4, 5)
    return None


def splits_of(rows: int, kv_heads: int) -> int:
    """Return the parts into which attention of so many rows divides every context, so that the programs keep a GPU busy."""
    return min(_MOST_SPLITS, power(max(1, _PROGRAMS // (rows * kv_heads))))


def rehearsed_rows(kv_heads: int) -> tuple[int, ...]:
    """Return numbers of rows that need all variants of the kernels between them: every tile, and every number of splits."""
    by_splits = {splits_of(rows, kv_heads): rows for rows in range(_PROGRAMS, 0, -1)}
    return tuple(sorted({1, 2, MOST_ROWS, MOST_ROWS + 1} | set(by_splits.values())))


class TritonOperators(TorchOperators):
    """TorchOperators by Triton kernels: the same results except for rounding."""

    attends = True

    def __init__(self, architecture: Architecture, tables: RopeTables, scratch: Scratch) -> None:
        # Imported here, so that nothing of Triton is loaded where it is not used.
        from lambdascale.inference import kernels

        super().__init__(architecture, tables, scratch)
        self._kernels = kernels
        a = architecture
        self._heads = a.heads + 2 * a.kv_heads
        self._block_d = power(a.head_dim)
        self._early = kernels.STARTS_EARLY and can_start_early(tables.cos.device)

    def places(self, slots: Tensor, positions: Tensor, *, padded: bool = False) -> Places:
        """See TorchOperators. The kernels themselves look up cosines and sines, and skip padding."""
        return Places(slots, positions, self._tables.cos, self._tables.sin)

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """See TorchOperators. Steps of many rows are launched, not replayed, and torch's launch is shorter."""
        if len(hidden) > MOST_ROWS:
            return super().norm(hidden, weight)
        out, size = self.scratch.take("normed", *hidden.shape), hidden.shape[1]
        block = power(size)
        self._kernels.norm_kernel[(len(hidden),)](
            hidden,
            weight,
            out,
            size,
            self.architecture.norm_eps,
            BLOCK=block,
            num_warps=max(4, min(16, block // 512)),
            **self._launch(len(hidden)),
        )
        return out

    def project(self, hidden: Tensor, layer: LayerWeights) -> Tensor:
        """See TorchOperators."""
        a = self.architecture
        shape = tile(len(hidden), len(layer.qkv))
        if shape is None:
            return super().project(hidden, layer)
        out = self.scratch.take("wide", len(hidden), len(layer.qkv))
        self._fused_product(shape, hidden, layer.input_norm, layer.qkv, layer.qkv_bias, out)
        return out.view(-1, self._heads, a.head_dim)

    def add_product(self, total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """See TorchOperators."""
        shape = tile(len(x), len(weight), added=True)
        if shape is None:
            super().add_product(total, x, weight, bias)
        elif len(x):
            self.product(shape, x, weight, bias, total, added=True)

    def gated(self, hidden: Tensor, layer: LayerWeights) -> Tensor:
        """See TorchOperators."""
        rows, columns = len(hidden), len(layer.gate_up) // 2
        out = self.scratch.take("gated", rows, columns)
        shape = tile(rows, columns, gated=True)
        if shape is not None:
            self._fused_product(shape, hidden, layer.post_norm, layer.gate_up, layer.gate_up_bias, out, gated=True)
            return out
        both = self._wide(self.norm(hidden, layer.post_norm), layer.gate_up, layer.gate_up_bias)
        block = min(1024, power(columns))
        self._kernels.gate_kernel[(rows, -(-columns // block))](both, out, columns, BLOCK=block, num_warps=4)
        return out

    def rotate(self, states: Tensor, places: Places, kv: Tensor) -> Tensor:
        """See TorchOperators."""
        a, block = self.architecture, min(16, power(self._heads))
        self._kernels.rotate_kernel[(len(states), -(-self._heads // block))](
            states,
            places.cos,
            places.sin,
            places.slots,
            places.positions,
            kv,
            states.stride(0),
            kv.stride(0),
            kv.stride(1),
            HEADS=a.heads,
            KV_HEADS=a.kv_heads,
            HALF=a.head_dim // 2,
            BLOCK_H=block,
            BLOCK_D=max(1, self._block_d // 2),
            num_warps=4,
            **self._launch(len(states)),
        )
        return states[:, : a.heads]

    def attend(self, query: Tensor, places: Places, kv: Tensor, window: Window) -> Tensor:
        """See TorchOperators."""
        a, rows = self.architecture, len(query)
        splits = splits_of(rows, a.kv_heads)
        parts = self.scratch.take("parts", rows * a.heads * splits, a.head_dim, torch.float32)
        sums = self.scratch.take("sums", rows * a.heads, splits, torch.float32)
        out = self.scratch.take("attended", rows, a.heads * a.head_dim)
        group = a.heads // a.kv_heads
        self._kernels.attend_kernel[(rows, a.kv_heads, splits)](
            query,
            kv,
            places.slots,
            places.positions,
            parts,
            sums,
            query.stride(0),
            kv.stride(0),
            kv.stride(1),
            a.head_dim**-0.5,
            _ALL_TOKENS if window is None else window,
            KV_HEADS=a.kv_heads,
            GROUP=group,
            DIM=a.head_dim,
            BLOCK_G=max(16, power(group)),
            BLOCK_D=max(16, self._block_d),
            BLOCK_T=64,
            SPLITS=splits,
            num_warps=4,
            num_stages=2,
            **self._launch(rows),
        )
        self._kernels.join_kernel[(rows, a.heads)](
            parts,
            sums,
            out,
            HEADS=a.heads,
            DIM=a.head_dim,
            BLOCK_D=self._block_d,
            SPLITS=splits,
            num_warps=4,
            **self._launch(rows),
        )
        return out

    def logits(self, hidden: Tensor, norm: Tensor, head: Tensor) -> Tensor:
        """See TorchOperators."""
        shape = tile(len(hidden), len(head))
        if shape is None:
            return super().logits(hidden, norm, head)
        out = torch.empty(len(hidden), len(head), dtype=torch.float32, device=hidden.device)
        self._fused_product(shape, hidden, norm, head, None, out)
        return out

    def _launch(self, rows: int) -> dict[str, bool]:
        """Return settings of a kernel's launch: of one row, kernels start early, where the GPU can do that.

        The start of a kernel is a larger part of a shorter step. Of more rows, kernels that wait take room from those that run.
        """
        return {"EARLY": True, "launch_pdl": True} if self._early and rows == 1 else {"EARLY": False}

    def _fused_product(
        self, shape: Tile, hidden: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, gated: bool = False
    ) -> None:
        """Set ``out`` to the norm of ``hidden`` times ``weight`` transposed, plus ``bias``."""
        if not len(hidden):
            return
        if hidden.dtype is torch.float16:
            # Hidden states times the norm's weights may exceed what this type holds before they are scaled.
            self.product(shape, self.norm(hidden, norm), weight, bias, out, gated=gated)
        else:
            self.product(shape, hidden, weight, bias, out, norm=norm, gated=gated)

    def product(
        self,
        shape: Tile,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        *,
        norm: Tensor | None = None,
        added: bool = False,
        gated: bool = False,
    ) -> None:
        """Launch ``linear_kernel`` with tiles of ``shape``, for types of 16 bits, which must have room for the rows."""
        outputs, inputs, t = len(weight) // 2 if gated else len(weight), weight.shape[1], shape.of(weight.dtype)
        self._kernels.linear_kernel[(-(-outputs // t.outputs),)](
            x,
            norm if norm is not None else x,
            weight,
            bias if bias is not None else x,
            out,
            len(x),
            outputs,
            inputs,
            x.stride(0),
            self.architecture.norm_eps,
            BLOCK_M=t.rows,
            BLOCK_N=t.outputs,
            BLOCK_K=t.inputs,
            EVEN_K=inputs % t.inputs == 0,
            NORMED=norm is not None,
            BIASED=bias is not None,
            ADDED=added,
            GATED=gated,
            num_warps=t.warps,
            num_stages=t.stages,
            **self._launch(len(x)),
        )


def can_start_early(device: torch.device) -> bool:
    """Return True if a kernel can start on this GPU while the one before it still runs: on Hopper and later ones."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def power(value: int) -> int:
    """The least power of two that is not below ``value``."""
    return 1 << (value - 1).bit_length() if value > 1 else 1


@cache
def has_triton() -> bool:
    """True if Triton is installed, as it is with torch for CUDA."""
    return find_spec("triton") is not None
