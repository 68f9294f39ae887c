"""GPUs of this machine, by the names that tables of measurements have for them."""

from __future__ import annotations

import torch

from lambdascale.core import UserError


def card(device: str = "cuda", count: int | None = None) -> str:
    """Return "cpu", or the number and the name of the GPUs (``count`` of them, if given); UserError if PyTorch finds none."""
    if device == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU on this machine; lambdascale doctor says more")
    return f"{torch.cuda.device_count() if count is None else count} x {torch.cuda.get_device_name(0)}"
