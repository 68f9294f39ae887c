"""Start policies that exercise the seams for moved boundaries and shares: two small peers of λScale, as tests of the design.

Both are the published mechanisms at their simplest, not the published systems.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lambdascale.control.placement import by_locality
from lambdascale.control.start import Change, LoadMore, LoadOrder, MulticastOrder, Reshape, StartDecision
from lambdascale.control.state import Allocation, Fleet, Instance, ModelState
from lambdascale.core import MulticastPlan, NodeId, PipelinePlan, Send, Stage
from lambdascale.core.checks import check_types, require
from lambdascale.core.commands import Loader, MulticastKind, Storage
from lambdascale.multicast import arrival_rounds


@dataclass(frozen=True, kw_only=True)
class CooperativeStart:
    """BlitzScale's cooperative execution (OSDI'25, section 5.2): a source and its destination share the source's requests.

    Blocks arrive in the model's order. With each, the boundary moves: the destination runs the blocks it holds, the source the
    rest. When all have arrived, each serves alone and the running requests are split evenly (the control plane's mode switch).
    Without an idle source, nodes load for themselves. One destination per idle source. Needs ``kv: copy``.
    """

    loader: ClassVar[Loader] = "pipelined"
    storage: ClassVar[Storage] = "ssd"
    multicast: ClassVar[MulticastKind] = "one_sided"
    instant: ClassVar[bool] = False

    def check(self, *, replicas: int, copies: int) -> None:
        """See StartPolicy; every run can use it."""

    def rank(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
        """See StartPolicy."""
        return by_locality(fleet, state, nodes)

    def start(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId], replicas: int) -> StartDecision:
        """See StartPolicy."""
        sources = [node for node, a in sorted(state.allocations.items()) if a.complete and not a.transfers and a.instances]
        blocks = tuple(range(state.blocks))
        if not any(allocation.complete for allocation in state.allocations.values()):
            loads = tuple(LoadOrder(node=n, tier=fleet.own_tier(state, n), blocks=blocks) for n in nodes[:replicas])
            return StartDecision(nodes=tuple(nodes[:replicas]), loads=loads)
        pairs = list(zip(sources, nodes[:replicas], strict=False))
        orders = tuple(MulticastOrder(plan=_chain(s, d, state.blocks), sources=((s, "gpu"),)) for s, d in pairs)
        return StartDecision(nodes=tuple(destination for _, destination in pairs), multicasts=orders)

    def advance(self, fleet: Fleet, state: ModelState, allocation: Allocation) -> Sequence[Change]:
        """See GradualStart: move the boundary to the end of what the destination holds from the first block on."""
        held = next((block for block in range(state.blocks) if block not in allocation.blocks), state.blocks)
        if not 0 < held < state.blocks:
            return ()
        source = _source_of(state, allocation)
        instance = None if source is None else _serving_with(source, allocation)
        if instance is None or source is None:
            return ()
        stages = (Stage(allocation.node, 0, held - 1), Stage(source.node, held, state.blocks - 1))
        return (Reshape(instance=instance.instance_id, stages=stages),) if stages != instance.stages else ()


def _chain(source: NodeId, destination: NodeId, blocks: int) -> MulticastPlan:
    rounds = tuple((Send(source, destination, block),) for block in range(blocks))
    return MulticastPlan(members=(source, destination), sources=(source,), blocks=blocks, rounds=rounds)


def _source_of(state: ModelState, allocation: Allocation) -> Allocation | None:
    """Return the allocation that feeds this one, None if none does any more."""
    for transfer in allocation.incoming.values():
        for node, _ in transfer.sources:
            if node in state.allocations and node != allocation.node:
                return state.allocations[node]
    return None


def _serving_with(source: Allocation, allocation: Allocation) -> Instance | None:
    """Return the source's instance that is shared with this destination, or that it could share."""
    for instance in source.instances.values():
        if set(instance.nodes) <= {source.node, allocation.node}:
            return instance
    return None


@dataclass(frozen=True, kw_only=True)
class SpreadStart:
    """A cold start over ``nodes`` nodes that each load a share and serve as a pipeline, then consolidation onto the first.

    The mechanism of HydraServe (NSDI'26): when the pipeline serves, its first node loads the rest and takes the whole model over
    with the KV of the running requests; the others are released. ``consolidate`` false: the pipeline serves until it is idle.
    """

    nodes: int = 4
    consolidate: bool = True
    loader: Loader = "pipelined"
    storage: Storage = "ssd"
    multicast: ClassVar[None] = None
    instant: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self)
        require(self.nodes >= 1, f"start.nodes must be at least 1, not {self.nodes}")

    def check(self, *, replicas: int, copies: int) -> None:
        """See StartPolicy; every run can use it."""

    def rank(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
        """See StartPolicy."""
        return by_locality(fleet, state, nodes)

    def start(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId], replicas: int) -> StartDecision:
        """See StartPolicy: as many groups as are wanted and fit, none larger than the number of blocks."""
        size = min(self.nodes, state.blocks, len(nodes))
        groups = [tuple(nodes[i * size : (i + 1) * size]) for i in range(min(replicas, len(nodes) // size))]
        stages = [_equal_stages(group, state.blocks) for group in groups]
        shares = [(s.node, tuple(range(s.first_block, s.last_block + 1))) for group in stages for s in group]
        loads = tuple(LoadOrder(node=node, tier=fleet.own_tier(state, node), blocks=blocks) for node, blocks in shares)
        pipelines = tuple(PipelinePlan(0, group) for group in stages) if size > 1 else ()
        taken = tuple(node for group in groups for node in group)
        return StartDecision(nodes=taken, wanted=tuple(shares), loads=loads, pipelines=pipelines)

    def advance(self, fleet: Fleet, state: ModelState, allocation: Allocation) -> Sequence[Change]:
        """See GradualStart."""
        for instance in list(allocation.instances.values()) if self.consolidate else ():
            if not instance.is_pipeline or allocation.transfers:
                continue
            first = state.allocations[instance.stages[0].node]
            if first.complete:
                whole = (Stage(first.node, 0, state.blocks - 1),)
                return (Reshape(instance=instance.instance_id, stages=whole, release=instance.nodes[1:]),)
            if first.is_share:
                rest = tuple(block for block in range(state.blocks) if block not in first.wanted)
                return (LoadMore(node=first.node, tier=fleet.own_tier(state, first.node), blocks=rest),)
        return ()


@dataclass(frozen=True, kw_only=True)
class WithHolders:
    """Pipelines of a destination, for the first half of the model, and a node that holds all of it, for the second half."""

    def pipelines(self, plan: MulticastPlan, holders: Collection[NodeId] = ()) -> Sequence[PipelinePlan]:
        """See PipelineBuilder."""
        arrivals, half = arrival_rounds(plan), plan.blocks // 2
        if half == 0:
            return ()
        pairs = zip(plan.destinations, holders, strict=False)
        found = [
            PipelinePlan(
                max(arrivals[destination][block] for block in range(half)),
                (Stage(destination, 0, half - 1), Stage(holder, half, plan.blocks - 1)),
            )
            for destination, holder in pairs
        ]
        return sorted(found, key=lambda plan: (plan.ready_round, plan.nodes))


def _equal_stages(nodes: Sequence[NodeId], blocks: int) -> tuple[Stage, ...]:
    bounds = [blocks * i // len(nodes) for i in range(len(nodes) + 1)]
    return tuple(Stage(node, bounds[i], bounds[i + 1] - 1) for i, node in enumerate(nodes))
