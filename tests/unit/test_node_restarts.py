"""Lost nodes that are started again, and the supervisor that plans it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from lambdascale.core import UserError, traced
from lambdascale.core.events import (
    BlockArrived,
    ConnectionLost,
    NodeGivenUp,
    NodeJoined,
    NodeLost,
    RequestArrived,
)
from lambdascale.live import wire
from lambdascale.live.controller.launch import End
from lambdascale.live.controller.supervisor import Supervisor
from lambdascale.live.node.line import LEFT
from tests.unit.live_backend_rig import FakeLauncher, Rig

REQUEST = traced(1, 0.0, "m", 2, 4)


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    assert rig.events() == [NodeJoined(0.0, 0), NodeJoined(0.0, 1)]
    rig.sent()
    return rig


class TestRestarts:
    """Lost nodes that come back."""

    def test_a_lost_node_comes_back_as_a_new_process(self) -> None:
        rig = Rig(restarts=5)
        rig.events()
        rig.sent()
        rig.launcher.ended.add(1)
        events = rig.after(0.25, [0])
        assert events == []  # processes are looked at once a second
        assert [type(event) for event in rig.after(1.0, [0])] == [NodeLost]
        events = rig.after(1.0, [0])
        assert [(type(event), event.node) for event in events if isinstance(event, NodeJoined)] == [(NodeJoined, 1)]
        assert rig.launcher.started[-1] == (1, 1)
        assert rig.hub.generations == {0: 0, 1: 1}
        directory = wire.Directory(2, {0: "0.0", 1: "1.1"}, {0: 0, 1: 1})
        assert directory in rig.sent(0)
        assert rig.backend._roster.alive == {0, 1}

    def test_a_node_joins_when_the_others_have_connected_too(self) -> None:
        """A living node has to connect to a new one with a lower id: commands to it must not come before."""
        rig = Rig(restarts=5)
        rig.events()
        rig.hub.answering = False
        rig.launcher.ended.add(0)
        rig.after(3.0, [1])
        rig.say(0, wire.Connected(0, 2))
        assert rig.events() == []
        rig.say(1, wire.Connected(1, 1))  # an answer to an earlier directory is none to this one
        assert rig.events() == []
        rig.say(1, wire.Connected(1, 2))
        assert [type(event) for event in rig.events()] == [NodeJoined]

    def test_a_newcomer_that_cannot_be_reached_is_tried_again(self) -> None:
        """The member that could not reach it lives on."""
        rig = Rig(restarts=5)
        rig.events()
        rig.hub.answering = False
        rig.launcher.ended.add(0)
        rig.after(3.0, [1])
        rig.say(1, wire.Unreached(0, "refused"))
        rig.events()
        assert rig.launcher.killed == [0, 0]
        rig.hub.answering = True
        assert [type(event) for event in rig.after(5.0, [1])] == [NodeJoined]
        assert rig.launcher.started[-1] == (0, 2)
        assert rig.backend._roster.alive == {0, 1}

    def test_a_node_that_dies_keeps_no_newcomer_from_joining(self) -> None:
        """Node 2 could not connect to it and to nobody after it: it waited for a directory that did not come, for 120 s."""
        rig = Rig(3, restarts=1)
        rig.events()
        rig.hub.answering = False
        rig.launcher.ended.add(2)
        rig.after(2.0, [0, 1])
        assert wire.Directory(2, {0: "0.0", 1: "1.0", 2: "2.1"}, {0: 0, 1: 0, 2: 1}) in rig.sent(2)
        rig.launcher.stillborn = True
        for node in (0, 1):
            rig.say(node, wire.Connected(node, 2))
        rig.launcher.ended.add(0)
        rig.after(1.25, [1])
        rig.say(2, wire.Unreached(0, "refused"))
        rig.after(1.0, [1])
        last = [message for message in rig.sent(2) if isinstance(message, wire.Directory)][-1]
        assert set(last.addresses) == {1, 2}
        rig.say(2, wire.Connected(2, last.number))
        assert [(type(event), event.node) for event in rig.events() if not isinstance(event, NodeGivenUp)] == [(NodeJoined, 2)]

    def test_a_node_that_dies_keeps_no_connection_from_being_mended(self) -> None:
        """Node 2 tries the dead node 0 first, and stopped there: the connection to node 1 cost one of two living nodes."""
        rig = Rig(3)
        rig.events()
        rig.hub.answering = False
        for node, peer in ((1, 2), (2, 1)):
            rig.say(node, wire.Severed(peer, "reset"))
        rig.launcher.ended.add(0)
        rig.say(2, wire.Unreached(0, "refused"))
        assert [(type(event), event.node) for event in rig.after(1.25, [1, 2])] == [(NodeLost, 0)]
        last = [message for message in rig.sent(2) if isinstance(message, wire.Directory)][-1]
        assert set(last.addresses) == {1, 2}
        rig.say(2, wire.Connected(2, last.number))
        assert [type(event) for event in rig.after(6.0, [1, 2])] == [ConnectionLost]
        assert rig.backend._roster.alive == {1, 2}

    def test_a_node_that_keeps_dying_is_given_up(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The node is given up after as many restarts as allowed, with twice the delay each time, and with one line."""
        rig = Rig(restarts=3)
        rig.events()
        rig.launcher.stillborn = True
        rig.launcher.ended.add(1)
        begin = rig.now_s
        times, count, events = [], len(rig.launcher.started), list[Any]()
        while rig.now_s < begin + 60:
            events += rig.after(0.25, [0])
            if len(rig.launcher.started) > count:
                count = len(rig.launcher.started)
                times.append(rig.now_s)
        assert [generation for node, generation in rig.launcher.started if node == 1] == [0, 1, 2, 3]
        assert [type(event) for event in events] == [NodeLost, NodeGivenUp]
        assert events[0].returns
        assert [round(b - a) for a, b in pairwise(times)] == [1, 2]
        assert capsys.readouterr().err.count("given up") == 1
        assert rig.backend._roster.alive == {0}

    def test_no_restarts_unless_asked_for(self, rig: Rig) -> None:
        rig.launcher.ended.add(1)
        (lost,) = rig.after(40.0, [0])
        assert isinstance(lost, NodeLost)
        assert not lost.returns
        assert rig.launcher.started == [(0, 0), (1, 0)]

    def test_messages_of_a_lost_node_are_not_heard(self, rig: Rig) -> None:
        rig.launcher.ended.add(1)
        rig.after(2.0, [0])
        rig.say(1, wire.Happened(BlockArrived(0.0, 1, 1, "m", 0)))
        assert rig.events() == []

    @pytest.mark.parametrize(("restarts", "ends"), [(0, True), (1, False)])
    def test_a_trace_waits_for_a_node_that_may_come_back(self, restarts: int, ends: bool) -> None:
        """A request that nobody serves does not end the run while a restart is planned; without one, it does."""
        rig = Rig(1, trace=[REQUEST], restarts=restarts)
        rig.say(0, wire.Fault(0, "broken", users=False))
        rig.backend._listen(0)
        assert [type(event) for event in rig.events()] == [NodeJoined, NodeLost, RequestArrived]
        assert rig.backend._idle() is ends

    @pytest.mark.parametrize(
        ("status", "kind", "says"),
        [
            (LEFT, UserError, "nodes 0, 1: it has not heard from the controller for too long, and left"),
            (-9, UserError, r"nodes 0, 1: it was killed \(SIGKILL\)"),
            (-11, RuntimeError, r"nodes 0, 1: it was ended by a fault \(SIGSEGV\)"),
            (-40, RuntimeError, r"nodes 0, 1: it was ended by a fault \(signal 40\)"),
            (1, RuntimeError, "nodes 0, 1: its process has ended with status 1"),
            (None, UserError, "nodes 0, 1: its process has ended$"),
        ],
    )
    def test_a_start_fails_when_a_node_does(
        self, status: int | None, kind: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One line says which and why; it is an internal error only if the end may be a fault of ours."""
        monkeypatch.setattr(FakeLauncher, "stillborn", True)
        monkeypatch.setattr(FakeLauncher, "status", status)
        with pytest.raises(kind, match=f"^the cluster did not start: {says}") as caught:
            Rig()
        assert caught.type is kind

    @pytest.mark.parametrize("message", [wire.Severed(1, "cut"), wire.Unreached(1, "cut")], ids=["severed", "unreached"])
    def test_a_start_fails_with_the_cause_rather_than_what_follows(
        self, message: wire.ToController, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A node was killed, and another one notices first that it does not answer."""
        monkeypatch.setattr(FakeLauncher, "greeting", staticmethod(lambda config: message))
        monkeypatch.setattr(FakeLauncher, "dead", lambda self: {1: End.of(-9)})
        with pytest.raises(UserError, match=r"^the cluster did not start: node 1: it was killed \(SIGKILL\)$"):
            Rig()

    def test_an_end_does_not_wait_for_nodes_that_are_starting(self, rig: Rig) -> None:
        """Nodes that start may not listen for seconds. The others are told, and leave in good order."""
        rig = Rig(restarts=1)
        rig.hub.answering = False
        rig.launcher.ended.add(1)
        rig.after(2.0, [0])
        assert rig.launcher.started[-1] == (1, 1)
        rig.launcher.killed.clear()
        rig.sent()
        rig.backend.close()
        assert rig.launcher.killed == [1]
        assert [type(message) for message in rig.sent(0)] == [wire.Shutdown]

    @pytest.mark.parametrize(
        ("message", "kind"),
        [
            (wire.Fault(1, "no GPU", users=True), UserError),
            (wire.Fault(1, "no GPU", users=False), RuntimeError),
            (wire.Unreached(0, "no GPU"), UserError),
        ],
    )
    def test_a_start_fails_with_what_a_node_says(
        self, message: wire.ToController, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(FakeLauncher, "greeting", staticmethod(lambda config: message))
        with pytest.raises(kind, match="no GPU") as caught:
            Rig()
        assert caught.type is kind


def test_restarts_long_ago_do_not_count() -> None:
    """Two are allowed within ten minutes: one every ten minutes goes on for ever."""
    now, lines = [0.0], list[str]()
    supervisor = Supervisor(2, lines.append, lambda: now[0])
    for _ in range(20):
        supervisor.lost(3)
        assert supervisor.waiting
        now[0] += 610
        assert supervisor.take_due() == [3]
        supervisor.joined(3)
    assert not lines
    for _ in range(2):
        supervisor.lost(3)
        now[0] += 31
        supervisor.take_due()
    assert lines == ["node 3 was restarted 2 times within 600 s: given up"]


def test_starts_that_hang_come_to_an_end() -> None:
    """Each takes longer than the window has room for; a node that was up in between has all its restarts again."""
    now, lines = [0.0], list[str]()
    supervisor = Supervisor(2, lines.append, lambda: now[0])
    for up in (True, False):
        for again in (True, True, False):
            assert supervisor.lost(3) is again
            now[0] += 610
            assert supervisor.take_due() == ([3] if again else [])
        if up:
            supervisor.joined(3)
    assert lines == ["node 3 was restarted 2 times and did not come up: given up"] * 2


def test_the_delay_has_a_bound() -> None:
    now = [0.0]
    supervisor = Supervisor(20, lambda line: None, lambda: now[0])
    delays = []
    for _ in range(12):
        supervisor.lost(3)
        delays.append(supervisor.wait_s())
        now[0] += delays[-1]
        assert supervisor.take_due() == [3]
    assert delays[:4] == [0.5, 1.0, 2.0, 4.0]
    assert delays[-1] == 30.0
