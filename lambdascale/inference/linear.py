"""y = x W^T + b for weights as checkpoints store them, [outputs, inputs], by the kernel that is fastest on this processor.

For float32 on a CPU torch has two: its BLAS (MKL in the published wheels) and oneDNN's, an operator of torch's compiler. For the
few rows of a decode step MKL is 1.5 times as fast on Intel's processors, and oneDNN 2 to 3 times on others, for which MKL has
slower kernels; for the many rows of a prefill both reach the processor's limit (tests/benchmarks/test_bench_engine.py).
``KERNEL`` names the one in use. It is chosen by the processor's maker, so that nodes on machines of one kind round alike.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

Tensor = torch.Tensor


def choose_kernel(processor: str, *, has_mkl: bool) -> Any:
    """Return oneDNN's operator; None for BLAS, on Intel's processors or if this build of torch cannot run the operator."""
    if (has_mkl and "GenuineIntel" in processor) or not torch.backends.mkldnn.is_available():
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        operator(torch.zeros(1, 8), torch.zeros(8, 8), None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return operator


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()


_ONEDNN = choose_kernel(_processor(), has_mkl=torch.backends.mkl.is_available())
KERNEL = "oneDNN" if _ONEDNN is not None else "BLAS"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return ``x`` [rows, inputs] times ``weight`` [outputs, inputs] transposed, plus ``bias`` [outputs].

    ``out`` [rows, outputs], contiguous: memory for the result. oneDNN's operator ignores it and returns memory of its own.
    """
    if _ONEDNN is not None and x.dtype is torch.float32 and x.device.type == "cpu":
        result: Tensor = _ONEDNN(x, weight, bias, "none", [], "")
        return result
    if out is None:
        return functional.linear(x, weight, bias)
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def add_linear(total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Add ``linear(x, weight, bias)`` to ``total`` [rows, outputs], in place."""
    if _ONEDNN is not None or bias is not None:
        total.add_(linear(x, weight, bias))
    else:
        total.addmm_(x, weight.t())
