"""Source rules: which nodes feed a multicast. One rule for their number k, whatever the system (reference, section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from lambdascale.control.state import Allocation, Fleet, ModelState
from lambdascale.control.traffic import ports_of_source
from lambdascale.core import NodeId
from lambdascale.core.commands import Tier

# The tiers that sources read, the better one first.
_TIERS: tuple[Tier, ...] = ("gpu", "host")


class Source(NamedTuple):
    """A node that could feed a multicast from ``tier``; compares by preference.

    ``busy_s``: seconds for which its ports have still to send or load, for all models; 0 if it is idle. ``rank``: the GPU's is
    below the host's.
    """

    busy_s: float
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
    """Replicas that are complete on the GPU, while they have nothing else to send (the prototype's FaaSNet and NCCL)."""

    host: ClassVar[bool] = False

    def holders(self, fleet: Fleet, state: ModelState, targets: Sequence[NodeId]) -> list[Source]:
        """See SourceRule."""
        return sorted(_on_gpu(fleet, state))

    def pick(self, fleet: Fleet, state: ModelState, holders: Sequence[Source], wanted: int) -> list[Source]:
        """See SourceRule."""
        return idle(holders, wanted)


@dataclass(frozen=True, kw_only=True)
class GpuAndHostSources:
    """Idle replicas on the GPU, then idle host copies (λScale; reference, section 2.6)."""

    host: ClassVar[bool] = True

    def holders(self, fleet: Fleet, state: ModelState, targets: Sequence[NodeId]) -> list[Source]:
        """See SourceRule."""
        return sorted(_on_gpu(fleet, state) + _in_host_memory(fleet, state, targets))

    def pick(self, fleet: Fleet, state: ModelState, holders: Sequence[Source], wanted: int) -> list[Source]:
        """See SourceRule."""
        return idle(holders, wanted)


@dataclass(frozen=True, kw_only=True)
class JoiningSources:
    """The sources of GpuAndHostSources; while none is idle, new nodes join the trees under way (FaaSNet, USENIX ATC'21).

    They become children of nodes that receive the model and have nothing to send, which pass every block on as it comes in.
    Nodes that load from storage are not joined: every new node has storage of its own.
    """

    host: ClassVar[bool] = True

    def holders(self, fleet: Fleet, state: ModelState, targets: Sequence[NodeId]) -> list[Source]:
        """See SourceRule."""
        return GpuAndHostSources().holders(fleet, state, targets)

    def pick(self, fleet: Fleet, state: ModelState, holders: Sequence[Source], wanted: int) -> list[Source]:
        """See SourceRule."""
        leaves = [_source(fleet, node, "gpu") for node, a in state.allocations.items() if _receives(a)]
        return idle(holders, wanted) or idle(sorted(leaves), wanted)


@dataclass(frozen=True, kw_only=True)
class StandingTree:
    """One balanced binary tree over a model's life, rebalanced after every join and leave at no cost (FaaSNet, USENIX ATC'21).

    The replicas are its first nodes, in the order in which they joined; those that leave are closed up. New nodes take the next
    places, below the nodes that have fewer than two children, whether these are busy, or still receive the model themselves.
    Without a replica, host copies feed trees as in GpuAndHostSources. Transfers under way keep their edges.
    """

    host: ClassVar[bool] = True

    def holders(self, fleet: Fleet, state: ModelState, targets: Sequence[NodeId]) -> list[Source]:
        """See SourceRule."""
        return GpuAndHostSources().holders(fleet, state, targets)

    def pick(self, fleet: Fleet, state: ModelState, holders: Sequence[Source], wanted: int) -> list[Source]:
        """See SourceRule."""
        standing = [node for node, a in state.allocations.items() if a.complete or _receives(a)]
        if not standing:
            return idle(holders, wanted)
        first, last = (len(standing) - 1) // 2, (len(standing) + wanted - 2) // 2
        return [_source(fleet, node, "gpu") for node in standing[first : last + 1]]


def idle(holders: Sequence[Source], wanted: int) -> list[Source]:
    """Return the first ``wanted`` holders that are idle: k = min(idle holders, ``wanted``)."""
    return [holder for holder in holders if not holder.busy_s][:wanted]


def _on_gpu(fleet: Fleet, state: ModelState) -> list[Source]:
    return [_source(fleet, node, "gpu") for node, a in state.allocations.items() if a.complete]


def _in_host_memory(fleet: Fleet, state: ModelState, targets: Sequence[NodeId]) -> list[Source]:
    excluded = {node for node, a in state.allocations.items() if a.complete}.union(targets)
    copies = fleet.host.holders(fleet.gpus_free, state.spec.name, fleet.at)
    return [_source(fleet, node, "host") for node in copies if node not in excluded]


def _source(fleet: Fleet, node: NodeId, tier: Tier) -> Source:
    return Source(fleet.traffic.seconds(node, *ports_of_source(tier)), _TIERS.index(tier), node, tier)


def _receives(allocation: Allocation) -> bool:
    """True if transfers from memory bring the node the whole model."""
    coming = allocation.incoming.values()
    return bool(coming) and not allocation.is_share and all(transfer.sources for transfer in coming)
