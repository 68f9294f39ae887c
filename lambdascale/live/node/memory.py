"""Bytes between tensors and endpoints."""

from __future__ import annotations

import torch

from lambdascale.transport import DeviceMemory, Memory, gpu_of


def memory_of(data: torch.Tensor) -> Memory:
    """Return the memory of a flat tensor of bytes, on the host or a GPU. It does not keep a GPU's memory alive."""
    if data.device.type == "cpu":
        return data.numpy().data
    return DeviceMemory(gpu_of(data.device.index), data.data_ptr(), data.numel())


def tensor_of(data: bytes | Memory, device: torch.device) -> torch.Tensor:
    """Return bytes as a flat tensor, in place where that is possible: memory is not copied, bytes are."""
    if isinstance(data, DeviceMemory):
        return torch.as_tensor(data, device=device)
    return torch.frombuffer(bytearray(data) if isinstance(data, bytes) else data, dtype=torch.uint8)
