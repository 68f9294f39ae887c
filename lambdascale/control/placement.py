"""Which nodes a scale-out takes. Pure orderings; the first nodes of the list are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lambdascale.control.state import Fleet, ModelState
from lambdascale.core import NodeId

Placement = Callable[[Fleet, ModelState, Sequence[NodeId]], list[NodeId]]


def by_locality(fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
    """Nodes with a host copy first, then those that load least at the moment, then the emptiest (paper, section 5)."""

    def key(node: NodeId) -> tuple[bool, int, int, NodeId]:
        warm = fleet.host.has(node, state.spec.name, fleet.at)
        return not warm, fleet.loads_on(node), -fleet.gpus_free[node], node

    return sorted(nodes, key=key)


def sparing_copies(fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
    """Nodes without a host copy first: where the network is faster than PCIe, copies do more good as sources of a multicast."""

    def key(node: NodeId) -> tuple[bool, int, int, NodeId]:
        warm = fleet.host.has(node, state.spec.name, fleet.at)
        return warm, fleet.loads_on(node), -fleet.gpus_free[node], node

    return sorted(nodes, key=key)


def by_startup_time(fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
    """Shortest estimated start-up first: (bytes queued on the node + the model) / rate of its tier (ServerlessLLM)."""
    cluster = fleet.cluster

    def key(node: NodeId) -> tuple[float, int, NodeId]:
        warm = fleet.host.has(node, state.spec.name, fleet.at)
        rate = float(cluster.pcie_bytes_per_s if warm else cluster.ssd_bytes_per_s)
        return (fleet.loads_on(node) + state.spec.size_bytes) / rate, -fleet.gpus_free[node], node

    return sorted(nodes, key=key)
