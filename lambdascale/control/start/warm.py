"""Rules for new nodes that hold a host copy: which of them load it themselves, although a multicast could bring the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lambdascale.control.placement import pcie_is_faster
from lambdascale.control.state import Fleet, ModelState
from lambdascale.core import NodeId


@runtime_checkable
class WarmRule(Protocol):
    """Chooses among the nodes of a scale-out those that load their own host copy. Pure."""

    def loading(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId], *, feeding: bool) -> list[NodeId]:
        """Return the nodes that load their own copy, in order; ``feeding``: host copies may feed the others meanwhile."""
        ...


@dataclass(frozen=True, kw_only=True)
class OwnCopies:
    """Every node with a host copy loads it over its own PCIe (paper, section 2.6 of the reference)."""

    def loading(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId], *, feeding: bool) -> list[NodeId]:
        """See WarmRule."""
        return [node for node in nodes if fleet.is_warm(state, node)]


@dataclass(frozen=True, kw_only=True)
class FasterWay:
    """A node loads its host copy where PCIe is as fast as the network, or while it feeds other new nodes from that copy."""

    def loading(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId], *, feeding: bool) -> list[NodeId]:
        """See WarmRule."""
        warm = [node for node in nodes if fleet.is_warm(state, node)]
        others = feeding and len(warm) < len(nodes)
        return [node for node in warm if others or pcie_is_faster(fleet, node)]


@dataclass(frozen=True, kw_only=True)
class NoOwnCopies:
    """No node loads its own copy while a multicast can bring the model."""

    def loading(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId], *, feeding: bool) -> list[NodeId]:
        """See WarmRule."""
        return []
