"""y = x W^T + b for weights as checkpoints store them, [outputs, inputs]: the one place that knows which kernel is fast where.

For float32 on a CPU, oneDNN's matrix kernels are 2 to 3 times faster than the BLAS behind torch.nn.functional.linear for the few
rows of a decode step (tests/benchmarks/test_bench_engine.py). torch exposes them as an operator of its compiler's; where a build
lacks it, or cannot run it, ``KERNEL`` says so and the plain function is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

Tensor = torch.Tensor


def _find_onednn() -> Any:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        operator(torch.zeros(1, 8), torch.zeros(8, 8), None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return operator


_ONEDNN = _find_onednn()
KERNEL = "oneDNN" if _ONEDNN is not None else "BLAS"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [rows, inputs] times ``weight`` [outputs, inputs] transposed, plus ``bias`` [outputs]."""
    if _ONEDNN is not None and x.dtype is torch.float32 and x.device.type == "cpu":
        result: Tensor = _ONEDNN(x, weight, bias, "none", [], "")
        return result
    return functional.linear(x, weight, bias)
