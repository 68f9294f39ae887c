"""LiveBackend, one message at a time: calls of other threads, lost nodes and their return, failures, and what is kept."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest

from lambdascale.core import Failure, MulticastPlan, Request, Send, UserError, traced
from lambdascale.core.commands import (
    CancelTransfer,
    Dispatch,
    FailRequest,
    LoadBlocks,
    PlaceCopy,
    Serve,
    StartMulticast,
    StopInstance,
    SwitchMode,
)
from lambdascale.core.events import (
    BlockArrived,
    CommandFailed,
    NodeJoined,
    NodeLost,
    RequestArrived,
    RequestFinished,
    SetUpDone,
    TokensProduced,
)
from lambdascale.core.plan import Stage
from lambdascale.live import wire
from tests.unit.live_backend_rig import Rig, ticket

REQUEST = traced(1, 0.0, "m", 2, 4)


def serve(rig: Rig, node: int = 0, instance: int = 5) -> None:
    rig.backend.submit(Serve(instance, "m", (Stage(node, 0, 1),), (10, 10), 100))


def dispatch(rig: Rig, *request_ids: int, instance: int = 5) -> None:
    rig.backend.submit(Dispatch(instance, tuple(Request(number, 0.0, "m", 2, 4) for number in request_ids)))


def answer(rig: Rig, request_id: int, count: int = 4, instance: int = 5, node: int = 0) -> None:
    tokens = tuple(wire.Token(request_id, index, 7, index == count - 1) for index in range(count))
    rig.say(node, wire.Tokens(instance, "local", tokens))


def load(rig: Rig, number: int, node: int = 1, tier: Any = "host") -> None:
    rig.backend.submit(LoadBlocks(number, "m", node, (0, 1), (10, 10), tier, "pipelined"))


def ids(events: list[Any], kind: type) -> list[int]:
    return [event.request.request_id if kind is RequestArrived else event.request_id for event in events if type(event) is kind]


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    assert rig.events() == [NodeJoined(0.0, 0), NodeJoined(0.0, 1)]
    rig.sent()
    return rig


@pytest.mark.parametrize("kept", [True, False])
def test_token_times_of_a_trace(kept: bool) -> None:
    """Gaps are those of the tokens' arrival; a request that fails has none, nor has one without token_times."""
    rig = Rig(trace=[REQUEST, traced(2, 0.0, "m", 2, 4)], token_times=kept)
    assert ids(rig.events(), RequestArrived) == [1, 2]
    serve(rig)
    dispatch(rig, 1, 2)
    for index, wait_s in enumerate((0.5, 0.25, 0.0, 1.0)):
        rig.now_s += wait_s
        rig.say(0, wire.Tokens(5, "local", (wire.Token(1, index, 7, index == 3), *([wire.Token(2, 0, 7, False)] * (index == 0)))))
        rig.events()
    rig.backend.submit(FailRequest(2, Failure("no_node", "no node")))
    gaps = rig.backend.token_gaps()
    assert (gaps is not None) == kept
    if gaps is not None:
        assert {number: own.tolist() for number, own in gaps.by_request().items()} == {1: [0.25, 0.0, 1.0]}


class TestCalls:
    """Calls of other threads."""

    def test_an_answer_reaches_its_sink(self, rig: Rig) -> None:
        sink = rig.offer(1)
        assert ids(rig.events(), RequestArrived) == [1]
        serve(rig)
        dispatch(rig, 1)
        answer(rig, 1)
        assert [type(event) for event in rig.events()] == [TokensProduced, RequestFinished]
        assert (sink.tokens_, sink.finished, sink.failures) == ([7] * 4, True, [])

    def test_aborts_while_others_offer(self, rig: Rig) -> None:
        """Aborted requests of which the control plane has not heard yet never arrive, whatever other threads do meanwhile."""
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            sinks: list[Any] = []

            def offer(first: int) -> None:
                for number in range(first, first + 2000):
                    sinks.append(rig.offer(number))
                    if number % 2:
                        rig.backend.abort(number)

            threads = [threading.Thread(target=offer, args=(first,)) for first in (0, 10_000)]
            for thread in threads:
                thread.start()
            events = []
            while any(thread.is_alive() for thread in threads):
                events += rig.events()
            events += rig.events()
        finally:
            sys.setswitchinterval(interval)
        arrived = ids(events, RequestArrived)
        assert sorted(n for n in arrived if not n % 2) == [*range(0, 2000, 2), *range(10_000, 12_000, 2)]
        assert not rig.backend._offered

    def test_an_abort_before_the_arrival(self, rig: Rig) -> None:
        rig.offer(1)
        rig.backend.abort(1)
        rig.offer(2)
        assert ids(rig.events(), RequestArrived) == [2]

    def test_an_abort_under_way(self, rig: Rig) -> None:
        rig.offer(1)
        rig.events()
        serve(rig)
        dispatch(rig, 1)
        rig.sent()
        rig.backend.abort(1)
        rig.events()
        assert rig.sent(0) == [wire.Abort(1)]
        rig.say(0, wire.Aborted(5, 1))
        assert ids(rig.events(), RequestFinished) == [1]

    def test_a_request_that_cannot_be_sent_fails_alone(self, rig: Rig) -> None:
        """A token that msgpack cannot hold: an OverflowError in the control thread would end the server."""
        bad, good = rig.offer(1, prompt=[1 << 70, 2]), rig.offer(2)
        assert ids(rig.events(), RequestArrived) == [2]
        assert [failure.reason for failure in bad.failures] == ["unsendable"]
        serve(rig)
        dispatch(rig, 2)
        answer(rig, 2)
        rig.events()
        assert good.finished

    def test_an_answer_that_ends_while_its_instance_fails(self, rig: Rig) -> None:
        """The control plane hears of the failure first and restarts the request: its end comes under the new instance's name."""
        sink = rig.offer(1)
        rig.events()
        serve(rig)
        dispatch(rig, 1)
        rig.say(0, wire.Happened(CommandFailed(0.0, "Serve", "broken", instance=5)))
        answer(rig, 1)
        for _ in range(2):
            rig.backend._listen(0)
        assert isinstance(rig.backend.next_event(), CommandFailed)
        rig.backend.submit(StopInstance(5))
        serve(rig, node=1, instance=6)
        rig.sent()
        dispatch(rig, 1, instance=6)
        assert rig.sent() == []
        assert [(type(event), event.instance) for event in rig.events()] == [(TokensProduced, 5), (RequestFinished, 6)]
        assert sink.finished

    def test_a_pipeline_that_did_not_start_is_dissolved_before_its_failure_is_heard_of(self, rig: Rig) -> None:
        """The head has none of its requests: they waited for a handover for ever."""
        rig.offer(1)
        rig.events()
        rig.backend.submit(Serve(5, "m", (Stage(0, 0, 0), Stage(1, 1, 1)), (10, 10), 100))
        dispatch(rig, 1)
        rig.say(0, wire.Happened(CommandFailed(0.0, "Compute", "no room", instance=5)))
        rig.backend._listen(0)
        serve(rig, node=1, instance=6)
        rig.backend.submit(SwitchMode(5, ((1, 6),), "recompute"))
        assert wire.Assign(6, (ticket(1),)) in rig.sent(1)

    def test_an_end_fails_all_that_wait(self, rig: Rig) -> None:
        """The request under way, the one not heard of, and one that comes later; each once."""
        stopping = Failure("stopping", "the server is stopping")
        first = rig.offer(1)
        rig.events()
        second = rig.offer(2)
        rig.backend.end(stopping)
        assert rig.backend.next_event() is None
        third = rig.offer(3)
        assert [sink.failures for sink in (first, second, third)] == [[stopping]] * 3
        assert rig.backend.next_event() is None

    def test_an_end_while_the_initial_load_is_under_way(self, rig: Rig) -> None:
        rig = Rig()
        load(rig, 3, tier="instant")
        rig.events()
        rig.backend.end()
        assert rig.backend.next_event() is None

    def test_a_request_given_up_reaches_its_client(self, rig: Rig) -> None:
        sink = rig.offer(1)
        rig.events()
        failure = Failure("instance_failed", "its instance failed 3 times")
        rig.backend.submit(FailRequest(1, failure))
        assert sink.failures == [failure]

    def test_a_request_given_up_before_its_end_is_heard_of_counts_once(self, rig: Rig) -> None:
        """The request ended while the failure of its instance was on its way to the control plane, which then gave it up."""
        rig.offer(1)
        rig.events()
        serve(rig)
        dispatch(rig, 1)
        failure = CommandFailed(0.0, "Serve", "no room", instance=5)
        rig.say(0, wire.Happened(failure))
        answer(rig, 1)
        rig.backend._listen(0)
        assert rig.backend.next_event() == failure
        rig.backend.submit(FailRequest(1, Failure("instance_failed", "3 times")))
        assert ids(rig.events(), RequestFinished) == []


def test_the_end_of_a_set_up_is_passed_on_while_its_transfer_waits(rig: Rig) -> None:
    """News of another node is dropped, as is that of a transfer which has ended."""
    plan = MulticastPlan((0, 1), (0,), 2, ((Send(0, 1, 0),), (Send(0, 1, 1),)))
    rig.backend.submit(StartMulticast(3, "m", plan, (8, 8), ("gpu",), "collective"))
    for node, told in ((1, SetUpDone(0.0, 3, 1)), (1, SetUpDone(0.0, 3, 0)), (0, SetUpDone(0.0, 3, 0))):
        rig.say(node, wire.Happened(told))
    rig.say(1, *(wire.Happened(BlockArrived(0.0, 3, 1, "m", block)) for block in (0, 1)))
    rig.say(1, wire.Happened(SetUpDone(0.0, 3, 1)))
    assert [type(event) for event in rig.events()] == [SetUpDone, BlockArrived, BlockArrived]


class TestLosses:
    """Nodes that are lost, and for which reasons."""

    def test_a_fault_costs_its_node_and_no_more(self, rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
        for users, node in ((False, 1), (True, 0)):
            rig.say(node, wire.Fault(node, "out of memory", users))
            assert rig.events()[-1] == NodeLost(0.0, node)
            assert rig.launcher.killed[-1] == node
        assert "node 1 is lost: out of memory" in capsys.readouterr().err

    def test_a_failure_that_names_nothing_costs_its_node(self, rig: Rig) -> None:
        rig.say(1, wire.Happened(CommandFailed(0.0, "Serve", "no room")))
        assert rig.events() == [NodeLost(0.0, 1)]

    @pytest.mark.parametrize("names", [{"transfer_id": 4}, {"instance": 5}])
    def test_a_failure_that_names_something_is_passed_on(self, rig: Rig, names: dict[str, int]) -> None:
        failure = CommandFailed(0.0, "LoadBlocks", "damaged", **names)
        rig.say(1, wire.Happened(failure))
        assert rig.events() == [failure]
        assert not rig.launcher.killed

    def test_a_failure_while_the_cluster_is_set_up(self) -> None:
        rig = Rig()
        rig.events()
        rig = Rig()
        load(rig, 3, tier="instant")
        rig.events()
        rig.say(1, wire.Happened(CommandFailed(0.0, "LoadBlocks", "no such file", transfer_id=3)))
        with pytest.raises(UserError, match="could not be set up: no such file"):
            rig.events()

    def test_the_loss_of_the_node_that_the_clock_waits_for(self) -> None:
        """Copies and loads of other nodes are still waited for, also when a transfer's number is the node's."""
        rig = Rig()
        load(rig, 1, node=0, tier="instant")
        rig.backend.submit(PlaceCopy(1, "m"))
        rig.events()
        rig.say(1, wire.Fault(1, "broken", users=False))
        rig.events()
        assert rig.backend.now() == 0
        rig.say(0, *(wire.Happened(BlockArrived(0.0, 1, 0, "m", block)) for block in (0, 1)))
        rig.events()
        rig.now_s += 1
        assert rig.backend.now() == 1

    def test_equal_lines_are_counted(self, rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
        for _ in range(38):
            rig.say(1, wire.Happened(CommandFailed(0.0, "Serve", "no sense", instance=5)))
        rig.events()
        rig.backend.close()
        lines = capsys.readouterr().err.splitlines()
        assert lines == ["Serve failed: no sense", "Serve failed: no sense (37 times more)"]


class TestTables:
    """Nothing is kept of what has ended."""

    @staticmethod
    def sizes(rig: Rig) -> dict[str, int]:
        """Entries of every table of the backend and of its parts."""
        found: dict[str, int] = {}
        parts: list[tuple[str, Any]] = [("backend", rig.backend)]
        while parts:
            name, part = parts.pop()
            for key, value in vars(part).items():
                if hasattr(value, "__dict__") and type(value).__module__.startswith("lambdascale.live.controller"):
                    parts.append((f"{name}.{key}", value))
                if hasattr(value, "__len__"):
                    found[f"{name}.{key}"] = len(value)
        return found

    def test_many_requests_and_transfers(self, rig: Rig) -> None:
        def turn(number: int) -> None:
            base = 10 * number
            for request_id in range(base, base + 4):
                rig.offer(request_id)
            rig.backend.abort(base)
            rig.events()
            rig.backend.abort(base + 1)
            rig.backend.abort(base + 9)  # never heard of
            serve(rig, instance=base)
            dispatch(rig, base + 1, base + 2, instance=base)
            answer(rig, base + 2, instance=base)
            rig.backend.submit(FailRequest(base + 3, Failure("no_node", "no")))
            plan = MulticastPlan(members=(0, 1), sources=(0,), blocks=2, rounds=((Send(0, 1, 0),), (Send(0, 1, 1),)))
            for transfer in range(base, base + 3):
                rig.backend.submit(StartMulticast(transfer, "m", plan, (10, 10), ("gpu",), "one_sided"))
            load(rig, base + 4)
            rig.backend.submit(CancelTransfer(base))
            rig.say(1, wire.Happened(CommandFailed(0.0, "StartMulticast", "damaged", transfer_id=base + 1)))
            rig.say(1, *(wire.Happened(BlockArrived(0.0, base + 2, 1, "m", block)) for block in (0, 1)))
            rig.say(0, wire.Aborted(base, base + 1))
            rig.events()
            rig.backend.submit(StopInstance(base))
            rig.events()

        turn(0)
        before = self.sizes(rig)
        for number in range(1, 40):
            turn(number)
            rig.sent()
        assert self.sizes(rig) == before

    def test_many_losses(self) -> None:
        """A node is lost often, given up in between, and comes back in the next window."""
        rig = Rig(restarts=100)
        rig.events()

        def turn() -> None:
            rig.say(1, wire.Fault(1, "broken", users=False))
            rig.after(31.5, [0, 1])

        for _ in range(25):  # ten minutes, of which restarts are remembered
            turn()
        before = self.sizes(rig)
        for _ in range(30):
            turn()
        after = self.sizes(rig)
        assert rig.backend._roster.alive == {0, 1}
        assert after == before


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_a_transfer_that_ends_early_is_forgotten(rig: Rig, how: str) -> None:
    """A trace would otherwise wait for its blocks for ever."""
    load(rig, 3)
    if how == "cancelled":
        rig.backend.submit(CancelTransfer(3))
    else:
        rig.say(1, wire.Happened(CommandFailed(0.0, "LoadBlocks", "damaged", transfer_id=3)))
        rig.events()
    assert rig.backend._idle()


@pytest.mark.parametrize("how", ["load", "multicast"])
def test_a_block_told_of_while_its_transfer_fails_is_not_waited_for_again(rig: Rig, how: str) -> None:
    """A node reports a block once. The control plane hears of the failure first, and plans the block anew."""
    load(rig, 3)
    failure = CommandFailed(0.0, "LoadBlocks", "damaged", transfer_id=3)
    rig.say(1, wire.Happened(failure), wire.Happened(BlockArrived(0.0, 3, 1, "m", 0)))
    for _ in range(2):
        rig.backend._listen(0.0)
    assert isinstance(rig.backend.next_event(), CommandFailed)
    if how == "load":
        load(rig, 4)
    else:
        plan = MulticastPlan((0, 1), (0,), 2, ((Send(0, 1, 0),), (Send(0, 1, 1),)))
        rig.backend.submit(StartMulticast(4, "m", plan, (10, 10), ("gpu",), "one_sided"))
    assert [type(event) for event in rig.events()] == [BlockArrived]
    assert not rig.backend._idle(), "of the other block nobody has told"
    rig.say(1, wire.Happened(BlockArrived(0.0, 4, 1, "m", 1)))
    assert [type(event) for event in rig.events()] == [BlockArrived]
    assert rig.backend._idle()


def test_a_cancelled_transfer_is_cancelled_everywhere(rig: Rig) -> None:
    """A node that has no part in it any more hears of it, too: it may wait for a lost one."""
    rig.backend.submit(CancelTransfer(7))
    assert rig.sent() == [wire.Do(CancelTransfer(7))] * 2


def test_seeds_of_a_trace_ticket_are_checked() -> None:
    with pytest.raises(ValueError, match="seed must be between -9223372036854775808 and 9223372036854775807"):
        ticket(1, seed=1 << 63)
