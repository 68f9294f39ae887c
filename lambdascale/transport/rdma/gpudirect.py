"""GPUDirect: a GPU's memory registered with NICs, which then write to it and read from it without the host.

Either by dma-buf, whose descriptor CUDA exports, or by nvidia-peermem, with which verbs accept a GPU's addresses like the host's.
Written from the documentation of CUDA, verbs and pyverbs, and tested with fakes only: no NIC with GPUDirect was available.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64
from functools import partial
from typing import TYPE_CHECKING

from pyverbs.mr import DmaBufMR

from lambdascale.core import UserError
from lambdascale.transport.base import TransportError
from lambdascale.transport.cuda import CudaError, DeviceMemory
from lambdascale.transport.rdma import device
from lambdascale.transport.rdma.options import GpuDirect

if TYPE_CHECKING:
    from lambdascale.transport.rdma.device import Device, Region

_DMA_BUF_SUPPORTED = 124
_HANDLE_IS_DMA_BUF = 1
_SYNC_MEMOPS = 6
_ADVICE = {
    "dmabuf": "dma-buf takes Linux 5.12, NVIDIA's open kernel modules and a NIC whose driver knows it",
    "peermem": "'modprobe nvidia_peermem' as root on the host",
}


def register(devices: Sequence[Device], memory: DeviceMemory, way: GpuDirect, *, remote: bool, windows: bool) -> Region:
    """Register a GPU's memory for peers' writes, as ``device.register``; UserError if this ``way`` does not work."""
    register_at = partial(device.register, devices, memory.address, memory.nbytes, remote=remote, windows=windows)
    try:
        # Otherwise a synchronous copy might return before its result is visible to the NIC.
        memory.gpu.call("cuPointerSetAttribute", byref(c_uint(1)), c_int(_SYNC_MEMOPS), c_uint64(memory.address))
        if way == "peermem":
            return register_at()
        with _exported(memory) as descriptor:
            # pyverbs uses the offset in the dma-buf, 0, as the NIC's first address, too.
            return register_at(make=lambda domain, access: DmaBufMR(domain, memory.nbytes, access, dmabuf=descriptor), origin=0)
    except (CudaError, TransportError) as error:
        raise UserError(
            f"backend.rdma.gpudirect={way} does not work here: {_ADVICE[way]} ({error.__cause__ or error})"
        ) from error


@contextmanager
def _exported(memory: DeviceMemory) -> Iterator[int]:
    """Yield the descriptor of a dma-buf of the memory's pages; once registered, the memory no longer needs the descriptor."""
    gpu, supported, descriptor = memory.gpu, c_int(), c_int(-1)
    gpu.call("cuDeviceGetAttribute", byref(supported), c_int(_DMA_BUF_SUPPORTED), c_int(gpu.device))
    if not supported.value:
        raise TransportError(f"the driver of GPU {gpu.ordinal} exports none")
    page = os.sysconf("SC_PAGE_SIZE")
    # Whole pages: every allocation ends at the end of a page.
    size = c_size_t(-(-memory.nbytes // page) * page)
    gpu.call(
        "cuMemGetHandleForAddressRange",
        byref(descriptor),
        c_uint64(memory.address),
        size,
        c_int(_HANDLE_IS_DMA_BUF),
        c_uint64(0),
    )
    try:
        yield descriptor.value
    finally:
        os.close(descriptor.value)
