"""The observed state of a cluster: figures of one moment, and nothing kept of what has ended."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest

from lambdascale.core import Failure, MulticastPlan, Request, Send
from lambdascale.core.commands import (
    AllocateNode,
    CancelTransfer,
    Dispatch,
    FailRequest,
    Repartition,
    Serve,
    StartMulticast,
    StopInstance,
    SwitchMode,
)
from lambdascale.core.events import BlockArrived, NodeJoined, NodeLost, RequestArrived, RequestFinished, TokensProduced
from lambdascale.core.plan import Stage
from lambdascale.live.serving.exposition import Collector
from lambdascale.live.serving.state import ClusterState


@pytest.fixture
def state() -> ClusterState:
    state = ClusterState(2)
    for node in (0, 1):
        state.on_event(NodeJoined(0.0, node))
    return state


def arrive(state: ClusterState, number: int) -> Request:
    request = Request(number, 0.0, "m", 2, 4)
    state.on_event(RequestArrived(0.0, request))
    return request


@pytest.fixture
def often() -> Iterator[None]:
    """Let threads take turns all the time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("often")
def test_all_figures_are_of_one_moment(state: ClusterState) -> None:
    """Every answer takes a second to its first token: so many seconds, so many observations, in each exposition."""
    stop = threading.Event()

    def observe() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            arrive(state, number)
            state.on_event(TokensProduced(1.0, 1, number, 1, "pipeline"))
            state.on_event(RequestFinished(1.0, 1, number, 4))

    thread = threading.Thread(target=observe)
    thread.start()
    try:
        for _ in range(300):
            samples = {s.name: s.value for metric in Collector(state).collect() for s in metric.samples if not s.labels}
            count = samples["lambdascale_ttft_seconds_count"]
            assert samples["lambdascale_ttft_seconds_sum"] == count
            assert samples["lambdascale_first_tokens_from_pipelines_total"] == count
            assert samples["lambdascale_requests_arrived_total"] - count in (0, 1)
            assert samples["lambdascale_output_tokens_total"] == 4 * samples["lambdascale_requests_finished_total"]
    finally:
        stop.set()
        thread.join()


def test_readings_stay_what_they_were(state: ClusterState) -> None:
    """Mutation: the counters themselves handed out, which go on changing while they are formatted."""
    readings = state.readings()
    arrive(state, 1)
    state.on_event(TokensProduced(1.0, 1, 1, 1, "pipeline"))
    assert (readings.counts.arrived, readings.counts.from_pipelines, sum(readings.ttft_counts)) == (0, 0, 0)


def sizes(state: ClusterState) -> dict[str, int]:
    found = {key: len(value) for key, value in vars(state).items() if hasattr(value, "__len__")}
    return found | {f"running {number}": len(instance.running) for number, instance in state._instances.items()}


def test_nothing_is_kept_of_what_has_ended(state: ClusterState) -> None:
    """Finished, failed and restarted requests, also where words about them come late; transfers; instances."""
    plan = MulticastPlan(members=(0, 1), sources=(0,), blocks=2, rounds=((Send(0, 1, 0),), (Send(0, 1, 1),)))

    def turn(number: int) -> None:
        base = 10 * number
        requests = [arrive(state, base + i) for i in range(4)]
        state.on_command(1.0, Serve(base, "m", (Stage(0, 0, 0), Stage(1, 1, 1)), (1, 1), 100))
        state.on_command(1.0, Serve(base + 1, "m", (Stage(1, 0, 1),), (1, 1), 100))
        state.on_command(1.0, Dispatch(base, tuple(requests[:3])))
        state.on_event(TokensProduced(1.0, base, base, 1, "local"))
        state.on_event(RequestFinished(1.0, base, base, 4))
        state.on_event(RequestFinished(1.0, base, base + 1, 0))  # aborted before its first token
        state.on_command(1.0, SwitchMode(base, ((base, base + 1), (base + 2, base + 1)), "recompute"))
        state.on_command(1.0, Dispatch(base + 1, (requests[0],)))  # of one that has ended
        state.on_command(1.0, StopInstance(base + 1))
        state.on_event(RequestFinished(1.0, base + 1, base + 2, 4))
        state.on_command(1.0, FailRequest(base + 3, Failure("no_node", "no")))
        state.on_command(1.0, StartMulticast(base, "m", plan, (1, 1), ("gpu",), "one_sided"))
        state.on_command(1.0, StartMulticast(base + 1, "m", plan, (1, 1), ("gpu",), "one_sided"))
        state.on_command(1.0, CancelTransfer(base))
        for block in (0, 1):
            state.on_event(BlockArrived(1.0, base + 1, 1, "m", block))

    turn(0)
    before = {key: size for key, size in sizes(state).items() if key != "_ttft"}
    for number in range(1, 30):
        turn(number)
    assert {key: size for key, size in sizes(state).items() if key != "_ttft"} == before
    assert state.snapshot()["requests"]["queued"] == 0


def test_a_lost_node_takes_its_gpus_and_comes_back(state: ClusterState) -> None:
    state.on_command(0.0, AllocateNode(1, "m", 4))
    state.on_event(NodeLost(2.0, 1))
    assert state.nodes_alive == 1
    state.on_event(NodeJoined(4.0, 1))
    assert state.nodes_alive == 2
    readings = state.readings()
    assert readings.counts.gpu_seconds == 8.0
    assert (readings.counts.nodes_lost, readings.counts.nodes_restarted) == (1, 1)


def test_serving_instances(state: ClusterState) -> None:
    assert not state.serves("m")
    state.on_command(0.0, Serve(5, "m", (Stage(0, 0, 1),), (1, 1), 100))
    assert state.serves("m")
    assert not state.serves("other")
    state.on_command(0.0, Repartition(5, (Stage(0, 0, 0), Stage(1, 1, 1)), "copy", 100))
    (pipeline,) = state.snapshot()["pipelines"]
    assert [stage["node"] for stage in pipeline["stages"]] == [0, 1]
    state.on_command(0.0, StopInstance(5))
    assert not state.serves("m")
