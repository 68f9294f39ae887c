"""Order in which a scale-out takes free nodes. Pure orderings; the first nodes of the list are used."""

from __future__ import annotations

from collections.abc import Sequence

from lambdascale.control.state import Fleet, ModelState
from lambdascale.core import NodeId


def by_locality(fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
    """Nodes with a host copy first, then those with fewest bytes to load, then those with most free GPUs (paper, section 5)."""

    def key(node: NodeId) -> tuple[bool, int, int, NodeId]:
        return not fleet.is_warm(state, node), fleet.loads_on(node), -fleet.gpus_free[node], node

    return sorted(nodes, key=key)


def sparing_copies(fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
    """Nodes without a host copy first: where the network is faster than PCIe, copies do more good as sources of a multicast."""

    def key(node: NodeId) -> tuple[bool, int, int, NodeId]:
        return fleet.is_warm(state, node), fleet.loads_on(node), -fleet.gpus_free[node], node

    return sorted(nodes, key=key)


def by_startup_time(fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
    """Shortest estimated start-up first: (bytes queued on the node + the model) / rate of its tier (ServerlessLLM)."""

    def key(node: NodeId) -> tuple[float, int, NodeId]:
        hardware = fleet.cluster.node(node)
        storage = hardware.ssd_bytes_per_s if fleet.storage == "ssd" else float(fleet.cluster.remote_bytes_per_s)
        rate = hardware.pcie_bytes_per_s if fleet.is_warm(state, node) else storage
        return (fleet.loads_on(node) + state.spec.size_bytes) / rate, -fleet.gpus_free[node], node

    return sorted(nodes, key=key)
