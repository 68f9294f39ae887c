"""KV of requests that change nodes with ``kv: cheapest``: copied or recomputed, whichever keeps requests waiting less.

By hand, for ``pipelined()``: model a has 32,768 bytes of KV a token, half of them with each of the pipeline's two nodes. Requests
4 and 6 go on on node 2, 5 and 7 on node 3. So each node sends and gets 16,384 bytes for each token of a prompt whose request has
its first token. Reading the weights takes 20 ms, and so do decodes, a token prefilled 0.2 ms.
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
    """A network of ``rate`` bytes/s without latency; a prefill of any size is measured as ``prefill_s`` longer than a decode."""
    compute = small_cluster().compute
    if prefill_s is not None:
        table = ComputeTable(
            model="a", prefill_tokens=(1,), prefill_s=(prefill_s + 1 / 128,), decode_batch=(1,), decode_s=(1 / 128,)
        )
        compute = replace(compute, measured=(table,))
    return {"nic_bytes_per_s": rate, "rdma_efficiency": 1.0, "link_latency_s": 0.0, "compute": compute}


def choice(cluster: dict[str, Any], *with_token: int, prompt: int) -> str:
    """The way that the mode switch of ``pipelined()`` takes when these requests have their first token."""
    world = pipelined(kv="cheapest", cluster=cluster, prompt=prompt)
    assert world.first_token(*with_token) == []
    switch = world.deliver("t3")[-1].split()
    assert switch[:3] == ["switch", "i3", "4>i4,5>i5,6>i4,7>i5"]
    return switch[3]


@pytest.mark.parametrize(
    ("rate", "with_token", "prompt", "expected"),
    [
        # 2 requests of 100 tokens a node: 3.28 MB against 202 tokens in 40.5 ms, less a decode: 20.4 ms.
        (3.2e9, ALL, 100, "copy"),  # 1 ms
        (162e6, ALL, 100, "copy"),  # 20.2 ms
        (159e6, ALL, 100, "recompute"),  # 20.6 ms
        # 2 requests of 10 tokens: both a prefill and a decode read the weights, and take the same.
        (1e12, ALL, 10, "recompute"),
        # 2 requests of 1,000 tokens: 32.8 MB against 2,002 tokens in 414 ms, less a decode: 392 ms.
        (1e9, ALL, 1000, "copy"),  # 33 ms
        (84e6, ALL, 1000, "copy"),  # 390 ms
        (83e6, ALL, 1000, "recompute"),  # 395 ms
        # 1 of each node's 2 requests has KV, of 200 tokens: 3.28 MB for one that waits, against 20.3 ms for both.
        (81e6, (4, 5), 200, "copy"),  # 40.5 ms
        (80e6, (4, 5), 200, "recompute"),  # 41.0 ms
        # KV moves in one direction only: node 2 gets that of request 4.
        (81e6, (4,), 200, "copy"),
        (80e6, (4,), 200, "recompute"),
        # Nothing to copy, however fast the network is.
        (1e12, (), 1000, "recompute"),
    ],
)
def test_the_way_that_keeps_requests_waiting_less(rate: float, with_token: tuple[int, ...], prompt: int, expected: str) -> None:
    assert choice(network(rate), *with_token, prompt=prompt) == expected


def test_a_measured_prefill_decides_and_a_tie_is_recomputed() -> None:
    """327,680 bytes at 20,971,520 bytes/s take 1/64 s."""
    assert choice(network(20_971_520, 1 / 64), *ALL, prompt=10) == "recompute"
    assert choice(network(20_971_521, 1 / 64), *ALL, prompt=10) == "copy"
    assert choice(network(20_971_519, 1 / 64), *ALL, prompt=10) == "recompute"
    assert choice(network(20_971_520, 1 / 63), *ALL, prompt=10) == "copy"


@pytest.mark.parametrize(
    ("path", "rate", "with_token", "expected"),
    [
        # One of each node's two requests has KV, 163,840 bytes for the other node. A prefill takes 4/128 s longer than a decode,
        # 1/128 s: 8/128 s for both that run there. The other request's takes 5/128 s, half of which is waited for thrice.
        ("places", 41_943_041, (4, 5), "copy"),  # 3.9 ms
        ("places", 41_943_040, (4, 5), "recompute"),
        ("network", 2_621_441, (4, 5), "copy"),  # 62.5 ms
        ("network", 2_621_440, (4, 5), "recompute"),
        # All have KV: nothing runs meanwhile, so that nobody waits for it.
        ("places", 10_485_760, ALL, "recompute"),  # 31.25 ms for each
        ("places", 10_485_761, ALL, "copy"),
        # Nodes have no memory to write to: nothing says how long messages take.
        ("messages", 1e15, ALL, "recompute"),
    ],
)
def test_places_are_granted_between_iterations(path: str, rate: float, with_token: tuple[int, ...], expected: str) -> None:
    assert choice(network(rate, 1 / 32) | {"kv_path": path}, *with_token, prompt=10) == expected


@pytest.mark.parametrize(("rate", "expected"), [(52_428_801, "copy"), (52_428_800, "recompute")])
def test_what_comes_from_the_queue_is_waited_for(rate: float, expected: str) -> None:
    """Request 8 comes to node 3 at once, where 5 goes on alone: its prefill keeps the KV of 5, and that for node 2, waiting.

    Two requests wait for 327,680 bytes and half a prefill of 5/128 s, one for 163,840 bytes and two halves, against 12/128 s.
    """
    world = pipelined(kv="cheapest", cluster=network(rate, 1 / 32) | {"kv_path": "places"}, prompt=10)
    world.first_token(*ALL)
    (pipeline,) = (each for each in world.plane.fleet.instances.values() if each.is_pipeline)
    pipeline.open = False
    world.finish(6)
    lines = [line for line in world.deliver("t3") if line.startswith(("switch", "dispatch"))]
    assert lines == [f"switch i3 4>i4,5>i5,7>i4 {expected}", "dispatch i5 8"]


def test_latency_counts() -> None:
    assert choice(network(20_971_521, 1 / 64) | {"link_latency_s": 0.001}, *ALL, prompt=10) == "recompute"


@pytest.mark.parametrize(
    ("path", "rate", "left", "expected"),
    [
        ("network", 22e7, 0, "copy"),
        ("network", 22e7, 2_000_000, "copy"),
        ("network", 22e7, 2_500_000, "recompute"),
        ("network", 22e7, 1 << 40, "recompute"),
        ("network", 25e7, 1 << 40, "copy"),
        ("places", 22e7, 1 << 40, "copy"),  # ahead of the blocks
    ],
)
@pytest.mark.parametrize(("sender", "receiver"), [(2, 1), (0, 3)])
def test_blocks_still_to_be_moved_take_an_equal_part_of_a_link(
    path: str, rate: float, left: int, expected: str, sender: int, receiver: int
) -> None:
    """The KV for node 3 crosses node 2's way out and its own way in: at most twice 14.9 or 13.1 ms; node 2's does neither.

    Two requests wait for each, against four that wait 20.4 ms: 14.9 + 14.9 + 9.1 is less than 40.8, 14.9 + 14.9 + 11.4 is not.
    """
    world = pipelined(kv="cheapest", cluster=network(rate) | {"kv_path": path}, prompt=100)
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
    [((1, 2, 4, 5), 1e12, "recompute"), ((0, 1, 2, 3, 4, 5), 170e6, "copy"), ((0, 1, 2, 3, 4, 5), 162e6, "recompute")],
)
def test_targets_that_are_pipelines_do_not_count(with_token: tuple[int, ...], rate: float, expected: str) -> None:
    """Node 1 of pipeline i1 takes 0 and 3 with it, the others go on in i3. It lacks 51.6 % of their KV, 3.38 MB."""
    world = trio(prompt=100, switch="each", kv="cheapest", cluster=network(rate))
    world.first_token(*with_token)
    world.block(0, 1, 2)
    assert world.block(1, 3, 0)[-1] == f"switch i1 0>i2,1>i3,2>i3,3>i2,4>i3,5>i3 {expected}"


def reshaped(cluster: dict[str, Any], *with_token: int, kv: str = "cheapest") -> str:
    """Replica i1 on node 0 has requests 0 and 1, of 100 tokens each; the first block of four comes to node 1."""
    world = World(nodes=2, start=CooperativeStart(), kv=kv, cluster=cluster)
    world.arrive(4, prompt=100)
    assert without(world.tick(), "timer") == ["allocate 1", "multicast t2 0:gpu>1"]
    world.first_token(*with_token)
    line = world.deliver("t2", 1)[0].split()
    assert line[:3] == ["reshape", "i1", "1:0-0,0:1-3"]
    return line[3]


@pytest.mark.parametrize(
    ("rate", "with_token", "expected"),
    [
        # 25.8 % of 6.55 MB, beside as many of the three blocks that follow: 3.38 MB. Two batches of 101 tokens: 20.3 ms for the
        # first, and for the second 15 ms more, on the busier node; less a decode, 15.2 ms.
        (225e6, (0, 1), "copy"),  # 15.0 ms
        (219e6, (0, 1), "recompute"),  # 15.5 ms
        # Half as many bytes, and half as many tokens, which take hardly less: 14.9 ms.
        (116e6, (0,), "copy"),  # 14.6 ms
        (112e6, (0,), "recompute"),  # 15.1 ms
        (1e12, (), "recompute"),
    ],
)
def test_the_way_at_a_moved_boundary(rate: float, with_token: tuple[int, ...], expected: str) -> None:
    assert reshaped(network(rate), *with_token) == expected


def test_a_moved_boundary_recomputes_where_kv_goes_in_messages() -> None:
    assert reshaped(network(1e12), 0, 1) == "copy"
    assert reshaped(network(1e12) | {"kv_path": "messages"}, 0, 1) == "recompute"
    assert reshaped(network(1e12) | {"kv_path": "messages"}, 0, 1, kv="copy") == "copy", "nobody is to choose"


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
