"""Options of the RDMA transport."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lambdascale.core.checks import check_types, require

GpuDirect = Literal["off", "dmabuf", "peermem"]
MTUS = (256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, kw_only=True)
class RdmaOptions:
    """Options; None and the empty tuple are chosen automatically.

    ``devices``: several become rails, over which every block is striped; a node's n-th device connects to its peers' n-th.
    ``port``, ``gid_index`` and ``mtu`` (bytes) apply to all of them. A write is divided into chunks of ``chunk_bytes``, of which
    a queue pair has up to ``depth`` in flight. ``windows``: a peer may write only while it is admitted (memory windows of type 2;
    None: if the devices have them); False: as long as it is connected. ``gpudirect``: blocks are written to the GPU's memory,
    registered by dma-buf or nvidia-peermem; off: to host memory.
    """

    devices: tuple[str, ...] = ()
    port: int | None = None
    gid_index: int | None = None
    mtu: int | None = None
    chunk_bytes: int = 1 << 20
    depth: int = 16
    windows: bool | None = None
    gpudirect: Literal["off", "dmabuf", "peermem"] = "off"

    def __post_init__(self) -> None:
        """Validate."""
        object.__setattr__(self, "devices", tuple(self.devices))
        check_types(self)
        require(len(set(self.devices)) == len(self.devices), f"rdma.devices names a device twice: {', '.join(self.devices)}")
        require(self.port is None or self.port >= 1, f"rdma.port must be at least 1, not {self.port}")
        require(self.gid_index is None or self.gid_index >= 0, f"rdma.gid_index must not be negative, not {self.gid_index}")
        require(self.mtu is None or self.mtu in MTUS, f"rdma.mtu must be one of {', '.join(map(str, MTUS))}, not {self.mtu}")
        require(self.chunk_bytes >= 4096, f"rdma.chunk_bytes must be at least 4096, not {self.chunk_bytes}")
        require(2 <= self.depth <= 1024, f"rdma.depth must be between 2 and 1024, not {self.depth}")
