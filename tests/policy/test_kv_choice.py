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

from lambdascale.control.kv_choice import KvChoice
from lambdascale.core import ComputeTable, NodeOverride, Stage, UserError
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.testing.starts import CooperativeStart
from lambdascale.testing.systems import small_cluster, small_model
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


def places(rate: float, prefill_s: float | None = None, **fields: Any) -> dict[str, Any]:
    """A network with places for KV, and memory in which copies take no time."""
    gpu = replace(small_cluster().gpu, hbm_bytes_per_s=1e18)
    return network(rate, prefill_s) | {"kv_path": "places", "gpu": gpu} | fields


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
    assert choice(places(rate, 1 / 32, kv_path=path), *with_token, prompt=10) == expected


LAYER = 16_383 * 2_048  # bytes of KV of a prompt of 16,383 tokens in each of 16 layers


@pytest.mark.parametrize(
    ("number", "size", "rate", "latency_s", "prompt", "expected"),
    [
        # Requests 4 and 5 have 16,383 tokens of KV, whose prefill takes 4 x 5/128 s, 19/128 s longer than a decode: 38/128 s for
        # both that run there. Their 8 layers go in as many parts as places have room for: all at once, or further grants wait for
        # 5/128 s each, beside 7.5/128 s for the first: at most 6 of them.
        (0, 0, 1e18, 0.0, 16_383, "copy"),
        (8, LAYER, 1e18, 0.0, 16_383, "copy"),
        (2, LAYER, 1e18, 0.0, 16_383, "copy"),  # 4 times 2
        (1, LAYER, 1e18, 0.0, 16_383, "recompute"),  # 8 times 1
        (1, 2 * LAYER, 1e18, 0.0, 16_383, "copy"),  # 4 times 1
        (1, 2 * LAYER - 1, 1e18, 0.0, 16_383, "recompute"),
        (1, 3 * LAYER, 1e18, 0.0, 16_383, "copy"),
        (1, 8 * LAYER, 1e18, 0.0, 16_383, "copy"),
        # A fifth iteration for 4,096 tokens more: 48/128 s. The link's time t, 3/128 s for its latency, 7.5/128 s, and, with one
        # place, 7 times 5/128 s: t + 45.5/128 s.
        (1, 20_479 * 2_048, 17.3e9, 3 / 128, 20_479, "copy"),  # t: 2.48/128 s
        (1, 20_479 * 2_048, 17.0e9, 3 / 128, 20_479, "recompute"),  # 2.53/128 s
        # With two, 3 times what the other one's part, t/8, leaves of 5/128 s: 5/8 t + 25.5/128 s.
        (2, 20_479 * 2_048, 1.20e9, 3 / 128, 20_479, "copy"),  # t: 35.8/128 s
        (2, 20_479 * 2_048, 1.19e9, 3 / 128, 20_479, "recompute"),  # 36.1/128 s
        # Four keep such a link busy: t + 10.5/128 s.
        (4, 20_479 * 2_048, 1.15e9, 3 / 128, 20_479, "copy"),  # t: 37.3/128 s
        (4, 20_479 * 2_048, 1.14e9, 3 / 128, 20_479, "recompute"),  # 37.7/128 s
    ],
)
def test_places_are_granted_anew_once_they_are_read(
    number: int, size: int, rate: float, latency_s: float, prompt: int, expected: str
) -> None:
    cluster = places(rate, 1 / 32, kv_places=number, kv_place_bytes=size, link_latency_s=latency_s)
    assert choice(cluster, 4, 5, prompt=prompt) == expected


@pytest.mark.parametrize(("latency_s", "expected"), [(6 / 128, "copy"), (8 / 128, "recompute")])
def test_both_ends_of_a_grant_may_be_busy(latency_s: float, expected: str) -> None:
    """Request 6 alone has no token: node 2, which gets the KV of 4 and sends that of 5 and 7, has an iteration of 5/128 s.

    Node 3 has none. Two places: 3 further rounds of grants for 4, 7 for 5 and 7. So 4 waits for 5/128 and 15/128 s, each of the
    others for 2.5/128 and 35/128 s, all three for the latency: 95/128 s and that. Prefills take 2 x 19/128 and 2 x 39/128 s more
    than decodes.
    """
    cluster = places(1e18, 1 / 32, kv_places=2, kv_place_bytes=LAYER, link_latency_s=latency_s)
    assert choice(cluster, 4, 5, 7, prompt=16_383) == expected


@pytest.mark.parametrize(
    ("with_token", "slow", "rate", "expected"),
    [
        # A token of each node's requests is 16,384 bytes, of two prompts of 10 tokens 327,680. Memory reads and writes half of
        # its data sheet's rate. All have KV: nothing runs, and the others take 1/32 s longer. All of 3 copies, each a read and a
        # write: 1,966,080 bytes, for both nodes alike.
        (ALL, (2, 3), 125_829_120, "recompute"),
        (ALL, (2, 3), 125_829_121, "copy"),
        # Node 2's memory alone: 2 of them wait for its 4 reads and writes, 2 for its 2; half of it each in the mean.
        (ALL, (2,), 62_914_560, "recompute"),
        (ALL, (2,), 62_914_561, "copy"),
        # One that waits, 1/256 s less than two that run: see above. Node 2 gets 163,840 bytes, or sends them.
        ((4,), (2,), 335_544_320, "recompute"),
        ((4,), (2,), 335_544_321, "copy"),
        ((5,), (2,), 167_772_160, "recompute"),
        ((5,), (2,), 167_772_161, "copy"),
    ],
)
def test_copies_in_memory_take_time(with_token: tuple[int, ...], slow: tuple[int, ...], rate: float, expected: str) -> None:
    gpu = replace(small_cluster().gpu, hbm_bytes_per_s=rate)
    cluster = places(1e18, 1 / 32, overrides=(NodeOverride(nodes=slow, gpu=gpu),))
    assert choice(cluster, *with_token, prompt=10) == expected
    assert choice(cluster | {"kv_path": "network"}, *with_token, prompt=10) == "copy", "simulated KV is in no memory"


@pytest.mark.parametrize(
    ("rate", "number", "expected"), [(52_428_801, 8, "copy"), (52_428_800, 8, "recompute"), (1e18, 7, "recompute")]
)
def test_what_comes_from_the_queue_is_waited_for(rate: float, number: int, expected: str) -> None:
    """Request 8 comes to node 3 at once, where 5 goes on alone: its prefill keeps the KV of 5, and that for node 2, waiting.

    Two requests wait for 327,680 bytes and half a prefill of 5/128 s, one for 163,840 bytes and two halves, against 12/128 s.
    Node 2's come in 8 parts: if one more has to wait until node 3 reads its grant, that is another 5/128 s for two.
    """
    at = {"kv_places": number, "kv_place_bytes": 40_960}
    world = pipelined(kv="cheapest", cluster=places(rate, 1 / 32, **at), prompt=10)
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


@pytest.mark.parametrize(("rate", "expected"), [(332e6, "recompute"), (341e6, "copy")])
def test_a_moved_boundary_s_copies_take_time_in_memory(rate: float, expected: str) -> None:
    """1.69 MB, thrice copied, at half of the rate, against two prefills of 5/128 s, the second of which waits for node 0.

    That has 74.2 % of the blocks, and the decode is 1/128 s less: 60.2 ms. Nothing of the instance runs meanwhile.
    """
    gpu = replace(small_cluster().gpu, hbm_bytes_per_s=rate)
    assert reshaped(places(1e18, 1 / 32, gpu=gpu), 0, 1) == expected


@pytest.mark.parametrize(
    ("path", "number", "size"), [("places", 0, 5), ("places", 5, 0), ("places", -1, -1), ("network", 1, 1), ("messages", 1, 1)]
)
def test_places_that_nobody_can_write_to_are_refused(path: Any, number: int, size: int) -> None:
    with pytest.raises(UserError, match=r"cluster\.kv_places"):
        replace(small_cluster(), kv_path=path, kv_places=number, kv_place_bytes=size)


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


# -- what a recomputation takes ----------------------------------------------------------------------------------------

TOKEN_S = 2 * small_model().params / 5e12  # a token prefilled, at half of 1e13 FLOPs
PAIR_S = 4 * 16 * 1024 / 5e12  # a token attended to, 16 layers of 1,024 units
WEIGHTS_S, KV_S = 1e9 / 5e10, 32_768 / 5e10  # the model read, and a token's KV, at half of 100 GB/s
WHOLE, HALVES = (Stage(0, 0, 3),), (Stage(0, 0, 1), Stage(1, 2, 3))


@pytest.mark.parametrize(
    ("stages", "contexts", "running", "max_tokens", "tokens", "attended", "decode_s"),
    [
        # Two contexts of 1,001 tokens; three requests run, which a decode of 20 ms and the contexts' KV serves.
        (WHOLE, (1001, 1001), 3, 4096, 2002, 2 * 501_501, WEIGHTS_S + 2002 * KV_S),
        (WHOLE, (1001, 1001), 3, 1001, 2002, 2 * 501_501, WEIGHTS_S + 2002 * KV_S),  # two iterations
        (WHOLE, (1001, 999), 300, 4096, 2000, 501_501 + 499_500, 300 * TOKEN_S + 2000 * KV_S),  # a decode bound by FLOPs
        # Two batches; while the second node has the first one, the first has the second: one and a half times a batch.
        (HALVES, (1001, 1001), 3, 4096, 1.5 * 1001, 1.5 * 501_501, WEIGHTS_S + 1001 * KV_S),
        (HALVES, (1001, 1001), 401, 4096, 1.5 * 1001, 1.5 * 501_501, 201 * TOKEN_S + 1001 * KV_S),  # of 201 and of 200
    ],
)
def test_a_recomputation_takes_a_prefill_less_a_decode(
    stages: tuple[Stage, ...],
    contexts: tuple[int, ...],
    running: int,
    max_tokens: int,
    tokens: float,
    attended: float,
    decode_s: float,
) -> None:
    """Mutations: contexts not attended to, or to themselves alone; what runs not divided among batches, or rounded down."""
    world = World(nodes=2)
    rule = KvChoice(world.plane.fleet, "cheapest", replace(world.config.batching, max_tokens=max_tokens))
    found = rule._recompute_s(world.plane.fleet.models["a"], stages, contexts, running)
    assert found == pytest.approx(tokens * TOKEN_S + attended * PAIR_S - decode_s, rel=1e-9 if stages is WHOLE else 1e-3)


def test_a_recomputation_beside_longer_decodes_takes_no_time() -> None:
    world = World(nodes=1)
    rule = KvChoice(world.plane.fleet, "cheapest", world.config.batching)
    assert rule._recompute_s(world.plane.fleet.models["a"], WHOLE, (10,), 400) == 0.0
