"""The control channel when one of its ends does not read for a while: nobody waits, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lambdascale.live import wire
from lambdascale.live.controller.hub import Hub
from lambdascale.live.node.line import Line

MANY = 30_000  # messages: more than ZeroMQ's own bounds and the kernel's buffers hold


@pytest.fixture
def ends() -> Iterator[tuple[Hub, Line]]:
    """A hub and the line of node 3, which have heard of each other."""
    hub = Hub("127.0.0.1", patience_s=0.0, start_patience_s=3600.0)
    line = Line(cast(Any, SimpleNamespace(node=3, generation=0, access=hub.access)))
    line._socket.sndtimeo = 10_000  # a line that waits for the controller fails its test: zmq.Again
    line.say(wire.Beat())
    heard: list[Any] = []
    while not heard:
        line.poll(0.01)
        heard, _ = hub.poll(0.1)
    yield hub, line
    line.close()
    hub.close()


def test_a_controller_that_does_not_read_makes_no_node_wait(ends: tuple[Hub, Line]) -> None:
    """A main loop that waits in send() sends no heartbeat, and never notices that the controller has ended."""
    hub, line = ends
    for number in range(MANY):
        line.say(wire.Fault(3, f"{number:300}", users=False))
    line.poll(0.0)
    heard: list[int] = []
    while len(heard) < MANY:
        heard += [int(message.reason) for _, message in hub.poll(1)[0] if isinstance(message, wire.Fault)]
    assert heard == list(range(MANY))


def test_a_node_that_does_not_read_misses_nothing(ends: tuple[Hub, Line]) -> None:
    hub, line = ends
    for number in range(MANY):
        hub.send(3, wire.Abort(number))
    heard: list[int] = []
    idle = 0
    while len(heard) < MANY and idle < 50:
        messages = line.poll(0.2)
        idle = 0 if messages else idle + 1
        heard += [message.request_id for message in messages if isinstance(message, wire.Abort)]
    assert heard == list(range(MANY))


def test_a_node_has_started_when_it_hears_of_the_others(ends: tuple[Hub, Line]) -> None:
    """Patience with the controller is the shorter one from then on."""
    hub, line = ends
    for _ in range(3):
        line.poll(0.01)
        assert not line.lost
    hub.send(3, wire.Directory(1, {}, {}))
    while not line.poll(0.1):
        pass
    for _ in range(100):
        line.poll(0.01)
        if line.lost:
            return
    pytest.fail("it waits for the controller as while it started")


def test_a_node_that_is_started_again_has_started(ends: tuple[Hub, Line]) -> None:
    """Patience is the shorter one at once: no start of a cluster depends on this node."""
    hub, _ = ends
    line = Line(cast(Any, SimpleNamespace(node=3, generation=1, access=hub.access)))
    for _ in range(1000):
        line.poll(0.01)
        if line.lost:
            break
    assert line.lost
    line.close()


def test_a_process_that_was_replaced_is_neither_heard_nor_told(ends: tuple[Hub, Line]) -> None:
    """Processes of the same node, both connected: the hub talks with the one expected, whatever the other says."""
    hub, before = ends
    after = Line(cast(Any, SimpleNamespace(node=3, generation=1, access=hub.access)))
    hub.expect(3, 1)
    before.say(wire.Fault(3, "of the old one", users=False))
    after.say(wire.Fault(3, "of the new one", users=False))
    heard: list[Any] = []
    told: list[Any] = []
    while not told:
        before.poll(0.0)
        told += after.poll(0.05)
        messages, _ = hub.poll(0.05)
        if messages:
            hub.send(3, wire.Abort(7))
        heard += [message.reason for _, message in messages if isinstance(message, wire.Fault)]
    assert heard == ["of the new one"]
    assert [message.request_id for message in told] == [7]
    assert before.poll(0.2) == []
    after.close()
