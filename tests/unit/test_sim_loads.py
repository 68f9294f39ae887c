"""Loads and copies against times worked out by hand on a cluster with round numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lambdascale.core import UserError
from tests.unit.transfers_rig import CLUSTER, Rig, load


@pytest.mark.parametrize(
    ("tier", "loader", "times"),
    [
        ("host", "pipelined", [1.0, 6.0]),  # 20 B/s
        ("ssd", "pipelined", [4.0, 24.0]),  # 5 B/s, PCIe hidden
        ("ssd", "sequential", [25.0, 30.0]),  # 24 s of SSD, then PCIe
        ("instant", "pipelined", [0.0, 0.0]),
    ],
)
def test_loads_deliver_block_by_block_in_the_order_asked_for(tier: str, loader: str, times: list[float]) -> None:
    rig = Rig()
    rig.engine.load(load(tier, loader))
    assert [(at, block) for at, _, _, block in rig.run()] == list(zip(times, [1, 0], strict=True))


def test_sequential_reads_from_the_remote_store_do_not_overlap_with_pcie() -> None:
    rig = Rig(replace(CLUSTER, remote_bytes_per_s=4.0))
    rig.engine.load(load("remote", "sequential"))
    assert [(at, block) for at, _, _, block in rig.run()] == [(31.0, 1), (36.0, 0)]


@pytest.mark.parametrize(("tier", "loader"), [("host", "pipelined"), ("ssd", "sequential"), ("instant", "pipelined")])
def test_a_load_of_nothing_ends_without_a_delivery(tier: str, loader: str) -> None:
    rig = Rig()
    rig.engine.load(load(tier, loader, blocks=()))
    assert rig.run() == []
    assert rig.engine.active == ()


@pytest.mark.parametrize("end", ["cancel", "lost"])
@pytest.mark.parametrize(("tier", "loader", "until", "before"), [("instant", "pipelined", -1, 0), ("ssd", "sequential", 26, 1)])
def test_a_load_that_is_cut_off_delivers_nothing_more(end: str, tier: str, loader: str, until: float, before: int) -> None:
    rig = Rig()
    rig.engine.load(load(tier, loader, node=1))
    rig.run(until=until)
    getattr(rig.engine, end)(1)  # transfer 1, or node 1
    assert len(rig.run()) == before


def test_two_loads_on_a_node_share_its_storage() -> None:
    rig = Rig()
    for transfer_id in (1, 2):
        rig.engine.load(load("host", transfer_id=transfer_id))
    rig.engine.load(load("host", node=1, transfer_id=3))
    assert [(at, t) for at, t, *_ in rig.run()] == [(1.0, 3), (2.0, 1), (2.0, 2), (6.0, 3), (12.0, 1), (12.0, 2)]


def test_the_remote_store_has_its_rate_or_does_not_exist() -> None:
    rig = Rig(replace(CLUSTER, remote_bytes_per_s=4.0))
    rig.engine.load(load("remote"))
    assert [at for at, *_ in rig.run()] == [5.0, 30.0]
    with pytest.raises(UserError, match="has no remote tier"):
        Rig().engine.load(load("remote"))


def test_a_copy_crosses_the_network_at_the_write_rate() -> None:
    rig, done = Rig(), []
    rig.engine.copy(0, 1, 100.0, lambda: done.append(rig.kernel.now))
    rig.run()
    assert done == [2.0]


def test_a_copy_within_a_node_takes_no_time_but_is_still_an_event() -> None:
    rig, done = Rig(), []
    rig.engine.copy(1, 1, 100.0, lambda: done.append(rig.kernel.now))
    assert done == []
    rig.run()
    assert done == [0.0]


def test_a_copy_from_a_lost_node_never_arrives() -> None:
    rig, done = Rig(), []
    rig.engine.copy(0, 1, 100.0, lambda: done.append(rig.kernel.now))
    rig.engine.copy(2, 1, 100.0, lambda: done.append(rig.kernel.now))
    rig.kernel.at(1.0, rig.engine.lost, 0)
    rig.run()
    assert done == [2.5], "200 wire bytes: 1 s at half the port's rate, then all of it"
