"""Bytes between tensors and endpoints."""

from __future__ import annotations

import torch

from lambdascale.inference import devices
from lambdascale.transport import DeviceMemory, Memory, gpu_of

# Memory of a GPU that data waiting there leaves free: an iteration needs some for a moment.
_SPARE_BYTES = 1 << 30


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


def to_bytes(data: bytes | torch.Tensor) -> bytes:
    """Return data as a message carries it."""
    return data if isinstance(data, bytes) else data.cpu().numpy().tobytes()


def await_computed(data: bytes | torch.Tensor) -> None:
    """Wait until a GPU has computed data in the current stream."""
    if isinstance(data, torch.Tensor) and data.device.type == "cuda":
        torch.cuda.current_stream(data.device).synchronize()


def copy_of(memory: Memory) -> bytes | torch.Tensor:
    """Return a copy of memory, on the same device if that has room to spare. The copy is complete when this returns."""
    if isinstance(memory, memoryview):
        return bytes(memory)
    device = torch.device("cuda", memory.gpu.ordinal)
    devices.use(device)
    copy = at_rest(tensor_of(memory, device).clone())
    torch.cuda.current_stream(device).synchronize()
    return copy


def at_rest(data: bytes | torch.Tensor) -> bytes | torch.Tensor:
    """Return data that is going to wait: a GPU's where they are while the GPU has room to spare, else in host memory."""
    if isinstance(data, bytes) or data.device.type == "cpu":
        return data
    unused = torch.cuda.memory_reserved(data.device) - torch.cuda.memory_allocated(data.device)
    free, _ = torch.cuda.mem_get_info(data.device)
    return data if free + unused >= _SPARE_BYTES else to_bytes(data)
