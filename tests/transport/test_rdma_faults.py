"""The rdma transport when verbs or handlers fail: one connection ends, and the thread that all depend on goes on."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from lambdascale.transport.rdma.watch import Watch, guarded

VERBS = ("addr", "cq", "device", "enums", "mr", "pd", "pyverbs_error", "qp", "wr")
OURS = "lambdascale.transport.rdma"


class PyverbsError(Exception):
    pass


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of connections, imported with made-up verbs; afterwards nothing of that is left."""
    parts = ("verbs", "device", "lane", "slots", "connection")
    for part in parts:
        monkeypatch.delitem(sys.modules, f"{OURS}.{part}", raising=False)
    package: Any = ModuleType("pyverbs")
    monkeypatch.setitem(sys.modules, "pyverbs", package)
    for name in VERBS:
        module = MagicMock(name=name, PyverbsError=PyverbsError)
        monkeypatch.setitem(sys.modules, f"pyverbs.{name}", module)
        setattr(package, name, module)
    yield importlib.import_module(f"{OURS}.connection")
    for part in parts:
        sys.modules.pop(f"{OURS}.{part}", None)


class Pipe:
    """A descriptor that is readable."""

    def __init__(self) -> None:
        self.fd, self._end = os.pipe()
        os.write(self._end, b"x")

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._end)


@pytest.fixture
def watch() -> Iterator[Watch]:
    watch = Watch("watch", lambda: None)
    yield watch
    watch.close()
    assert not watch.thread.is_alive()


class TestWatch:
    def test_a_callback_that_fails(self, watch: Watch, capsys: pytest.CaptureFixture[str]) -> None:
        """The owner is told, and the callback is called no more; others are."""
        bad, good, told, called = Pipe(), Pipe(), list[str](), threading.Event()

        def fail() -> None:
            raise PyverbsError("no completion queue")

        watch.call(lambda: watch.add(bad.fd, fail, lambda error: told.append(str(error))))
        watch.call_and_wait(lambda: None, 10)

        def once() -> None:
            watch.remove(good.fd)
            called.set()

        watch.call(lambda: watch.add(good.fd, once, lambda error: None))
        assert called.wait(10)
        assert told == ["no completion queue"]
        assert capsys.readouterr().err.count("PyverbsError: no completion queue") == 1
        for pipe in (bad, good):
            pipe.close()

    def test_a_job_that_fails(self, watch: Watch, capsys: pytest.CaptureFixture[str]) -> None:
        """The watch goes on even if the callback that is told fails, too."""
        told: list[str] = []

        def fail(error: Exception | None = None) -> None:
            told.append(repr(error))
            raise ZeroDivisionError

        watch.call(fail, fail)
        watch.call_and_wait(lambda: None, 10)
        watch.call_and_wait(fail, 10)
        assert told == ["None", "ZeroDivisionError()", "None"]
        assert watch.thread.is_alive()

    def test_a_tick_that_fails(self, capsys: pytest.CaptureFixture[str]) -> None:
        calls: list[int] = []

        def tick() -> None:
            calls.append(1)
            raise ZeroDivisionError

        watch = Watch("watch", tick)
        for _ in range(2):
            watch.call_and_wait(lambda: None, 10)
        watch.close()
        assert len(calls) >= 2


def made(connection: Any, **parts: Any) -> Any:
    """A connection to node 3 made of the given parts; what it tells is in ``lost`` and ``jobs``."""
    it = connection.RdmaConnection.__new__(connection.RdmaConnection)
    lock, lost, jobs = threading.RLock(), list[tuple[int, str]](), list[Any]()
    endpoint = SimpleNamespace(
        watch=SimpleNamespace(call=lambda job, failed=None: jobs.append(job), remove=lambda fd: None),
        forget=lambda one, reason="": lost.append((one.peer, reason)) if reason else None,
        freed=lambda one: None,
        link=None,
    )
    outbox = SimpleNamespace(fail=list)
    usual = {
        "peer": 3, "sock": MagicMock(), "lanes": [], "lost": lost, "jobs": jobs, "_endpoint": endpoint, "_lock": lock,
        "_changed": threading.Condition(lock), "_outbox": outbox, "_gate": MagicMock(), "_slots": MagicMock(),
        "_inbox": SimpleNamespace(peer_has_left=False), "_ending": False, "_reason": "", "_tells": False, "_freed": False,
        "_left": threading.Event(),
    }  # fmt: skip
    it.__dict__.update(usual | parts)
    return it


def told(it: Any) -> list[tuple[int, str]]:
    """Losses that are told when the watch thread has done what it was asked to; none before."""
    assert not it.lost
    for job in it.jobs:
        if job == it._free:
            job()
    lost: list[tuple[int, str]] = it.lost
    return lost


def test_a_completion_queue_that_fails(connection: Any) -> None:
    """The peer counts as lost, with the reason."""
    lane = connection.Lane.__new__(connection.Lane)
    lane._cq = SimpleNamespace(poll=MagicMock(side_effect=PyverbsError("device removed")))
    it = made(connection)
    it._completed(0, lane, acknowledge=False)
    assert told(it) == [(3, "its completions cannot be read: device removed")]


def test_an_exception_that_nothing_foresaw(connection: Any) -> None:
    it = made(connection)
    guarded(MagicMock(side_effect=ZeroDivisionError("mine")), it.failed)
    assert told(it) == [(3, "ZeroDivisionError: mine")]


def test_a_sending_thread_that_fails(connection: Any, capsys: pytest.CaptureFixture[str]) -> None:
    it = made(connection, _next=MagicMock(side_effect=KeyError("mine")))
    it.sock.recv_into.side_effect = lambda view: 1
    it._send_all()
    assert told(it) == [(3, "KeyError: 'mine'")]
    assert "Traceback" in capsys.readouterr().err


def test_memory_that_cannot_be_freed(connection: Any) -> None:
    """Everything else is, and whoever waits for a write is told."""
    future: Any = MagicMock()
    lane = MagicMock(fd=5)
    it = made(connection, lanes=[lane], _outbox=SimpleNamespace(fail=lambda: [future]))
    it._gate.close.side_effect = PyverbsError("mine")
    it._slots.close.side_effect = PyverbsError("mine")
    it.failed(ValueError("first"))
    assert told(it) == [(3, "ValueError: first")]
    assert lane.close.called
    assert it.sock.close.called
    assert future.set_exception.called


def test_writes_that_cannot_be_given_up(connection: Any) -> None:
    """The loss is told all the same."""
    it = made(connection, _outbox=SimpleNamespace(fail=MagicMock(side_effect=PyverbsError("mine"))))
    it.failed(ValueError("first"))
    assert told(it) == [(3, "ValueError: first")]


@pytest.mark.parametrize("how", ["cut", "failed"])
def test_a_loss_is_told_when_nothing_can_arrive_any_more(connection: Any, how: str) -> None:
    """A write of the peer may be under way, and the node uses its memory anew: the queue pair is closed before."""
    done: list[str] = []
    it = made(connection, lanes=[MagicMock(fd=5, close=lambda: done.append("closed"))])
    it._endpoint.forget = lambda one, reason="": done.append(f"told: {reason}")
    it.sock.shutdown = lambda how: done.append("may connect anew")
    it._endpoint.watch.call_and_wait = lambda job, timeout: [each() for each in (*it.jobs, job)]
    if how == "cut":
        it.cut("severed")
        assert done == ["closed", "told: severed", "may connect anew"], "when it returns"
    else:
        it.failed(ValueError("mine"))
        assert done == []
        it._endpoint.watch.call_and_wait(it._free, 1.0)
        assert done == ["closed", "told: ValueError: mine", "may connect anew"]


def test_whether_a_write_is_shut_out_is_looked_up_under_the_lock(connection: Any) -> None:
    """The sending thread takes writes out of the queue meanwhile."""
    from lambdascale.transport.rdma.outbox import Outbox

    it = made(connection)
    looked: list[bool] = []

    class Writes(deque[Any]):
        def __bool__(self) -> bool:
            looked.append(it._lock._is_owned())
            return False

    outbox = Outbox.__new__(Outbox)
    outbox.__dict__.update(_writes=Writes(), goodbye=lambda: None)
    turns = iter((True, True, False))
    it._outbox = outbox
    it._thread = SimpleNamespace(is_alive=lambda: next(turns), join=lambda timeout: None)
    it._reason = "over"
    it._endpoint.watch.call_and_wait = lambda job, timeout: None
    it.finish()
    assert looked == [True, True]
