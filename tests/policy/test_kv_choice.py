"""KV of requests that change nodes with ``kv: cheapest``: copied or recomputed, whichever keeps requests waiting less.

By hand, for ``pipelined()``: model a has 32,768 bytes of KV a token, half of them with each of the pipeline's two nodes. Requests
4 to 7 have 10 tokens of prompt; 4 and 6 go on on node 2, 5 and 7 on node 3. So each node sends and gets 16,384 bytes for each of
the 10 tokens with KV of a request that has its first token. Prefills of so few take as long as reading the weights: 20 ms.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hydra.errors import InstantiationException

from lambdascale.core import ComputeTable, UserError
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.testing.starts import CooperativeStart
from lambdascale.testing.systems import small_cluster
from tests.policy.test_pipeline_rules import trio
from tests.policy.world import World, pipelined, without

ALL = (4, 5, 6, 7)


def network(rate: float, prefill_s: float | None = None) -> dict[str, Any]:
    """A network of ``rate`` bytes/s without latency, and nodes of which every prefill of model a is measured as so long."""
    compute = small_cluster().compute
    if prefill_s is not None:
        table = ComputeTable(model="a", prefill_tokens=(1,), prefill_s=(prefill_s,), decode_batch=(1,), decode_s=(0.001,))
        compute = replace(compute, measured=(table,))
    return {"nic_bytes_per_s": rate, "rdma_efficiency": 1.0, "link_latency_s": 0.0, "compute": compute}


def choice(cluster: dict[str, Any], *with_token: int, prompt: int = 10) -> str:
    """The way that the mode switch of ``pipelined()`` takes when these requests have their first token."""
    world = pipelined(kv="cheapest", cluster=cluster, prompt=prompt)
    assert world.first_token(*with_token) == []
    switch = world.deliver("t3")[-1].split()
    assert switch[:3] == ["switch", "i3", "4>i4,5>i5,6>i4,7>i5"]
    return switch[3]


@pytest.mark.parametrize(
    ("rate", "with_token", "prompt", "expected"),
    [
        # 2 requests of 10 tokens a node: 327,680 bytes against 20 ms.
        (3.2e9, ALL, 10, "copy"),  # 0.1 ms
        (17e6, ALL, 10, "copy"),  # 19.3 ms
        (16e6, ALL, 10, "recompute"),  # 20.5 ms
        # 2 requests of 1,000 tokens a node: 32.8 MB against 2,002 tokens of 0.2 ms, and 26 ms of attention: 427 ms.
        (1e9, ALL, 1000, "copy"),  # 33 ms
        (80e6, ALL, 1000, "copy"),  # 410 ms
        (75e6, ALL, 1000, "recompute"),  # 437 ms
        # 1 of each node's 2 requests has KV: 163,840 bytes for one that waits, against 20 ms for both.
        (4.2e6, (4, 5), 10, "copy"),  # 39.0 ms
        (4e6, (4, 5), 10, "recompute"),  # 41.0 ms
        # KV moves in one direction only: node 2 gets that of request 4.
        (4.2e6, (4,), 10, "copy"),
        (4e6, (4,), 10, "recompute"),
        # Nothing to copy, however fast the network is.
        (1e12, (), 10, "recompute"),
    ],
)
def test_the_way_that_keeps_requests_waiting_less(rate: float, with_token: tuple[int, ...], prompt: int, expected: str) -> None:
    assert choice(network(rate), *with_token, prompt=prompt) == expected


def test_a_measured_prefill_decides_and_a_tie_is_recomputed() -> None:
    """327,680 bytes at 20,971,520 bytes/s take 1/64 s."""
    assert choice(network(20_971_520, 1 / 64), *ALL) == "recompute"
    assert choice(network(20_971_521, 1 / 64), *ALL) == "copy"
    assert choice(network(20_971_519, 1 / 64), *ALL) == "recompute"
    assert choice(network(20_971_520, 1 / 63), *ALL) == "copy"


def test_latency_counts() -> None:
    assert choice(network(20_971_521, 1 / 64) | {"link_latency_s": 0.001}, *ALL) == "recompute"


@pytest.mark.parametrize(
    ("rate", "left", "expected"),
    [(22e6, 0, "copy"), (22e6, 200_000, "copy"), (22e6, 250_000, "recompute"), (22e6, 10**9, "recompute"), (25e6, 10**9, "copy")],
)
@pytest.mark.parametrize(("sender", "receiver"), [(2, 1), (0, 3)])
def test_blocks_still_to_be_moved_take_an_equal_part_of_a_link(
    rate: float, left: int, expected: str, sender: int, receiver: int
) -> None:
    """The KV for node 3 crosses node 2's way out and its own way in: at most twice 14.9 or 13.1 ms; node 2's does neither.

    Two requests wait for each, against four that wait 20 ms: 14.9 + 14.9 + 9.1 is less than 40, 14.9 + 14.9 + 11.4 is not.
    """
    world = pipelined(kv="cheapest", cluster=network(rate))
    world.first_token(*ALL)
    world.deliver("t3", 3)
    world.plane.fleet.traffic.add(sender, ("nic_out",), receiver, left)
    assert world.deliver("t3")[-1].endswith(expected)


def test_a_request_that_has_moved_before_is_known_by_its_tokens_still() -> None:
    world = pipelined(kv="cheapest")
    assert world.first_token(4) == []
    world.deliver("t3")
    fleet = world.plane.fleet
    assert fleet.produced == {4: 1}
    world.first_token(5)
    assert fleet.produced == {4: 1, 5: 1}
    world.finish(4, 5)
    assert fleet.produced == {}, "nothing is kept of requests that have ended"


def test_tokens_of_a_request_that_is_not_there_are_not_kept() -> None:
    world = pipelined(kv="cheapest")
    world.first_token(4)
    world.finish(4)
    world.first_token(4)
    assert world.plane.fleet.produced == {}


def test_tokens_of_requests_that_are_given_up_are_not_kept() -> None:
    world = World(nodes=1, min_replicas=1)
    world.arrive(1)
    world.first_token(0)
    for number in (1, 2, 3):
        assert world.plane.fleet.produced == {0: 1}, "its tokens exist, wherever it goes on"
        world.fail(instance=f"i{number}")
    assert world.plane.fleet.produced == {}


@pytest.mark.parametrize(
    ("with_token", "rate", "expected"),
    [((1, 2, 4, 5), 1e12, "recompute"), ((0, 1, 2, 3, 4, 5), 17.5e6, "copy"), ((0, 1, 2, 3, 4, 5), 16.5e6, "recompute")],
)
def test_targets_that_are_pipelines_do_not_count(with_token: tuple[int, ...], rate: float, expected: str) -> None:
    """Node 1 of pipeline i1 takes 0 and 3 with it, the others go on in i3. It lacks 51.6 % of their KV: 338,415 bytes, 20 ms."""
    world = trio(switch="each", kv="cheapest", cluster=network(rate))
    world.first_token(*with_token)
    world.block(0, 1, 2)
    assert world.block(1, 3, 0)[-1] == f"switch i1 0>i2,1>i3,2>i3,3>i2,4>i3,5>i3 {expected}"


def reshaped(cluster: dict[str, Any], *with_token: int, kv: str = "cheapest") -> str:
    """Replica i1 on node 0 has requests 0 and 1, of 10 tokens each; the first block of four comes to node 1."""
    world = World(nodes=2, start=CooperativeStart(), kv=kv, cluster=cluster)
    world.arrive(4)
    assert without(world.tick(), "timer") == ["allocate 1", "multicast t2 0:gpu>1"]
    world.first_token(*with_token)
    line = world.deliver("t2", 1)[0].split()
    assert line[:3] == ["reshape", "i1", "1:0-0,0:1-3"]
    return line[3]


@pytest.mark.parametrize(
    ("rate", "with_token", "expected"),
    [
        # 25.8 % of 655,360 bytes, beside as many of the three blocks that follow: 338,415 bytes. Two batches of 10 tokens: 20 ms
        # for the first, and for the second 14.8 ms more, on the busier node.
        (10e6, (0, 1), "copy"),  # 33.8 ms
        (9.6e6, (0, 1), "recompute"),  # 35.3 ms
        (5e6, (0,), "copy"),  # 33.8 ms
        (4.8e6, (0,), "recompute"),
        (1e12, (), "recompute"),
    ],
)
def test_the_way_at_a_moved_boundary(rate: float, with_token: tuple[int, ...], expected: str) -> None:
    assert reshaped(network(rate), *with_token) == expected


def test_fixed_policies_ask_for_no_prediction() -> None:
    assert reshaped(network(1e12), 0, 1, kv="recompute") == choice_of("recompute", network(1e12)) == "recompute"
    assert reshaped(network(1e3), 0, 1, kv="copy") == choice_of("copy", network(1e3)) == "copy"


def choice_of(kv: str, cluster: dict[str, Any]) -> str:
    """The way of ``pipelined()`` with a fixed policy."""
    world = pipelined(kv=kv, cluster=cluster)
    world.first_token(*ALL)
    return world.deliver("t3")[-1].split()[-1]


def test_any_other_policy_is_refused() -> None:
    with pytest.raises((UserError, InstantiationException), match=r"kv|recompute"):
        build(compose(["system.kv=cheap"]))
