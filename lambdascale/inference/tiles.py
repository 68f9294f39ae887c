"""Measured choices for the kernels of a decode step: tiles of products, and which kernels start early."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

# Every program of linear_kernel computes all rows; tiles exist for at most this many.
MOST_ROWS = 32
# Rows that the matrix units compute at least.
_LEAST_ROWS = 16
_ANY = 1 << 30
# Of Hopper (CUDA C++ Programming Guide, compute capability 9.0): of a program at most, of a multiprocessor, and what the system
# takes of it for each program.
PROGRAM_BYTES, PROCESSOR_BYTES, RESERVED_BYTES = 227 << 10, 228 << 10, 1 << 10


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth that a program of ``linear_kernel`` computes at a time, and its launch settings.

    ``swapped``: weights are the left operand of the matrix units.
    """

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    swapped: bool = False

    def of(self, dtype: torch.dtype) -> Tile:
        """Return the tile for a type, of half the depth for float32: what a program has at a time must fit shared memory."""
        return replace(self, inputs=self.inputs // 2) if dtype is torch.float32 else self

    def shared_bytes(self, dtype: torch.dtype, *, gated: bool = False) -> int:
        """Return the bytes of shared memory that a program's rows and weights take, of every step of the software pipeline.

        Only Hopper's own matrix instructions, for weights as the left operand, read them there until the step is computed.
        """
        t = self.of(dtype)
        held = t.stages if t.swapped else t.stages - 1
        return (t.rows + t.outputs * (2 if gated else 1)) * t.inputs * dtype.itemsize * held

    def at_once(self, dtype: torch.dtype) -> int:
        """Return the number of programs that a multiprocessor's shared memory has room for at once."""
        return PROCESSOR_BYTES // (self.shared_bytes(dtype) + RESERVED_BYTES)


@dataclass(frozen=True)
class Choice:
    """The ``tile`` of products that add to the hidden states, for at most so many rows and outputs."""

    tile: Tile
    rows: int = MOST_ROWS
    outputs: int = _ANY


@dataclass(frozen=True)
class Tuning:
    """``added``: tiles of the products that add to the hidden states, of which the first that serves is taken.

    Steps of at most ``early_rows`` start each kernel while the one before still runs. ``triggers``: kernels that let the next
    one start once they have read what they read; behind others it starts when all their programs have ended.
    """

    added: tuple[Choice, ...]
    early_rows: int
    triggers: frozenset[str]

    def adding(self, rows: int, outputs: int) -> Tile | None:
        """Return the tile for a product that adds to the hidden states, None where cuBLAS is as fast."""
        return next((each.tile for each in self.added if rows <= each.rows and outputs <= each.outputs), None)

    def summed(self, rows: int, hidden: int) -> int:
        """Return the outputs per program of a product that adds to hidden states of width ``hidden``, in ``rows`` rows.

        Each program leaves the sum of squares of its outputs to the norm that follows.
        """
        found = self.adding(rows, hidden)
        assert found is not None, "so few rows have tiles"
        return found.outputs

    def limits(self) -> tuple[int, ...]:
        """Return the numbers of rows above which a step of one more row has other tiles or starts."""
        return tuple(sorted({_LEAST_ROWS, MOST_ROWS, self.early_rows, *(each.rows for each in self.added)}))


# Chosen by measurement on an H200, for products of 7B and 13B Llamas and 1, 8 and 32 rows (results/LOG.md). Up to 4,224 outputs
# give each of 132 multiprocessors one program; of more, two have to fit one, or some wait for others to end: 7 % of 13B's step.
_ONE_EACH = 132 * 32
TUNED = Tuning(
    added=(
        Choice(Tile(16, 32, 512, 4, 4), rows=_LEAST_ROWS, outputs=_ONE_EACH),
        Choice(Tile(16, 32, 256, 4, 5), rows=_LEAST_ROWS),
        Choice(Tile(32, 32, 256, 4, 5), outputs=_ONE_EACH),
        Choice(Tile(32, 32, 256, 4, 4)),
    ),
    early_rows=MOST_ROWS,
    triggers=frozenset({"linear", "attend", "join"}),
)


def tile(rows: int, *, gated: bool = False) -> Tile | None:
    """Return the tile for a product of normed hidden states, None where cuBLAS is as fast.

    Products of up to 16 rows take the time of one: the matrix units compute 16.
    """
    if rows > MOST_ROWS:
        return None
    return Tile(_LEAST_ROWS if rows <= _LEAST_ROWS else MOST_ROWS, 64, 64 if gated else 128, 4, 4, swapped=True)
