"""What the controller hears of a node's blocks: that they arrived, each once, and what went wrong."""

from __future__ import annotations

from collections.abc import Callable

from lambdascale.core import NodeId
from lambdascale.core.events import AnyEvent, BlockArrived, CommandFailed


class Reports:
    """``send`` takes events for the controller."""

    def __init__(self, node: NodeId, send: Callable[[AnyEvent], None]) -> None:
        self.node = node
        self._send = send
        self._told: set[tuple[str, int]] = set()

    def arrived(self, transfer_id: int, model: str, block: int) -> None:
        """A block is on the device: told once, however many transfers were to bring it."""
        if (model, block) not in self._told:
            self._told.add((model, block))
            self._send(BlockArrived(0.0, transfer_id, self.node, model, block))

    def forget(self, model: str) -> None:
        """The model leaves the device: its blocks may arrive anew."""
        self._told = {key for key in self._told if key[0] != model}

    def failed(self, command: str, reason: str, transfer_id: int = -1) -> None:
        """A command could not be carried out."""
        self._send(CommandFailed(0.0, command, reason, transfer_id=transfer_id))
