"""Scale-in: replicas that serve are counted, surplus ones are drained and released, and nothing flaps."""

from __future__ import annotations

import pytest

from lambdascale.control import build_system, drive
from lambdascale.core.commands import AllocateNode
from lambdascale.core.events import RequestFinished
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.metrics import Recorder, gpu_usage
from lambdascale.metrics.tables import gpu_seconds
from lambdascale.sim import SimConfig
from lambdascale.testing.starts import SpreadStart
from lambdascale.testing.systems import small_cluster, with_kv_tokens
from tests.policy.world import World, without


def loaded(*requests: int, keep_alive_s: float = 0.0, model: str = "a", **settings: object) -> tuple[World, list[list[int]]]:
    """Replicas i1, i2, ... on nodes 0, 1, ... with so many requests each, of eight slots; a replica is wanted for every four.

    Returns the requests of each replica, too.
    """
    count = len(requests)
    defaults: dict[str, object] = {"nodes": count, "min_replicas": 1, "target": 4, "max_batch": 8}
    world = World("faasnet", **(defaults | settings), keep_alive_s=keep_alive_s)
    world.arrive(4 * count, model)
    world.tick()
    for transfer in world.open_transfers():
        world.deliver(transfer)
    world.arrive(4 * count, model)
    at: dict[int, list[int]] = {}
    for request, instance in world.at_instance.items():
        at.setdefault(instance, []).append(request)
    assert [len(there) for there in at.values()] == [8] * count
    for there, keep in zip(at.values(), requests, strict=True):
        world.finish(*there[keep:])
    return world, [there[:keep] for there, keep in zip(at.values(), requests, strict=True)]


# -- what serves ------------------------------------------------------------------------------------------------------


def test_the_last_serving_replica_stays_while_others_load() -> None:
    """Mutation: replicas that load counted as if they served (13B on ServerlessLLM: none served for 15.6 of 590 s)."""
    world = World("serverlessllm", nodes=3, keep_alive_s=0.0)
    world.arrive(6)
    assert without(world.tick(), "timer") == ["allocate 1", "allocate 2", "load t2 1 ssd 0123", "load t3 2 ssd 0123"]
    world.finish(*range(6))
    assert world.tick() == ["timer 0.2"], "i1 is idle, and the only one that serves"
    assert world.arrive(1) == ["dispatch i1 6"]
    world.finish(6)
    assert world.deliver("t2") == ["serve i2 1"]
    assert world.tick() == ["stop i1", "release 0 keep", "timer 0.3"], "one of two that serve, longest idle"
    world.deliver("t3")
    assert world.tick() == ["stop i2", "release 1 keep"]


def test_as_many_serve_as_are_desired_while_others_load() -> None:
    world = World("serverlessllm", nodes=4, min_replicas=2, target=1, max_batch=1, keep_alive_s=0.0)
    world.arrive(4)
    world.tick()
    world.finish(0, 1, 2)
    assert world.tick() == ["timer 0.2"], "one request wants a replica, the minimum is two, and two serve"
    world.deliver("t3")
    assert without(world.tick(), "timer") == ["stop i1", "release 0 keep"]


def test_nodes_of_a_pipeline_serve() -> None:
    """Two nodes that serve together while they load are as good as two replicas."""
    world = World(nodes=4, min_replicas=2, keep_alive_s=0.0)
    world.arrive(9)
    world.tick()
    world.deliver("t3", 4)
    world.finish(0, 1, 4, 5, 6, 7, 8)
    assert world.tick() == ["timer 0.2"], "i1 and i2 feed, i3 gets blocks"
    world.finish(2, 3)
    world.deliver("t3")
    assert without(world.tick(), "timer") == ["stop i1", "release 0 keep", "stop i2", "release 1 keep"]


# -- draining ---------------------------------------------------------------------------------------------------------


def test_a_surplus_replica_gets_no_requests_and_is_released_when_empty() -> None:
    """Mutations: nothing drained under steady load (13B at 6/s held 5.1 replicas for 2.9); requests sent to a drained one."""
    world, (_, _, last) = loaded(2, 2, 1)
    assert world.tick() == ["timer 0.2"], "i3 is drained"
    assert world.arrive(2) == ["dispatch i1 24", "dispatch i2 25"]
    world.finish(24, 25)
    assert world.tick() == ["timer 0.3"]
    assert world.finish(*last) == []
    assert world.tick() == ["stop i3", "release 2 keep", "timer 0.4"]


def drained(world: World) -> list[int]:
    """Positions (1, 2, ...) of the drained among the instances that serve."""
    return [n for n, instance in enumerate(world.plane.fleet.instances.values(), 1) if instance.draining]


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        # With two of three, answers may take half as long again: five requests become 7.5, six become nine, which want three.
        ((2, 2, 1), [3]),
        ((2, 2, 2), []),
        ((3, 2, 1), []),
        # With one of two, three become six, and two become four.
        ((1, 1), [1]),
        ((1, 2), []),
        # Two of four at once: three requests become four and a half with two of three left, then nine with one of two.
        ((1, 1, 1, 1), [1, 2]),
        ((4,), []),
        # With four of five, thirteen become 16.25, which want five, and twelve become fifteen.
        ((3, 3, 3, 2, 2), []),
        ((3, 3, 2, 2, 2), [3]),
    ],
)
def test_a_busy_replica_is_drained_if_the_others_will_not_need_it_back(requests: tuple[int, ...], expected: list[int]) -> None:
    """Mutations: no look ahead; a look ahead for the first of several only."""
    world, _ = loaded(*requests)
    world.tick()
    assert drained(world) == expected


def test_replicas_that_were_not_in_use_need_no_look_ahead() -> None:
    """Mutations: the load on the others thought to grow; one that is idle by chance thought to be unused (constant load flaps).

    Eight requests on two of three replicas want two of them.
    """
    world, _ = loaded(4, 4, 0)
    assert without(world.tick(), "timer") == ["stop i3", "release 2 keep"]
    world, _ = loaded(4, 4, 0, keep_alive_s=0.25)
    world.tick()
    world.tick()
    world.arrive(1)
    world.finish(24)  # on i3, at 0.2
    world.tick()
    world.tick()
    assert drained(world) == [], "at 0.4, idle for 0.2 seconds"
    assert without(world.tick(), "timer") == ["stop i3", "release 2 keep"]


def test_a_replica_that_still_loads_does_none_of_the_others_work() -> None:
    """Three requests on two of three: two could do with answers half as long again, one not with answers twice as long.

    Mutation: what loads counted among those that take the drained one's work over.
    """
    world = World("serverlessllm", nodes=3, target=4, max_batch=8, keep_alive_s=0.0)
    world.arrive(12)
    assert without(world.tick(), "timer", "allocate") == ["load t2 1 ssd 0123", "load t3 2 ssd 0123"]
    world.deliver("t2")
    world.finish(*range(2, 8), *range(9, 12))
    assert world.at_instance[0] == world.at_instance[1] != world.at_instance[8]
    world.tick()
    assert drained(world) == []
    world.deliver("t3")
    assert without(world.tick(), "timer") == ["stop i3", "release 2 keep"]


def test_the_least_loaded_is_drained() -> None:
    """The longest idle of several idle ones goes first: test_autoscaling."""
    world, _ = loaded(2, 1, 2)
    world.tick()
    assert drained(world) == [2]


def test_of_equally_loaded_busy_ones_the_older_is_drained() -> None:
    """Replicas have a request each, and neither was ever idle. Mutation: the last answer taken for the beginning of idleness."""
    world, (first, second) = loaded(2, 2)
    for world.at, request in ((0.05, second[0]), (0.06, first[0])):
        world.finish(request)
    world.tick()
    assert drained(world) == [1]


def test_a_surplus_must_have_lasted_its_keep_alive() -> None:
    """Mutation: the load of the moment instead of the highest in the keep-alive."""
    world, _ = loaded(2, 2, 1, keep_alive_s=0.25)
    world.tick()  # at 0.1, the last look at 0.0 saw twelve requests
    world.tick()
    assert drained(world) == [], "0.2 seconds later"
    world.arrive(4)
    world.finish(24, 25, 26, 27)
    world.tick()
    assert drained(world) == [3], "0.3 seconds later; what came and went between two looks is not seen"


def test_a_look_at_more_load_starts_the_keep_alive_anew() -> None:
    world, _ = loaded(2, 2, 1, keep_alive_s=0.25)
    world.tick()
    world.arrive(5)
    world.tick()  # at 0.2: ten requests want three
    world.finish(*range(24, 29))
    for _ in range(2):
        world.tick()
        assert drained(world) == []
    world.tick()
    assert drained(world) == [3], "at 0.5"


def test_a_drained_replica_that_feeds_another_node_is_released_when_that_has_ended() -> None:
    """Requests wait for a node with more memory, which is fed by i1. Mutation: released in the middle of the transfer."""
    few = with_kv_tokens(small_cluster(3), 100, (0, 1)).overrides
    world, ((one,), (other,)) = loaded(1, 1, nodes=3, cluster={"overrides": few})
    world.tick()
    assert drained(world) == [1]
    world.finish(other)
    assert world.arrive(prompt=300) == []
    assert without(world.tick(), "timer") == ["allocate 2", "multicast t3 0:gpu>2"]
    world.finish(one)
    assert without(world.tick(), "timer") == []
    assert world.deliver("t3")[-1] == "dispatch i3 16"
    assert without(world.tick(), "timer") == ["stop i2", "release 1 keep", "stop i1", "release 0 keep"], "longest idle first"


# -- back into service -------------------------------------------------------------------------------------------------


def test_a_drained_replica_serves_again_when_it_is_needed_and_no_node_is_taken() -> None:
    """Mutation: a scale-out instead, or the drained one forgotten."""
    world, _ = loaded(2, 2, 1, nodes=4)
    world.tick()
    assert drained(world) == [3]
    world.arrive(4)
    assert world.tick() == ["timer 0.3"]
    assert drained(world) == [], "nine requests want three replicas"
    assert world.arrive(1) == ["dispatch i3 28"]


@pytest.mark.parametrize("emptier", [0, 1])
def test_as_many_serve_again_as_are_needed_the_fullest_first(emptier: int) -> None:
    """Mutations: all of them; the emptiest first; the oldest."""
    world, requests = loaded(1, 1, 1, 1)
    world.tick()
    assert drained(world) == [1, 2]
    world.arrive(6)
    world.finish(*requests[emptier])
    world.arrive(1)
    released = [f"stop i{emptier + 1}", f"release {emptier} keep"]
    assert without(world.tick(), "timer") == released, "ten requests want three"
    assert drained(world) == []


def test_a_drained_replica_takes_what_no_other_has_room_for() -> None:
    """Mutation: a request queued beside free slots until the next look."""
    world, (_, (one,)) = loaded(1, 1)
    world.tick()
    assert drained(world) == [1]
    lines = world.arrive(8)
    assert [line.split()[1] for line in lines] == ["i2"] * 7 + ["i1"]
    assert drained(world) == []
    assert world.finish(one) == []


def test_a_lost_replica_brings_a_drained_one_back() -> None:
    world, _ = loaded(2, 2, 1)
    world.tick()
    assert world.lose(0) == ["stop i1", "dispatch i2 0,1"]
    world.lose(1)
    assert drained(world) == [], "nobody else serves"


# -- the last replica, fixed numbers, other models -----------------------------------------------------------------------


def test_the_last_replica_goes_when_it_was_idle_for_its_keep_alive() -> None:
    """Mutation: looks alone decide: a request shorter than the interval is never seen, and its replica released."""
    world = World(nodes=1, min_replicas=0, keep_alive_s=0.25, target=4)
    world.arrive(1)
    world.tick()
    world.deliver("t1")
    world.finish(0)
    for at in (0.1, 0.2, 0.3, 0.4, 0.5):
        assert without(world.tick(at), "timer") == []
        world.at = at + 0.05
        world.arrive(1)
        world.finish(world.requests - 1)
    assert without(world.tick(0.7), "timer") == []
    assert without(world.tick(0.8), "timer") == ["stop i1", "release 0 keep"]


def test_a_fixed_number_is_never_drained() -> None:
    world, _ = loaded(1, 0, 0, min_replicas=3, max_replicas=3)
    assert world.tick() == []
    assert drained(world) == []


def two_models(*requests: int) -> tuple[World, list[list[int]]]:
    """Replicas of a as in ``loaded``; none of b, and no free node. Keep-alive is long."""
    return loaded(*requests, keep_alive_s=100.0, models="ab", min_replicas=0)


def test_busy_replicas_of_other_models_are_drained_to_make_room() -> None:
    """Mutation: idle ones only; then b waits for as long as requests of a spread over all nodes."""
    world, (_, _, last) = two_models(2, 2, 1)
    world.arrive(1, "b")
    assert without(world.tick(), "timer") == []
    assert drained(world) == [3]
    world.finish(*last)
    assert without(world.tick(), "timer")[:3] == ["stop i3", "release 2 keep", "allocate 2b"]
    assert drained(world) == [], "no more than b lacks"


def test_as_many_are_drained_as_the_other_model_lacks() -> None:
    """Mutation: one at a look."""
    world, _ = two_models(1, 1, 1, 1)
    world.arrive(5, "b")
    world.tick()
    assert drained(world) == [1, 2]


def test_what_is_drained_already_makes_room_too() -> None:
    """Mutation: one more drained at every look."""
    world, _ = two_models(1, 1, 1, 1)
    world.arrive(1, "b")
    for _ in range(3):
        world.tick()
        assert drained(world) == [1]


def test_a_drained_replica_that_its_model_needs_again_makes_no_room() -> None:
    """Mutation: what is drained and empty released for a, which wants a second, before b, whose turn comes later, needs it."""
    world, (_, _, last) = loaded(2, 2, 1, models="ab", model="b", min_replicas=0, nodes=4)
    world.arrive(4, "a")
    world.tick()
    assert drained(world) == [3]
    world.finish(*last)
    world.arrive(5, "b")
    world.arrive(1, "a")
    assert without(world.tick(), "timer") == []
    assert drained(world) == []


def test_no_room_is_made_by_the_last_that_serve() -> None:
    """Mutation: replicas that load counted as if they served."""
    world = World("serverlessllm", nodes=2, models="ab", min_replicas=0, keep_alive_s=100.0)
    world.arrive(1)
    world.tick()
    world.deliver("t1")
    world.arrive(2)
    assert without(world.tick(), "timer", "load") == ["allocate 1"]
    world.finish(0, 1)
    world.arrive(1, "b")
    assert without(world.tick(), "timer") == [], "a has a request, i1 has it"


def test_shares_are_one_replica_and_go_together() -> None:
    """A pipeline of four shares, and another of four: one of them is to spare."""
    world = World(nodes=8, min_replicas=0, start=SpreadStart(consolidate=False), keep_alive_s=0.0)
    world.arrive(4)
    world.tick()
    for transfer in world.open_transfers():
        world.deliver(transfer)
    world.finish(1, 2, 3)
    released = [line for line in world.tick() if line.startswith("release")]
    assert len(released) == 4
    assert world.finish(0) == []


# -- in time -------------------------------------------------------------------------------------------------------------


def steady(process: str, system: str) -> tuple[float, int]:
    """13B at 6 requests/s for 600 s: mean number of GPUs, and number of nodes started."""
    workload = ["workload=constant", "workload.rate_rps=6", "workload.duration_s=600", f"workload.process={process}"]
    experiment = build(compose([f"system={system}", "model=llama2_13b", *workload]))
    trace = experiment.workload.load(models=[model.name for model in experiment.models], seed=1)
    assert isinstance(experiment.backend, SimConfig)
    backend = experiment.backend.build(
        cluster=experiment.cluster,
        models=experiment.models,
        requests=trace.requests,
        batching=experiment.system.batching,
        seed=1,
    )
    recorder = Recorder()
    drive(build_system(experiment.system, cluster=experiment.cluster, models=experiment.models), backend, [recorder])
    last = max(event.at for _, event in recorder.entries if isinstance(event, RequestFinished))
    starts = sum(isinstance(entry, AllocateNode) for _, entry in recorder.entries)
    return gpu_seconds(gpu_usage(recorder), recorder.end_s) / last, starts


@pytest.mark.parametrize("system", ["lambdascale", "serverlessllm", "ideal"])
def test_steady_load_holds_what_it_wants(system: str) -> None:
    """Poisson arrivals want 2.9 replicas on average, 3.4 as the highest in the keep-alive; undrained, 5.1 are held."""
    held, _ = steady("poisson", system)
    assert 2.9 < held < 4.1
