"""Memory that is allocated once and given out in pieces, so that blocks never wait for page faults."""

from __future__ import annotations

import mmap
from bisect import bisect_left, insort
from contextlib import suppress
from pathlib import Path

import torch

from lambdascale.checkpoints.safetensors_file import ALIGNMENT
from lambdascale.core import CapacityError
from lambdascale.core.checks import require

Tensor = torch.Tensor


def touched_memory(size: int) -> mmap.mmap:
    """Return anonymous memory whose pages are all mapped (it is zeroed), in huge pages where the system has them.

    Direct reads into memory of small scattered pages were measured at a third of the rate (results/LOG.md).
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    torch.frombuffer(memory, dtype=torch.uint8).zero_()
    return memory


class Extents:
    """Allocator of ``capacity`` bytes: a piece comes from the smallest hole that fits, and adjacent holes are merged."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._holes: list[tuple[int, int]] = [(0, capacity)] if capacity else []  # (offset, size), by offset
        self._taken: dict[int, int] = {}

    @property
    def free_bytes(self) -> int:
        """Number of free bytes, in all holes together."""
        return sum(size for _, size in self._holes)

    def take(self, size: int, home: int | None = None) -> int | None:
        """Take a piece of ``size`` bytes, rounded up to whole pages; return its offset, None if no hole is large enough.

        At ``home`` if all of that is free.
        """
        size = -(-size // ALIGNMENT) * ALIGNMENT
        fitting = [(hole, offset) for offset, hole in self._holes if hole >= size]
        if not fitting:
            return None
        around = [(hole, at) for hole, at in fitting if home is not None and at <= home <= at + hole - size]
        hole, offset = min(around or fitting)
        begin = home if around and home is not None else offset
        self._holes.remove((offset, hole))
        for left, end in ((offset, begin), (begin + size, offset + hole)):
            if left < end:
                insort(self._holes, (left, end - left))
        self._taken[begin] = size
        return begin

    def give_back(self, offset: int) -> None:
        """Free the piece at ``offset``."""
        size = self._taken.pop(offset)
        at = bisect_left(self._holes, (offset, 0))
        if at < len(self._holes) and self._holes[at][0] == offset + size:
            size += self._holes.pop(at)[1]
        if at and sum(self._holes[at - 1]) == offset:
            offset, before = self._holes.pop(at - 1)
            size += before
        insort(self._holes, (offset, size))


class Arena:
    """``capacity`` bytes on a device, allocated and touched at once; CapacityError if the device has less.

    In host memory it begins on a page, so that O_DIRECT can read into it, and is registered with CUDA where that is present.
    ``memory``: use this instead of allocating (a transport's: in host memory on a page boundary, on a GPU a uint8 tensor).
    """

    def __init__(self, capacity: int, device: torch.device, what: str, memory: memoryview | Tensor | None = None) -> None:
        require(capacity >= 0, f"{what} must not be negative, not {capacity}")
        capacity = capacity // ALIGNMENT * ALIGNMENT
        self.device = device
        self.pinned = False
        if memory is None:
            _check_room(capacity, device, what)
        if isinstance(memory, Tensor):
            self.bytes = memory[:capacity]
        elif device.type == "cpu":
            self.bytes = self._host(capacity, memory)
        else:
            self.bytes = torch.zeros(capacity, dtype=torch.uint8, device=device)
        self.extents = Extents(capacity)

    def _host(self, capacity: int, given: memoryview | None) -> Tensor:
        if not capacity:
            return torch.empty(0, dtype=torch.uint8)
        memory = torch.frombuffer(touched_memory(capacity) if given is None else given, dtype=torch.uint8, count=capacity)
        assert memory.data_ptr() % ALIGNMENT == 0, "an arena begins on a page"
        if torch.cuda.is_available():
            status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), capacity, 0)
            if int(status) != 0:
                raise CapacityError(f"{capacity} bytes of host memory could not be pinned for CUDA (error {int(status)})")
            self.pinned = True
        return memory

    def view(self, offset: int, size: int) -> Tensor:
        """Return a piece as a flat uint8 tensor."""
        return self.bytes[offset : offset + size]

    def close(self) -> None:
        """Unregister the memory; views stay valid as long as they are referred to."""
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())
            self.pinned = False


def _check_room(capacity: int, device: torch.device, what: str) -> None:
    free = _available_bytes() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if capacity > free:
        where = "host memory" if device.type == "cpu" else str(device)
        raise CapacityError(f"{what} of {capacity / 1e9:.2f} GB does not fit: {where} has {free / 1e9:.2f} GB free")


def _available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise CapacityError(f"{meminfo} does not say how much memory is available")
