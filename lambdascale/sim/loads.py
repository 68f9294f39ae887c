"""Loads from a node's own memory or storage, or the remote store: blocks that follow each other.

The pipelined loader's reads stream through host memory to the GPU: one flow over storage and PCIe at once, at the slower of the
two. That is the limit of small pieces; a real loader adds the copy of its last piece.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf

from msgspec import Struct

from lambdascale.core import NodeId, UserError
from lambdascale.core.commands import LoadBlocks
from lambdascale.sim.fabric import Fabric
from lambdascale.sim.links import FlowGroup, Port

Deliver = Callable[[int, NodeId, str, int], None]


class Way(Struct, frozen=True):
    """Ports that bytes cross together, at most ``cap`` bytes/s fast. ``weights``: see Flow; ``goodput``: each of them."""

    ports: tuple[Port, ...]
    weights: tuple[float, ...]
    goodput: float
    cap: float


def load_ways(command: LoadBlocks, fabric: Fabric) -> tuple[Way | None, Way]:
    """Return the way of all blocks together into host memory, None if they need none, and then that of each block.

    UserError if the cluster has no such tier.
    """
    if command.tier == "instant":
        return None, _way(command, fabric)
    pcie = fabric.port("pcie", command.node)
    if command.tier == "host":
        return None, _way(command, fabric, pcie)
    storage, cap = _storage(command, fabric)
    if command.loader == "pipelined":
        return None, _way(command, fabric, storage, pcie, cap=cap)
    return _way(command, fabric, storage, cap=cap), _way(command, fabric, pcie)


def _way(command: LoadBlocks, fabric: Fabric, *ports: Port, cap: float = inf) -> Way:
    """Return the way over ``ports``.

    Flows of all tiers but the remote store have sizes in bytes at a NIC's line rate, as sends have, so that a send from host
    memory has an equal share of PCIe.
    """
    goodput = 1.0 if command.tier == "remote" else fabric.cluster.rdma_efficiency
    return Way(ports, (goodput,) * len(ports), goodput, cap)


def _storage(command: LoadBlocks, fabric: Fabric) -> tuple[Port, float]:
    if command.tier == "ssd":
        return fabric.port("ssd", command.node), inf
    rate = float(fabric.cluster.remote_bytes_per_s)
    if command.tier != "remote" or rate <= 0:
        raise UserError(f"cluster {fabric.cluster.name} has no {command.tier} tier to load {command.model} from")
    return fabric.port("nic_in", command.node), rate


class Load(FlowGroup):
    """One LoadBlocks under way; UserError if its tier does not exist. ``on_end(transfer_id)`` is called after its last block."""

    def __init__(self, command: LoadBlocks, fabric: Fabric, deliver: Deliver, on_end: Callable[[int], None]) -> None:
        super().__init__()
        self._command = command
        self._nodes = (command.node,)
        self._left = deque(command.blocks)
        self._fabric = fabric
        self._deliver = deliver
        self._on_end = on_end
        self._ahead, self._way = load_ways(command, fabric)

    def start(self) -> None:
        """Begin; the tier "instant" delivers at once, as events of the present time."""
        if self._ahead is not None:
            ahead, size_bytes = self._ahead, sum(self._command.block_bytes[block] for block in self._left)
            size = size_bytes / ahead.goodput
            self._fabric.flow(self, self._nodes, ahead.ports, size, self._begin, ahead.cap, ahead.weights)
        elif self._way.ports:
            self._begin()
        else:
            self._fabric.kernel.at(self._fabric.kernel.now, self._all_arrived)

    def _begin(self) -> None:
        """Let block follow block, as parts of one flow."""
        if not self._left:
            self._on_end(self._command.transfer_id)
            return
        way, first = self._way, self._command.block_bytes[self._left[0]]
        self._fabric.flow(self, self._nodes, way.ports, first / way.goodput, self._arrived, way.cap, way.weights, in_parts=True)

    def _arrived(self) -> float | None:
        """Deliver the next block; return what the one behind it takes of the way, None if none is to follow."""
        command, left = self._command, self._left
        self._deliver(command.transfer_id, command.node, command.model, left.popleft())
        if left:
            return command.block_bytes[left[0]] / self._way.goodput
        self._on_end(command.transfer_id)
        return None

    def _all_arrived(self, _: object) -> None:
        """Deliver all blocks, none if the load or its node has come to nothing: no flow ends with them here."""
        if self.cancelled or not self._fabric.alive(self._nodes):
            self._left.clear()
        if not self._left:
            self._on_end(self._command.transfer_id)
        while self._left:
            self._arrived()

    def coming(self, model: str, node: NodeId) -> set[int]:
        """Return the blocks of ``model`` that this load has still to bring to ``node``."""
        return set(self._left) if (model, node) == (self._command.model, self._command.node) else set()
