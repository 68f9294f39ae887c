"""Predictions by which pipelines are chosen, formed and filled: first passes, rounds of loads, times until nodes are complete."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lambdascale.control.prospects import costs_now, left_s, load_costs
from lambdascale.control.state import Allocation
from lambdascale.core import ComputeSpec, NodeOverride
from lambdascale.testing.systems import small_cluster, small_model
from tests.policy.world import World

SMALL = small_cluster()
TOKEN_S = 2 * small_model().params / 5e12  # at half of 1e13 FLOPs
PAIR_S = 4 * 16 * 1024 / 5e12  # a token attended to, 16 layers of 1,024 units
HOP_S = 1024 * 2 / 3.2e9  # a token's activations at four fifths of 4 GB/s


def attended(prompt: int) -> int:
    """Pairs of tokens in a prompt's attention: each with itself and those before it."""
    return sum(range(1, prompt + 1))


@pytest.mark.parametrize(
    ("prompts", "mean"), [((1000,), 1000), ((400, 600), 500), ((1000, 1001), 1000), ((1000, 1001, 1001), 1001)]
)
def test_first_passes_of_what_waits_are_those_of_its_mean_prompt(prompts: tuple[int, ...], mean: int) -> None:
    """Mutations: weights read for the passes, or overheads counted in them; attention of one token with one; no hop."""
    world = World(nodes=1)
    world.arrive(2, prompt=7)  # these run
    for prompt in prompts:
        world.arrive(prompt=prompt)
    costs = costs_now(world.plane.fleet, world.plane.fleet.models["a"])
    assert costs.requests == len(prompts)
    assert costs.overhead_s == SMALL.compute.iteration_overhead_s
    assert costs.batch_s == pytest.approx([c * (mean * TOKEN_S + attended(mean) * PAIR_S) for c in (1, 2)])
    assert costs.hop_s == pytest.approx([1e-4 + c * mean * HOP_S for c in (1, 2)])


def test_without_a_queue_they_are_those_of_what_runs_and_follow_it() -> None:
    """Mutations: predictions kept when requests arrive, end, or are sent to instances."""
    world = World(nodes=1, max_batch=1)
    fleet = world.plane.fleet
    state = fleet.models["a"]

    def prompt_and_requests() -> tuple[int, int]:
        costs = costs_now(fleet, state)
        return round((costs.hop_s[0] - 1e-4) / HOP_S), costs.requests

    assert prompt_and_requests() == (1, 1), "nothing is known"
    world.arrive(prompt=500)
    assert prompt_and_requests() == (500, 1)
    world.arrive(prompt=700)
    assert prompt_and_requests() == (700, 1)
    world.arrive(prompt=900)
    assert prompt_and_requests() == (800, 2)
    world.finish(0)
    assert prompt_and_requests() == (900, 1)
    world.finish(1, 2)
    assert prompt_and_requests() == (1, 1)


def test_predictions_follow_requests_that_new_replicas_take() -> None:
    """Nothing arrives or ends meanwhile. Mutation: a prediction kept although commands were given since."""
    world = World(nodes=2, max_batch=1, target=1)
    fleet = world.plane.fleet
    for prompt in (100, 200, 300):
        world.arrive(prompt=prompt)
    world.tick()
    assert costs_now(fleet, fleet.models["a"]).requests == 2
    assert world.deliver("t2") == ["serve i2 1", "dispatch i2 1"]
    costs = costs_now(fleet, fleet.models["a"])
    assert (costs.requests, round((costs.hop_s[0] - 1e-4) / HOP_S)) == (1, 300)


def test_the_slowest_kind_of_node_is_what_passes_are_predicted_for() -> None:
    """Mutations: the fastest kind, or the first."""
    slow = ComputeSpec(flops_efficiency=0.25, bandwidth_efficiency=0.5, iteration_overhead_s=0.1)
    overrides = (NodeOverride(nodes=(1,), compute=slow), NodeOverride(nodes=(2,), nic_bytes_per_s=1e9))
    world = World(nodes=3, cluster={"overrides": overrides})
    world.arrive(2)
    world.arrive(prompt=1000)
    costs = costs_now(world.plane.fleet, world.plane.fleet.models["a"])
    assert costs.overhead_s == 0.1
    assert costs.batch_s[0] == pytest.approx(2 * (1000 * TOKEN_S + attended(1000) * PAIR_S))
    assert costs.hop_s[0] == pytest.approx(1e-4 + 4 * 1000 * HOP_S)


@pytest.mark.parametrize(
    ("nodes", "copies", "rate"),
    [
        ((0, 1), 2, 2e9),  # host memory, over PCIe
        ((0, 1), 1, 0.5e9),  # node 1 from its SSD
        ((1, 2), 1, 0.25e9),  # node 2 from a slower one
        ((3,), 4, 0.2e9),  # host memory, over a PCIe that is slower than the SSD
    ],
)
def test_a_round_of_loads_is_the_largest_block_on_the_slowest_node(nodes: tuple[int, ...], copies: int, rate: float) -> None:
    overrides = (NodeOverride(nodes=(2,), ssd_bytes_per_s=0.25e9), NodeOverride(nodes=(3,), pcie_bytes_per_s=0.2e9))
    world = World(nodes=4, copies=copies, min_replicas=0, cluster={"overrides": overrides})
    state = world.plane.fleet.models["a"]
    assert load_costs(world.plane.fleet, state, nodes).round_s == pytest.approx(max(state.block_bytes) / rate)


@pytest.mark.parametrize(
    ("wanted", "held", "first_at", "left"),
    [
        (4, 0, None, 4 * 3.0),  # a block may take as long as nothing has come
        (4, 1, 9.0, 3 * 3.0),  # one block says nothing of the pace
        (4, 2, 9.0, 2 * 1.0),
        (4, 3, 9.0, 1 * 0.5),
        (4, 4, 9.0, 0.0),
        (2, 2, 9.0, float("inf")),  # a share never serves alone
    ],
)
def test_time_until_a_node_is_complete(wanted: int, held: int, first_at: float | None, left: float) -> None:
    """Allocated at 7, now it is 10. Mutations: the pace since the allocation; the first block counted among the later ones."""
    allocation = Allocation(0, "a", set(range(wanted)), 4, blocks=set(range(held)), began_at=7.0, first_at=first_at)
    assert left_s(allocation, 10.0) == left


def test_a_fast_network_makes_no_pass_faster() -> None:
    world = World(nodes=1, cluster={"nic_bytes_per_s": 8e9, "compute": replace(SMALL.compute, iteration_overhead_s=0.01)})
    world.arrive(prompt=1000)
    costs = costs_now(world.plane.fleet, world.plane.fleet.models["a"])
    assert (costs.overhead_s, costs.hop_s[0]) == (0.01, pytest.approx(1e-4 + 500 * HOP_S))
    assert costs.batch_s[0] == pytest.approx(1000 * TOKEN_S + attended(1000) * PAIR_S)
