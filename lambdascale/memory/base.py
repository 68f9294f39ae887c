"""Protocols of host memory: its configuration, and the record of host copies that the control plane asks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from lambdascale.core import NodeId


class HostMemory(Protocol):
    """Host copies of models on all nodes. ``now``: seconds of the run; copies that expired by then count as absent."""

    def has(self, node: NodeId, model: str, now: float) -> bool:
        """True if ``node`` holds a usable copy of ``model``."""
        ...

    def holders(self, nodes: Iterable[NodeId], model: str, now: float) -> list[NodeId]:
        """Return those of ``nodes`` that hold a usable copy of ``model``."""
        ...

    def put(self, node: NodeId, model: str, size_bytes: int, now: float) -> list[str]:
        """Keep a copy, or renew it; return the models evicted for it. A copy that cannot fit is not kept."""
        ...

    def pin(self, node: NodeId, model: str) -> None:
        """Hold a copy while a transfer reads it."""
        ...

    def pins(self, node: NodeId, model: str) -> int:
        """Return the number of transfers that read this copy."""
        ...

    def unpin(self, node: NodeId, model: str, now: float) -> None:
        """Undo one pin."""
        ...

    def forget(self, node: NodeId) -> None:
        """Drop everything on a lost node."""
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

    @property
    def budget(self) -> int | str | None:
        """Bytes per node; None: all of its host memory."""
        ...

    def build(self, host_memory_bytes: Mapping[NodeId, int]) -> HostMemory:
        """Return the empty record for nodes with so much host memory; UserError if the budget exceeds it."""
        ...
