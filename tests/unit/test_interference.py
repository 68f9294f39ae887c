"""Multicasts that slow the iterations of their members, and the seconds that requests are served beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lambdascale.core import Failure, MulticastPlan, Request, Stage, UserError
from lambdascale.core.commands import (
    CancelTransfer,
    Command,
    Dispatch,
    FailRequest,
    Repartition,
    Serve,
    StopInstance,
    SwitchMode,
)
from lambdascale.core.events import BlockArrived, Event, RequestArrived, RequestFinished
from lambdascale.experiments.compose import compose
from lambdascale.experiments.runner import run
from lambdascale.metrics import Recorder
from lambdascale.metrics.interference import Covered, beside_multicasts
from lambdascale.sim.interference import Interference
from lambdascale.sim.options import TransferOptions
from lambdascale.sim.sharing import DisturbedPace, SharedCores
from tests.unit.transfers_rig import CHAIN, TRIANGLE, multicast


def told(**options: Any) -> tuple[Interference, list[tuple[int, float | None, bool]]]:
    """Part under test, and what it told: node, slowdown (None: taken), begins or ends."""
    heard: list[tuple[int, float | None, bool]] = []
    part = Interference(
        TransferOptions(**options),
        lambda node, busy: heard.append((node, None, busy)),
        lambda node, slowdown, begins: heard.append((node, slowdown, begins)),
    )
    return part, heard


def test_by_default_only_collectives_take_gpus() -> None:
    part, heard = told()
    part.one_sided(1, [0, 1])
    part.collective(2, [0])
    assert heard == [(0, None, True)]
    part.release(1)
    part.release(2)
    part.release(2)
    assert heard == [(0, None, True), (0, None, False)]


def test_members_are_slowed_until_the_transfer_ends() -> None:
    part, heard = told(one_sided_slowdown=1.5, collective_slowdown=2.0)
    part.one_sided(1, [0, 1])
    part.collective(2, [3])
    part.release(1)
    assert heard == [(0, 1.5, True), (1, 1.5, True), (3, 2.0, True), (0, 1.5, False), (1, 1.5, False)]


@pytest.mark.parametrize("name", ["one_sided_slowdown", "collective_slowdown"])
def test_a_slowdown_makes_nothing_faster(name: str) -> None:
    with pytest.raises(UserError, match=rf"transfers.{name} must be at least 1, not 0.5"):
        TransferOptions(**{name: 0.5})


class TestPace:
    def test_the_largest_slowdown_counts(self) -> None:
        pace = DisturbedPace(None)
        assert pace.enter(lambda: None)[1] == 1.0
        pace.disturb(1.5, True)
        pace.disturb(1.2, True)
        assert pace.enter(lambda: None)[1] == 1.5
        pace.disturb(1.5, False)
        assert pace.enter(lambda: None)[1] == 1.2

    def test_it_multiplies_that_of_shared_cores(self) -> None:
        pace = DisturbedPace(SharedCores((1.0, 2.0)))
        first, alone = pace.enter(lambda: None)
        pace.disturb(1.5, True)
        assert (alone, pace.enter(lambda: None)[1]) == (1.0, 3.0)
        pace.leave(first)
        assert pace.enter(lambda: None)[1] == 3.0

    def test_those_who_compute_hear_of_begin_and_end(self) -> None:
        heard: list[str] = []
        pace = DisturbedPace(None)
        ticket, _ = pace.enter(lambda: heard.append("changed"))
        pace.disturb(2.0, True)
        pace.disturb(2.0, False)
        assert heard == ["changed", "changed"]
        pace.leave(ticket)
        pace.disturb(2.0, True)
        assert len(heard) == 2


BURST = ["system=lambdascale", "workload=burst", "workload.count=60", "cluster.nodes=4", "cluster.nic_bytes_per_s=5GB/s"]


def test_a_run_is_slower_for_it_and_only_then(tmp_path: Path) -> None:
    """Mutations: slowed for ever, or at nodes that have no part; a factor of 1 is none at all."""

    def summary(*more: str, name: str) -> dict[str, Any]:
        return run(compose([*BURST, "system.memory.initial_copies=0", *more, f"out={tmp_path / name}"])).summary

    plain = summary(name="plain")
    slow = summary("backend.transfers.one_sided_slowdown=2", name="slow")
    same = summary("backend.transfers.collective_slowdown=2", name="same")  # no collective, but the same kind of ports
    assert plain["beside_multicast_s"]["sum"] > 0
    assert slow["e2e_s"]["mean"] > plain["e2e_s"]["mean"]
    assert slow["e2e_s"]["mean"] < 2 * plain["e2e_s"]["mean"]
    assert same["ttft_s"] == plain["ttft_s"]
    assert same["e2e_s"]["mean"] == pytest.approx(plain["e2e_s"]["mean"])


def test_sources_of_a_broadcast_serve_on_with_a_slowdown(tmp_path: Path) -> None:
    def e2e_s(*more: str, name: str) -> float:
        system = ["system=nccl_broadcast", *BURST[1:], "system.memory.initial_copies=0"]
        mean: float = run(compose([*system, *more, f"out={tmp_path / name}"])).summary["e2e_s"]["mean"]
        return mean

    key = "backend.transfers.collective_slowdown"
    blocked, free, slow = e2e_s(name="blocked"), e2e_s(f"{key}=1", name="free"), e2e_s(f"{key}=1.6", name="slow")
    assert free < slow < blocked


# -- seconds beside multicasts -----------------------------------------------------------------------------------------


def test_covered_seconds() -> None:
    covered = Covered([(5.0, 6.0), (1.0, 2.0), (1.5, 3.0), (4.0, 4.0)])
    assert [covered.within(*span) for span in [(0, 10), (0, 1), (1.2, 1.7), (2.5, 5.5), (6, 9)]] == pytest.approx(
        [3.0, 0.0, 0.5, 1.0, 0.0]
    )
    assert Covered([]).within(0, 1) == 0


def beside(*entries: Event | tuple[float, Command]) -> dict[int, float]:
    recorder = Recorder()
    for entry in entries:
        if isinstance(entry, Event):
            recorder.on_event(entry)
        else:
            recorder.on_command(*entry)
    return beside_multicasts(recorder)


def serve(instance: int, *nodes: int) -> Serve:
    stages = tuple(Stage(node, index, index) for index, node in enumerate(nodes))
    return Serve(instance, "m", stages, (1,) * len(nodes), 100)


def dispatch(instance: int, *requests: int) -> Dispatch:
    return Dispatch(instance, tuple(Request(number, 0.0, "m", 1, 9) for number in requests))


def transfer(begin: float, end: float, plan: MulticastPlan = TRIANGLE, tier: str = "gpu") -> list[Any]:
    last = plan.destinations[-1]
    return [
        (begin, multicast(plan, tier=tier)),
        BlockArrived((begin + end) / 2, 1, last, "m", 0),
        BlockArrived(end, 1, last, "m", 1),
    ]


def test_a_request_of_a_source_and_one_of_another_node() -> None:
    """Node 0 sends from 2 to 6; node 9 has no part. A request is served from its dispatch to its end."""
    start, *arrivals = transfer(2.0, 6.0)
    found = beside(
        (0.0, serve(1, 0)),
        (0.0, serve(2, 9)),
        (1.0, dispatch(1, 7)),
        (1.0, dispatch(2, 8)),
        start,
        *arrivals,
        RequestFinished(9.0, 1, 7, 5),
        RequestFinished(9.0, 2, 8, 5),
    )
    assert found == {7: pytest.approx(4.0), 8: 0.0}


def test_a_source_in_host_memory_is_not_slowed() -> None:
    start, *arrivals = transfer(2.0, 6.0, CHAIN, tier="host")
    found = beside((0.0, serve(1, 0)), (1.0, dispatch(1, 7)), start, *arrivals, RequestFinished(9.0, 1, 7, 5))
    assert found == {7: 0.0}


def test_a_cancelled_multicast_ends_there() -> None:
    start, first, _ = transfer(2.0, 6.0)
    entries = [(0.0, serve(1, 0)), (1.0, dispatch(1, 7)), start, first, (5.0, CancelTransfer(1)), RequestFinished(9.0, 1, 7, 5)]
    assert beside(*entries) == {7: pytest.approx(3.0)}


def test_requests_that_move() -> None:
    """Requests switch from a pipeline with a node in the multicast to a replica without, fail, or lose their instance."""
    start, *arrivals = transfer(0.0, 8.0)
    found = beside(
        start,
        (0.0, serve(1, 9, 1)),
        (0.0, serve(2, 9)),
        (1.0, dispatch(1, 7, 8, 6)),
        (2.0, FailRequest(8, Failure("no_node", "no"))),
        (3.0, SwitchMode(1, ((7, 2),), "recompute")),
        (3.5, StopInstance(1)),
        *arrivals,
        RequestFinished(9.0, 2, 7, 5),
    )
    assert found == {7: pytest.approx(2.0), 8: pytest.approx(1.0), 6: pytest.approx(2.5)}


def test_moved_boundaries_count_from_then_on() -> None:
    start, *arrivals = transfer(0.0, 8.0)
    moved = Repartition(1, (Stage(9, 0, 1),), "copy", 100)
    entries = [start, (0.0, serve(1, 9, 1)), (1.0, dispatch(1, 7)), (4.0, moved), *arrivals, RequestFinished(9.0, 1, 7, 5)]
    assert beside(*entries) == {7: pytest.approx(3.0)}


def test_without_a_multicast_and_without_a_dispatch() -> None:
    assert beside(RequestArrived(0.0, Request(3, 0.0, "m", 1, 9)), (1.0, serve(1, 0)), (1.0, dispatch(1, 7))) == {7: 0.0}
