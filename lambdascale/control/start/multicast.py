"""Multicast from nodes that hold the model: λScale, FaaSNet and NCCL broadcast, by planner, builder, sources and warm rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lambdascale.control.placement import ByLocality, Placement
from lambdascale.control.prospects import multicast_costs
from lambdascale.control.start.base import MulticastOrder, StartDecision
from lambdascale.control.start.local import Beside, loads_together
from lambdascale.control.start.sources import GpuAndHostSources, Source, SourceRule
from lambdascale.control.start.warm import OwnCopies, WarmRule
from lambdascale.control.state import Fleet, ModelState
from lambdascale.core import NodeId, UserError
from lambdascale.core.checks import check_types, require
from lambdascale.core.commands import Loader, MulticastKind, Storage
from lambdascale.multicast.base import MulticastPlanner
from lambdascale.pipelines import NoPipelines, PipelineBuilder


@dataclass(frozen=True, kw_only=True)
class MulticastStart:
    """New nodes receive the model from nodes that hold it, by ``planner``; without a holder, every node loads for itself.

    ``pipelines`` serve while blocks arrive. ``multicast``: one-sided writes, or a collective over a communicator, one for each
    sub-group. ``sources``: sub-groups k of a multicast, or "auto" for one for each idle source that has a destination.
    ``source_rule``: nodes that may be sources. ``warm``: new nodes that load their own host copy instead of being destinations.
    ``placement``: order in which free nodes are taken. ``barrier_s``: seconds a controller spends between two rounds, which start
    together; None: nodes send as soon as they hold a block. ``loader``: "pipelined" uses SSD and PCIe at once, "sequential"
    reads everything into host memory first. ``storage``: the tier of models without a host copy.
    """

    planner: MulticastPlanner
    pipelines: PipelineBuilder = field(default_factory=NoPipelines)
    multicast: MulticastKind = "one_sided"
    sources: int | Literal["auto"] = "auto"
    source_rule: SourceRule = field(default_factory=GpuAndHostSources)
    warm: WarmRule = field(default_factory=OwnCopies)
    placement: Placement = field(default_factory=ByLocality)
    barrier_s: float | None = None
    loader: Loader = "pipelined"
    storage: Storage = "ssd"
    instant: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self)
        if isinstance(self.sources, int):
            require(self.sources >= 1, f"system.start.sources must be at least 1, not {self.sources}")
        if self.barrier_s is not None:
            require(self.barrier_s >= 0, f"system.start.barrier_s must not be negative, not {self.barrier_s}")

    def check(self, *, replicas: int, copies: int) -> None:
        """See StartPolicy: a fixed number of sub-groups needs as many sources from the start."""
        certain = replicas + (copies if self.source_rule.host else 0)
        if isinstance(self.sources, int) and self.sources > max(1, certain):
            raise UserError(
                f"system.start.sources={self.sources} sub-groups need as many sources, but a run starts with {certain}: "
                f"autoscaler.min_replicas={replicas}, memory.initial_copies={copies}"
            )

    def rank(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
        """See StartPolicy."""
        return self.placement.rank(fleet, state, nodes)

    def start(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId], replicas: int) -> StartDecision:
        """See StartPolicy. While every source is busy, nodes that depend on one are not taken yet."""
        taken = list(nodes[:replicas])
        warm = self.warm.loading(fleet, state, taken, feeding=self.source_rule.host)
        cold = [node for node in taken if node not in warm]
        holders = self.source_rule.holders(fleet, state, cold) if cold else []
        if not holders:
            loads, pipelines = loads_together(fleet, state, warm, self.pipelines)
            more, others = loads_together(fleet, state, cold, self.pipelines)
            return StartDecision(nodes=tuple(taken), loads=loads + more, pipelines=pipelines + others)
        sources = self.source_rule.pick(fleet, state, holders, self._wanted(len(cold)))
        if not sources:
            loads, pipelines = loads_together(fleet, state, warm, self.pipelines)
            return StartDecision(nodes=tuple(warm), loads=loads, pipelines=pipelines)
        order = self._order(state, sources, cold)
        resident = [source.node for source in sources if source.tier == "gpu" and state.allocations[source.node].complete]
        beside = None
        if not isinstance(self.pipelines, NoPipelines):
            beside = Beside(order.plan, multicast_costs(fleet, state, order.plan.members, order.sources, warm))
        loads, pipelines = loads_together(fleet, state, warm, self.pipelines, beside=beside, resident=resident)
        return StartDecision(nodes=tuple(taken), loads=loads, multicasts=self._transfers(order), pipelines=pipelines)

    def _wanted(self, destinations: int) -> int:
        """Return the most sources a multicast to ``destinations`` nodes may have: one per destination."""
        return destinations if self.sources == "auto" else min(self.sources, destinations)

    def _order(self, state: ModelState, sources: Sequence[Source], nodes: Sequence[NodeId]) -> MulticastOrder:
        plan = self.planner.plan(sources=len(sources), destinations=len(nodes), blocks=state.blocks)
        members = [*(source.node for source in sources), *nodes]
        tiers = tuple((source.node, source.tier) for source in sources)
        return MulticastOrder(plan=plan.on(members), sources=tiers, barrier_s=self.barrier_s)

    def _transfers(self, order: MulticastOrder) -> tuple[MulticastOrder, ...]:
        """Split a collective into one transfer for each sub-group: a communicator has one root."""
        if self.multicast == "one_sided":
            return (order,)
        tiers = dict(order.sources)
        return tuple(
            MulticastOrder(plan=part, sources=tuple((node, tiers[node]) for node in part.sources)) for part in order.plan.parts()
        )
