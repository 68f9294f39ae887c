"""Whole plans on the simulated data plane: nothing twice, nothing missing, no deadlock, never faster than the ports allow."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.faasnet import BalancedTree
from lambdascale.core import ClusterSpec, ComputeSpec, GpuSpec, MulticastPlan, Send
from lambdascale.core.commands import LoadBlocks, StartMulticast
from lambdascale.multicast import BinomialPipeline, validate_plan
from lambdascale.multicast.base import MulticastPlanner
from lambdascale.sim.kernel import Kernel
from lambdascale.sim.measure import multicast_times
from lambdascale.sim.options import TransferOptions
from lambdascale.sim.transfers import TransferEngine

CLUSTER = ClusterSpec(
    name="property",
    nodes=64,
    gpus_per_node=1,
    gpu=GpuSpec(name="g", memory_bytes=10**9, hbm_bytes_per_s=1e9, peak_flops=1e12),
    compute=ComputeSpec(flops_efficiency=0.5, bandwidth_efficiency=0.5),
    nic_bytes_per_s=50e9,
    rdma_efficiency=0.84,
    collective_efficiency=0.98,
    link_latency_s=1e-5,
    hop_latency_s=0.0,
    pcie_bytes_per_s=26e9,
    ssd_bytes_per_s=5e9,
    host_memory_bytes=10**9,
    usd_per_gpu_hour=1.0,
)
BLOCK = 10**9
BLOCK_S = BLOCK / 42e9 + 1e-5


class Deliveries:
    """Blocks an engine delivered, and its grants."""

    def __init__(self, **options: bool) -> None:
        self.kernel = Kernel()
        self.arrived: list[tuple[float, int, int, int]] = []
        self.engine = TransferEngine(
            self.kernel,
            CLUSTER,
            TransferOptions(record_grants=True, **options),
            np.random.default_rng(0),
            lambda transfer, node, _, block: self.arrived.append((self.kernel.now, transfer, node, block)),
            lambda node, busy: None,
        )

    def start(self, transfer_id: int, plan: MulticastPlan) -> None:
        tiers = ("gpu",) * len(plan.sources)
        self.engine.multicast(StartMulticast(transfer_id, "m", plan, (BLOCK,) * plan.blocks, tiers, "rdma"))

    def run(self) -> None:
        while self.kernel.step():
            pass


@st.composite
def random_plans(draw: st.DrawFn) -> MulticastPlan:
    """Valid plans without any structure: in each round some holders send something somebody lacks, up to two blocks to a node."""
    nodes, blocks = draw(st.integers(2, 6)), draw(st.integers(1, 4))
    held = [set(range(blocks)), *(set[int]() for _ in range(nodes - 1))]
    rounds: list[tuple[Send, ...]] = []
    while any(len(blocks_held) < blocks for blocks_held in held):
        sent: list[Send] = []
        for src in draw(st.permutations(range(nodes))):
            taken = {(t.dst, t.block) for t in sent}
            open_ports = [d for d in range(nodes) if sum(t.dst == d for t in sent) < 2]
            useful = [(d, b) for d in open_ports for b in held[src] if b not in held[d] and (d, b) not in taken]
            if useful and (src == 0 or draw(st.booleans())):
                sent.append(Send(src, *draw(st.sampled_from(useful))))
        for t in sent:
            held[t.dst].add(t.block)
        rounds.append(tuple(sent))
    doubles = [
        (number, node)
        for number, sent in enumerate(rounds, start=1)
        for node, received in Counter(t.dst for t in sent).items()
        if received == 2
    ]
    plan = MulticastPlan(
        members=tuple(range(nodes)), sources=(0,), blocks=blocks, rounds=tuple(rounds), double_receives=tuple(doubles)
    )
    validate_plan(plan)
    return plan


@settings(max_examples=60, deadline=None)
@given(random_plans(), st.booleans())
def test_any_valid_plan_delivers_every_block_once_and_moves_no_byte_more(plan: MulticastPlan, barrier: bool) -> None:
    world = Deliveries(barrier=barrier)
    world.start(1, plan)
    world.run()
    wanted = {(node, block) for node in plan.destinations for block in range(plan.blocks)}
    assert Counter((node, block) for _, _, node, block in world.arrived) == Counter(wanted)
    assert world.engine.active == ()
    moved = sum(g.rate * (g.end_s - g.begin_s) for g in world.engine.links.grants or [])
    assert moved == pytest.approx(len(wanted) * BLOCK_S * 50e9)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 28), st.integers(1, 12), st.sampled_from([BinomialPipeline(), BalancedTree()]))
def test_planners_never_stall_nor_beat_the_receive_port(
    sources: int, destinations: int, blocks: int, planner: MulticastPlanner
) -> None:
    plan = planner.plan(sources=sources, destinations=destinations, blocks=max(blocks, sources))
    cluster = replace(CLUSTER, nodes=sources + destinations)
    eager = multicast_times(plan, [BLOCK] * plan.blocks, cluster, TransferOptions())
    assert min(eager.complete_s.values()) >= plan.blocks * BLOCK_S * (1 - 1e-9)
    assert set(eager.complete_s) == set(plan.destinations)


@pytest.mark.parametrize("nodes", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("blocks", [1, 2, 5, 16])
def test_eager_takes_exactly_the_rounds_where_nobody_can_run_ahead(nodes: int, blocks: int) -> None:
    plan = BinomialPipeline().plan(sources=1, destinations=nodes - 1, blocks=blocks)
    cluster = replace(CLUSTER, nodes=nodes)
    times = multicast_times(plan, [BLOCK] * blocks, cluster, TransferOptions())
    assert times.total_s == pytest.approx((blocks + nodes.bit_length() - 2) * BLOCK_S)


@settings(max_examples=40, deadline=None)
@given(random_plans(), random_plans(), st.floats(0, 0.3), st.integers(0, 5))
def test_after_a_cancel_and_a_loss_nothing_more_of_them_arrives(
    first: MulticastPlan, second: MulticastPlan, at: float, lost: int
) -> None:
    world = Deliveries()
    world.start(1, first)
    world.start(2, second)
    marks: list[int] = []

    def strike(_: object) -> None:
        world.engine.cancel(1)
        world.engine.lost(lost)
        marks.append(len(world.arrived))

    world.kernel.at(at, strike)
    world.run()
    assert all(transfer == 2 and node != lost for _, transfer, node, _ in world.arrived[marks[0] :])
    assert max(Counter(entry[1:] for entry in world.arrived).values(), default=0) <= 1
    if lost not in second.members:
        assert world.engine.active == (), "a node that takes no part does not stall anybody"


LOAD = st.tuples(
    st.integers(0, 2),  # node
    st.sampled_from([("instant", "pipelined"), ("host", "pipelined"), ("ssd", "pipelined"), ("ssd", "sequential")]),
    st.integers(1, 4),  # blocks
)


@settings(max_examples=200, deadline=None)
@given(st.lists(LOAD, min_size=1, max_size=5), st.integers(0, 40), st.sampled_from(["cancel", "lost"]), st.integers(0, 2))
def test_no_block_of_a_load_that_is_cut_off_arrives(
    loads: list[tuple[int, tuple[str, str], int]], steps: int, end: str, struck: int
) -> None:
    """A load asks nothing when a block is through: no flow ends with it once it is cancelled or its node is lost.

    The cut comes between any two steps, also of the same time.
    """
    world = Deliveries()
    for number, (node, (tier, loader), blocks) in enumerate(loads):
        world.engine.load(LoadBlocks(number, "m", node, tuple(range(blocks)), (BLOCK,) * blocks, tier, loader))
    for _ in range(steps):
        world.kernel.step()
    before = len(world.arrived)
    getattr(world.engine, end)(struck)
    world.run()
    cut = {number for number, (node, *_) in enumerate(loads) if (number if end == "cancel" else node) == struck}
    assert all(transfer not in cut for _, transfer, _, _ in world.arrived[before:])
    arrived = Counter((transfer, block) for _, transfer, _, block in world.arrived)
    whole = {(number, block) for number, (_, _, blocks) in enumerate(loads) if number not in cut for block in range(blocks)}
    assert max(arrived.values(), default=0) <= 1
    assert whole <= set(arrived), "the others are not disturbed"


@settings(max_examples=20, deadline=None)
@given(random_plans())
def test_two_runs_are_the_same_to_the_last_bit(plan: MulticastPlan) -> None:
    runs = []
    for _ in range(2):
        world = Deliveries()
        world.start(1, plan)
        world.run()
        runs.append(world.arrived)
    assert runs[0] == runs[1]
