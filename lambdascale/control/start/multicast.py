"""Multicast from nodes that hold the model: λScale, FaaSNet and NCCL broadcast, by planner, builder and sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lambdascale.control.placement import by_locality, sparing_copies
from lambdascale.control.start.base import MulticastOrder, StartDecision
from lambdascale.control.start.local import loads_together
from lambdascale.control.state import Fleet, ModelState
from lambdascale.core import NodeId, UserError
from lambdascale.core.checks import check_types, require
from lambdascale.core.commands import Loader, MulticastKind, Storage, Tier
from lambdascale.multicast.base import MulticastPlanner
from lambdascale.pipelines import NoPipelines, PipelineBuilder

_Holder = tuple[int, int, NodeId, Tier]


@dataclass(frozen=True, kw_only=True)
class MulticastStart:
    """New nodes receive the model from nodes that hold it, by ``planner``; without a holder, every node loads for itself.

    ``pipelines`` serve while blocks arrive. ``multicast``: one-sided writes, or a collective over a communicator. ``sources``:
    sub-groups k of a multicast, or "auto" for one for each idle source that has a destination. ``host_sources``: host copies
    may feed a multicast. ``warm_loads``: a new node with a host copy loads it over its own PCIe instead of being a destination:
    always, never, or where PCIe is faster than the network or the node feeds others from host memory meanwhile.
    ``share_sources``: a busy source may feed another multicast at the same time if no source is idle. ``loader``:
    "pipelined" uses SSD and PCIe at once, "sequential" reads everything into host memory first. ``storage``: the tier of models
    without a host copy.
    """

    planner: MulticastPlanner
    pipelines: PipelineBuilder = field(default_factory=NoPipelines)
    multicast: MulticastKind = "one_sided"
    sources: int | Literal["auto"] = "auto"
    host_sources: bool = True
    warm_loads: Literal["always", "faster", "never"] = "faster"
    share_sources: bool = False
    loader: Loader = "pipelined"
    storage: Storage = "ssd"
    instant: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self)
        if isinstance(self.sources, int):
            require(self.sources >= 1, f"system.start.sources must be at least 1, not {self.sources}")

    def check(self, *, replicas: int, copies: int) -> None:
        """See StartPolicy: a fixed number of sub-groups needs as many sources from the start."""
        certain = replicas + (copies if self.host_sources else 0)
        if isinstance(self.sources, int) and self.sources > max(1, certain):
            raise UserError(
                f"system.start.sources={self.sources} sub-groups need as many sources, but a run starts with {certain}: "
                f"autoscaler.min_replicas={replicas}, memory.initial_copies={copies}"
            )

    def rank(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
        """See StartPolicy: host copies first where nodes load their own, last where they do more good as sources."""
        own = all(self._loads_own_copy(fleet, node) for node in nodes)
        return by_locality(fleet, state, nodes) if own else sparing_copies(fleet, state, nodes)

    def start(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId], replicas: int) -> StartDecision:
        """See StartPolicy. While every source is busy, nodes that depend on one are not taken yet."""
        taken = list(nodes[:replicas])
        warm = self._load_themselves(fleet, state, taken)
        cold = [node for node in taken if node not in warm]
        loads, pipelines = loads_together(fleet, state, warm, self.pipelines)
        holders = self._holders(fleet, state, cold) if cold else []
        if not holders:
            more, others = loads_together(fleet, state, cold, self.pipelines)
            return StartDecision(nodes=tuple(taken), loads=loads + more, pipelines=pipelines + others)
        sources = self._pick_sources(holders, len(cold))
        if not sources:
            return StartDecision(nodes=tuple(warm), loads=loads, pipelines=pipelines)
        order = self._order(state, sources, cold)
        resident = [node for node, tier in order.sources if tier == "gpu"]
        formed = tuple(self.pipelines.pipelines(order.plan, resident))
        return StartDecision(nodes=tuple(taken), loads=loads, multicasts=(order,), pipelines=pipelines + formed)

    def _loads_own_copy(self, fleet: Fleet, node: NodeId) -> bool:
        """True if the node loads a host copy itself although a multicast could bring the model."""
        hardware = fleet.cluster.node(node)
        faster = hardware.pcie_bytes_per_s >= hardware.nic_bytes_per_s * fleet.cluster.rdma_efficiency
        return self.warm_loads == "always" or (self.warm_loads == "faster" and faster)

    def _load_themselves(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
        """Nodes with a host copy that load it: where that beats the network, or while they feed others from host memory."""
        if self.warm_loads == "never":
            return []
        warm = [node for node in nodes if fleet.is_warm(state, node)]
        feeds_others = self.host_sources and len(warm) < len(nodes)
        return [node for node in warm if feeds_others or self._loads_own_copy(fleet, node)]

    def _holders(self, fleet: Fleet, state: ModelState, targets: Sequence[NodeId]) -> list[_Holder]:
        """All that could feed a multicast to ``targets``: (transfers it feeds now, 0 for GPU and 1 for host, node, tier)."""
        name = state.spec.name
        found: list[_Holder] = [(a.transfers, 0, node, "gpu") for node, a in state.allocations.items() if a.complete]
        if self.host_sources:
            excluded = {node for _, _, node, _ in found}.union(targets)
            copies = (node for node in fleet.host.holders(fleet.gpus_free, name, fleet.at) if node not in excluded)
            found += [(fleet.host.pins(node, name), 1, node, "host") for node in copies]
        return sorted(found)

    def _pick_sources(self, holders: Sequence[_Holder], destinations: int) -> list[tuple[NodeId, Tier]]:
        """Return the sources to use: idle ones, GPU replicas before host copies, at most one per destination."""
        wanted = destinations if self.sources == "auto" else min(self.sources, destinations)
        idle = [holder for holder in holders if holder[0] == 0]
        if not idle and self.share_sources:
            idle = list(holders[:1])
        return [(node, tier) for _, _, node, tier in idle][:wanted]

    def _order(self, state: ModelState, sources: Sequence[tuple[NodeId, Tier]], nodes: Sequence[NodeId]) -> MulticastOrder:
        abstract = self.planner.plan(sources=len(sources), destinations=len(nodes), blocks=state.blocks)
        used = tuple(sources[: len(abstract.sources)])
        return MulticastOrder(plan=abstract.on([*(node for node, _ in used), *nodes]), sources=used)
