"""The cluster's ports and the flows of whole commands over them: started, cancelled and lost together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import inf

from lambdascale.core import ClusterSpec, NodeId
from lambdascale.sim.kernel import Kernel
from lambdascale.sim.links import Done, FlowGroup, LinkNetwork, Port


class Fabric:
    """Ports of each node: NIC out and NIC in (full duplex), PCIe and SSD; made when first used. Lost nodes move nothing.

    ``nic_shares``: nodes whose NIC has only this share of the cluster's rate, in both directions. ``host_bytes_per_s``: rate of
    the port ``host``, a way of its own from host memory to the NIC.
    """

    def __init__(
        self,
        kernel: Kernel,
        cluster: ClusterSpec,
        nic_shares: Mapping[NodeId, float],
        *,
        record_grants: bool = False,
        host_bytes_per_s: float = inf,
    ) -> None:
        self.kernel = kernel
        self.cluster = cluster
        self.links = LinkNetwork(kernel, record_grants=record_grants)
        self._nic_shares = dict(nic_shares)
        self._host_bytes_per_s = host_bytes_per_s
        self._ports: dict[tuple[str, NodeId], Port] = {}
        self.lost: set[frozenset[NodeId]] = set()  # nodes, and pairs of living nodes without a connection

    def port(self, kind: str, node: NodeId) -> Port:
        """Return the ``kind`` (nic_out, nic_in, pcie, ssd, host) port of ``node``."""
        port = self._ports.get((kind, node))
        if port is None:
            hardware = self.cluster.node(node)
            rates = {"ssd": hardware.ssd_bytes_per_s, "pcie": hardware.pcie_bytes_per_s, "host": self._host_bytes_per_s}
            nic = hardware.nic_bytes_per_s * self._nic_shares.get(node, 1.0)
            port = self._ports[kind, node] = Port(f"{kind}:{node}", rates.get(kind, nic))
        return port

    def hop(self, src: NodeId, dst: NodeId) -> tuple[Port, Port]:
        """Return the two ports bytes from ``src`` to ``dst`` cross."""
        return self.port("nic_out", src), self.port("nic_in", dst)

    def set_nic_share(self, node: NodeId, share: float) -> None:
        """Give the node's NIC this share of the cluster's rate from now on; what is under way goes on at it."""
        self._nic_shares[node] = share
        rate = self.cluster.node(node).nic_bytes_per_s * share
        for kind in ("nic_out", "nic_in"):
            self.links.set_rate(self.port(kind, node), rate)

    def alive(self, nodes: Collection[NodeId]) -> bool:
        """True if none of ``nodes`` is lost, and no two of them lack a connection."""
        return not any(lost.issubset(nodes) for lost in self.lost)

    def flow(
        self,
        group: FlowGroup,
        nodes: Collection[NodeId],
        ports: tuple[Port, ...],
        size_bytes: float,
        on_done: Done,
        cap: float = inf,
        weights: tuple[float, ...] | None = None,
        *,
        in_parts: bool = False,
    ) -> None:
        """Start a flow of ``group`` that depends on ``nodes``; none if the group is cancelled or they are not alive."""
        if not group.cancelled and not (self.lost and not self.alive(nodes)):
            group.flows[self.links.start(ports, size_bytes, on_done, cap, group, weights, in_parts=in_parts)] = nodes

    def cancel(self, group: FlowGroup) -> None:
        """Stop the group's flows; it starts no others."""
        group.cancelled = True
        for flow in group.flows:
            self.links.cancel(flow)
        group.flows.clear()

    def lose(self, lost: frozenset[NodeId], groups: Collection[FlowGroup]) -> None:
        """Stop those flows of ``groups`` that depend on a node, or on both nodes of a pair that has lost its connection.

        None begins until it is restored.
        """
        self.lost.add(lost)
        for group in groups:
            for flow in [flow for flow, nodes in group.flows.items() if lost.issubset(nodes)]:
                self.links.cancel(flow)
                del group.flows[flow]

    def restore(self, lost: frozenset[NodeId]) -> None:
        """Let a node, or a pair, move bytes again; flows that were lost do not come back."""
        self.lost.discard(lost)
