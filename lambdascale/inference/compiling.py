"""Compilation of the kernels of a GPU's operators: it takes seconds, and runs in the background."""

from __future__ import annotations

import threading
from typing import Any

import torch

from lambdascale.checkpoints import Architecture
from lambdascale.checkpoints.packing import PART_BYTES
from lambdascale.inference import devices
from lambdascale.inference.digest import part_digests
from lambdascale.inference.fused import TritonOperators, power, rehearsed_rows
from lambdascale.inference.operators import RopeTables
from lambdascale.inference.scratch import Scratch
from lambdascale.inference.tiles import MOST_ROWS, tile


class Compiler:
    """Compiles the kernels that a model's stages need, each set once, on a thread of its own."""

    def __init__(self) -> None:
        # Guards all three: a set is begun once and listed in _ready only when every kernel of it has run.
        self._lock = threading.Lock()
        self._threads: dict[Any, threading.Thread] = {}
        self._ready: set[Any] = set()
        self._failed: dict[Any, BaseException] = {}

    def done(self, architecture: Architecture, dtype: torch.dtype, device: torch.device) -> bool:
        """Return True if the kernels are compiled. Begin nothing."""
        return _key(architecture, dtype, device) in self._ready

    def busy(self, architecture: Architecture, dtype: torch.dtype, device: torch.device) -> bool:
        """Return True while the kernels are being compiled."""
        thread = self._threads.get(_key(architecture, dtype, device))
        return thread is not None and thread.is_alive()

    def ready(self, architecture: Architecture, dtype: torch.dtype, device: torch.device) -> bool:
        """Return True if the kernels are compiled; else start compiling them. Raises the error if compilation failed."""
        key = _key(architecture, dtype, device)
        if key in self._ready:
            return True
        with self._lock:
            if key in self._failed:
                raise self._failed[key]
            if key not in self._threads:
                # A daemon: a node that is told to leave does not wait for kernels that nobody will use.
                thread = threading.Thread(
                    target=self._compile, args=(key, architecture, dtype, device), name="kernels", daemon=True
                )
                self._threads[key] = thread
                thread.start()
        return False

    def wait(self, architecture: Architecture, dtype: torch.dtype, device: torch.device) -> None:
        """Wait until the kernels are compiled. Raises the error if compilation failed."""
        if not self.ready(architecture, dtype, device):
            self._threads[_key(architecture, dtype, device)].join()
            self.ready(architecture, dtype, device)

    def _compile(self, key: Any, architecture: Architecture, dtype: torch.dtype, device: torch.device) -> None:
        try:
            devices.use(device)
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream(device)):
                rehearse(architecture, dtype, device)
                torch.cuda.current_stream().synchronize()
        except BaseException as error:
            with self._lock:
                self._failed[key] = error
        else:
            with self._lock:
                self._ready.add(key)


def _key(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> Any:
    return (architecture, dtype, device)


def rehearse(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> None:
    """Run every kernel of a model's stages, and the digest's, once on few rows and outputs, with the tiles of real iterations.

    No iteration compiles anything afterwards: it would stand still for half a second.
    """
    a, tokens = architecture, 16
    part_digests(torch.zeros(PART_BYTES, dtype=torch.uint8, device=device))
    tables = RopeTables(*(torch.zeros(tokens, a.head_dim // 2, dtype=dtype, device=device) for _ in range(2)))
    operators = TritonOperators(a, tables, Scratch(dtype, device))
    wide = a.heads + 2 * a.kv_heads
    for rows in rehearsed_rows(a.kv_heads, operators.tuning):
        states = torch.zeros(rows, wide, a.head_dim, dtype=dtype, device=device)
        kv = torch.zeros(1, 2 * a.kv_heads, tokens, a.head_dim, dtype=dtype, device=device)
        padding = torch.full((rows,), -1, dtype=torch.long, device=device)
        places = operators.places(torch.zeros(rows, dtype=torch.long, device=device), padding, padded=True)
        query = operators.rotate(states, places, kv)
        for window in set(a.windows):
            operators.attend(query, places, kv, window)
            operators.rotate_and_attend(states, places, kv, window)
        if rows <= MOST_ROWS:
            _rehearse_products(operators, rows, dtype, device)
    both = torch.zeros(1, 2 * a.intermediate, dtype=dtype, device=device)
    block = min(1024, power(a.intermediate))
    operators._kernels.gate_kernel[(1, 1)](both, both, a.intermediate, BLOCK=block, num_warps=4)


def _rehearse_products(operators: TritonOperators, rows: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compute a few outputs of every product: a kernel is compiled for types, flags and a tile, not for a number of outputs."""
    a = operators.architecture
    # Inputs, outputs, added, gated, prepares a norm, type of the result, biased.
    cases: list[tuple[int, int, bool, bool, bool, torch.dtype, bool]] = [
        (a.hidden, (a.heads + 2 * a.kv_heads) * a.head_dim, False, False, False, dtype, a.qkv_bias),
        (a.heads * a.head_dim, a.hidden, True, False, True, dtype, a.output_bias),
        (a.hidden, a.intermediate, False, True, False, dtype, a.mlp_bias),
        (a.intermediate, a.hidden, True, False, True, dtype, a.mlp_bias),
        (a.intermediate, a.hidden, True, False, False, dtype, a.mlp_bias),  # at a stage's end
        (a.hidden, a.vocab, False, False, False, torch.float32, False),
    ]
    hidden = torch.zeros(rows, a.hidden, dtype=dtype, device=device)
    operators.norm(hidden, hidden[0])
    for inputs, outputs, added, gated, prepares, result, biased in cases:
        shape = operators.tuning.adding(rows, outputs) if added else tile(rows, gated=gated)
        assert shape is not None, "so few rows have tiles"
        few = 64 if outputs % 16 == 0 else 63  # kernels for multiples of 16 differ from the others
        weight = torch.zeros(few * (2 if gated else 1), inputs, dtype=dtype, device=device)
        operators._product(
            shape,
            torch.zeros(rows, inputs, dtype=dtype, device=device),
            weight,
            weight[:, 0].contiguous() if biased else None,
            torch.zeros(rows, few, dtype=result, device=device),
            added=added,
            gated=gated,
            prepares=hidden[0] if prepares and dtype is not torch.float16 else None,
        )


COMPILER = Compiler()
