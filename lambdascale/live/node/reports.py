"""Reports of a node's blocks to the controller: each arrival once, and failures."""

from __future__ import annotations

from collections.abc import Callable

from lambdascale.core import NodeId
from lambdascale.core.events import BlockArrived, CommandFailed
from lambdascale.live.node.jobs import About, Failures


class Reports:
    """``send`` takes events for the controller; ``fault`` the reason why the node cannot go on (see Failures)."""

    def __init__(self, node: NodeId, send: Callable[[BlockArrived | CommandFailed], None], fault: Callable[[str], None]) -> None:
        self.node = node
        self.failures = Failures(node, send, fault)
        self._send = send
        self._told: set[tuple[str, int]] = set()  # bounded: at most every block of every model

    def arrived(self, transfer_id: int, model: str, block: int) -> None:
        """Report that a block is on the device: once, however many transfers were to bring it."""
        if (model, block) not in self._told:
            self._told.add((model, block))
            self._send(BlockArrived(0.0, transfer_id, self.node, model, block))

    def forget(self, model: str) -> None:
        """Report the model's blocks anew when they arrive: the model leaves the device."""
        self._told = {key for key in self._told if key[0] != model}

    def failed(self, about: About, error: Exception | str) -> None:
        """Report that a command could not be carried out."""
        self.failures.failed(about, error)
