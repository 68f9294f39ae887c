"""Transfers against times worked out by hand on a cluster with round numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from msgspec.structs import replace as replace_plan

from lambdascale.core import MulticastPlan, Send, UserError
from lambdascale.multicast import validate_plan
from lambdascale.sim import SimConfig
from lambdascale.sim.communicator import _line, _Measured, draw_setup_s, setup_basis, setup_distribution
from lambdascale.sim.kernel import Kernel
from lambdascale.sim.measure import multicast_times
from lambdascale.sim.options import TransferOptions
from lambdascale.sim.transfers import TransferEngine
from tests.unit.transfers_rig import CHAIN, CLUSTER, TRIANGLE, Rig, load, multicast


def test_edges_go_ahead_on_their_own_and_double_receives_share_the_port() -> None:
    rig = Rig()
    rig.engine.multicast(multicast())
    # 100 wire bytes a block at 100 B/s: 1 s alone, 2 s when node 2 receives both at once.
    assert rig.run() == [(1.0, 1, 1, 0), (3.0, 1, 2, 1), (3.0, 1, 2, 0), (4.0, 1, 1, 1)]


@pytest.mark.parametrize("barrier", [False, True], ids=["eager", "barrier"])
def test_a_round_with_a_declared_double_receive_takes_twice_the_time_of_its_port(barrier: bool) -> None:
    validate_plan(TRIANGLE)
    times = {}
    for doubled in (True, False):
        # Without the double receive, node 3 takes the second block of round 2 and passes it on in a round of its own.
        split = replace_plan(
            TRIANGLE, members=(0, 1, 2, 3), rounds=(TRIANGLE.rounds[0], (Send(0, 3, 1), Send(1, 2, 0))), double_receives=()
        )
        rig = Rig(barrier=barrier, barrier_s=0.0, record_grants=True)
        rig.engine.multicast(multicast(TRIANGLE if doubled else split))
        arrived = rig.run()
        assert {(node, block) for *_, node, block in arrived[:3]} == {(1, 0), (2, 0), (2 if doubled else 3, 1)}
        times[doubled] = [at for at, *_ in arrived][1:3]
        into_two = [g for g in rig.engine.links.grants or [] if "nic_in:2" in g.ports and g.begin_s >= 1.0]
        assert {g.rate for g in into_two} == {50.0 if doubled else 100.0}, "the two blocks share the receive port"
    assert times == {True: [3.0, 3.0], False: [2.0, 2.0]}, "2 s after round 1 instead of 1 s"


def test_the_barrier_costs_its_time_once_a_round_but_not_after_the_last() -> None:
    rig = Rig(barrier=True, barrier_s=0.25)
    rig.engine.multicast(multicast())
    assert [at for at, *_ in rig.run()] == [1.0, 3.25, 3.25, 4.5]


def test_a_collective_on_its_own_takes_its_set_up_and_its_stream() -> None:
    drawn = draw_setup_s(3, np.random.default_rng(7))
    times = multicast_times(CHAIN, [50, 50], CLUSTER, TransferOptions(chunk_bytes=10), multicast="collective", seed=7)
    assert times.setup_s == drawn
    assert times.total_s == pytest.approx(drawn + 1.1)


@pytest.mark.parametrize(("seconds", "at"), [([0.5, 0.75], 0.75), ([0.5], 0.5), ([0.5, 0.75, 1.0], 0.75)])
def test_a_collective_may_be_a_sleep(seconds: list[float], at: float) -> None:
    """A broadcast of three ranks sleeps: no set-up, no traffic, no GPU; more ranks than were measured take the last time."""
    rig = Rig(broadcast_s=seconds, record_grants=True)
    rig.engine.multicast(multicast(CHAIN, multicast="collective"))
    assert rig.run() == [(at, 1, node, block) for node in (1, 2) for block in (0, 1)]
    assert (rig.occupied, rig.engine.setup_s, rig.engine.links.grants) == ([], {}, [])


@pytest.mark.parametrize("end", ["cancelled", "a node lost"])
def test_a_sleep_that_is_given_up_brings_nothing(end: str) -> None:
    rig = Rig(broadcast_s=[0.5])
    rig.engine.multicast(multicast(CHAIN, multicast="collective"))
    if end == "cancelled":
        rig.engine.cancel(1)
    else:
        rig.engine.lost(2)
    assert rig.run() == []
    with pytest.raises(UserError, match=r"transfers\.broadcast_s takes positive seconds, not \[0\.0\]"):
        TransferOptions(broadcast_s=[0.0])


def test_two_multicasts_share_their_source() -> None:
    rig = Rig()
    pair = MulticastPlan(members=(0, 1), sources=(0,), blocks=1, rounds=((Send(0, 1, 0),),))
    rig.engine.multicast(multicast(pair, 1))
    rig.engine.multicast(multicast(pair.on([0, 2]), 2))
    assert rig.run() == [(2.0, 1, 1, 0), (2.0, 2, 2, 0)]


def test_latency_keeps_the_port_busy() -> None:
    pair = MulticastPlan(members=(0, 1), sources=(0,), blocks=2, rounds=((Send(0, 1, 0),), (Send(0, 1, 1),)))
    times = multicast_times(pair, [50, 50], replace(CLUSTER, link_latency_s=0.1), TransferOptions())
    assert times.total_s == pytest.approx(2.2)


def test_a_source_in_host_memory_sends_as_fast_as_its_pcie_and_the_next_node_as_fast_as_its_nic() -> None:
    plan = MulticastPlan(members=(0, 1, 2), sources=(0,), blocks=1, rounds=((Send(0, 1, 0),), (Send(1, 2, 0),)))
    rig = Rig(record_grants=True)
    rig.engine.multicast(multicast(plan, tier="host"))
    # 50 bytes at PCIe's 20 B/s, then at the NIC's 50 B/s of goodput.
    assert rig.run() == [(2.5, 1, 1, 0), (3.5, 1, 2, 0)]
    first = (rig.engine.links.grants or [])[0]
    assert dict(zip(first.ports, first.weights, strict=True)) == {"pcie:0": 0.5, "nic_out:0": 1.0, "nic_in:1": 1.0}
    assert first.rate == 40.0, "of the NIC's 100 B/s of line rate, for 20 B/s of payload"


def test_a_source_in_host_memory_is_as_fast_as_its_nic_where_pcie_is_faster() -> None:
    pair = MulticastPlan(members=(0, 1), sources=(0,), blocks=1, rounds=((Send(0, 1, 0),),))
    rig = Rig(replace(CLUSTER, pcie_bytes_per_s=60.0))
    rig.engine.multicast(multicast(pair, tier="host"))
    assert rig.run() == [(1.0, 1, 1, 0)]


def test_a_source_in_host_memory_shares_its_pcie_with_the_loads_of_its_node_only() -> None:
    pair = MulticastPlan(members=(0, 1), sources=(0,), blocks=1, rounds=((Send(0, 1, 0),),))
    rig = Rig()
    rig.engine.multicast(multicast(pair, tier="host"))
    rig.engine.load(load("host", transfer_id=2, blocks=(0,)))
    rig.engine.load(load("host", node=1, transfer_id=3, blocks=(0,)))
    # Node 0's PCIe: 10 B/s of the load and 10 of the multicast's 50 bytes, which are through at 5 s; then the load has all 20 for
    # the other half of its 100. Node 1 loads 100 bytes at 20 B/s.
    assert [(pytest.approx(at), t) for at, t, *_ in rig.run()] == [(5.0, 1), (5.0, 3), (7.5, 2)]


def test_a_source_in_host_memory_with_a_way_of_its_own_leaves_pcie_to_the_loads_of_its_node() -> None:
    pair = MulticastPlan(members=(0, 1), sources=(0,), blocks=1, rounds=((Send(0, 1, 0),),))
    rig = Rig(host_source_bytes_per_s="40B/s")
    rig.engine.multicast(multicast(pair, tier="host"))
    rig.engine.load(load("host", transfer_id=2, blocks=(0,)))
    # 50 bytes at 40 B/s, of the NIC's 50; 100 bytes at PCIe's 20.
    assert [(pytest.approx(at), t) for at, t, *_ in rig.run()] == [(1.25, 1), (5.0, 2)]


@pytest.mark.parametrize("barrier", [False, True])
def test_the_start_up_of_a_send_from_host_memory_is_not_stretched_by_pcie(barrier: bool) -> None:
    pair = MulticastPlan(members=(0, 1), sources=(0,), blocks=1, rounds=((Send(0, 1, 0),),))
    rig = Rig(replace(CLUSTER, link_latency_s=0.25), barrier=barrier)
    rig.engine.multicast(multicast(pair, tier="host"))
    assert rig.run() == [(pytest.approx(2.75), 1, 1, 0)]


def test_a_streaming_broadcast_from_host_memory_is_as_fast_as_pcie() -> None:
    rig = Rig(chunk_bytes=10, communicator_setup=False)
    rig.engine.multicast(multicast(CHAIN, multicast="collective", tier="host"))
    # 100 bytes and, once, a chunk of 10 for the second hop, at 20 B/s.
    assert [at for at, *_ in rig.run()] == [pytest.approx(5.5)] * 4


def test_sends_and_reads_from_the_remote_store_use_all_nics_of_a_node() -> None:
    rig = Rig(replace(CLUSTER, nics_per_node=2, remote_bytes_per_s=150.0, pcie_bytes_per_s=1000.0))
    pair = MulticastPlan(members=(0, 1), sources=(0,), blocks=1, rounds=((Send(0, 1, 0),),))
    rig.engine.multicast(multicast(pair, size=150))
    rig.engine.load(load("remote", node=2, transfer_id=2, blocks=(0, 1)))
    # 300 wire bytes at 2 x 100 B/s; 100 and 20 bytes at the store's 150 B/s.
    assert [(pytest.approx(at), t) for at, t, *_ in rig.run()] == [(2 / 3, 2), (0.8, 2), (1.5, 1)]


def test_cancel_in_the_middle_delivers_nothing_more_and_frees_the_ports() -> None:
    rig = Rig()
    rig.engine.multicast(multicast())
    rig.run(until=1.5)
    rig.engine.cancel(1)
    rig.engine.cancel(1)
    rig.engine.multicast(multicast(transfer_id=2))
    assert [entry[1] for entry in rig.run()] == [1, 2, 2, 2, 2]


def test_a_node_lost_in_the_last_round_receives_nothing_and_the_rest_stalls() -> None:
    rig = Rig()
    rig.engine.multicast(multicast())
    rig.run(until=3.5)
    rig.engine.lost(1)
    assert len(rig.run()) == 3
    rig.engine.multicast(multicast(transfer_id=2))
    assert [entry[2] for entry in rig.run()[3:]] == [], "node 1 is first in line at node 0 and is lost"


def test_a_survivor_sends_what_it_holds_from_a_broken_multicast() -> None:
    plan = MulticastPlan(members=(5, 6), sources=(5,), blocks=3, rounds=((Send(5, 6, 2), Send(6, 5, 0)), (Send(5, 6, 1),)))
    rig = Rig()
    rig.engine.multicast(multicast(plan))
    assert rig.run() == [(1.0, 1, 6, 2), (1.0, 1, 5, 0), (2.0, 1, 6, 1)]


def test_a_streaming_broadcast_takes_the_time_of_one_hop_and_the_fill() -> None:
    rig = Rig(chunk_bytes=10, communicator_setup=False)
    rig.engine.multicast(multicast(CHAIN, multicast="collective"))
    assert [at for at, *_ in rig.run()] == [pytest.approx(1.1)] * 4
    assert rig.occupied == [(0.0, 0, True), (pytest.approx(1.1), 0, False)]


def test_cancelling_a_collective_gives_the_gpu_back() -> None:
    rig = Rig(communicator_setup=False)
    rig.engine.multicast(multicast(multicast="collective"))
    rig.kernel.at(0.5, rig.engine.cancel, 1)
    rig.run()
    assert rig.occupied == [(0.0, 0, True), (0.5, 0, False)]


def test_the_medians_line_is_that_of_weighted_least_squares() -> None:
    """Call it here, too: the module's own call is over before a mutation run switches a fault on."""
    points = [(_Measured(4, 0.4, 2.0, 2), 0.5), (_Measured(8, 0.7, 4.4, 2), 0.6), (_Measured(16, 1.0, 9.0, 1), 0.7)]
    weights = [measured.values**0.5 / sigma for measured, sigma in points]  # numpy squares them
    slope, intercept = np.polyfit([0.0, 1.0, 2.0], [0.5 * np.log(m.low_s * m.high_s) for m, _ in points], 1, w=weights)
    assert _line(points) == pytest.approx((intercept, slope))


def test_communicator_setup_follows_the_measurements() -> None:
    rng = np.random.default_rng(1)
    for ranks, low, high in [(2, 0.4, 2.0), (4, 0.4, 2.0), (8, 0.7, 4.4)]:
        draws = [draw_setup_s(ranks, rng) for _ in range(4000)]
        assert np.percentile(draws, [5, 95]) == pytest.approx([low, high], rel=0.35)
    low, high = np.percentile([draw_setup_s(12, rng) for _ in range(4000)], [5, 95])
    assert low < 0.89 < high, "the one sample with 12 ranks"
    assert np.exp(setup_distribution(12)[0]) < 1.5, "far below the 2.6 s that the smaller groups alone would give"
    medians = [setup_distribution(ranks)[0] for ranks in (4, 6, 8, 12, 64)]
    assert medians == sorted(medians)
    assert [setup_basis(ranks) for ranks in (2, 8, 9, 12, 13)] == [
        "measured",
        "measured",
        "one sample",
        "one sample",
        "extrapolated",
    ]
    assert 18 <= draw_setup_s(4, rng, outlier_probability=1.0) <= 120


@pytest.mark.parametrize("barrier", [False, True], ids=["eager", "barrier"])
def test_a_node_passes_on_what_another_transfer_still_brings_it(barrier: bool) -> None:
    """Mutation: the source of a join taken for complete. A block takes 1 s a hop; node 2 joins at 0.5 s, below node 1."""
    rig = Rig(barrier=barrier, barrier_s=0.0)
    first = MulticastPlan(members=(0, 1), sources=(0,), blocks=2, rounds=((Send(0, 1, 0),), (Send(0, 1, 1),)))
    second = MulticastPlan(members=(1, 2), sources=(1,), blocks=2, rounds=((Send(1, 2, 0),), (Send(1, 2, 1),)))
    rig.engine.multicast(multicast(first))
    rig.kernel.at(0.5, rig.engine.multicast, multicast(second, 2))
    assert sorted(rig.run()) == [(1.0, 1, 1, 0), (2.0, 1, 1, 1), (2.0, 2, 2, 0), (3.0, 2, 2, 1)]


def test_finished_and_cancelled_transfers_are_forgotten() -> None:
    rig = Rig()
    rig.engine.multicast(multicast())
    rig.engine.multicast(multicast(transfer_id=2))
    rig.engine.load(load("host", node=3, transfer_id=3))
    rig.engine.load(load("instant", node=3, transfer_id=4))
    assert rig.engine.active == (1, 2, 3, 4)
    rig.engine.cancel(2)
    assert rig.engine.active == (1, 3, 4)
    rig.run()
    assert rig.engine.active == ()


def test_a_plan_without_transfers_neither_draws_a_set_up_nor_keeps_the_gpu() -> None:
    alone = MulticastPlan(members=(0,), sources=(0,), blocks=2, rounds=(), streaming=True)
    rig = Rig()
    rig.engine.multicast(multicast(alone, multicast="collective"))
    assert rig.run() == rig.occupied == []
    assert (rig.engine.active, rig.engine.setup_s) == ((), {})


def test_a_round_without_transfers_costs_its_barrier() -> None:
    plan = MulticastPlan(members=(0, 1), sources=(0,), blocks=2, rounds=((Send(0, 1, 0),), (), (Send(0, 1, 1),)))
    rig = Rig(barrier=True, barrier_s=0.25)
    rig.engine.multicast(multicast(plan))
    assert [at for at, *_ in rig.run()] == [1.0, 2.5]


@pytest.mark.parametrize("at", [0.5, 1.05])  # while the bytes flow; while the last chunks drain
def test_a_streaming_broadcast_delivers_nothing_once_a_member_is_lost(at: float) -> None:
    rig = Rig(chunk_bytes=10, communicator_setup=False)
    rig.engine.multicast(multicast(CHAIN, multicast="collective"))
    rig.kernel.at(at, rig.engine.lost, 2)
    assert rig.run() == []
    rig.engine.cancel(1)
    assert rig.occupied[-1][1:] == (0, False)


def test_a_member_lost_in_a_collective_gives_the_gpus_of_its_sources_back() -> None:
    rig = Rig(chunk_bytes=10, communicator_setup=False)
    rig.engine.multicast(multicast(CHAIN, multicast="collective"))
    rig.kernel.at(0.5, rig.engine.lost, 2)
    rig.run()
    assert rig.occupied == [(0.0, 0, True), (0.5, 0, False)]


def test_a_member_lost_during_the_set_up_keeps_the_sources_free() -> None:
    rig = Rig()
    rig.engine.multicast(multicast(CHAIN, multicast="collective"))
    rig.engine.lost(1)
    assert rig.run() == rig.occupied == []


def test_a_collective_whose_source_still_receives_sends_nothing_before_its_set_up() -> None:
    rig = Rig()
    rig.engine.load(load("host", transfer_id=1))
    rig.engine.multicast(multicast(transfer_id=2, multicast="collective"))
    times = [at for at, transfer, *_ in rig.run() if transfer == 2]
    assert len(times) == 4
    assert min(times) > rig.engine.setup_s[2]
    assert [busy for *_, busy in rig.occupied] == [True, False]


def test_a_streaming_broadcast_and_a_load_from_the_remote_store_share_the_nic() -> None:
    rig = Rig(replace(CLUSTER, remote_bytes_per_s=60.0, pcie_bytes_per_s=1000.0), chunk_bytes=10, communicator_setup=False)
    rig.engine.multicast(multicast(CHAIN, multicast="collective"))
    rig.engine.load(load("remote", node=2, transfer_id=2, blocks=(0,)))
    # Both get half of node 2's 100 B/s: 100 bytes each in 2 s, and the chain has its fill of 0.1 s to go.
    assert [(at, t) for at, t, *_ in rig.run()] == [(2.0, 2), *[(pytest.approx(2.1), 1)] * 4]


def test_many_equal_flows_through_one_port_end_together_in_the_order_they_began() -> None:
    rig = Rig()
    for transfer_id in range(1, 8):
        pair = MulticastPlan(members=(0, transfer_id), sources=(0,), blocks=1, rounds=((Send(0, transfer_id, 0),),))
        rig.engine.multicast(multicast(pair, transfer_id, size=10**9))
    arrived = rig.run()
    assert [t for _, t, *_ in arrived] == list(range(1, 8))
    assert [at for at, *_ in arrived] == [pytest.approx(7 * 2e7, rel=1e-12)] * 7


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="barrier_s must not be negative"):
        TransferOptions(barrier_s=-1.0)
    with pytest.raises(UserError, match=r"communicator_outlier_probability must be in \[0, 1\], not 2"):
        TransferOptions(communicator_outlier_probability=2)


def test_what_unpacked_tensors_and_buffers_made_on_the_way_cost() -> None:
    packed = TransferOptions()
    unpacked = TransferOptions(packed=False, tensors_per_layer=4, tensor_overhead_s=0.5)
    allocating = TransferOptions(preallocated=False, allocation_s=0.25, registration_bytes_per_s=100.0)
    assert packed.block_overhead_s(50.0, 3) == 0.0
    assert unpacked.block_overhead_s(50.0, 3) == 6.0
    assert allocating.block_overhead_s(50.0, 3) == 0.75
    plan = MulticastPlan(members=(0, 1), sources=(0,), blocks=2, rounds=((Send(0, 1, 0),), (Send(0, 1, 1),)))
    # A block of 50 bytes takes 1 s at half of 100 bytes/s; a model without known layers has one a block.
    assert [multicast_times(plan, [50, 50], CLUSTER, options).total_s for options in (packed, unpacked, allocating)] == [
        2.0,
        6.0,
        3.5,
    ]


def test_a_slow_node_slows_what_crosses_its_port() -> None:
    config = SimConfig(slow_nodes=((2, 0.5),))
    assert config.slow_nodes == ((2, 0.5),)
    kernel, arrived = Kernel(), []
    engine = TransferEngine(
        kernel,
        CLUSTER,
        TransferOptions(),
        np.random.default_rng(0),
        lambda transfer, node, model, block: arrived.append((kernel.now, node)),
        lambda node, busy: None,
        nic_shares=dict(config.slow_nodes),
    )
    star = MulticastPlan(members=(0, 1, 2), sources=(0,), blocks=1, rounds=((Send(0, 1, 0),), (Send(0, 2, 0),)))
    engine.multicast(multicast(star))
    while kernel.step():
        pass
    assert arrived == [(1.0, 1), (3.0, 2)]


@pytest.mark.parametrize("slow", [((1, 0.0),), ((1, 1.5),), ((1,),)])
def test_slow_nodes_that_make_no_sense(slow: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(UserError, match="slow_nodes"):
        SimConfig(slow_nodes=slow)


# -- links that change and nodes that return -----------------------------------------------------------------------------


def test_what_is_under_way_goes_on_at_the_new_rate_of_its_link() -> None:
    pair = MulticastPlan(members=(0, 1), sources=(0,), blocks=1, rounds=((Send(0, 1, 0),),))
    rig = Rig()
    rig.engine.multicast(multicast(pair))
    alone = Rig()
    alone.engine.multicast(multicast(pair))
    ((before, *_),) = alone.run()
    rig.kernel.at(before / 2, lambda _: rig.engine.set_nic_share(1, 0.25))
    assert [at for at, *_ in rig.run()] == [pytest.approx(before / 2 + 4 * before / 2)]


def test_a_node_that_returns_takes_part_again_but_not_in_what_was_lost_with_it() -> None:
    pair = MulticastPlan(members=(0, 1), sources=(0,), blocks=1, rounds=((Send(0, 1, 0),),))
    rig = Rig()
    rig.engine.multicast(multicast(pair, 1))
    rig.engine.lost(1)
    rig.engine.multicast(multicast(pair, 2))
    rig.engine.restored(1)
    rig.engine.multicast(multicast(pair, 3))
    assert [transfer for _, transfer, *_ in rig.run()] == [3]
