"""A node's watch over the controller: silence counts only while the node runs."""

from __future__ import annotations

from typing import Any

import pytest
import zmq

from lambdascale.live.node.vigil import Vigil
from lambdascale.live.node_config import Access


class Watch:
    """A vigil over a controller that does not exist, at a time of the test's."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        public, secret = zmq.curve_keypair()
        access = Access("tcp://127.0.0.1:1", "tcp://127.0.0.1:1", public, public, secret, b"", 1.5, 10.0)
        self.now = 100.0
        self.vigil = Vigil(self.context, access, lambda: self.now)

    def look(self, seconds: float, *, heard: bool = False) -> str:
        self.now += seconds
        ready: dict[Any, int] = {self.vigil._socket: zmq.POLLIN} if heard else {}
        self.vigil.look(ready)
        return self.vigil.verdict


@pytest.fixture
def watch() -> Any:
    watch = Watch()
    watch.vigil.settle()
    yield watch
    watch.vigil.close()
    watch.context.term()


def test_silence(watch: Watch) -> None:
    assert [watch.look(0.25) for _ in range(6)] == [""] * 6
    assert watch.look(0.25) == "the controller is silent for 1.8 s"


def test_signs_of_life(watch: Watch) -> None:
    for _ in range(100):
        assert watch.look(1.4, heard=True) == ""
        assert watch.look(0.25) == ""


def test_a_node_that_was_stopped_hears_the_controller_first(watch: Watch) -> None:
    assert watch.look(3600.0) == ""
    assert watch.look(0.1, heard=True) == ""
    assert [watch.look(0.25) for _ in range(6)] == [""] * 6


def test_more_patience_while_the_cluster_starts() -> None:
    """A node that leaves then ends the start; once it has met the others, it is replaced."""
    starting = Watch()
    assert [starting.look(0.25) for _ in range(40)] == [""] * 40
    starting.vigil.settle()
    assert [starting.look(0.25) for _ in range(6)] == [""] * 6
    assert starting.look(0.25)
    starting.vigil.close()
    starting.context.term()


def test_a_start_is_not_waited_for_without_end() -> None:
    starting = Watch()
    assert [bool(starting.look(0.25)) for _ in range(41)] == [False] * 40 + [True]
    starting.vigil.close()
    starting.context.term()
