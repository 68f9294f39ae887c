"""Simulated instances against times worked out by hand: turns at a node's port, interleaved stages, moved boundaries."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lambdascale.control import BatchLimits
from lambdascale.core import ComputeTable, NodeId, NodeOverride, Request, Stage
from lambdascale.core.commands import Command, Dispatch, Repartition, Serve, StopInstance
from lambdascale.core.events import Event, NodeJoined, RequestFinished, RequestPreempted, TokensProduced
from lambdascale.sim import SimConfig
from lambdascale.sim.backend import SimBackend
from lambdascale.sim.instances import _moves
from lambdascale.testing.systems import small_cluster, small_model

# A prefill takes 0.1 s and a decode step 0.02 s whatever their size; hops and KV reads take no time.
TABLE = ComputeTable(model="small", prefill_tokens=(1.0,), prefill_s=(0.1,), decode_batch=(1.0,), decode_s=(0.02,))
CLUSTER = replace(small_cluster(4), hop_latency_s=0.0, compute=replace(small_cluster().compute, measured=(TABLE,)))
BLOCKS = 16
SIZES = (1_000_000_000 // BLOCKS,) * BLOCKS
KV = 79_345


def backend(cluster: object = CLUSTER, failures: tuple[tuple[int, float], ...] = (), *, token_times: bool = False) -> SimBackend:
    built = SimConfig(node_failures=failures).build(
        cluster=cluster,
        models=[small_model()],
        requests=[],
        batching=BatchLimits(max_batch=8),
        seed=0,
        token_times=token_times,
    )
    return built


def stages(*nodes: NodeId) -> tuple[Stage, ...]:
    """Stages of equal numbers of blocks on these nodes in turn."""
    size = BLOCKS // len(nodes)
    return tuple(Stage(node, i * size, (i + 1) * size - 1) for i, node in enumerate(nodes))


def serve(cluster: SimBackend, instance: int, *nodes: NodeId) -> None:
    cluster.submit(Serve(instance, "small", stages(*nodes), SIZES, KV))


def request(number: int, tokens: int, prompt: int = 8) -> Request:
    return Request(number, 0.0, "small", prompt, tokens)


def later(cluster: SimBackend, at_s: float, command: Command) -> None:
    cluster.kernel.at(at_s, lambda _: cluster.submit(command))


def play(cluster: SimBackend) -> list[Event]:
    events = []
    while (event := cluster.next_event()) is not None:
        if not isinstance(event, NodeJoined):
            events.append(event)
    return events


def finished(events: list[Event]) -> dict[int, float]:
    return {event.request_id: event.at for event in events if isinstance(event, RequestFinished)}


def first_tokens(events: list[Event]) -> dict[int, float]:
    return {event.request_id: event.at for event in events if isinstance(event, TokensProduced)}


def test_a_replica_alone() -> None:
    cluster = backend()
    serve(cluster, 1, 0)
    cluster.submit(Dispatch(1, (request(0, 11),)))
    assert finished(play(cluster))[0] == pytest.approx(0.1 + 10 * 0.02)


def test_two_instances_on_a_node_take_turns() -> None:
    """Each is half as fast as alone; on two nodes, both are as fast as alone."""
    together, apart = backend(), backend()
    for cluster, other in ((together, 0), (apart, 1)):
        serve(cluster, 1, 0)
        serve(cluster, 2, other)
        cluster.submit(Dispatch(1, (request(0, 51),)))
        cluster.submit(Dispatch(2, (request(1, 51),)))
    shared, alone = finished(play(together)), finished(play(apart))
    assert alone == pytest.approx({0: 0.1 + 50 * 0.02, 1: 0.1 + 50 * 0.02})
    assert max(shared.values()) == pytest.approx(2 * (0.1 + 50 * 0.02))
    assert min(shared.values()) > 1.9 * (0.1 + 50 * 0.02)


def test_a_late_instance_cuts_a_long_run() -> None:
    """A run of many decode iterations ends with the one under way when another instance wants the node."""
    cluster = backend()
    serve(cluster, 1, 0)
    serve(cluster, 2, 0)
    cluster.submit(Dispatch(1, (request(0, 1000),)))
    later(cluster, 1.005, Dispatch(2, (request(1, 1),)))
    assert first_tokens(play(cluster))[1] == pytest.approx(1.02 + 0.1)


def test_interleaved_stages_serve_what_is_due_next() -> None:
    """Stages n0 n1 n0 n1 of a quarter each, two requests: the batches use both nodes all the time."""
    cluster = backend()
    serve(cluster, 1, 0, 1, 0, 1)
    cluster.submit(Dispatch(1, (request(0, 64), request(1, 64))))
    took = max(finished(play(cluster)).values())
    alone = 0.1 + 63 * 0.02
    # Both nodes are busy all the time but for the first and the last quarters: a node has half of each request's work to do.
    assert alone <= took <= alone * 1.05


def test_stages_on_nodes_of_their_own_keep_a_batch_in_flight_each() -> None:
    cluster = backend()
    serve(cluster, 1, 0, 1, 2, 3)
    cluster.submit(Dispatch(1, tuple(request(i, 33) for i in range(4))))
    assert max(finished(play(cluster)).values()) <= (0.1 + 32 * 0.02) * 1.3


def test_batches_take_turns_where_fewer_of_them_keep_the_busiest_node_occupied() -> None:
    """Node 0 has 14 of 16 blocks: two batches occupy it all the time. Mutation: the first batch that is due begins."""
    cluster = backend()
    cluster.submit(Serve(1, "small", (Stage(0, 0, 13), Stage(1, 14, 14), Stage(2, 15, 15)), SIZES, KV))
    cluster.submit(Dispatch(1, tuple(request(number, 51) for number in range(3))))
    events = play(cluster)
    begin, end = 3 * 0.1 * 14 / 16, 3 * (0.1 + 50 * 0.02) * 14 / 16
    assert max(first_tokens(events).values()) == pytest.approx(begin + 0.1 * 2 / 16)
    assert list(finished(events).values()) == pytest.approx([end] * 3, abs=0.1)


def test_a_moved_boundary_loses_no_token() -> None:
    """One node, then two, then the other alone: the KV follows over the link and every request ends with its tokens."""
    for kv in ("copy", "recompute"):
        cluster = backend()
        serve(cluster, 1, 0)
        cluster.submit(Dispatch(1, tuple(request(i, 40) for i in range(6))))
        steps = {0.15: stages(1, 0), 0.3: stages(1), 0.45: stages(2, 1, 0, 1)}
        for at, after in steps.items():
            later(cluster, at, Repartition(1, after, kv, KV))
        events = play(cluster)
        assert {e.request_id: e.tokens for e in events if isinstance(e, RequestFinished)} == dict.fromkeys(range(6), 40)
        assert len(first_tokens(events)) == 6


def test_copied_kv_takes_the_time_of_its_bytes() -> None:
    """A long context moves over a slow NIC before the next iteration begins; recomputing it takes a prefill instead."""
    slow = replace(CLUSTER, nic_bytes_per_s=1e8, rdma_efficiency=1.0)
    took = {}
    for kv in ("copy", "recompute"):
        cluster = backend(slow)
        serve(cluster, 1, 0)
        cluster.submit(Dispatch(1, (request(0, 11, prompt=3000),)))
        later(cluster, 0.11, Repartition(1, stages(1), kv, KV))
        took[kv] = finished(play(cluster))[0]
    tokens = 3001  # the prompt, and the first token's KV is written by the step that was under way
    kv_s = tokens * small_model().kv_bytes_per_token / 1e8
    assert took["copy"] == pytest.approx(0.1 + 10 * 0.02 + kv_s, rel=0.01)
    assert took["recompute"] == pytest.approx(0.1 + 10 * 0.02 + 0.1 - 0.02, rel=0.01)


def test_iterations_under_way_end_on_the_stages_they_began_with() -> None:
    cluster = backend()
    serve(cluster, 1, 0, 1)
    cluster.submit(Dispatch(1, (request(0, 2),)))
    later(cluster, 0.06, Repartition(1, stages(2), "copy", KV))
    # The prefill is on node 1 by then: it ends there after 0.1 s, the second token is node 2's.
    events = play(cluster)
    assert first_tokens(events)[0] == pytest.approx(0.1)
    assert finished(events)[0] == pytest.approx(0.12, abs=0.01)


def test_a_lost_node_that_only_an_old_iteration_needs_fails_the_instance() -> None:
    cluster = backend(failures=((1, 0.07),))
    serve(cluster, 1, 0, 1)
    cluster.submit(Dispatch(1, (request(0, 2),)))
    later(cluster, 0.06, Repartition(1, stages(2), "copy", KV))
    kinds = [type(event).__name__ for event in play(cluster)]
    assert kinds == ["NodeLost", "CommandFailed"]


def test_a_stopped_instance_frees_its_node() -> None:
    cluster = backend()
    serve(cluster, 1, 0)
    serve(cluster, 2, 0)
    cluster.submit(Dispatch(1, (request(0, 1000),)))
    cluster.submit(Dispatch(2, (request(1, 2),)))
    later(cluster, 0.05, StopInstance(1))
    assert finished(play(cluster)) == pytest.approx({1: 0.05 + 0.1 + 0.02})


def test_a_node_with_other_hardware_computes_at_its_own_speed() -> None:
    """Node 1 has tables of its own: half as fast."""
    half = replace(TABLE, prefill_s=(0.2,), decode_s=(0.04,))
    override = NodeOverride(nodes=(1,), compute=replace(CLUSTER.compute, measured=(half,)))
    cluster = backend(replace(CLUSTER, overrides=(override,)))
    for node in (0, 1):
        serve(cluster, node + 1, node)
        cluster.submit(Dispatch(node + 1, (request(node, 11),)))
    assert finished(play(cluster)) == pytest.approx({0: 0.3, 1: 0.6})


def test_kv_memory_that_runs_out_costs_a_prefill() -> None:
    """Two requests of 8 + 11 tokens in 30: after 8 steps the second is preempted; it waits and is prefilled again."""
    cluster = backend()
    cluster.submit(Serve(1, "small", stages(0), SIZES, 30))
    cluster.submit(Dispatch(1, (request(0, 11), request(1, 11))))
    events = play(cluster)
    ends = finished(events)
    assert [event for event in events if isinstance(event, RequestPreempted)] == [
        RequestPreempted(pytest.approx(0.1 + 7 * 0.02), 1, 1)
    ]
    assert ends[0] == pytest.approx(0.1 + 10 * 0.02)
    assert ends[1] == pytest.approx(0.1 + 10 * 0.02 + 0.1 + 2 * 0.02), "7 + 1 of its tokens came before, one with the prefill"


def test_kv_memory_changes_with_the_stages() -> None:
    """Batches that exist and new ones have the new memory."""
    cluster = backend()
    serve(cluster, 1, 0)
    cluster.submit(Repartition(1, stages(0, 1), "copy", 50))
    assert [batch.scheduler.kv_tokens for batch in cluster._instances[1]._batches] == [50, 50]


def test_kv_moves_for_blocks_that_change_nodes_only() -> None:
    """Mutation: ranges that do not overlap, or that stay where they are."""
    assert _moves((Stage(0, 0, 3),), (Stage(1, 0, 1), Stage(0, 2, 3))) == [(0, 1, 0, 1)]
    assert _moves((Stage(0, 0, 1), Stage(1, 2, 3)), (Stage(0, 0, 2), Stage(1, 3, 3))) == [(1, 0, 2, 2)]
