"""Element types of weights in torch, and conversion between them."""

from __future__ import annotations

import torch

from lambdascale.core import UserError

TORCH_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def convert(piece: bytes, old: str, new: str) -> bytes:
    """Convert the bytes of weights from type ``old`` to ``new``, rounding to nearest; UserError if ``old`` is not supported."""
    if old not in TORCH_TYPES:
        raise UserError(f"weights of type {old} are not supported, only {', '.join(TORCH_TYPES)}")
    values = torch.frombuffer(bytearray(piece), dtype=TORCH_TYPES[old]).to(TORCH_TYPES[new])
    return values.view(torch.uint8).numpy().tobytes()
