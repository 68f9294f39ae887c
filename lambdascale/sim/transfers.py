"""The simulated data plane: multicast plans, loads from storage and copies between nodes, as flows over ports.

Assumptions, all stated: NICs are full duplex; a NIC reads GPU and registered host memory at its line rate (GPUDirect, host
memory as RDMA source), so the tier of a multicast's source costs nothing extra; a read that streams from SSD through host
memory to the GPU goes at the slower of the two (cut-through); a transfer's start-up keeps its port for ``link_latency_s``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf

import numpy as np

from lambdascale.core import ClusterSpec, NodeId, UserError
from lambdascale.core.checks import check_types, require
from lambdascale.core.commands import LoadBlocks, StartMulticast
from lambdascale.sim.communicator import draw_setup_s
from lambdascale.sim.kernel import Kernel
from lambdascale.sim.links import Flow, LinkNetwork, Port

Deliver = Callable[[int, NodeId, str, int], None]
Occupy = Callable[[NodeId, bool], None]


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """How the data plane behaves.

    ``barrier``: rounds wait for each other, with ``barrier_s`` between them, as under the prototype's controller (about
    6 ms a round, reference section 4); otherwise every edge goes ahead as soon as it can. ``communicator_setup``: a
    collective first builds its communicator; ``communicator_outlier_probability`` of these take 18 to 120 s (off by default: the
    reference saw them but gives no frequency). ``chunk_bytes``: the pieces a streaming broadcast forwards.
    """

    barrier: bool = False
    barrier_s: float = 0.006
    communicator_setup: bool = True
    communicator_outlier_probability: float = 0.0
    chunk_bytes: int = 4 << 20
    record_grants: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self)
        require(self.barrier_s >= 0, f"transfers.barrier_s must not be negative, not {self.barrier_s}")
        require(self.chunk_bytes > 0, f"transfers.chunk_bytes must be positive, not {self.chunk_bytes}")
        probability = self.communicator_outlier_probability
        require(0 <= probability <= 1, f"transfers.communicator_outlier_probability must be in [0, 1], not {probability}")


class _Transfer:
    """A multicast or load under way: its flows, and the nodes whose GPUs it occupies."""

    def __init__(self) -> None:
        self.flows: dict[Flow, tuple[NodeId, NodeId]] = {}
        self.occupied: tuple[NodeId, ...] = ()
        self.cancelled = False


class _Multicast(_Transfer):
    """A plan's progress: what each node still has to send, in round order, and what it holds."""

    def __init__(self, command: StartMulticast) -> None:
        super().__init__()
        self.command = command
        self.sends: dict[NodeId, deque[tuple[NodeId, int]]] = {}
        received: dict[NodeId, set[int]] = {node: set() for node in command.plan.members}
        sent: dict[NodeId, set[int]] = {node: set() for node in command.plan.members}
        for transfers in command.plan.rounds:
            for t in transfers:
                self.sends.setdefault(t.src, deque()).append((t.dst, t.block))
                received[t.dst].add(t.block)
                sent[t.src].add(t.block)
        # What a node sends without ever receiving it, it must hold from the start (sources, and survivors of a re-plan).
        self.held = {node: sent[node] - received[node] for node in command.plan.members}
        self.busy: set[NodeId] = set()
        self.left = sum(len(transfers) for transfers in command.plan.rounds)


class TransferEngine:
    """Moves blocks in simulated time. ``deliver`` is called for every block that arrives in a node's GPU memory."""

    def __init__(
        self,
        kernel: Kernel,
        cluster: ClusterSpec,
        options: TransferOptions,
        rng: np.random.Generator,
        deliver: Deliver,
        occupy: Occupy,
    ) -> None:
        self._kernel = kernel
        self._cluster = cluster
        self._options = options
        self._rng = rng
        self._deliver = deliver
        self._occupy = occupy
        self._ports: dict[tuple[str, NodeId], Port] = {}
        self._transfers: dict[int, _Transfer] = {}
        self._lost: set[NodeId] = set()
        self.links = LinkNetwork(kernel, record_grants=options.record_grants)
        self.setup_s: dict[int, float] = {}

    # -- multicasts --------------------------------------------------------------------------------------------------

    def multicast(self, command: StartMulticast) -> None:
        """Carry a plan out; a collective builds its communicator first and then occupies the sources' GPUs."""
        transfer = self._transfers[command.transfer_id] = _Multicast(command)
        if command.transport == "rdma":
            self._begin_multicast(transfer)
            return
        setup_s = 0.0
        if self._options.communicator_setup:
            ranks = len(command.plan.members)
            setup_s = draw_setup_s(ranks, self._rng, self._options.communicator_outlier_probability)
        self.setup_s[command.transfer_id] = setup_s
        self._kernel.at(self._kernel.now + setup_s, self._begin_collective, transfer)

    def _begin_collective(self, transfer: _Multicast) -> None:
        if transfer.cancelled:
            return
        transfer.occupied = transfer.command.plan.sources
        for node in transfer.occupied:
            self._occupy(node, True)
        self._begin_multicast(transfer)

    def _begin_multicast(self, transfer: _Multicast) -> None:
        if transfer.command.plan.streaming:
            self._stream(transfer)
        elif self._options.barrier:
            self._run_round((transfer, 0))
        else:
            for node in list(transfer.sends):
                self._send_next(transfer, node)

    def _send_next(self, transfer: _Multicast, node: NodeId) -> None:
        """Start the node's next send if its port is free and the block is there."""
        sends = transfer.sends.get(node)
        if node in transfer.busy or not sends or sends[0][1] not in transfer.held[node]:
            return
        destination, block = sends.popleft()
        transfer.busy.add(node)
        self._edge(transfer, node, destination, block, partial(self._sent, transfer, node, destination, block))

    def _sent(self, transfer: _Multicast, node: NodeId, destination: NodeId, block: int) -> None:
        transfer.busy.discard(node)
        self._received(transfer, destination, block)
        self._send_next(transfer, node)
        self._send_next(transfer, destination)

    def _received(self, transfer: _Multicast, node: NodeId, block: int) -> None:
        transfer.held[node].add(block)
        transfer.left -= 1
        if transfer.left == 0:
            self._release(transfer)
            self._transfers.pop(transfer.command.transfer_id, None)
        self._deliver(transfer.command.transfer_id, node, transfer.command.model, block)

    def _run_round(self, entry: tuple[_Multicast, int]) -> None:
        """The prototype's controller: all transfers of a round, then a barrier, then the next round."""
        transfer, index = entry
        rounds = transfer.command.plan.rounds
        if transfer.cancelled or index == len(rounds):
            return
        left = len(rounds[index])

        def done(node: NodeId, block: int) -> None:
            nonlocal left
            left -= 1
            self._received(transfer, node, block)
            if left == 0:
                self._kernel.at(self._kernel.now + self._options.barrier_s, self._run_round, (transfer, index + 1))

        for t in rounds[index]:
            self._edge(transfer, t.src, t.dst, t.block, partial(done, t.dst, t.block))

    def _edge(self, transfer: _Multicast, src: NodeId, dst: NodeId, block: int, on_done: Callable[[], None]) -> None:
        cluster = self._cluster
        line = float(cluster.nic_bytes_per_s)
        size = transfer.command.block_bytes[block] / cluster.rdma_efficiency + cluster.link_latency_s * line
        self._flow(transfer, (src, dst), (self._port("nic_out", src), self._port("nic_in", dst)), size, on_done)

    def _stream(self, transfer: _Multicast) -> None:
        """One flow over all hops at once; the last node is done when the pipe of chunks has drained."""
        command = transfer.command
        edges = list(dict.fromkeys((t.src, t.dst) for transfers in command.plan.rounds for t in transfers))
        ports = [port for src, dst in edges for port in (self._port("nic_out", src), self._port("nic_in", dst))]
        if not edges or not self._lost.isdisjoint(command.plan.members):
            return
        rate = float(self._cluster.nic_bytes_per_s) * self._cluster.collective_efficiency
        fill_s = (len(edges) - 1) * self._options.chunk_bytes / rate + len(edges) * self._cluster.link_latency_s
        size = sum(command.block_bytes) / self._cluster.collective_efficiency

        def drained() -> None:
            self._kernel.at(self._kernel.now + fill_s, self._stream_done, transfer)

        self._flow(transfer, (edges[0][0], edges[-1][1]), tuple(dict.fromkeys(ports)), size, drained)

    def _stream_done(self, transfer: _Multicast) -> None:
        if transfer.cancelled:
            return
        for node in transfer.command.plan.destinations:
            for block in range(transfer.command.plan.blocks):
                self._received(transfer, node, block)

    # -- loads and copies --------------------------------------------------------------------------------------------

    def load(self, command: LoadBlocks) -> None:
        """Load blocks one after another from the node's own storage, the remote store, or (ideal baseline) from nowhere."""
        transfer = self._transfers[command.transfer_id] = _Transfer()
        if command.tier == "instant":
            for block in command.blocks:
                self._kernel.at(self._kernel.now, self._loaded_instantly, (command, block))
        elif command.tier == "ssd" and command.loader == "sequential":
            size = float(sum(command.block_bytes[block] for block in command.blocks))
            pcie = (self._port("pcie", command.node),)
            then = partial(self._load_next, transfer, command, pcie, inf, deque(command.blocks))
            self._flow(transfer, (command.node, command.node), (self._port("ssd", command.node),), size, then)
        else:
            ports, cap = self._load_path(command)
            self._load_next(transfer, command, ports, cap, deque(command.blocks))

    def _load_path(self, command: LoadBlocks) -> tuple[tuple[Port, ...], float]:
        pcie = self._port("pcie", command.node)
        if command.tier == "host":
            return (pcie,), inf
        if command.tier == "ssd":
            return (self._port("ssd", command.node), pcie), inf
        remote = float(self._cluster.remote_bytes_per_s)
        if command.tier != "remote" or remote <= 0:
            raise UserError(f"cluster {self._cluster.name} has no {command.tier} tier to load {command.model} from")
        return (self._port("nic_in", command.node), pcie), remote

    def _load_next(
        self, transfer: _Transfer, command: LoadBlocks, ports: tuple[Port, ...], cap: float, blocks: deque[int]
    ) -> None:
        if not blocks:
            return
        block = blocks.popleft()

        def done() -> None:
            self._deliver(command.transfer_id, command.node, command.model, block)
            self._load_next(transfer, command, ports, cap, blocks)

        self._flow(transfer, (command.node, command.node), ports, float(command.block_bytes[block]), done, cap)

    def _loaded_instantly(self, entry: tuple[LoadBlocks, int]) -> None:
        command, block = entry
        if command.node not in self._lost and not self._transfers[command.transfer_id].cancelled:
            self._deliver(command.transfer_id, command.node, command.model, block)

    def copy(self, src: NodeId, dst: NodeId, size_bytes: float, on_done: Callable[[], None]) -> None:
        """Write ``size_bytes`` from ``src`` to ``dst`` (KV cache at a mode switch)."""
        transfer = self._transfers.setdefault(-1, _Transfer())
        ports = (self._port("nic_out", src), self._port("nic_in", dst))
        self._flow(transfer, (src, dst), ports, size_bytes / self._cluster.rdma_efficiency, on_done)

    # -- ends --------------------------------------------------------------------------------------------------------

    def cancel(self, transfer_id: int) -> None:
        """Stop a transfer: nothing of it arrives from now on."""
        transfer = self._transfers.pop(transfer_id, None)
        if transfer is None:
            return
        transfer.cancelled = True
        for flow in list(transfer.flows):
            self.links.cancel(flow)
        transfer.flows.clear()
        self._release(transfer)

    def node_lost(self, node: NodeId) -> None:
        """Nothing moves to, from or through this node any more; what depended on it stalls until it is cancelled."""
        self._lost.add(node)
        for transfer in self._transfers.values():
            gone = [flow for flow, ends in transfer.flows.items() if node in ends or self._crosses(flow, node)]
            for flow in gone:
                self.links.cancel(flow)
                del transfer.flows[flow]

    def _crosses(self, flow: Flow, node: NodeId) -> bool:
        return any(self._ports.get((kind, node)) in flow.ports for kind in ("nic_in", "nic_out"))

    def _release(self, transfer: _Transfer) -> None:
        for node in transfer.occupied:
            self._occupy(node, False)
        transfer.occupied = ()

    def _flow(
        self,
        transfer: _Transfer,
        ends: tuple[NodeId, NodeId],
        ports: tuple[Port, ...],
        size_bytes: float,
        on_done: Callable[[], None],
        cap: float = inf,
    ) -> None:
        """Start a flow of a transfer, unless one of its ends is lost."""
        if transfer.cancelled or not self._lost.isdisjoint(ends):
            return

        def done() -> None:
            transfer.flows.pop(flow, None)
            on_done()

        flow = self.links.start(ports, size_bytes, done, cap)
        transfer.flows[flow] = ends

    def _port(self, kind: str, node: NodeId) -> Port:
        port = self._ports.get((kind, node))
        if port is None:
            cluster = self._cluster
            rates = {"ssd": cluster.ssd_bytes_per_s, "pcie": cluster.pcie_bytes_per_s}
            port = self._ports[kind, node] = Port(f"{kind}:{node}", float(rates.get(kind, cluster.nic_bytes_per_s)))
        return port
