"""Models that are split over the GPUs of a node: figures worked out by hand. A prefill takes 0.1 s, a decode step 0.02 s."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from lambdascale.core import NodeOverride, UserError
from lambdascale.core.commands import Dispatch, StopInstance
from lambdascale.testing.systems import small_cluster, small_model
from tests.policy.test_simulator import CLUSTER, TABLE, Cluster, request, serve, shown
from tests.policy.world import World

SPLIT = replace(small_model(), gpus_per_replica=2)
PAIRS = replace(CLUSTER, gpus_per_node=2)


def pairs(max_batch: int = 1, **options: object) -> Cluster:
    return Cluster(cluster=PAIRS, models=(SPLIT,), max_batch=max_batch, **options)  # type: ignore[arg-type]  # options of several types


def test_a_request_alone_takes_as_long_as_on_one_gpu_that_held_everything() -> None:
    one = Cluster(max_batch=1).at(0.0, serve(1, 0), Dispatch(1, (request(0, 11),))).events()
    two = pairs().at(0.0, serve(1, 0), Dispatch(1, (request(0, 11),))).events()
    assert shown(two) == shown(one) == [(0.1, "TokensProduced", 0), (0.3, "RequestFinished", 0)]


@pytest.mark.parametrize("mode", ["continuous", "static"])
def test_two_batches_are_on_the_two_gpus_of_a_node_at_once(mode: str) -> None:
    """Each GPU takes 0.05 s of a prefill and 0.01 s of a step; one after the other the two requests take 0.28 s.

    Request 1 is prefilled from 0.05 to 0.15 s; request 0 waits behind it with its first step (until 0.16 s). Fixed batches are
    no exception: the prototype has an execution unit for each GPU. Mutation: one that has all GPUs to itself.
    """
    events = pairs(mode=mode).at(0.0, serve(1, 0), Dispatch(1, (request(0, 3), request(1, 3)))).events()
    assert shown(events) == [
        *[(0.1, "TokensProduced", 0), (0.15, "TokensProduced", 1), (0.18, "RequestFinished", 0), (0.19, "RequestFinished", 1)],
    ]


def test_two_long_answers_take_as_long_as_one() -> None:
    """A step of each batch takes 0.02 s in the steady state: 100 more steps are 2 s for both."""
    events = pairs().at(0.0, serve(1, 0), Dispatch(1, (request(0, 103), request(1, 103)))).events()
    assert shown(events)[2:] == [(2.18, "RequestFinished", 0), (2.19, "RequestFinished", 1)]


@pytest.mark.parametrize(
    ("at_s", "first_s"),
    [
        (0.135, 0.235),  # request 0 is on the second GPU with its second step, until 0.14 s: the first GPU is free at once
        (0.125, 0.230),  # it is on the first GPU, until 0.13 s
    ],
)
def test_a_long_run_lets_a_newcomer_in_as_soon_as_the_first_gpu_is_free(at_s: float, first_s: float) -> None:
    """Request 0's third step follows the newcomer's prefill through the GPUs; alone again, it has seven more to go."""
    cluster = pairs().at(0.0, serve(1, 0), Dispatch(1, (request(0, 11),))).at(at_s, Dispatch(1, (request(1, 1),)))
    assert shown(cluster.events()) == [
        (0.1, "TokensProduced", 0),
        *[(first_s, "TokensProduced", 1), (first_s, "RequestFinished", 1)],
        (round(first_s + 0.01 + 7 * 0.02, 6), "RequestFinished", 0),
    ]


def test_a_pipeline_over_nodes_of_two_gpus_has_four_batches_in_flight() -> None:
    """A request alone: 0.05 s, a hop, 0.05 s, a hop. The others follow at the 0.025 s that each GPU takes of a prefill."""
    requests = tuple(request(number, 1) for number in range(4))
    events = pairs().at(0.0, serve(1, 0, 1), Dispatch(1, requests)).events()
    assert [at for at, kind, _ in shown(events) if kind == "TokensProduced"] == [0.12, 0.145, 0.17, 0.195]


def test_models_on_different_gpus_of_a_node_do_not_wait_for_each_other() -> None:
    other = msgspec.structs.replace(serve(2, 0), model="other")
    table = replace(TABLE, model="other")
    both = replace(PAIRS, compute=replace(PAIRS.compute, measured=(TABLE, table)))
    cluster = Cluster(cluster=both, models=(small_model(), small_model("other")))
    cluster.at(0.0, serve(1, 0), other, Dispatch(1, (request(0, 3),)), Dispatch(2, (request(1, 3),)))
    assert [at for at, kind, _ in shown(cluster.events()) if kind == "RequestFinished"] == [0.14, 0.14]


def test_a_stopped_instance_leaves_the_gpus_free() -> None:
    """Request 0 is on the second GPU at 0.06 s, request 1 on the first."""
    cluster = pairs().at(0.0, serve(1, 0), Dispatch(1, (request(0, 3), request(1, 3))))
    cluster.at(0.06, StopInstance(1), serve(2, 0), Dispatch(2, (request(2, 1),)))
    assert shown(cluster.events()) == [(0.16, "TokensProduced", 2), (0.16, "RequestFinished", 2)]


def test_the_router_gives_a_replica_a_batch_for_each_of_its_gpus() -> None:
    world = World(nodes=1, gpus=2, gpus_per_replica=2, max_batch=2)
    assert [bool(world.arrive()) for _ in range(5)] == [True] * 4 + [False], "the fifth waits"
    assert set(world.at_instance) == {0, 1, 2, 3}


def test_fixed_batches_are_one_for_each_gpu() -> None:
    """Mutation: fixed batches that have all GPUs of a replica to themselves."""
    world = World(nodes=1, gpus=4, gpus_per_replica=4, max_batch=1, mode="static")
    assert [bool(world.arrive()) for _ in range(5)] == [True] * 4 + [False], "the fifth waits"


def test_the_batches_of_a_replica_share_the_memory_beside_the_weights() -> None:
    """Two GPUs of 4 GB, 90 % usable, hold 1 GB of weights: 6.2 GB of KV cache, half of it for each batch."""
    node = PAIRS.node(0)
    assert node.kv_tokens(SPLIT) == int(3.1e9 // SPLIT.kv_bytes_per_token)
    assert node.kv_tokens(replace(SPLIT, gpus_per_replica=3)) == 0


def test_a_node_uses_all_its_nics() -> None:
    override = NodeOverride(nodes=(1,), nics_per_node=4)
    cluster = replace(small_cluster(4), nics_per_node=2, overrides=(override, NodeOverride(nodes=(2,), nic_bytes_per_s=1e9)))
    assert [cluster.node(node).nic_bytes_per_s for node in range(4)] == [8e9, 16e9, 2e9, 8e9]
    for wrong in (0, -1):
        with pytest.raises(UserError, match="nics_per_node must be positive"):
            replace(small_cluster(), nics_per_node=wrong)
        with pytest.raises(UserError, match="nics_per_node must be positive"):
            NodeOverride(nodes=(0,), nics_per_node=wrong)
