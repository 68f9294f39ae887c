"""Protocol of start policies, and their decisions. A policy reads the fleet; the control plane carries its decisions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lambdascale.control.state import Allocation, Fleet, ModelState
from lambdascale.core import MulticastPlan, NodeId, PipelinePlan, Stage
from lambdascale.core.commands import Loader, MulticastKind, Storage, Tier


@dataclass(frozen=True, kw_only=True)
class LoadOrder:
    """``node`` loads ``blocks`` from its own ``tier``, in this order."""

    node: NodeId
    tier: Tier
    blocks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class MulticastOrder:
    """``plan`` over real node ids, read from ``sources``: (node, tier) pairs in the plan's order."""

    plan: MulticastPlan
    sources: tuple[tuple[NodeId, Tier], ...]


@dataclass(frozen=True, kw_only=True)
class StartDecision:
    """A scale-out: ``nodes`` to allocate, their transfers, and pipelines to form once their blocks arrive.

    ``wanted``: (node, blocks) for nodes that are to hold a share of the model only; the others are to hold all of it.
    """

    nodes: tuple[NodeId, ...] = ()
    wanted: tuple[tuple[NodeId, tuple[int, ...]], ...] = ()
    loads: tuple[LoadOrder, ...] = ()
    multicasts: tuple[MulticastOrder, ...] = ()
    pipelines: tuple[PipelinePlan, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reshape:
    """Serve ``instance`` by other ``stages``; ``release`` nodes that serve in nothing afterwards."""

    instance: int
    stages: tuple[Stage, ...]
    release: tuple[NodeId, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoadMore:
    """An allocated node is to hold further ``blocks``, which it loads from its own ``tier``."""

    node: NodeId
    tier: Tier
    blocks: tuple[int, ...]


Change = Reshape | LoadMore


@runtime_checkable
class StartPolicy(Protocol):
    """Decides how new replicas get their weights. Pure: it reads the fleet, changes nothing, draws nothing.

    A policy that also changes replicas while they start is a ``GradualStart``.

    ``instant``: weights are in place at once (ideal scaling); a live cluster then keeps every model resident.
    """

    @property
    def loader(self) -> Loader:
        """Order of a load's steps: see LoadBlocks."""
        ...

    @property
    def storage(self) -> Storage:
        """Tier in which every node finds models that it has no host copy of."""
        ...

    @property
    def multicast(self) -> MulticastKind | None:
        """Kind of its multicasts; None if it has none."""
        ...

    @property
    def instant(self) -> bool:
        """True if loads take no time."""
        ...

    def check(self, *, replicas: int, copies: int) -> None:
        """Raise UserError if a run that begins with so many replicas and host copies of a model cannot use the policy."""
        ...

    def rank(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
        """Return free ``nodes`` in the order in which a scale-out takes them."""
        ...

    def start(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId], replicas: int) -> StartDecision:
        """Decide how up to ``replicas`` more replicas start on the free ``nodes``, ranked; it may take fewer, or none yet."""
        ...


@runtime_checkable
class GradualStart(StartPolicy, Protocol):
    """A start policy that is asked again after every block: moved boundaries, further loads."""

    def advance(self, fleet: Fleet, state: ModelState, allocation: Allocation) -> Sequence[Change]:
        """Decide what changes now that a block arrived at ``allocation`` or an instance formed on it."""
        ...
