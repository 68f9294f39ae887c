"""The simulated data plane: multicast plans, loads from storage and copies between nodes, as flows over ports.

Assumptions, all stated: NICs are full duplex; a NIC reads GPU memory at its line rate (GPUDirect); what a source sends from
host memory also crosses the node's PCIe, at most as fast as that is, and shares it with the node's own loads (or has a way and
a rate of its own, if the options say so); a transfer's
start-up keeps its port for ``link_latency_s``. Loads: see :mod:`lambdascale.sim.loads`.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping
from functools import partial
from math import inf

import numpy as np

from lambdascale.core import ClusterSpec, NodeId
from lambdascale.core.commands import LoadBlocks, StartMulticast, Tier
from lambdascale.sim.fabric import Fabric
from lambdascale.sim.interference import Disturb, Interference, Occupy
from lambdascale.sim.kernel import Kernel
from lambdascale.sim.links import FlowGroup
from lambdascale.sim.loads import Deliver, Load
from lambdascale.sim.options import TransferOptions


class _Member:
    """A node's part in a multicast: sends (round, to, block) and receives (round, from) to come, blocks held, NIC.

    A streaming multicast has no sends: it is one flow. ``pcie``: the port crossed by what it sends, if it sends from host memory.
    """

    __slots__ = ("busy", "held", "nic_in", "nic_out", "node", "pcie", "receives", "sends")

    def __init__(self, node: NodeId, fabric: Fabric, tier: Tier, host_port: str) -> None:
        self.pcie = fabric.port(host_port, node) if tier == "host" else None
        self.node = node
        self.sends: deque[tuple[int, _Member, int]] = deque()
        self.receives: deque[tuple[int, _Member]] = deque()
        self.held: set[int] = set()
        self.busy = False
        self.nic_out = fabric.port("nic_out", node)
        self.nic_in = fabric.port("nic_in", node)


class _Multicast(FlowGroup):
    """A plan's progress. ``left``: number of sends to come; ``sizes``: see TransferEngine._sizes; ``begun``: sends may start."""

    def __init__(self, command: StartMulticast, fabric: Fabric, sizes: tuple[float, ...], host_port: str) -> None:
        super().__init__()
        self.command = command
        self.sizes = sizes
        self.begun = False  # not while a collective sets its communicator up
        tiers = dict(zip(command.plan.sources, command.source_tiers, strict=True))
        self.members = members = {node: _Member(node, fabric, tiers.get(node, "gpu"), host_port) for node in command.plan.members}
        received: dict[NodeId, set[int]] = {node: set() for node in members}
        self.left = 0
        streaming = command.plan.streaming
        for number, sends in enumerate(command.plan.rounds):
            self.left += len(sends)
            for send in sends:
                src, dst, block = members[send.src], members[send.dst], send.block
                src.held.add(block)
                received[dst.node].add(block)
                if not streaming:
                    src.sends.append((number, dst, block))
                    dst.receives.append((number, src))
        # What a node sends without ever receiving it, it must hold from the start (sources, and survivors of a re-plan).
        for node, member in members.items():
            member.held -= received[node]
        # Sources that other transfers still bring blocks to; the round (under a barrier) that waits for such a block.
        self.joined: tuple[NodeId, ...] = ()
        self.stalled: int | None = None

    def coming(self, model: str, node: NodeId) -> set[int]:
        """Return the blocks of ``model`` that this transfer has still to bring to ``node``."""
        if self.command.model != model or node not in self.members:
            return set()
        brought = {t.block for sends in self.command.plan.rounds for t in sends if t.dst == node}
        return brought - self.members[node].held


class TransferEngine:
    """Moves blocks in simulated time. ``deliver`` is called for every block that arrives in a node's GPU memory.

    ``occupy``, ``disturb``: see Interference. ``set_up(transfer, node)``: see SetUpDone. ``setup_s``: the communicator set-ups
    drawn, by transfer id. ``links.grants``: the recorded grants, if asked for. ``layers`` of each model (one a block, if not
    given) and ``nic_shares`` of nodes whose NIC is slower than the others'.
    """

    def __init__(
        self,
        kernel: Kernel,
        cluster: ClusterSpec,
        options: TransferOptions,
        rng: np.random.Generator,
        deliver: Deliver,
        occupy: Occupy,
        *,
        set_up: Callable[[int, NodeId], None] = lambda transfer_id, node: None,
        layers: Mapping[str, int] | None = None,
        nic_shares: Mapping[NodeId, float] | None = None,
        disturb: Disturb | None = None,
    ) -> None:
        self._kernel = kernel
        self._cluster = cluster
        self._options = options
        self._rng = rng
        self._deliver = deliver
        self._interference = Interference(options, occupy, disturb)
        self._set_up = set_up
        self._layers = layers or {}
        self._rate = None if cluster.overrides else cluster.node(0).nic_bytes_per_s  # of all NICs, if they are alike
        host_bytes_per_s = options.host_source_bytes_per_s
        self._host_port = "pcie" if host_bytes_per_s is None else "host"
        self._fabric = Fabric(
            kernel,
            cluster,
            nic_shares or {},
            record_grants=options.record_grants,
            host_bytes_per_s=inf if host_bytes_per_s is None else float(host_bytes_per_s),
        )
        self._transfers: dict[int, _Multicast | Load] = {}
        self._joins: dict[_Multicast, None] = {}  # those with sources that still receive; in order
        self._held: defaultdict[tuple[str, NodeId], set[int]] = defaultdict(set)  # blocks of a model that a node has received
        self._copies = FlowGroup()
        self.links = self._fabric.links
        self.setup_s: dict[int, float] = {}

    @property
    def active(self) -> tuple[int, ...]:
        """Ids of the multicasts and loads that are neither complete nor cancelled, stalled ones included."""
        return tuple(self._transfers)

    # -- multicasts --------------------------------------------------------------------------------------------------

    def multicast(self, command: StartMulticast) -> None:
        """Carry a plan out; a collective builds its communicator first and then occupies the sources' GPUs."""
        transfer = _Multicast(command, self._fabric, self._sizes(command), self._host_port)
        if not transfer.left:
            return
        self._join(transfer)
        self._transfers[command.transfer_id] = transfer
        self._launch(transfer)

    def _launch(self, transfer: _Multicast) -> None:
        command = transfer.command
        if command.multicast == "one_sided":
            on_gpus = [node for node, member in transfer.members.items() if member.pcie is None]
            self._interference.one_sided(command.transfer_id, on_gpus)
            self._begin_multicast(transfer)
            return
        slept_s = self._options.slept_s(len(command.plan.members))
        if slept_s is not None:
            self._kernel.at(self._kernel.now + slept_s, self._stream_done, transfer)
            return
        self.setup_s[command.transfer_id] = setup_s = self._options.draw_setup_s(len(command.plan.members), self._rng)
        self._kernel.at(self._kernel.now + setup_s, self._begin_collective, transfer)

    def _join(self, transfer: _Multicast) -> None:
        """Note what sources on GPUs still receive by other transfers: they send it on once they hold it."""
        command = transfer.command
        for node, tier in zip(command.plan.sources, command.source_tiers, strict=True):
            if tier == "host":  # its copy is complete, whatever its GPU receives
                continue
            lacking = {block for other in self._transfers.values() for block in other.coming(command.model, node)}
            lacking -= self._held.get((command.model, node), set())  # what repeats a failed transfer may bring them once more
            if lacking:
                transfer.members[node].held -= lacking
                transfer.joined += (node,)
        if transfer.joined:
            self._joins[transfer] = None

    def _arrived(self, transfer_id: int, node: NodeId, model: str, block: int) -> None:
        """Hand an arrival on, and let transfers go on whose source waited for the block at ``node``."""
        self._held[model, node].add(block)
        if self._joins:
            self._pass_on(node, model, block)
        self._deliver(transfer_id, node, model, block)

    def _pass_on(self, node: NodeId, model: str, block: int) -> None:
        for join in [j for j in self._joins if node in j.joined and j.command.model == model]:
            join.members[node].held.add(block)
            if not join.begun:
                continue
            if self._barrier_s(join.command) is None:
                self._send_next(join, join.members[node])
            elif join.stalled is not None:
                index, join.stalled = join.stalled, None
                self._run_round((join, index))

    def _begin_collective(self, transfer: _Multicast) -> None:
        plan = transfer.command.plan
        if transfer.cancelled or not self._fabric.alive(plan.members):
            return
        for node in plan.destinations:
            self._set_up(transfer.command.transfer_id, node)
        self._interference.collective(transfer.command.transfer_id, plan.sources)
        self._begin_multicast(transfer)

    def _begin_multicast(self, transfer: _Multicast) -> None:
        transfer.begun = True
        if transfer.command.plan.streaming:
            self._stream(transfer)
        elif self._barrier_s(transfer.command) is not None:
            self._run_round((transfer, 0))
        else:
            # In the order of their first sends.
            for node in dict.fromkeys(send.src for sends in transfer.command.plan.rounds for send in sends):
                self._send_next(transfer, transfer.members[node])

    def _send_next(self, transfer: _Multicast, node: _Member) -> None:
        """Start the node's next send if its port is free, it holds the block, and the receiver has ended earlier rounds."""
        if node.busy or not node.sends:
            return
        number, destination, block = node.sends[0]
        if block not in node.held or destination.receives[0][0] != number:
            return
        node.sends.popleft()
        node.busy = True
        self._edge(transfer, node, destination, block, partial(self._sent, transfer, node, destination, block))

    def _sent(self, transfer: _Multicast, node: _Member, destination: _Member, block: int) -> None:
        node.busy = False
        # Receives of one round may end in any order; only how many of it are left matters.
        receives = destination.receives
        number, _ = receives.popleft()
        self._received(transfer, destination, block)
        if node.sends:
            self._send_next(transfer, node)
        if destination.sends:
            self._send_next(transfer, destination)
        if receives and receives[0][0] != number:
            due = receives[0][0]
            for number, sender in receives:
                if number != due:
                    break
                self._send_next(transfer, sender)

    def _received(self, transfer: _Multicast, node: _Member, block: int) -> None:
        node.held.add(block)
        transfer.left -= 1
        command = transfer.command
        if transfer.left == 0:
            self._interference.release(command.transfer_id)
            self._ended(command.transfer_id)
        self._arrived(command.transfer_id, node.node, command.model, block)

    def _run_round(self, entry: tuple[_Multicast, int]) -> None:
        """Run a round as the prototype's controller does: all its sends, then a barrier, then the next round."""
        transfer, index = entry
        rounds = transfer.command.plan.rounds
        if transfer.cancelled or index == len(rounds):
            return
        if transfer.joined and any(send.block not in transfer.members[send.src].held for send in rounds[index]):
            transfer.stalled = index
            return
        left = len(rounds[index])
        if not left:
            self._end_round(transfer, index)

        def done(node: _Member, block: int) -> None:
            nonlocal left
            left -= 1
            self._received(transfer, node, block)
            if left == 0:
                self._end_round(transfer, index)

        for send in rounds[index]:
            src, dst = transfer.members[send.src], transfer.members[send.dst]
            self._edge(transfer, src, dst, send.block, partial(done, dst, send.block))

    def _end_round(self, transfer: _Multicast, index: int) -> None:
        barrier_s = self._barrier_s(transfer.command) or 0.0
        self._kernel.at(self._kernel.now + barrier_s, self._run_round, (transfer, index + 1))

    def _barrier_s(self, command: StartMulticast) -> float | None:
        """Return the system's barrier, else the one that this run imposes on all systems; None without any."""
        if command.barrier_s is None and self._options.barrier:
            return self._options.barrier_s
        return command.barrier_s

    def _edge(self, transfer: _Multicast, src: _Member, dst: _Member, block: int, on_done: Callable[[], None]) -> None:
        nodes = src.node, dst.node
        if src.pcie is None:
            size = transfer.sizes[block] if self._rate else self._line_bytes(transfer.command, block, self._nic_rate(nodes))
            self._fabric.flow(transfer, nodes, (src.nic_out, dst.nic_in), size, on_done)
            return
        # PCIe carries the payload, the NICs the payload and what they fall short of their line rate by.
        goodput = self._cluster.rdma_efficiency
        line = min(self._rate or self._nic_rate(nodes), src.pcie.bytes_per_s / goodput)
        size, ports = self._line_bytes(transfer.command, block, line), (src.pcie, src.nic_out, dst.nic_in)
        self._fabric.flow(transfer, nodes, ports, size, on_done, weights=(goodput, 1.0, 1.0))

    def _nic_rate(self, nodes: Collection[NodeId]) -> float:
        """Return the line rate of the slowest NIC among ``nodes``, in bytes/s."""
        return min(self._cluster.node(node).nic_bytes_per_s for node in nodes)

    def _sizes(self, command: StartMulticast) -> tuple[float, ...]:
        """Return what each block of a multicast takes of a NIC, if it moves by itself and all NICs of the cluster are alike."""
        rate = self._rate
        if rate is None or command.plan.streaming:
            return ()
        return tuple([self._line_bytes(command, block, rate) for block in range(command.plan.blocks)])

    def _line_bytes(self, command: StartMulticast, block: int, rate: float) -> float:
        """Return a block's bytes at the line rate ``rate`` that take as long as the block with all that it costs besides."""
        cluster, payload = self._cluster, command.block_bytes[block]
        layers = self._layers.get(command.model, command.plan.blocks) / command.plan.blocks
        overhead_s = cluster.link_latency_s + self._options.block_overhead_s(payload, layers)
        return payload / cluster.rdma_efficiency + overhead_s * rate

    def _stream(self, transfer: _Multicast) -> None:
        """One flow over all hops at once; the last node is done when the pipe of chunks has drained."""
        plan, cluster = transfer.command.plan, self._cluster
        edges = dict.fromkeys((send.src, send.dst) for sends in plan.rounds for send in sends)
        nics = tuple(port for src, dst in edges for port in self._fabric.hop(src, dst))
        pcie = tuple(member.pcie for member in transfer.members.values() if member.pcie is not None)
        ports = pcie + nics
        assert len(set(ports)) == len(ports), "a streaming plan is made of chains: no node forwards to two, or receives from two"
        hops, goodput = plan.longest_path(), cluster.collective_efficiency
        rate = min(self._nic_rate(plan.members) * goodput, *(port.bytes_per_s for port in pcie), inf)
        fill_s = (hops - 1) * self._options.chunk_bytes / rate + hops * cluster.link_latency_s
        size = sum(transfer.command.block_bytes) / goodput
        weights = (goodput,) * len(pcie) + (1.0,) * len(nics) if pcie else None

        def drained() -> None:
            self._kernel.at(self._kernel.now + fill_s, self._stream_done, transfer)

        self._fabric.flow(transfer, plan.members, ports, size, drained, weights=weights)

    def _stream_done(self, transfer: _Multicast) -> None:
        plan = transfer.command.plan
        if transfer.cancelled or not self._fabric.alive(plan.members):
            return
        for node in plan.destinations:
            for block in range(plan.blocks):
                self._received(transfer, transfer.members[node], block)

    # -- loads and copies --------------------------------------------------------------------------------------------

    def load(self, command: LoadBlocks) -> None:
        """Load blocks one after another; UserError if the cluster has no such tier."""
        load = self._transfers[command.transfer_id] = Load(command, self._fabric, self._arrived, self._ended)
        load.start()

    def copy(self, src: NodeId, dst: NodeId, size_bytes: float, on_done: Callable[[], None]) -> None:
        """Write ``size_bytes`` from ``src`` to ``dst`` (KV cache at a mode switch); within a node that takes no time."""
        if src == dst:
            self._kernel.at(self._kernel.now, lambda _: on_done())
            return
        self._fabric.flow(
            self._copies, (src, dst), self._fabric.hop(src, dst), size_bytes / self._cluster.rdma_efficiency, on_done
        )

    # -- ends --------------------------------------------------------------------------------------------------------

    def cancel(self, transfer_id: int) -> None:
        """Stop a transfer: nothing of it arrives from now on. Unknown and finished ids are ignored."""
        transfer = self._transfers.pop(transfer_id, None)
        if transfer is None:
            return
        self._fabric.cancel(transfer)
        if isinstance(transfer, _Multicast):
            self._joins.pop(transfer, None)
            self._interference.release(transfer_id)

    def lost(self, *nodes: NodeId) -> None:
        """Stop all that moves to, from or through a node, or between two that have lost their connection.

        What depended on it stalls until it is cancelled. A collective breaks with its communicator, also while that is set up:
        its sources have their GPUs back, though a control plane that counts it as through never cancels it.
        """
        for each in [each for each in self._transfers.values() if isinstance(each, _Multicast)]:
            if each.command.multicast == "collective" and all(node in each.members for node in nodes):
                self._interference.release(each.command.transfer_id)
                self._fabric.cancel(each)
        self._fabric.lose(frozenset(nodes), (*self._transfers.values(), self._copies))
        if len(nodes) == 1:
            self._held = defaultdict(set, {key: held for key, held in self._held.items() if key[1] not in nodes})

    def released(self, node: NodeId, model: str) -> None:
        """Take note that a node's GPUs hold nothing of a model any more."""
        self._held.pop((model, node), None)

    def restored(self, *nodes: NodeId) -> None:
        """Let a lost node, which comes back empty, take part in transfers again, or two nodes by a new connection."""
        self._fabric.restore(frozenset(nodes))

    def set_nic_share(self, node: NodeId, share: float) -> None:
        """Give the node's NIC this share of the cluster's rate from now on."""
        self._fabric.set_nic_share(node, share)

    def _ended(self, transfer_id: int) -> None:
        transfer = self._transfers.pop(transfer_id, None)
        if isinstance(transfer, _Multicast):
            self._joins.pop(transfer, None)
