"""Bytes that the ports of every node have still to move for the transfers under way, of all models together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from lambdascale.core import ClusterSpec, NodeId
from lambdascale.core.commands import Storage, Tier

Port = Literal["nic_out", "nic_in", "pcie", "storage"]
PORTS: tuple[Port, ...] = ("nic_in", "nic_out", "pcie", "storage")
# Ports of the reading node that a block crosses on its way from a tier to the node's own GPUs.
_LOADING: dict[Tier, tuple[Port, ...]] = {"gpu": (), "instant": (), "host": ("pcie",)}
_COLD: tuple[Port, ...] = ("storage", "pcie")


def ports_of_load(tier: Tier) -> tuple[Port, ...]:
    """Ports that a node's load from its own ``tier`` uses; a cold one passes PCIe too."""
    return _LOADING.get(tier, _COLD)


def ports_of_source(tier: Tier) -> tuple[Port, ...]:
    """Ports that a node uses to send what it holds in ``tier``: a host copy crosses PCIe on its way to the NIC."""
    return ("pcie", "nic_out") if tier == "host" else ("nic_out",)


class Traffic:
    """An account of what is still to be moved: transfers add their blocks, and take them off as they arrive or are given up.

    Rates are the nodes' own: NICs at the efficiency of one-sided writes, ``storage`` at that of the SSD or the remote store.
    """

    def __init__(self, cluster: ClusterSpec, storage: Storage) -> None:
        self._cluster = cluster
        self._storage = storage
        self._left: defaultdict[NodeId, dict[Port, int]] = defaultdict(lambda: dict.fromkeys(PORTS, 0))
        self._rates: dict[tuple[NodeId, Port], float] = {}

    def add(self, sender: NodeId, ports: Sequence[Port], receiver: NodeId, size_bytes: int) -> None:
        """Count ``size_bytes`` more on ``ports`` of the sender and on the NIC of a receiver other than it; fewer if negative."""
        left = self._left[sender]
        for port in ports:
            left[port] += size_bytes
        if sender != receiver:
            self._left[receiver]["nic_in"] += size_bytes

    def left(self, node: NodeId, port: Port) -> int:
        """Return the bytes that a port has still to move."""
        return self._left[node][port]

    def busy(self) -> list[tuple[NodeId, Port, int]]:
        """Return the ports that still have bytes to move, with their number."""
        return [(node, port, left) for node, ports in self._left.items() for port, left in ports.items() if left]

    def seconds(self, node: NodeId, *ports: Port, more: int = 0) -> float:
        """Return the time until the busiest of ``ports`` has moved what is under way and ``more`` bytes; 0 if all are idle."""
        longest, left = 0.0, self._left[node]
        if not (more or any(left.values())):
            return 0.0
        for port in ports:
            size_bytes = left[port] + more
            if size_bytes and (seconds := size_bytes / self._rate(node, port)) > longest:
                longest = seconds
        return longest

    def _rate(self, node: NodeId, port: Port) -> float:
        rate = self._rates.get((node, port))
        if rate is None:
            rate = self._rates[node, port] = self._rate_of(node, port)
        return rate

    def _rate_of(self, node: NodeId, port: Port) -> float:
        hardware = self._cluster.node(node)
        if port == "pcie":
            return hardware.pcie_bytes_per_s
        if port == "storage":
            return hardware.ssd_bytes_per_s if self._storage == "ssd" else float(self._cluster.remote_bytes_per_s)
        return hardware.nic_bytes_per_s * self._cluster.rdma_efficiency
