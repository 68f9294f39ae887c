"""Multicast plans and pipelines as values: which block moves where in which round, and which nodes serve together.

A plan speaks of positions 0..nodes-1, sources first; :meth:`MulticastPlan.on` puts it onto real node ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

NodeId = int
FormRule = Literal["always", "useful"]
SwitchRule = Literal["all", "each"]


class Send(Struct, frozen=True, gc=False):
    """One block from ``src`` to ``dst``."""

    src: NodeId
    dst: NodeId
    block: int


class MulticastPlan(Struct, frozen=True, gc=False):
    """Rounds of sends that bring every block to every destination once (paper, section 4.2).

    ``members`` are all the nodes, sources first; ``sources`` hold every block at the start. ``groups`` are the
    sub-groups of k-way transmission, each with its source first; ``orders[i]`` is the order in which sub-group i's
    source injects the blocks. Rounds are logical: a node agent runs its own sends in round order as soon as it holds
    their blocks. ``streaming``: hops forward in pieces much smaller than a block (as NCCL's ring does), so
    that a backend charges the pipe's rate, not rounds. ``double_receives``: every (round counted from 1, node) in which the
    planner lets a node receive two blocks; in all other rounds a node receives at most one. The two blocks share the node's
    receive port, so such a round lasts twice as long. None of the planners shipped needs any; pairs that mirror each other in
    the round in which a block comes in do (paper, section 4.2).
    """

    members: tuple[NodeId, ...]
    sources: tuple[NodeId, ...]
    blocks: int
    rounds: tuple[tuple[Send, ...], ...]
    groups: tuple[tuple[NodeId, ...], ...] = ()
    orders: tuple[tuple[int, ...], ...] = ()
    streaming: bool = False
    double_receives: tuple[tuple[int, NodeId], ...] = ()

    @property
    def destinations(self) -> tuple[NodeId, ...]:
        """The members that receive, in plan order."""
        return self.members[len(self.sources) :]

    def on(self, nodes: Sequence[NodeId]) -> MulticastPlan:
        """Return the same plan with ``members[i]`` replaced by ``nodes[i]``; ValueError unless ``nodes`` has as many."""
        names = dict(zip(self.members, nodes, strict=True))
        return MulticastPlan(
            members=tuple(nodes),
            sources=tuple(names[n] for n in self.sources),
            blocks=self.blocks,
            rounds=tuple([tuple([Send(names[s.src], names[s.dst], s.block) for s in sends]) for sends in self.rounds]),
            groups=tuple(tuple(names[n] for n in g) for g in self.groups),
            orders=self.orders,
            streaming=self.streaming,
            double_receives=tuple((number, names[n]) for number, n in self.double_receives),
        )

    def longest_path(self) -> int:
        """Return the hops from a source to the destination farthest from it."""
        depth = dict.fromkeys(self.sources, 0)
        for sends in self.rounds:
            for send in sends:
                depth[send.dst] = depth.get(send.src, 0) + 1
        return max(depth.values())

    def parts(self) -> tuple[MulticastPlan, ...]:
        """Return one plan for each sub-group: sub-groups exchange nothing, so that each can be carried out by itself."""
        if len(self.groups) < 2:
            return (self,)
        return tuple(self._part(group, order) for group, order in zip(self.groups, self.orders, strict=True))

    def _part(self, group: tuple[NodeId, ...], order: tuple[int, ...]) -> MulticastPlan:
        nodes = set(group)
        rounds = [tuple([send for send in sends if send.src in nodes]) for sends in self.rounds]
        last = max((number for number, sends in enumerate(rounds, start=1) if sends), default=0)
        return MulticastPlan(
            members=group,
            sources=group[:1],
            blocks=self.blocks,
            rounds=tuple(rounds[:last]),
            groups=(group,),
            orders=(order,),
            streaming=self.streaming,
            double_receives=tuple((number, node) for number, node in self.double_receives if node in nodes),
        )


class Stage(Struct, frozen=True, gc=False):
    """A node's share of a pipeline: blocks ``first_block`` to ``last_block``, both included."""

    node: NodeId
    first_block: int
    last_block: int


class PipelinePlan(Struct, frozen=True, gc=False):
    """Stages in execution order that cover the model once; ready after ``ready_round`` rounds of its multicast.

    ``form``: it serves "always" from then on, or if "useful" before its mode switch. ``switch``: it dissolves when "all" nodes
    hold the whole model, or "each" node leaves when it does and the others, or the complete ones alone, can go on.
    """

    ready_round: int
    stages: tuple[Stage, ...]
    form: FormRule = "always"
    switch: SwitchRule = "all"

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """The distinct nodes of the stages, in order of first appearance."""
        return tuple(dict.fromkeys(stage.node for stage in self.stages))
