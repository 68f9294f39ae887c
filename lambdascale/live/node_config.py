"""Configuration of one node process, as the controller sends it."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from lambdascale.checkpoints.safetensors_file import ALIGNMENT
from lambdascale.control.batching import BatchLimits
from lambdascale.core import ClusterSpec, NodeId
from lambdascale.inference.verification import Verify
from lambdascale.transport import rdma


class Access(Struct, frozen=True):
    """Addresses of the controller (``pulse``: of its heartbeats); the cluster's keys: for CURVE, and for its nodes.

    ``patience_s``: a node that has seen no heartbeat of the controller for so long ends; ``start_patience_s``: at the cluster's
    start, until it knows the others.
    """

    controller: str
    pulse: str
    server_public: bytes
    client_public: bytes
    client_secret: bytes
    nodes_key: bytes
    patience_s: float
    start_patience_s: float


class Areas(Struct, frozen=True):
    """A node's registered memory for what others write there beside blocks: behind the arena that blocks land in.

    ``hidden_bytes`` for hidden states, 0: they travel in messages; ``kv_places`` of ``kv_place_bytes`` each for KV at mode
    switches, likewise. On a GPU it is memory that weights and KV do not get (see LiveConfig.seen).
    """

    hidden_bytes: int = 0
    kv_places: int = 0
    kv_place_bytes: int = 0

    @property
    def kv_begin(self) -> int:
        """First byte of the places for KV, behind those for hidden states."""
        return -(-self.hidden_bytes // ALIGNMENT) * ALIGNMENT

    @property
    def kv_bytes(self) -> int:
        """Size of all places for KV."""
        return self.kv_places * self.kv_place_bytes

    @property
    def nbytes(self) -> int:
        """Size of all of it."""
        return self.kv_begin + self.kv_bytes


class NodeConfig(Struct, frozen=True):
    """All an agent needs to know; plain values.

    Rates in bytes/s, None: as fast as it goes; ``remote`` None: no remote store. ``verify``: see StoreConfig.
    ``generation`` is the number of processes that the node has had before this one.
    ``kernels``: see LiveConfig.
    ``timeline``: folder for the compute thread's timeline, None: it keeps none.
    """

    node: NodeId
    access: Access
    models: tuple[tuple[str, str], ...]
    cluster: ClusterSpec
    limits: BatchLimits
    transport: str
    executor: str
    device: str
    slot_tokens: int
    host_bytes: int
    device_bytes: int
    threads: int
    host: str = "127.0.0.1"
    generation: int = 0
    link: float | None = None
    ssd: float | None = None
    pcie: float | None = None
    remote: float | None = None
    preloaded: bool = False
    rdma: rdma.RdmaOptions = rdma.RdmaOptions()
    collective: Literal["nccl", "gloo"] = "gloo"
    verify: Verify = "full"
    areas: Areas = Areas()
    kernels: Literal["first", "behind"] = "behind"
    timeline: str | None = None
