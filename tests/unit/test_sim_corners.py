"""Corners of the simulated data plane and of its instances against times worked out by hand. Mutants survived without them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lambdascale.core import MulticastPlan, NodeOverride, Send
from lambdascale.core.commands import Dispatch, StartMulticast
from tests.unit.test_sim_instances import CLUSTER as COMPUTING
from tests.unit.test_sim_instances import backend, finished, first_tokens, later, play, request, serve
from tests.unit.transfers_rig import CHAIN, CLUSTER, Rig, load, multicast


def test_a_streaming_broadcast_below_the_line_rate_fills_its_chain_at_the_rate_it_streams() -> None:
    """Mutation: the chunk on the way moves faster than the stream."""
    rig = Rig(replace(CLUSTER, collective_efficiency=0.5), chunk_bytes=10, communicator_setup=False)
    rig.engine.multicast(multicast(CHAIN, multicast="collective"))
    # 100 bytes at half of 100 B/s take 2 s; the second hop then has one chunk of 10 bytes to go, at 50 B/s.
    assert [at for at, *_ in rig.run()] == [pytest.approx(2.2)] * 4


def test_a_source_on_a_gpu_waits_for_its_blocks_also_behind_one_in_host_memory() -> None:
    """Mutation: the sources after the first in host memory are taken to be complete."""
    rig = Rig()
    rig.engine.load(load("host", node=1, transfer_id=1, blocks=(0,)))  # 100 bytes at 20 B/s: there after 5 s
    plan = MulticastPlan(members=(0, 1, 2, 3), sources=(0, 1), blocks=1, rounds=((Send(0, 2, 0), Send(1, 3, 0)),))
    rig.engine.multicast(StartMulticast(2, "m", plan, (50,), ("host", "gpu"), "one_sided"))
    assert rig.run() == [(2.5, 2, 2, 0), (5.0, 1, 1, 0), (6.0, 2, 3, 0)]


def test_a_block_between_unequal_nics_takes_the_time_of_the_slower_one() -> None:
    """Mutations: the edge's rate, and the command whose block it is."""
    slow = NodeOverride(nodes=(1,), nic_bytes_per_s=25.0)
    rig = Rig(replace(CLUSTER, link_latency_s=0.5, overrides=(slow,)))
    plan = MulticastPlan(
        members=(0, 1, 2), sources=(0,), blocks=2, rounds=((Send(0, 1, 0),), (Send(0, 2, 0),), (Send(0, 2, 1),), (Send(0, 1, 1),))
    )
    rig.engine.multicast(multicast(plan))
    # 50 bytes of payload are 100 at the line rate: 4 s to node 1, 1 s to node 2, each with half a second besides.
    assert rig.run() == [(4.5, 1, 1, 0), (6.0, 1, 2, 0), (7.5, 1, 2, 1), (12.0, 1, 1, 1)]


def test_a_slowed_run_that_is_cut_ends_with_the_iteration_under_way() -> None:
    """Two nodes share cores, each at half its speed. Mutation: the slowdown counts the other way."""
    cluster = backend(replace(COMPUTING, compute=replace(COMPUTING.compute, shared_slowdown=(2.0, 2.0))))
    serve(cluster, 1, 0)
    serve(cluster, 2, 0)
    cluster.submit(Dispatch(1, (request(0, 101),)))
    later(cluster, 1.01, Dispatch(2, (request(1, 1),)))
    events = play(cluster)
    # Prefill until 0.2 s, then steps of 0.04 s: the one that ends at 1.04 s is under way. The other's prefill takes 0.2 s.
    assert first_tokens(events)[1] == pytest.approx(1.04 + 0.2)
    assert finished(events)[0] == pytest.approx(0.2 + 100 * 0.04 + 0.2)
