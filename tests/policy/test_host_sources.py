"""PCIe of a host source: one link for what it sends and what it loads, shared max-min fairly; predicted as simulated."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lambdascale.control import BatchLimits
from lambdascale.control.prospects import multicast_costs, rounds_per_block
from lambdascale.core import ClusterSpec, MulticastPlan, NodeId, Send
from lambdascale.core.commands import LoadBlocks, StartMulticast
from lambdascale.core.events import BlockArrived
from lambdascale.sim import SimConfig, TransferOptions
from lambdascale.testing.systems import small_cluster, small_model
from tests.policy.world import World

BLOCK = 250_000_000
# Node 0 sends blocks from host memory to node 1, each over a link of 3.2 GB/s at most.
PAIR = MulticastPlan(members=(0, 1), sources=(0,), blocks=4, rounds=tuple((Send(0, 1, b),) for b in range(4)))


def hardware(pcie: float) -> ClusterSpec:
    return replace(small_cluster(4), pcie_bytes_per_s=pcie, link_latency_s=0.0)


def simulated(pcie: float, *, loads: bool) -> dict[tuple[NodeId, int], float]:
    """Times at which each node has each block; with ``loads``, node 0 loads its copy while it sends."""
    options = TransferOptions(communicator_setup=False, chunk_bytes=1)
    backend = SimConfig(transfers=options).build(
        cluster=hardware(pcie), models=(small_model(),), requests=(), batching=BatchLimits(), seed=0
    )
    backend.submit(StartMulticast(1, "small", PAIR, (BLOCK,) * 4, ("host",), "one_sided", None))
    if loads:
        backend.submit(LoadBlocks(2, "small", 0, (0, 1, 2, 3), (BLOCK,) * 4, "host", "pipelined"))
    found = {}
    while (event := backend.next_event()) is not None:
        if isinstance(event, BlockArrived):
            found[event.node, event.block] = event.at
    return found


@pytest.mark.parametrize(
    ("pcie", "loads", "send", "load"),
    [
        (2e9, False, 2e9, None),  # PCIe bounds the send
        (8e9, False, 3.2e9, None),  # the NIC does
        (2e9, True, 1e9, 1e9),  # half each
        (6.4e9, True, 3.2e9, 3.2e9),
        (8e9, True, 3.2e9, 4.8e9),  # the NIC needs less than half: the load has the rest
    ],
)
def test_the_split_of_pcie(pcie: float, loads: bool, send: float, load: float | None) -> None:
    """Mutations: the same share whatever the NIC needs; a source's own load left out of the prediction."""
    times = simulated(pcie, loads=loads)
    assert times[1, 0] == pytest.approx(BLOCK / send)
    world = World("lambdascale", nodes=4, cluster={"pcie_bytes_per_s": pcie, "link_latency_s": 0.0})
    fleet = world.plane.fleet
    state = fleet.models["a"]
    round_s = multicast_costs(fleet, state, (0, 1), ((0, "host"),), (0,) if loads else ()).round_s
    assert round_s == pytest.approx(BLOCK / send, rel=0.04), "the model's last block is a little larger"
    if load is not None:
        assert times[0, 0] == pytest.approx(BLOCK / load)
        pace = rounds_per_block(fleet, state, 0, round_s=round_s, feeds=True)
        assert pace == pytest.approx(send / load)


def test_a_load_beside_a_multicast_that_it_does_not_feed_has_pcie_for_itself() -> None:
    world = World("lambdascale", nodes=4, cluster={"link_latency_s": 0.0})
    fleet = world.plane.fleet
    state = fleet.models["a"]
    costs = multicast_costs(fleet, state, (0, 1), ((0, "gpu"),), (2,))
    assert costs.round_s == pytest.approx(max(state.block_bytes) / 3.2e9), "a source on the GPU sends at the NIC's rate"
    assert rounds_per_block(fleet, state, 2, round_s=costs.round_s, feeds=False) == pytest.approx(3.2 / 2)
