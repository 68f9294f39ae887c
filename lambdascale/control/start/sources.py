"""Source rules: which nodes feed a multicast. One rule for their number k, whatever the system (reference, section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from lambdascale.control.state import Fleet, ModelState
from lambdascale.core import NodeId
from lambdascale.core.commands import Tier


class Source(NamedTuple):
    """A node that could feed a multicast from ``tier``; compares by preference.

    ``transfers``: those it takes part in now; it is idle at 0. ``rank``: GPU before host.
    """

    transfers: int
    rank: int
    node: NodeId
    tier: Tier


@runtime_checkable
class SourceRule(Protocol):
    """Chooses the nodes that feed a multicast. Pure.

    ``host``: True if host copies may feed one.
    """

    @property
    def host(self) -> bool:
        """True if host copies may be sources."""
        ...

    def holders(self, fleet: Fleet, state: ModelState, targets: Sequence[NodeId]) -> list[Source]:
        """Return all nodes but ``targets`` that hold the model and may feed it, the best first."""
        ...

    def pick(self, fleet: Fleet, state: ModelState, holders: Sequence[Source], wanted: int) -> list[Source]:
        """Return up to ``wanted`` sources for a multicast that starts now; none: it waits until a holder is idle."""
        ...


@dataclass(frozen=True, kw_only=True)
class GpuSources:
    """Replicas that are complete on the GPU, while they take part in no other transfer (the prototype's FaaSNet and NCCL)."""

    host: ClassVar[bool] = False

    def holders(self, fleet: Fleet, state: ModelState, targets: Sequence[NodeId]) -> list[Source]:
        """See SourceRule."""
        return sorted(_on_gpu(state))

    def pick(self, fleet: Fleet, state: ModelState, holders: Sequence[Source], wanted: int) -> list[Source]:
        """See SourceRule."""
        return idle(holders, wanted)


@dataclass(frozen=True, kw_only=True)
class GpuAndHostSources:
    """Idle replicas on the GPU, then host copies that no transfer reads (λScale; reference, section 2.6)."""

    host: ClassVar[bool] = True

    def holders(self, fleet: Fleet, state: ModelState, targets: Sequence[NodeId]) -> list[Source]:
        """See SourceRule."""
        return sorted(_on_gpu(state) + _in_host_memory(fleet, state, targets))

    def pick(self, fleet: Fleet, state: ModelState, holders: Sequence[Source], wanted: int) -> list[Source]:
        """See SourceRule."""
        return idle(holders, wanted)


def idle(holders: Sequence[Source], wanted: int) -> list[Source]:
    """Return the first ``wanted`` holders that take part in no transfer: k = min(idle holders, ``wanted``)."""
    return [holder for holder in holders if not holder.transfers][:wanted]


def _on_gpu(state: ModelState) -> list[Source]:
    return [Source(a.transfers, 0, node, "gpu") for node, a in state.allocations.items() if a.complete]


def _in_host_memory(fleet: Fleet, state: ModelState, targets: Sequence[NodeId]) -> list[Source]:
    name = state.spec.name
    excluded = {node for node, a in state.allocations.items() if a.complete}.union(targets)
    copies = (node for node in fleet.host.holders(fleet.gpus_free, name, fleet.at) if node not in excluded)
    return [Source(fleet.host.pins(node, name), 1, node, "host") for node in copies]
