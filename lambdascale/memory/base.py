"""Protocols of host memory: its configuration, and the record of host copies for the control plane."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from lambdascale.core import NodeId


class HostMemory(Protocol):
    """Host copies of models on all nodes. ``now`` is in seconds of the run; copies expired by then count as absent."""

    def has(self, node: NodeId, model: str, now: float) -> bool:
        """True if ``node`` holds a usable copy of ``model``."""
        ...

    def holders(self, nodes: Iterable[NodeId], model: str, now: float) -> list[NodeId]:
        """Return the nodes among ``nodes`` that hold a usable copy of ``model``."""
        ...

    def put(self, node: NodeId, model: str, size_bytes: int, now: float) -> list[str]:
        """Keep or renew a copy of ``size_bytes``; return the models evicted for it. A copy that does not fit is not kept."""
        ...

    def pin(self, node: NodeId, model: str) -> None:
        """Pin a copy while a transfer reads it, so that it is not evicted."""
        ...

    def pins(self, node: NodeId, model: str) -> int:
        """Return the number of transfers that read this copy."""
        ...

    def unpin(self, node: NodeId, model: str, now: float) -> None:
        """Undo one pin; the copy counts as used at ``now``."""
        ...

    def forget(self, node: NodeId) -> None:
        """Drop all copies and pins of a lost node."""
        ...


@runtime_checkable
class HostMemoryConfig(Protocol):
    """Configuration of host memory."""

    @property
    def enabled(self) -> bool:
        """False if no copies are kept."""
        ...

    @property
    def initial_copies(self) -> int:
        """Number of nodes that hold each model from the start."""
        ...

    def room_bytes(self, host_memory_bytes: int) -> int:
        """Return the bytes that copies may take on a node with ``host_memory_bytes``; 0 if none are kept."""
        ...

    def build(self, host_memory_bytes: Mapping[NodeId, int]) -> HostMemory:
        """Return an empty record for nodes with ``host_memory_bytes`` each; UserError if the budget exceeds a node's."""
        ...
