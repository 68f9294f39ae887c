"""Multicasts and loads under way; a run's clock waits for the initial ones. All of it belongs to the control thread."""

from __future__ import annotations

from dataclasses import dataclass

from lambdascale.core import NodeId
from lambdascale.core.commands import LoadBlocks, PlaceCopy, StartMulticast

Pair = tuple[NodeId, int]  # a node and a block


@dataclass
class _Transfer:
    """``waiting``: the blocks that have not arrived where they should. ``initial``: the clock waits for it."""

    model: str
    waiting: set[Pair]
    initial: bool


class Transfers:
    """A transfer is forgotten when its last block has arrived or was lost with its node, when it failed, or is cancelled."""

    def __init__(self) -> None:
        self._transfers: dict[int, _Transfer] = {}
        self._copies: set[tuple[NodeId, str]] = set()
        self._asked: set[tuple[NodeId, str, int]] = set()  # bounded: at most every block of every model on every node

    def __len__(self) -> int:
        return len(self._transfers)

    @property
    def initial(self) -> bool:
        """True while initial loads or host copies are under way."""
        return bool(self._copies) or any(transfer.initial for transfer in self._transfers.values())

    def multicast(self, command: StartMulticast, alive: set[NodeId], told: set[Pair]) -> None:
        """Begin a multicast. Blocks for nodes that are not ``alive`` are not waited for, nor those ``told`` of already."""
        pairs = {(send.dst, send.block) for round_ in command.plan.rounds for send in round_}
        self._begin(command.transfer_id, command.model, pairs, alive, told, initial=False)

    def load(self, command: LoadBlocks, alive: set[NodeId], told: set[Pair], *, initial: bool) -> None:
        """Begin a load; ``alive`` and ``told`` as for a multicast."""
        pairs = {(command.node, block) for block in command.blocks}
        self._begin(command.transfer_id, command.model, pairs, alive, told, initial=initial)

    def _begin(self, number: int, model: str, pairs: set[Pair], alive: set[NodeId], told: set[Pair], *, initial: bool) -> None:
        self._asked |= {(node, model, block) for node, block in pairs}
        waiting = {pair for pair in pairs - told if pair[0] in alive}
        if waiting:
            self._transfers[number] = _Transfer(model, waiting, initial)

    def place_copy(self, command: PlaceCopy) -> None:
        """Begin an initial host copy."""
        self._copies.add((command.node, command.model))

    def placed(self, node: NodeId, model: str) -> None:
        """Note that a host copy is complete."""
        self._copies.discard((node, model))

    def was_asked(self, node: NodeId, model: str, block: int) -> bool:
        """Return True if some transfer, perhaps a cancelled one, was to bring the block to the node."""
        return (node, model, block) in self._asked

    def awaits(self, number: int, node: NodeId) -> bool:
        """Return True if the transfer has still to bring blocks to the node."""
        transfer = self._transfers.get(number)
        return transfer is not None and any(to == node for to, _ in transfer.waiting)

    def arrived(self, node: NodeId, model: str, block: int) -> None:
        """Note that a block has arrived. It counts for all transfers of the model: it may come under a cancelled one's number."""
        for number, transfer in list(self._transfers.items()):
            if transfer.model == model:
                self._remove(number, transfer, {(node, block)})

    def node_lost(self, node: NodeId) -> None:
        """Stop waiting for blocks on this node."""
        self._copies = {copy for copy in self._copies if copy[0] != node}
        for number, transfer in list(self._transfers.items()):
            self._remove(number, transfer, {pair for pair in transfer.waiting if pair[0] == node})

    def _remove(self, number: int, transfer: _Transfer, pairs: set[Pair]) -> None:
        transfer.waiting -= pairs
        if not transfer.waiting:
            del self._transfers[number]

    def end(self, number: int) -> None:
        """Forget a transfer that failed or is cancelled."""
        self._transfers.pop(number, None)
