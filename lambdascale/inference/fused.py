"""The operators of a GPU as Triton kernels."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from lambdascale.checkpoints import Architecture
from lambdascale.inference.operators import Places, RopeTables, TorchOperators, Window
from lambdascale.inference.scratch import Scratch
from lambdascale.inference.tiles import MOST_ROWS, TUNED, Tile, Tuning, tile
from lambdascale.inference.weights import LayerWeights

Tensor = torch.Tensor
# Programs that keep a GPU of 132 multiprocessors busy with attention.
_PROGRAMS = 256
_MOST_SPLITS = 64
_ALL_TOKENS = 1 << 30


def splits_of(rows: int, kv_heads: int) -> int:
    """Return the parts into which attention of so many rows divides every context, so that the programs keep a GPU busy."""
    return min(_MOST_SPLITS, power(max(1, _PROGRAMS // (rows * kv_heads))))


def rehearsed_rows(kv_heads: int, tuning: Tuning = TUNED) -> tuple[int, ...]:
    """Return numbers of rows that need all variants of the kernels between them: every tile and start, attention divided or not.

    Kernels of one row are compiled for one.
    """
    found: dict[tuple[bool, ...], int] = {}
    for rows in range(1, _PROGRAMS + 1):
        limits = (rows <= limit for limit in (1, *tuning.limits()))
        found.setdefault((*limits, splits_of(rows, kv_heads) == 1), rows)
    return tuple(found.values())


class TritonOperators(TorchOperators):
    """TorchOperators by Triton kernels: the same results except for rounding."""

    attends = True
    tuning = TUNED

    def __init__(self, architecture: Architecture, tables: RopeTables, scratch: Scratch) -> None:
        # Imported here, so that nothing of Triton is loaded where it is not used.
        from lambdascale.inference import kernels

        super().__init__(architecture, tables, scratch)
        self._kernels = kernels
        a = architecture
        self._heads = a.heads + 2 * a.kv_heads
        self._block_d = power(a.head_dim)
        # The hidden states and the norm's weights that the last product prepared (see linear_kernel).
        self._prepared: tuple[Tensor, Tensor] | None = None
        self._early = kernels.STARTS_EARLY and can_start_early(tables.cos.device)

    def places(self, slots: Tensor, positions: Tensor, *, padded: bool = False) -> Places:
        """See TorchOperators. The kernels themselves look up cosines and sines, and skip padding."""
        return Places(slots, positions, self._tables.cos, self._tables.sin)

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """See TorchOperators. Steps of many rows are launched, not replayed, and torch's launch is shorter."""
        if len(hidden) > MOST_ROWS:
            return super().norm(hidden, weight)
        out, size = self.scratch.take("normed", *hidden.shape), hidden.shape[1]
        block, summed = power(size), self.tuning.summed(len(hidden), size)
        self._kernels.norm_kernel[(len(hidden),)](
            hidden,
            weight,
            out,
            self._squares(len(hidden), size, summed),
            size,
            self.architecture.norm_eps,
            SUMMED=summed,
            BLOCK=block,
            num_warps=max(4, min(16, block // 512)),
            **self._launch(len(hidden)),
        )
        self._prepared = None
        return out

    def project(self, hidden: Tensor, layer: LayerWeights) -> Tensor:
        """See TorchOperators."""
        a, shape = self.architecture, tile(len(hidden))
        if shape is None:
            return super().project(hidden, layer)
        out = self.scratch.take("wide", len(hidden), len(layer.qkv))
        self._normed_product(shape, hidden, layer.input_norm, layer.qkv, layer.qkv_bias, out)
        return out.view(-1, self._heads, a.head_dim)

    def add_product(self, total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None = None) -> None:
        """See TorchOperators."""
        shape = self.tuning.adding(*total.shape)
        self._prepared = None
        if shape is None:
            super().add_product(total, x, weight, bias)
        elif len(x):
            # As float16, hidden states times the norm's weights may exceed what the type holds before they are scaled.
            prepares = None if total.dtype is torch.float16 else norm
            self._product(shape, x, weight, bias, total, added=True, prepares=prepares)
            self._prepared = None if prepares is None else (total, prepares)

    def gated(self, hidden: Tensor, layer: LayerWeights) -> Tensor:
        """See TorchOperators."""
        rows, columns = len(hidden), len(layer.gate_up) // 2
        out = self.scratch.take("gated", rows, columns)
        shape = tile(rows, gated=True)
        if shape is not None:
            self._normed_product(shape, hidden, layer.post_norm, layer.gate_up, layer.gate_up_bias, out, gated=True)
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
        return self._attention(query, places, kv, window, rotated=True)

    def rotate_and_attend(self, states: Tensor, places: Places, kv: Tensor, window: Window) -> Tensor:
        """See TorchOperators."""
        return self._attention(states, places, kv, window, rotated=False)

    def _attention(self, states: Tensor, places: Places, kv: Tensor, window: Window, *, rotated: bool) -> Tensor:
        """Launch ``attend_kernel``, and ``join_kernel`` where it divides contexts."""
        a, rows = self.architecture, len(states)
        group, splits = a.heads // a.kv_heads, splits_of(rows, a.kv_heads)
        parts = self.scratch.take("parts", rows * a.heads * splits, a.head_dim, torch.float32)
        sums = self.scratch.take("sums", rows * a.heads, splits, torch.float32)
        out = self.scratch.take("attended", rows, a.heads * a.head_dim)
        self._kernels.attend_kernel[(rows, a.kv_heads, splits)](
            states,
            places.cos,
            places.sin,
            kv,
            places.slots,
            places.positions,
            parts,
            sums,
            out,
            states.stride(0),
            kv.stride(0),
            kv.stride(1),
            a.head_dim**-0.5,
            _ALL_TOKENS if window is None else window,
            splits,
            KV_HEADS=a.kv_heads,
            GROUP=group,
            DIM=a.head_dim,
            BLOCK_G=max(16, power(group)),
            BLOCK_D=max(16, self._block_d),
            BLOCK_T=64,
            ROTATED=rotated,
            WHOLE=splits == 1,
            num_warps=4,
            num_stages=3,
            TRIGGERS=self._triggers("attend", rows),
            **self._launch(rows),
        )
        if splits > 1:
            self._kernels.join_kernel[(rows, a.heads)](
                parts,
                sums,
                out,
                splits,
                HEADS=a.heads,
                DIM=a.head_dim,
                BLOCK_D=self._block_d,
                BLOCK_S=_MOST_SPLITS,
                num_warps=4,
                TRIGGERS=self._triggers("join", rows),
                **self._launch(rows),
            )
        return out

    def logits(self, hidden: Tensor, norm: Tensor, head: Tensor) -> Tensor:
        """See TorchOperators."""
        shape = tile(len(hidden))
        if shape is None:
            return super().logits(hidden, norm, head)
        out = torch.empty(len(hidden), len(head), dtype=torch.float32, device=hidden.device)
        self._normed_product(shape, hidden, norm, head, None, out)
        return out

    def _launch(self, rows: int) -> dict[str, bool]:
        """Return settings of a kernel's launch: of few rows, kernels start early, where the GPU can do that.

        The start of a kernel is a larger part of a shorter step.
        """
        return {"EARLY": True, "launch_pdl": True} if self._starts_early(rows) else {"EARLY": False}

    def _triggers(self, kernel: str, rows: int) -> bool:
        return self._starts_early(rows) and kernel in self.tuning.triggers

    def _starts_early(self, rows: int) -> bool:
        return self._early and rows <= self.tuning.early_rows

    def _squares(self, rows: int, hidden: int, summed: int) -> Tensor:
        """Return memory for the sums of squares of rows of hidden states, each of ``summed`` of them."""
        return self.scratch.take("squares", rows, -(-hidden // summed), torch.float32)

    def _normed_product(
        self, shape: Tile, hidden: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, gated: bool = False
    ) -> None:
        """Set ``out`` to the norm of ``hidden`` times ``weight`` transposed, plus ``bias``."""
        if not len(hidden):
            return
        # The product that made these hidden states has prepared their norm; embeddings, and selected rows, come without one.
        is_prepared = self._prepared is not None and self._prepared[0] is hidden and self._prepared[1] is norm
        x = self.scratch.take("scaled", *hidden.shape) if is_prepared else self.norm(hidden, norm)
        self._product(shape, x, weight, bias, out, gated=gated)

    def _product(
        self,
        shape: Tile,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        *,
        added: bool = False,
        gated: bool = False,
        prepares: Tensor | None = None,
    ) -> None:
        """Launch ``linear_kernel`` with tiles of ``shape``, which must have room for the rows."""
        rows, outputs, inputs = len(x), len(weight) // 2 if gated else len(weight), weight.shape[1]
        t = shape.of(weight.dtype)
        # Whose sums of squares a product of normed hidden states takes; one that adds leaves its own.
        summed = t.outputs if added else self.tuning.summed(rows, inputs)
        self._kernels.linear_kernel[(-(-outputs // t.outputs),)](
            x,
            self._squares(rows, outputs if added else inputs, summed),
            weight,
            bias if bias is not None else x,
            out,
            prepares if prepares is not None else x,
            self.scratch.take("scaled", rows, outputs) if prepares is not None else x,
            rows,
            outputs,
            inputs,
            x.stride(0),
            self.architecture.norm_eps,
            BLOCK_M=t.rows,
            BLOCK_N=t.outputs,
            BLOCK_K=t.inputs,
            BLOCK_S=1 if added else power(-(-inputs // summed)),
            SUMMED=summed,
            SWAPPED=t.swapped,
            # Both products that add share a kernel, whatever their inputs.
            EVEN_K=not added and inputs % t.inputs == 0,
            BIASED=bias is not None,
            ADDED=added,
            GATED=gated,
            PREPARES=prepares is not None,
            TRIGGERS=self._triggers("linear", rows),
            num_warps=t.warps,
            num_stages=t.stages,
            **self._launch(rows),
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
