"""Multicasts and loads from their command to their end: what they still have to bring, and what they hold on to meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lambdascale.control.state import Allocation, Fleet, ModelState, TransferState
from lambdascale.control.traffic import Port, ports_of_load, ports_of_source
from lambdascale.core import MulticastPlan, NodeId
from lambdascale.core.commands import LoadBlocks, Loader, MulticastKind, StartMulticast, Tier

_FORWARDING: tuple[Port, ...] = ports_of_source("gpu")


class Transfers:
    """Issues transfers and keeps their records. A source's allocation and host copy stay until the transfer ends."""

    def __init__(self, fleet: Fleet, *, loader: Loader, multicast: MulticastKind) -> None:
        self._fleet = fleet
        self._loader = loader
        self._multicast = multicast

    def multicast(
        self,
        state: ModelState,
        plan: MulticastPlan,
        sources: Sequence[tuple[NodeId, Tier]],
        *,
        barrier_s: float | None = None,
        again: bool = False,
    ) -> None:
        """Issue a plan over real nodes; ``barrier_s``: see StartMulticast, ``again``: see TransferState."""
        coming: dict[NodeId, dict[int, NodeId]] = {node: {} for node in plan.destinations}
        for sends in plan.rounds:
            for send in sends:
                coming[send.dst][send.block] = send.src
        ports = {node: ports_of_source(tier) for node, tier in sources}
        transfer_id = self._begin(state, coming, sources, ports, multicast=True, again=again)
        tiers = tuple(tier for _, tier in sources)
        self._fleet.out.append(
            StartMulticast(transfer_id, state.spec.name, plan, state.block_bytes, tiers, self._multicast, barrier_s)
        )

    def load(self, state: ModelState, node: NodeId, tier: Tier, blocks: Sequence[int]) -> None:
        """Let ``node`` load ``blocks`` from its own ``tier``, in this order."""
        sources: list[tuple[NodeId, Tier]] = [(node, tier)] if tier == "host" else []
        ports = {node: ports_of_load(tier)}
        transfer_id = self._begin(state, {node: dict.fromkeys(blocks, node)}, sources, ports, multicast=False)
        command = LoadBlocks(transfer_id, state.spec.name, node, tuple(blocks), state.block_bytes, tier, self._loader)
        self._fleet.out.append(command)

    def load_missing(self, state: ModelState, node: NodeId) -> None:
        """Let a node load the wanted blocks that it lacks and that no transfer brings, from its own host memory or storage."""
        allocation = state.allocations[node]
        coming = {block for transfer in allocation.incoming.values() for block in transfer.waiting[node]}
        missing = sorted(allocation.wanted - allocation.blocks - coming)
        if missing:
            self.load(state, node, self._fleet.own_tier(state, node), missing)

    def _begin(
        self,
        state: ModelState,
        coming: dict[NodeId, dict[int, NodeId]],
        sources: Sequence[tuple[NodeId, Tier]],
        ports: dict[NodeId, tuple[Port, ...]],
        *,
        multicast: bool,
        again: bool = False,
    ) -> int:
        fleet = self._fleet
        members = frozenset([*coming, *(node for node, _ in sources)])
        held = tuple(allocation for node, allocation in state.allocations.items() if node in members)
        number = fleet.new_id()
        transfer = TransferState(number, state.spec.name, coming, ports, members, held, tuple(sources), multicast, again)
        fleet.transfers[number] = transfer
        for node in coming:
            state.allocations[node].incoming[number] = transfer
        self._count_all(transfer, state.block_bytes, 1)
        for allocation in held:
            allocation.transfers += 1
        for node, tier in sources:
            if tier == "host":
                fleet.host.pin(node, state.spec.name)
        return number

    def _count_all(self, transfer: TransferState, block_bytes: Sequence[int], sign: Literal[1, -1]) -> None:
        """Add all blocks that a transfer has still to bring to the account, or take them off, an edge at a time."""
        for receiver, blocks in transfer.waiting.items():
            sizes: dict[NodeId, int] = {}
            if transfer.multicast:
                for block, sender in blocks.items():
                    sizes[sender] = sizes.get(sender, 0) + block_bytes[block]
            elif transfer.ports[receiver]:
                sizes[receiver] = sum(map(block_bytes.__getitem__, blocks))
            for sender, size_bytes in sizes.items():
                self._fleet.traffic.add(sender, transfer.ports.get(sender, _FORWARDING), receiver, sign * size_bytes)

    def block_arrived(self, allocation: Allocation, block: int, size_bytes: int) -> None:
        """Note a block, whichever transfer brought it; end the transfers that have nothing left to bring."""
        node, through = allocation.node, False
        for transfer in allocation.incoming.values():
            left = transfer.waiting[node]
            sender = left.pop(block, None)
            if sender is not None:
                self._fleet.traffic.add(sender, transfer.ports.get(sender, _FORWARDING), node, -size_bytes)
            if not left:
                through = True
        if through:
            self._end_through(allocation)

    def _end_through(self, allocation: Allocation) -> None:
        """Take a node out of the transfers that have brought it everything; end those that have nothing left to bring."""
        node = allocation.node
        for transfer in [transfer for transfer in allocation.incoming.values() if not transfer.waiting[node]]:
            del transfer.waiting[node], allocation.incoming[transfer.transfer_id]
            if not transfer.waiting:
                self.end(transfer)

    def end(self, transfer: TransferState) -> None:
        """Free the members of a transfer that is done or given up, and their ports of what it had still to bring."""
        fleet = self._fleet
        del fleet.transfers[transfer.transfer_id]
        self._count_all(transfer, fleet.models[transfer.model].block_bytes, -1)
        for allocation in transfer.held:
            allocation.transfers -= 1
            allocation.incoming.pop(transfer.transfer_id, None)
        for node, tier in transfer.sources:
            if tier == "host":
                fleet.host.unpin(node, transfer.model, fleet.at)
