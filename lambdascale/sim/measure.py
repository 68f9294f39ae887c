"""The time of one multicast on its own, without a serving system around it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from lambdascale.core import ClusterSpec, MulticastPlan, NodeId
from lambdascale.core.commands import MulticastKind, StartMulticast, Tier
from lambdascale.sim.kernel import Kernel
from lambdascale.sim.options import TransferOptions
from lambdascale.sim.transfers import TransferEngine


class MulticastTimes(Struct, frozen=True):
    """Seconds from the command: ``setup_s`` for the communicator, ``complete_s`` until each destination has the model."""

    setup_s: float
    complete_s: dict[NodeId, float]

    @property
    def total_s(self) -> float:
        """Seconds until the last destination holds the whole model."""
        return max(self.complete_s.values(), default=self.setup_s)


def multicast_times(
    plan: MulticastPlan,
    block_bytes: Sequence[int],
    cluster: ClusterSpec,
    options: TransferOptions,
    *,
    multicast: MulticastKind = "one_sided",
    seed: int = 0,
) -> MulticastTimes:
    """Simulate ``plan`` on an idle cluster."""
    kernel = Kernel()
    complete: dict[NodeId, float] = {}
    missing = dict.fromkeys(plan.destinations, plan.blocks)

    def deliver(_: int, node: NodeId, __: str, ___: int) -> None:
        missing[node] -= 1
        if missing[node] == 0:
            complete[node] = kernel.now

    engine = TransferEngine(kernel, cluster, options, np.random.default_rng(seed), deliver, lambda node, busy: None)
    tiers: tuple[Tier, ...] = tuple("gpu" for _ in plan.sources)
    engine.multicast(StartMulticast(1, "model", plan, tuple(block_bytes), tiers, multicast))
    while kernel.step():
        pass
    assert not any(missing.values()), f"multicast stalled, blocks missing per node: {missing}"
    return MulticastTimes(engine.setup_s.get(1, 0.0), complete)
