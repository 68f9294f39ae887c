"""Placement: the order in which a scale-out takes free nodes. Pure parts of start policies; the first nodes are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lambdascale.control.state import Fleet, ModelState
from lambdascale.control.traffic import PORTS, Port
from lambdascale.core import NodeId


@runtime_checkable
class Placement(Protocol):
    """Ranks free nodes for a scale-out of a model. Pure: it reads the fleet and changes nothing."""

    def rank(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
        """Return ``nodes``, the best first."""
        ...


@dataclass(frozen=True, kw_only=True)
class ByLocality:
    """Nodes with a host copy first, then those least busy with transfers, then those with most free GPUs (paper, section 5)."""

    def rank(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
        """See Placement."""
        return _ranked(fleet, state, nodes, warm_first=True)


@dataclass(frozen=True, kw_only=True)
class SparingCopies:
    """Nodes without a host copy first, where the network is faster than some node's PCIe: copies do more good as sources.

    Where PCIe is as fast as the network on all nodes, as ByLocality.
    """

    def rank(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
        """See Placement."""
        if all(pcie_is_faster(fleet, node) for node in nodes):
            return ByLocality().rank(fleet, state, nodes)
        return _ranked(fleet, state, nodes, warm_first=False)


@dataclass(frozen=True, kw_only=True)
class ByStartupTime:
    """Shortest estimated start-up first: (bytes queued at the tier to read from + the model) / its rate (ServerlessLLM)."""

    def rank(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
        """See Placement."""

        def key(node: NodeId) -> tuple[float, int, NodeId]:
            port: Port = "pcie" if fleet.is_warm(state, node) else "storage"
            return fleet.traffic.seconds(node, port, more=state.spec.size_bytes), -fleet.gpus_free[node], node

        return sorted(nodes, key=key)


def pcie_is_faster(fleet: Fleet, node: NodeId) -> bool:
    """True if ``node`` loads a host copy at least as fast as a multicast brings the model."""
    hardware = fleet.cluster.node(node)
    return hardware.pcie_bytes_per_s >= hardware.nic_bytes_per_s * fleet.cluster.rdma_efficiency


def _ranked(fleet: Fleet, state: ModelState, nodes: Sequence[NodeId], *, warm_first: bool) -> list[NodeId]:
    """Sort by host copies, then by transfers under way and free GPUs."""
    if len(nodes) < 2:
        return [*nodes]
    has, busy_s, gpus_free, name, at = fleet.host.has, fleet.traffic.seconds, fleet.gpus_free, state.spec.name, fleet.at
    keys = [(has(node, name, at) is not warm_first, busy_s(node, *PORTS), -gpus_free[node], node) for node in nodes]
    return [node for *_, node in sorted(keys)]
