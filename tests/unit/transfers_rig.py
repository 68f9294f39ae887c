"""A simulated data plane on a cluster with round numbers, and commands for it."""

from __future__ import annotations

from math import inf, nextafter

import numpy as np

from lambdascale.core import ClusterSpec, ComputeSpec, GpuSpec, MulticastPlan, Send
from lambdascale.core.commands import LoadBlocks, StartMulticast
from lambdascale.sim.kernel import Kernel
from lambdascale.sim.options import TransferOptions
from lambdascale.sim.transfers import TransferEngine

CLUSTER = ClusterSpec(
    name="round",
    nodes=4,
    gpus_per_node=1,
    gpu=GpuSpec(name="g", memory_bytes=10**9, hbm_bytes_per_s=1e9, peak_flops=1e12),
    compute=ComputeSpec(flops_efficiency=0.5, bandwidth_efficiency=0.5),
    nic_bytes_per_s=100.0,
    rdma_efficiency=0.5,
    collective_efficiency=1.0,
    link_latency_s=0.0,
    hop_latency_s=0.0,
    pcie_bytes_per_s=20.0,
    ssd_bytes_per_s=5.0,
    host_memory_bytes=10**9,
    usd_per_gpu_hour=1.0,
)
TRIANGLE = MulticastPlan(  # 2 receives both blocks in round 2
    members=(0, 1, 2),
    sources=(0,),
    blocks=2,
    rounds=((Send(0, 1, 0),), (Send(0, 2, 1), Send(1, 2, 0)), (Send(2, 1, 1),)),
    double_receives=((2, 2),),
)
CHAIN = MulticastPlan(
    members=(0, 1, 2),
    sources=(0,),
    blocks=2,
    rounds=((Send(0, 1, 0),), (Send(0, 1, 1), Send(1, 2, 0)), (Send(1, 2, 1),)),
    streaming=True,
)


class Rig:
    def __init__(self, cluster: ClusterSpec = CLUSTER, **options: object) -> None:
        self.kernel = Kernel()
        self.arrived: list[tuple[float, int, int, int]] = []
        self.occupied: list[tuple[float, int, bool]] = []
        self.engine = TransferEngine(
            self.kernel,
            cluster,
            TransferOptions(**options),
            np.random.default_rng(0),
            lambda transfer, node, model, block: self.arrived.append((self.kernel.now, transfer, node, block)),
            lambda node, busy: self.occupied.append((self.kernel.now, node, busy)),
        )

    def run(self, until: float = float("inf")) -> list[tuple[float, int, int, int]]:
        self.kernel.advance(nextafter(until, inf), ())
        return self.arrived


def multicast(
    plan: MulticastPlan = TRIANGLE, transfer_id: int = 1, size: int = 50, multicast: str = "one_sided", tier: str = "gpu"
) -> StartMulticast:
    return StartMulticast(transfer_id, "m", plan, (size,) * plan.blocks, (tier,), multicast)


def load(
    tier: str, loader: str = "pipelined", node: int = 0, transfer_id: int = 1, blocks: tuple[int, ...] = (1, 0)
) -> LoadBlocks:
    return LoadBlocks(transfer_id, "m", node, blocks, (100, 20), tier, loader)
