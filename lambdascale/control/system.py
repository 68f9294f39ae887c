"""What distinguishes one system from another: its parts and a few settings, as one frozen value from conf/system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lambdascale.control.autoscaler import Autoscaler
from lambdascale.control.batching import BatchLimits
from lambdascale.control.plane import ControlPlane
from lambdascale.core import ClusterSpec, ModelSpec, UserError
from lambdascale.core.checks import check_types, require
from lambdascale.core.commands import KvPolicy, Loader, MulticastKind
from lambdascale.memory import HostCacheConfig
from lambdascale.multicast.base import MulticastPlanner
from lambdascale.pipelines.base import PipelineBuilder


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """A serving system composed of a multicast planner, a pipeline builder, an autoscaler and a memory policy.

    ``scale_out``: how new replicas get their weights. "multicast": from nodes that have them, by ``planner`` over
    ``multicast`` writes; "local": every node loads for itself; "instant": no time at all (ideal scaling).
    ``blocks``: into how many blocks a model is cut. ``sources``: sub-groups k of a multicast, or "auto" for as many as there
    are sources and destinations. ``placement`` orders the free nodes (see control/placement.py). ``host_sources``: host copies
    may feed a multicast. ``warm_loads``: a new node with a host copy loads it over its own PCIe instead of being a destination
    of the multicast: always, never, or where PCIe is faster than the network or the node feeds others from host memory meanwhile.
    ``share_sources``: a busy source may feed another multicast at the same time if there is no idle one.
    ``loader``, ``kv`` and ``batching``: see LoadBlocks, SwitchMode and BatchLimits.
    """

    name: str
    planner: MulticastPlanner
    pipelines: PipelineBuilder
    autoscaler: Autoscaler
    memory: HostCacheConfig
    batching: BatchLimits
    scale_out: Literal["multicast", "local", "instant"] = "multicast"
    multicast: MulticastKind = "one_sided"
    blocks: int = 16
    sources: int | Literal["auto"] = "auto"
    placement: Literal["locality", "startup_time"] = "locality"
    host_sources: bool = True
    warm_loads: Literal["always", "faster", "never"] = "faster"
    share_sources: bool = False
    loader: Loader = "pipelined"
    kv: KvPolicy = "recompute"

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self)
        require(self.blocks >= 1, f"system.blocks must be at least 1, not {self.blocks}")
        if isinstance(self.sources, int):
            require(self.sources >= 1, f"system.sources must be at least 1, not {self.sources}")
            certain = self.autoscaler.min_replicas + (
                self.memory.initial_copies if self.host_sources and self.memory.enabled else 0
            )
            if self.scale_out == "multicast" and self.sources > max(1, certain):
                raise UserError(
                    f"system.sources={self.sources} sub-groups need as many sources, but a run starts with {certain}: "
                    f"autoscaler.min_replicas={self.autoscaler.min_replicas}, memory.initial_copies={self.memory.initial_copies}"
                )

    def build(self, *, cluster: ClusterSpec, models: Sequence[ModelSpec]) -> ControlPlane:
        """The system for this cluster and these models; CapacityError or UserError when they do not fit each other."""
        require(bool(models), "a run needs at least one model")
        names = [model.name for model in models]
        require(len(set(names)) == len(names), f"model names must differ, got {names}")
        for model in models:
            cluster.kv_tokens(model)
            model.partition(self.blocks)
        return ControlPlane(config=self, cluster=cluster, models=models)
