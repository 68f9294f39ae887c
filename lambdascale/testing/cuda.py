"""A fake CUDA driver in host memory, to test the use of the driver on machines without a GPU."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from lambdascale.transport.cuda import HANDLE_BYTES

_INVALID, _OUT_OF_MEMORY = 1, 2


class FakeCuda:
    """Library for ``Gpu``. ``failing``: functions that fail, with their status; ``calls``: names of the calls, in order.

    Copies happen at once. Handles contain addresses; ``opened`` lists those not closed, ``allocated`` the allocations.
    """

    def __init__(self, *, devices: int = 1, capacity: int = 1 << 30) -> None:
        self.devices, self.capacity = devices, capacity
        self.failing: dict[str, int] = {}
        self.calls: list[str] = []
        self.allocated: dict[int, Any] = {}
        self.opened: list[int] = []
        self._numbers = 0

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def called(*arguments: Any) -> int:
            self.calls.append(name)
            status = self.failing.get(name)
            # Functions that the fake does not implement succeed.
            act = getattr(type(self), f"_{name.removesuffix('_v2')}", None)
            return status if status is not None else 0 if act is None else act(self, *arguments) or 0

        return called

    def _cuDeviceGetCount(self, count: Any) -> None:
        count._obj.value = self.devices

    def _cuDeviceTotalMem(self, size: Any, device: Any) -> None:
        size._obj.value = self.capacity

    def _cuGetErrorString(self, status: Any, text: Any) -> None:
        text._obj.value = b"status %d of a fake" % status.value

    def _cuMemGetInfo(self, free: Any, total: Any) -> None:
        total._obj.value = self.capacity
        free._obj.value = self.capacity - sum(map(len, self.allocated.values()))

    def _cuDeviceGetAttribute(self, value: Any, attribute: Any, device: Any) -> None:
        value._obj.value = 1  # every attribute is supported

    def _cuMemGetHandleForAddressRange(self, handle: Any, address: Any, size: Any, kind: Any, flags: Any) -> int:
        if address.value not in self.allocated or size.value % os.sysconf("SC_PAGE_SIZE"):
            return _INVALID
        handle._obj.value = os.memfd_create("dma-buf")
        return 0

    def _cuMemAlloc(self, address: Any, size: Any) -> int:
        if size.value + sum(map(len, self.allocated.values())) > self.capacity:
            return _OUT_OF_MEMORY
        memory = (ctypes.c_ubyte * size.value)()
        address._obj.value = ctypes.addressof(memory)
        self.allocated[address._obj.value] = memory
        return 0

    def _cuMemFree(self, address: Any) -> int:
        return 0 if self.allocated.pop(address.value, None) is not None else _INVALID

    def _cuMemsetD8(self, address: Any, value: Any, size: Any) -> None:
        ctypes.memset(address.value, value.value, size.value)

    def _cuMemcpy(self, target: Any, source: Any, size: Any) -> None:
        ctypes.memmove(target.value, source.value, size.value)

    def _cuMemcpyAsync(self, target: Any, source: Any, size: Any, stream: Any) -> None:
        assert stream.value, "the stream has been made"
        self._cuMemcpy(target, source, size)

    def _cuStreamCreate(self, stream: Any, flags: Any) -> None:
        self._numbers += 1
        stream._obj.value = self._numbers

    _cuEventCreate = _cuStreamCreate

    def _cuIpcGetMemHandle(self, handle: Any, address: Any) -> int:
        if address.value not in self.allocated:
            return _INVALID
        ctypes.memmove(ctypes.addressof(handle._obj), address.value.to_bytes(HANDLE_BYTES, "little"), HANDLE_BYTES)
        return 0

    def _cuIpcOpenMemHandle(self, address: Any, handle: Any, flags: Any) -> int:
        address._obj.value = int.from_bytes(bytes(handle), "little")
        self.opened.append(address._obj.value)
        return 0

    def _cuIpcCloseMemHandle(self, address: Any) -> int:
        if address.value not in self.opened:
            return _INVALID
        self.opened.remove(address.value)
        return 0
