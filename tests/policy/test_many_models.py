"""More models than nodes: minima that give way to a first replica, and minima that no cluster can hold."""

from __future__ import annotations

import pytest

from lambdascale.control import build_system, drive
from lambdascale.core import UserError
from lambdascale.core.commands import Command
from lambdascale.core.events import Event
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.metrics import Recorder, requests_table
from tests.policy.world import World, without


def test_a_minimum_gives_way_to_a_model_whose_requests_wait() -> None:
    """A node is lost; b, whose replica it had, gets that of a or c which has been idle longer, and keeps it.

    Mutation: a minimum kept whatever waits.
    """
    world = World(nodes=3, models="abc")
    world.at = 1.0
    world.arrive(1, "a")
    world.finish(0)
    world.lose(1)
    world.arrive(1, "b")
    assert without(world.tick(), "timer") == ["stop i3", "release 2c keep", "allocate 2b", "load t4 2b ssd 0123"]
    assert world.deliver("t4") == ["serve i4 2b", "dispatch i4 1"]
    world.finish(1)
    while world.ticking:
        assert without(world.tick(), "timer") == [], "two nodes for three minima: what is in place stays, and the looks end"
    world.arrive(1, "c")
    assert without(world.tick(), "timer", "multicast") == ["stop i1", "release 0 keep", "allocate 0c"], "a has been idle longest"


def test_a_minimum_gives_way_only_where_nothing_else_is_free() -> None:
    """Mutations: a free node overlooked; a surplus replica, idle for a shorter time, kept instead of the minimum."""
    world = World(nodes=4, models="abc")
    world.lose(1)
    world.arrive(1, "b")
    assert without(world.tick(), "timer", "load") == ["allocate 3b"]
    world = World(nodes=4, models="abc", keep_alive_s=100.0, target=1)
    world.arrive(2, "a")
    world.tick()
    for transfer in world.open_transfers():
        world.deliver(transfer)
    world.finish(0, 1)
    world.lose(1)
    world.arrive(1, "b")
    assert without(world.tick(), "timer", "load", "stop") == ["release 0 keep", "allocate 0b"]


def test_a_busy_minimum_is_not_taken_and_then_is() -> None:
    """Mutation: replicas with requests, or in a transfer, taken. Claims wait for the first that is idle."""
    world = World(nodes=3, models="abc")
    world.arrive(1, "a")
    world.arrive(1, "c")
    world.lose(1)
    world.arrive(1, "b")
    assert without(world.tick(), "timer") == []
    world.finish(1)
    assert without(world.tick(), "timer", "load") == ["stop i3", "release 2c keep", "allocate 2b"]


@pytest.mark.parametrize(
    ("busy", "released"),
    [
        ("", ["release 0 keep", "allocate 0e"]),
        ("ac", ["release 1b keep", "release 1d keep", "allocate 1e"]),
        ("abc", ["release 1d keep", "allocate 1e"]),
        ("abcd", []),
    ],
)
def test_idle_replicas_of_a_node_give_way_together(busy: str, released: list[str]) -> None:
    """Node 0 has a and c, a GPU each, and two free ones; node 1 has b, one, and d, two, and one free. e needs three.

    Mutations: GPUs that are free already not counted; one replica released at most, or more than are needed; GPUs counted
    together that are not on one node.
    """
    world = World(nodes=2, gpus=4, models="abcde", gpus_per_replica={"a": 1, "b": 1, "c": 1, "d": 2, "e": 3})
    assert without(world.start, "load", "serve") == ["allocate 0", "allocate 1b", "allocate 0c", "allocate 1d"]
    for model in busy:
        world.arrive(1, model)
    world.arrive(1, "e")
    assert without(world.tick(), "timer", "load", "stop") == released


def idle_from(world: World, **times: float) -> None:
    """Every model's replica answers a request at its time, and is idle from then on."""
    for model, world.at in sorted(times.items(), key=lambda item: item[1]):
        world.arrive(1, model)
        world.finish(world.requests - 1)


def test_of_several_idle_on_a_node_the_one_idle_longest_gives_way() -> None:
    """a and c are on node 0. Mutation: the model that is configured first."""
    world = World(nodes=2, gpus=2, models="abcd")
    world.lose(1)
    idle_from(world, a=4.0, c=2.0)
    world.arrive(1, "b")
    assert without(world.tick(), "timer", "load", "stop") == ["release 0c keep", "allocate 0b"]


@pytest.mark.parametrize(("d", "freed"), [(5.0, ["release 2c keep"]), (2.0, ["release 0 keep", "release 0d keep"])])
def test_a_node_is_idle_from_the_last_of_those_that_give_way_together(d: float, freed: list[str]) -> None:
    """e needs two GPUs: those of a and d on node 0, or that of c and a free one on node 2. Mutation: the first decides."""
    world = World(nodes=3, gpus=2, models="abcde", gpus_per_replica={"a": 1, "b": 1, "c": 1, "d": 1, "e": 2})
    assert without(world.start, "load", "serve") == ["allocate 0", "allocate 1b", "allocate 2c", "allocate 0d"]
    idle_from(world, a=1.0, b=6.0, c=3.0, d=d)
    world.arrive(1, "e")
    assert without(world.tick(), "timer", "load", "stop") == [*freed, f"allocate {freed[0].split()[1][0]}e"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": "abc", "nodes": 2}, "min_replicas=1 of 3 models needs 3 GPUs, cluster small has 2; 0 scales to zero"),
        ({"models": "a", "nodes": 2, "min_replicas": 3}, "min_replicas=3 needs as many nodes, cluster small has 2"),
        ({"models": "ab", "nodes": 2, "gpus": 2, "gpus_per_replica": 2, "min_replicas": 2}, "2 models needs 8 GPUs"),
    ],
)
def test_a_minimum_that_the_cluster_cannot_hold_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        World(**settings)
    World(**(settings | {"min_replicas": 0}))


class Deadline:
    """Observer that ends a run which does not end."""

    def on_event(self, event: Event) -> None:
        assert event.at < 600, "requests wait for ever"

    def on_command(self, at: float, command: Command) -> None: ...


@pytest.mark.parametrize("system", ["lambdascale", "serverlessllm"])
def test_a_run_with_fewer_nodes_than_models_left_ends(system: str) -> None:
    """Twelve models on as many nodes with a replica each; four nodes are lost, and all models get requests until 60 s."""
    overrides = [f"system={system}", "model=llama2_7b", "model_count=12", "workload=constant", "workload.duration_s=60"]
    failures = "backend.node_failures=[[1,0.5],[4,0.6],[9,0.7],[11,20.0]]"
    experiment = build(compose([*overrides, "workload.zipf_exponent=0", "workload.rate_rps=2", failures]))
    models = experiment.models
    trace = experiment.workload.load(models=[model.name for model in models], seed=1).requests
    backend = experiment.backend.build(
        cluster=experiment.cluster, models=models, requests=trace, batching=experiment.system.batching, seed=1
    )
    recorder = Recorder()
    drive(build_system(experiment.system, cluster=experiment.cluster, models=models), backend, [recorder, Deadline()])
    rows = requests_table(recorder, system).to_pandas()
    assert set(rows.model) == {model.name for model in models}
    assert set(rows.status) == {"ok"}


def test_two_models_of_one_name_are_refused() -> None:
    """Mutation: the second takes the first one's place, and its requests."""
    with pytest.raises(UserError, match="model names must differ, got \\['a', 'a'\\]"):
        World(models="aa")
