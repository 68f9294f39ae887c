"""GPU memory through the CUDA driver's interface (libcuda.so.1): the functions that transports need, without torch.

Everything runs in a device's primary context, in which torch computes too, so each may use the other's memory. Memory allocated
here is not from torch's caching allocator: an exported handle covers exactly this memory, whatever PYTORCH_CUDA_ALLOC_CONF says.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from lambdascale.core import CapacityError, UserError
from lambdascale.core.checks import require

HANDLE_BYTES = 64
# Unit of allocation: smaller pieces would share a page with other allocations, and a handle covers whole pages.
_PAGE_BYTES = 2 << 20
_STREAM_NON_BLOCKING = 1
_EVENT_BLOCKING_SYNC, _EVENT_DISABLE_TIMING = 1, 2
_IPC_LAZY_ENABLE_PEER_ACCESS = 1
# Waited for, and not the context: that is an error while another thread records a graph, and breaks the recording.
_DEFAULT_STREAM = c_void_p()
_OUT_OF_MEMORY, _NOT_READY = 2, 600
# Functions that return at once. They are called with the interpreter's lock held: a thread that lets go of it beside a computing
# one waits milliseconds for it, at each call.
_QUICK = frozenset(("cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuEventQuery", "cuEventRecord"))


class CudaError(OSError):
    """A failed call of the CUDA driver; the message names the call. ``status`` is CUDA's error number."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("reserved", c_ubyte * HANDLE_BYTES),)


def gpu_sizes() -> list[int]:
    """Bytes of memory of each GPU that CUDA lets this process use, none without CUDA.

    Needs no torch, which takes seconds to import.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, device, size = c_int(), c_int(), c_size_t()
    if library.cuInit(c_uint(0)) or library.cuDeviceGetCount(byref(count)):
        return []
    sizes = []
    for ordinal in range(count.value):
        if library.cuDeviceGet(byref(device), c_int(ordinal)) or library.cuDeviceTotalMem_v2(byref(size), device):
            return []
        sizes.append(size.value)
    return sizes


def count_gpus() -> int:
    """Number of GPUs that CUDA lets this process use, 0 without CUDA."""
    return len(gpu_sizes())


@cache
def gpu_of(ordinal: int) -> Gpu:
    """GPU of this process, numbered as torch does. UserError without CUDA or without that GPU."""
    try:
        library, quick = ctypes.CDLL("libcuda.so.1"), ctypes.PyDLL("libcuda.so.1")
    except OSError as error:
        raise UserError("this machine has no CUDA: libcuda.so.1, a part of NVIDIA's driver, cannot be loaded") from error
    try:
        return Gpu(ordinal, library, quick)
    except CudaError as error:
        raise UserError(f"CUDA does not work on this machine: {error}") from error


class Gpu:
    """A device and its primary context, usable from any thread. ``library`` has the driver's functions as attributes.

    ``quick``: the same functions without letting other threads run meanwhile.
    """

    def __init__(self, ordinal: int, library: Any, quick: Any = None) -> None:
        self.ordinal = ordinal
        self._library = library
        self._quick = library if quick is None else quick
        self._context = c_void_p()
        count, device = c_int(), c_int()  # the handle of a device is a number other than its ordinal
        self._call("cuInit", c_uint(0))
        self._call("cuDeviceGetCount", byref(count))
        require(ordinal < count.value, f"no GPU {ordinal}: CUDA finds {count.value}")
        self._call("cuDeviceGet", byref(device), c_int(ordinal))
        self.device = device.value
        # Never released: other CUDA code of the process (torch) uses it.
        self._call("cuDevicePrimaryCtxRetain", byref(self._context), device)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver in this device's context; CudaError if it fails."""
        with self._current():
            self._call(name, *arguments)

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, self._status(name, *arguments))

    def _status(self, name: str, *arguments: Any) -> int:
        status: int = getattr(self._quick if name in _QUICK else self._library, name)(*arguments)
        return status

    def _check(self, name: str, status: int) -> None:
        if status:
            text = c_char_p()
            self._library.cuGetErrorString(c_int(status), byref(text))
            raise CudaError(f"{name}: {(text.value or b'unknown error').decode()} ({status})", status)

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Make this device's context current in the calling thread, and restore the previous one afterwards."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def allocate(self, size: int) -> DeviceMemory:
        """Allocate ``size`` zeroed bytes in whole pages, to be freed by ``free``; CapacityError if the GPU's memory is full."""
        address, whole = c_uint64(), max(1, -(-size // _PAGE_BYTES)) * _PAGE_BYTES
        try:
            self.call("cuMemAlloc_v2", byref(address), c_size_t(whole))
        except CudaError as error:
            if error.status != _OUT_OF_MEMORY:
                raise
            free = self.free_bytes() / 1e9
            raise CapacityError(f"{whole / 1e9:.2f} GB do not fit: GPU {self.ordinal} has {free:.2f} GB free") from error
        self.call("cuMemsetD8_v2", address, c_ubyte(0), c_size_t(whole))
        self.call("cuStreamSynchronize", _DEFAULT_STREAM)
        return DeviceMemory(self, address.value, size)

    def free(self, memory: DeviceMemory) -> None:
        """Free memory from ``allocate``, after its last use has ended."""
        self.call("cuMemFree_v2", c_uint64(memory.address))

    def free_bytes(self) -> int:
        """Number of free bytes of the GPU's memory."""
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def share(self, memory: DeviceMemory) -> bytes:
        """Handle with which other processes of this host can ``open`` memory from ``allocate``."""
        handle = IpcHandle()
        self.call("cuIpcGetMemHandle", byref(handle), c_uint64(memory.address))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """Open another process's memory, on this GPU or one it can access; return its address, to be closed by ``shut``."""
        address = c_uint64()
        opened = IpcHandle.from_buffer_copy(handle)
        self.call("cuIpcOpenMemHandle_v2", byref(address), opened, c_uint(_IPC_LAZY_ENABLE_PEER_ACCESS))
        return address.value

    def shut(self, address: int) -> None:
        """Close memory that ``open`` opened."""
        self.call("cuIpcCloseMemHandle", c_uint64(address))

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy ``size`` bytes between addresses of the host or of GPUs, and wait until the copy is complete."""
        self.call("cuMemcpy", c_uint64(target), c_uint64(source), c_size_t(size))
        self.call("cuStreamSynchronize", _DEFAULT_STREAM)  # with pageable memory, cuMemcpy returns before the copy is complete

    def wait_for(self, event: c_void_p) -> None:
        """Wait until the work before an event is complete."""
        with self._current():
            status = self._status("cuEventQuery", event)
            if status == _NOT_READY:
                self._call("cuEventSynchronize", event)
            else:
                self._check("cuEventQuery", status)

    def copy_later(self, target: int, source: int, size: int, stream: c_void_p, event: c_void_p) -> None:
        """Queue a copy in a stream, with an event behind it."""
        with self._current():
            self._call("cuMemcpyAsync", c_uint64(target), c_uint64(source), c_size_t(size), stream)
            self._call("cuEventRecord", event, stream)


class Copies:
    """Copies in sequence in a stream of their own, concurrent with the GPU's computation; used by one thread.

    At most two are in flight: ``start`` waits for the copy before the last.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._stream = c_void_p()
        self._events = (c_void_p(), c_void_p())
        self._turn = 0
        gpu.call("cuStreamCreate", byref(self._stream), c_uint(_STREAM_NON_BLOCKING))
        for event in self._events:
            gpu.call("cuEventCreate", byref(event), c_uint(_EVENT_BLOCKING_SYNC | _EVENT_DISABLE_TIMING))

    def start(self, target: int, source: int, size: int) -> None:
        """Copy ``size`` bytes between addresses of the host or of GPUs; neither may change until ``wait`` has returned."""
        event = self._events[self._turn]
        self._turn = 1 - self._turn
        self._gpu.wait_for(event)
        self._gpu.copy_later(target, source, size, self._stream, event)

    def wait(self) -> None:
        """Wait until all copies are complete and visible to others."""
        for event in self._events:
            self._gpu.wait_for(event)

    def close(self) -> None:
        """Free stream and events."""
        for event in self._events:
            self._gpu.call("cuEventDestroy_v2", event)
        self._gpu.call("cuStreamDestroy_v2", self._stream)


@dataclass(frozen=True, eq=False)
class DeviceMemory:
    """A piece of a GPU's memory, sliced like a memoryview; ``bytes()`` copies it to the host. It does not keep memory alive."""

    gpu: Gpu
    address: int
    nbytes: int

    def __len__(self) -> int:
        return self.nbytes

    def __getitem__(self, piece: slice) -> DeviceMemory:
        begin, end, step = piece.indices(self.nbytes)
        assert step == 1, "memory is cut, not sampled"
        return DeviceMemory(self.gpu, self.address + begin, max(0, end - begin))

    def __bytes__(self) -> bytes:
        found = bytearray(self.nbytes)
        if found:
            self.gpu.copy(address_of(memoryview(found)), self.address, self.nbytes)
        return bytes(found)

    def fill(self, data: bytes) -> None:
        """Overwrite the whole piece with ``data`` from the host, of the same length."""
        assert len(data) == self.nbytes, "it is filled as a whole"
        if data:
            self.gpu.copy(self.address, address_of(memoryview(data)), self.nbytes)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Description for ``torch.as_tensor``, as bytes."""
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}


def address_of(memory: memoryview | DeviceMemory) -> int:
    """Address of memory; 0 for empty host memory."""
    if isinstance(memory, DeviceMemory):
        return memory.address
    return int(np.frombuffer(memory, dtype=np.uint8).__array_interface__["data"][0]) if memory.nbytes else 0
