"""``serve`` when its control thread ends before, while or after the HTTP server starts: it ends too, with the reason."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from lambdascale.checkpoints import PackedModel
from lambdascale.cli.serve import _system
from lambdascale.core import UserError
from lambdascale.live.serving.options import HttpOptions, bind
from lambdascale.live.serving.server import Service, serve
from lambdascale.testing.systems import small_cluster
from tests.live.harness import pack_tiny


class Backend:
    """Fails when it is asked for an event and ``broken`` is set; ends when it is told to."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.broken, self.closed = threading.Event(), threading.Event()
        self.failed: list[Any] = []
        self.ended = False

    def now(self) -> float:
        return 0.0

    def submit(self, command: Any) -> None: ...

    def next_event(self) -> None:
        self.broken.wait(60)
        if not self.ended:
            raise self.error

    def fail_all(self, failure: Any) -> None:
        self.failed.append(failure)

    def end(self, failure: Any) -> None:
        if not self.broken.is_set():
            self.ended = True
            self.broken.set()

    def close(self) -> None:
        self.closed.set()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return PackedModel.open(pack_tiny(tmp_path_factory.mktemp("early")), "tiny")


@pytest.fixture
def make(model: PackedModel) -> Callable[[BaseException], tuple[Service, Backend]]:
    def service(error: BaseException) -> tuple[Service, Backend]:
        backend = Backend(error)
        config: Any = SimpleNamespace(start=lambda **_: backend, slot_tokens=64, seen=lambda cluster, *_: cluster)
        arguments = argparse.Namespace(system="lambdascale", min_nodes=1, keep_alive=7.0, overrides=[])
        system = _system(arguments, len(model.blocks))
        made = Service(config=config, model=model, cluster=small_cluster(), system=system, options=HttpOptions(port=0))
        return made, backend

    return service


Make = Callable[[BaseException], tuple[Service, Backend]]
NO_MODEL = UserError("the cluster could not be set up: block 3 is damaged")


def run(service: Service) -> int:
    options = HttpOptions(port=0)
    with bind(options) as bound:
        return serve(service, options, bound, view=False)


def test_a_fault_before_the_server_can_be_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is called back any more: it must look. The server does not get as far as to wait for requests."""
    service, backend = make(NO_MODEL)
    backend.broken.set()
    service._thread.join(60)
    monkeypatch.setattr(service, "ill", lambda: pytest.fail("it waits for requests"))
    with pytest.raises(UserError, match="block 3 is damaged"):
        run(service)
    assert backend.closed.is_set()
    assert [failure.reason for failure in backend.failed] == ["server_failed"]


@pytest.mark.parametrize(("error", "status"), [(NO_MODEL, 2), (RuntimeError("a fault of ours"), 1)])
def test_a_fault_while_requests_are_waited_for(
    error: Exception, status: int, make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service, backend = make(error)
    ill = service.ill

    def look() -> str:
        backend.broken.set()  # the server is up
        return ill()

    monkeypatch.setattr(service, "ill", look)
    if status == 2:
        with pytest.raises(UserError, match="block 3 is damaged"):
            run(service)
    else:
        assert run(service) == status
    assert backend.closed.is_set()
    assert ("a fault of ours" in capsys.readouterr().err) is (status == 1)
