"""Order in which a scale-out takes free nodes. Pure orderings; the first nodes of the list are used."""

from __future__ import annotations

from collections.abc import Sequence

from lambdascale.control.state import Fleet, ModelState
from lambdascale.control.traffic import Port
from lambdascale.core import NodeId

_PORTS: tuple[Port, ...] = ("nic_in", "nic_out", "pcie", "storage")


def by_locality(fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
    """Nodes with a host copy first, then those least busy with transfers, then those with most free GPUs (paper, section 5)."""

    def key(node: NodeId) -> tuple[bool, float, int, NodeId]:
        return not fleet.is_warm(state, node), *_idleness(fleet, node)

    return sorted(nodes, key=key)


def sparing_copies(fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
    """Nodes without a host copy first: where the network is faster than PCIe, copies do more good as sources of a multicast."""

    def key(node: NodeId) -> tuple[bool, float, int, NodeId]:
        return fleet.is_warm(state, node), *_idleness(fleet, node)

    return sorted(nodes, key=key)


def _idleness(fleet: Fleet, node: NodeId) -> tuple[float, int, NodeId]:
    return fleet.traffic.seconds(node, *_PORTS), -fleet.gpus_free[node], node


def by_startup_time(fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
    """Shortest estimated start-up first: (bytes queued at the tier to read from + the model) / its rate (ServerlessLLM)."""

    def key(node: NodeId) -> tuple[float, int, NodeId]:
        port: Port = "pcie" if fleet.is_warm(state, node) else "storage"
        return fleet.traffic.seconds(node, port, more=state.spec.size_bytes), -fleet.gpus_free[node], node

    return sorted(nodes, key=key)
