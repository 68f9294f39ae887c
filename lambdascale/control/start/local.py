"""Loads by every node for itself, and the plan that describes such loads to pipeline builders."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import ClassVar

from lambdascale.control.placement import ByStartupTime, Placement
from lambdascale.control.prospects import load_costs, rounds_per_block
from lambdascale.control.start.base import LoadOrder, StartDecision
from lambdascale.control.state import Fleet, ModelState
from lambdascale.core import MulticastPlan, NodeId, PipelinePlan, Send
from lambdascale.core.checks import check_types
from lambdascale.core.commands import Loader, Storage
from lambdascale.multicast import orders_between
from lambdascale.pipelines import Costs, NoPipelines, PipelineBuilder

# Loads that end so small a part of a round behind its end count as in it (sums of floats).
_TOLERANCE = 1e-9


@dataclass(frozen=True, kw_only=True)
class LocalStart:
    """Every new node loads from its host memory or ``storage``; ``placement``: order in which free nodes are taken."""

    placement: Placement = field(default_factory=ByStartupTime)
    loader: Loader = "pipelined"
    storage: Storage = "ssd"
    multicast: ClassVar[None] = None
    instant: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self)

    def check(self, *, replicas: int, copies: int) -> None:
        """See StartPolicy; every run can use it."""

    def rank(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
        """See StartPolicy."""
        return self.placement.rank(fleet, state, nodes)

    def start(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId], replicas: int) -> StartDecision:
        """See StartPolicy."""
        taken = tuple(nodes[:replicas])
        blocks = tuple(range(state.blocks))
        return StartDecision(
            nodes=taken, loads=tuple(LoadOrder(node=node, tier=fleet.own_tier(state, node), blocks=blocks) for node in taken)
        )


@dataclass(frozen=True, kw_only=True)
class FreeMigration(LocalStart):
    """Local loads, where requests of other models leave nodes with a copy of the model at no cost (a bound; simulated only).

    ServerlessLLM's live migration moves them to a free node, which loads their model first. Here the free node takes the new
    model instead and reads it as from host memory, once for each copy on a node busy with other models: no migration can give
    more.
    """

    def start(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId], replicas: int) -> StartDecision:
        """See StartPolicy."""
        decision = super().start(fleet, state, nodes, replicas)
        busy = (node for node in fleet.candidates(state) if node not in nodes and node not in state.allocations)
        copies = len(fleet.host.holders(busy, state.spec.name, fleet.at))
        moved = {load.node for load in [load for load in decision.loads if load.tier != "host"][:copies]}
        loads = tuple(replace(load, tier="host") if load.node in moved else load for load in decision.loads)
        return replace(decision, loads=loads)


@dataclass(frozen=True)
class Beside:
    """A multicast that brings the model to other nodes meanwhile, and what its rounds cost."""

    plan: MulticastPlan
    costs: Costs


def loads_together(
    fleet: Fleet,
    state: ModelState,
    nodes: Sequence[NodeId],
    builder: PipelineBuilder,
    *,
    beside: Beside | None = None,
    resident: Collection[NodeId] = (),
) -> tuple[tuple[LoadOrder, ...], tuple[PipelinePlan, ...]]:
    """Loads by ``nodes`` for themselves, and the pipelines of these nodes and of the destinations of a multicast ``beside`` them.

    With pipelines, nodes load in shifted orders, so that together they soon hold the model (reference, section 2.6).
    ``resident``: sources of the multicast that hold the whole model on the GPU.
    """
    if not nodes:
        return (), tuple(builder.pipelines(beside.plan, resident, beside.costs)) if beside else ()
    orders: Sequence[tuple[int, ...]] = (tuple(range(state.blocks)),) * len(nodes)
    pipelines: tuple[PipelinePlan, ...] = ()
    # A single node makes no pipeline, whatever it may cost.
    if (len(nodes) > 1 or beside is not None) and not isinstance(builder, NoPipelines):
        plan = _plan_of_loads(fleet, state, nodes, beside)
        costs = beside.costs if beside else load_costs(fleet, state, nodes)
        pipelines = tuple(builder.pipelines(plan, resident, costs))
        if pipelines:
            orders = plan.orders[-len(nodes) :]
    loads = tuple(
        LoadOrder(node=node, tier=fleet.own_tier(state, node), blocks=order) for node, order in zip(nodes, orders, strict=True)
    )
    return loads, pipelines


def _plan_of_loads(fleet: Fleet, state: ModelState, nodes: Sequence[NodeId], beside: Beside | None) -> MulticastPlan:
    """Describe loads as a plan: each node is a sub-group of its own, behind those of the multicast, with a stand-in source.

    A load's block takes as many of the multicast's rounds as its share of PCIe is slower; all alike without a multicast.
    """
    multicast = beside.plan if beside else None
    groups = () if multicast is None else tuple((-1 - i, *group[1:]) for i, group in enumerate(multicast.groups))
    stores = [-1 - len(groups) - i for i in range(len(nodes))]
    begun = () if multicast is None else multicast.orders
    orders = orders_between(state.blocks, {order[0] for order in begun}, len(nodes))
    sends: dict[int, list[Send]] = {}
    for node, store, order in zip(nodes, stores, orders, strict=True):
        pace = _pace(fleet, state, node, beside)
        for position, block in enumerate(order, start=1):
            sends.setdefault(ceil(position * pace - _TOLERANCE), []).append(Send(store, node, block))
    if multicast is not None:
        stand_in = {group[0]: -1 - i for i, group in enumerate(multicast.groups)}
        for number, round_ in enumerate(multicast.rounds, start=1):
            sends.setdefault(number, []).extend(Send(stand_in.get(s.src, s.src), s.dst, s.block) for s in round_)
    sources = (*(group[0] for group in groups), *stores)
    return MulticastPlan(
        members=(*sources, *(() if multicast is None else multicast.destinations), *nodes),
        sources=sources,
        blocks=state.blocks,
        rounds=tuple(tuple(sends.get(number, ())) for number in range(1, max(sends) + 1)),
        groups=(*groups, *zip(stores, nodes, strict=True)),
        orders=(*begun, *orders),
    )


def _pace(fleet: Fleet, state: ModelState, node: NodeId, beside: Beside | None) -> float:
    """Return the rounds of the multicast in which a node loads a block."""
    if beside is None:
        return 1.0
    return rounds_per_block(fleet, state, node, round_s=beside.costs.round_s, feeds=node in beside.plan.sources)
