"""Parts that make one system different from another, as one frozen value from conf/system."""

from __future__ import annotations

from dataclasses import dataclass

from lambdascale.control.autoscaler import AutoscalingPolicy
from lambdascale.control.batching import BatchLimits
from lambdascale.control.kv_choice import KvRule
from lambdascale.control.start import StartPolicy
from lambdascale.core.checks import check_types, require
from lambdascale.memory import HostMemoryConfig


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """A serving system composed of parts: ``start`` (how new replicas get their weights), autoscaler and host memory.

    ``blocks``: number of blocks a model is cut into. ``kv`` and ``batching``: see KvChoice and BatchLimits.
    """

    name: str
    start: StartPolicy
    autoscaler: AutoscalingPolicy
    memory: HostMemoryConfig
    batching: BatchLimits
    blocks: int = 16
    kv: KvRule = "recompute"

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self)
        require(self.blocks >= 1, f"system.blocks must be at least 1, not {self.blocks}")
        copies = self.memory.initial_copies if self.memory.enabled else 0
        self.start.check(replicas=self.autoscaler.min_replicas, copies=copies)
