"""Loads from a node's own storage or the remote store, as steps that follow each other.

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


class Step(Struct, frozen=True):
    """``size_bytes`` over ``ports``, at most ``cap`` bytes/s fast; afterwards ``block`` is in GPU memory, if it names one.

    ``weights``: see Flow.
    """

    ports: tuple[Port, ...]
    size_bytes: float
    cap: float
    weights: tuple[float, ...] | None
    block: int | None


def load_steps(command: LoadBlocks, fabric: Fabric) -> deque[Step]:
    """Return the steps of a load from host, SSD or remote store, in order; UserError if the cluster has no such tier."""
    pcie = fabric.port("pcie", command.node)
    # In bytes at a NIC's line rate, as sends are counted, so that a send from host memory has an equal share of PCIe.
    goodput = None if command.tier == "remote" else fabric.cluster.rdma_efficiency
    sizes = [(block, float(command.block_bytes[block])) for block in command.blocks]

    def step(ports: tuple[Port, ...], size: float, cap: float, block: int | None) -> Step:
        if goodput is None:
            return Step(ports, size, cap, None, block)
        return Step(ports, size / goodput, inf, (goodput,) * len(ports), block)

    if command.tier == "host":
        return deque(step((pcie,), size, inf, block) for block, size in sizes)
    storage, cap = _storage(command, fabric)
    if command.loader == "pipelined":
        return deque(step((storage, pcie), size, cap, block) for block, size in sizes)
    whole = step((storage,), sum(size for _, size in sizes), cap, None)
    return deque([whole, *(step((pcie,), size, inf, block) for block, size in sizes)])


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
        self._left = set(command.blocks)
        self._fabric = fabric
        self._deliver = deliver
        self._on_end = on_end
        self._steps = deque[Step]() if command.tier == "instant" else load_steps(command, fabric)

    def start(self) -> None:
        """Begin; the tier "instant" delivers at once, as events of the present time."""
        if self._command.tier != "instant":
            self._next()
            return
        kernel = self._fabric.kernel
        kernel.at(kernel.now, self._all_arrived)

    def _next(self) -> None:
        if self._steps:
            step = self._steps[0]
            self._fabric.flow(self, self._nodes, step.ports, step.size_bytes, self._stepped, step.cap, step.weights)
        else:
            self._on_end(self._command.transfer_id)

    def _stepped(self) -> None:
        step = self._steps.popleft()
        if step.block is not None:
            self._arrived(step.block)
        self._next()

    def _all_arrived(self, _: object) -> None:
        for block in self._command.blocks:
            self._arrived(block)
        self._on_end(self._command.transfer_id)

    def coming(self, model: str, node: NodeId) -> set[int]:
        """Return the blocks of ``model`` that this load has still to bring to ``node``."""
        return set(self._left) if (model, node) == (self._command.model, self._command.node) else set()

    def _arrived(self, block: int) -> None:
        command, fabric = self._command, self._fabric
        self._left.discard(block)
        if not self.cancelled and (not fabric.lost or fabric.alive((command.node,))):
            self._deliver(command.transfer_id, command.node, command.model, block)
