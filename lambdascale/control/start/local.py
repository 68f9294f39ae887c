"""Loads by every node for itself, and the plan that describes such loads to pipeline builders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lambdascale.control.placement import by_startup_time
from lambdascale.control.start.base import LoadOrder, StartDecision
from lambdascale.control.state import Fleet, ModelState
from lambdascale.core import MulticastPlan, NodeId, PipelinePlan, Send
from lambdascale.core.checks import check_types
from lambdascale.core.commands import Loader, Storage
from lambdascale.multicast import injection_orders
from lambdascale.pipelines import PipelineBuilder

# The stand-in source of the plan that describes nodes loading for themselves, each in its own order.
_STORE = -1


@dataclass(frozen=True, kw_only=True)
class LocalStart:
    """Every new node loads from its host memory or ``storage``; nodes are taken by estimated start-up time (ServerlessLLM)."""

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
        return by_startup_time(fleet, state, nodes)

    def start(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId], replicas: int) -> StartDecision:
        """See StartPolicy."""
        taken = tuple(nodes[:replicas])
        blocks = tuple(range(state.blocks))
        return StartDecision(
            nodes=taken, loads=tuple(LoadOrder(node=node, tier=fleet.own_tier(state, node), blocks=blocks) for node in taken)
        )


def loads_together(
    fleet: Fleet, state: ModelState, nodes: Sequence[NodeId], builder: PipelineBuilder
) -> tuple[tuple[LoadOrder, ...], tuple[PipelinePlan, ...]]:
    """Loads by ``nodes`` for themselves; with pipelines, in shifted orders, so that together they soon hold the model."""
    if not nodes:
        return (), ()
    plan = _plan_of_loads(nodes, injection_orders(state.blocks, len(nodes)))
    pipelines = tuple(builder.pipelines(plan)) if len(nodes) > 1 else ()
    plain = tuple(range(state.blocks))
    loads = tuple(
        LoadOrder(node=node, tier=fleet.own_tier(state, node), blocks=order if pipelines else plain)
        for node, order in zip(nodes, plan.orders, strict=True)
    )
    return loads, pipelines


def _plan_of_loads(nodes: Sequence[NodeId], orders: Sequence[Sequence[int]]) -> MulticastPlan:
    """Nodes that load for themselves at one rate, written as a plan whose sub-groups are the single nodes."""
    rounds = tuple(
        tuple(Send(_STORE, node, order[r]) for node, order in zip(nodes, orders, strict=True)) for r in range(len(orders[0]))
    )
    return MulticastPlan(
        members=(_STORE, *nodes),
        sources=(_STORE,),
        blocks=len(orders[0]),
        rounds=rounds,
        groups=tuple((_STORE, node) for node in nodes),
        orders=tuple(tuple(order) for order in orders),
    )
