"""``lambdascale serve``: a control plane over live nodes, behind the front end, until somebody stops it."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from lambdascale.checkpoints import PackedModel
from lambdascale.control import SystemConfig, build_system, drive
from lambdascale.core import ClusterSpec
from lambdascale.live.config import LiveConfig
from lambdascale.live.controller.backend import LiveBackend
from lambdascale.live.serving.frontend import FrontEnd
from lambdascale.live.serving.state import ClusterState
from lambdascale.live.serving.text import Text
from lambdascale.live.serving.view import View

_LINGER_S = 5


class Service:
    """A cluster that serves one model. ``backend`` runs already; ``close()`` ends everything."""

    def __init__(self, *, config: LiveConfig, model: PackedModel, cluster: ClusterSpec, system: SystemConfig) -> None:
        self.text = Text(model.directory)
        plane = build_system(system, cluster=cluster, models=[model.spec])
        self.state = ClusterState(len(model.blocks))
        self.backend: LiveBackend = config.start(cluster=cluster, models=[(model.name, model)], system=system, open_ended=True)
        self._stopping = False
        self.fault: BaseException | None = None
        self.on_fault: Callable[[], None] = _nothing

        def run() -> None:
            try:
                drive(plane, self.backend, [self.state])
            except BaseException as error:
                self.fault = error
                traceback.print_exc()
                self.backend.fail_all("the server has failed")
                self.on_fault()

        self._thread = threading.Thread(target=run, name="control", daemon=True)
        self._thread.start()
        self.front_end = FrontEnd(
            model=model.name,
            text=self.text,
            cluster=self.backend,
            state=self.state,
            slot_tokens=config.slot_tokens,
            alive=lambda: not self._stopping and self.fault is None,
        )

    def stop_answering(self) -> None:
        """No new requests; those under way are told."""
        self._stopping = True
        self.backend.end()

    def close(self) -> None:
        """End the nodes; nothing stays behind."""
        self.stop_answering()
        self._thread.join()
        self.backend.close()


def _nothing() -> None:
    """Before the server runs, nobody has to be told."""


class _Server(uvicorn.Server):
    """Tells the service first when it is asked to stop, so that open streams end."""

    service: Service

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Being asked to stop is no error: unlike uvicorn's own, this does not raise the signal again afterwards."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal."""
        self.service.stop_answering()
        self.service.backend.fail_all("the server is stopping")
        super().handle_exit(sig, frame)


def serve(service: Service, *, host: str, port: int, view: bool) -> int:
    """Answer requests until a signal; the exit status."""
    config = uvicorn.Config(
        service.front_end.app, host=host, port=port, log_level="warning", lifespan="off", timeout_graceful_shutdown=_LINGER_S
    )
    server = _Server(config)
    server.service = service

    def stop() -> None:
        server.should_exit = True

    service.on_fault = stop
    try:
        if view:
            with View(service.state, f"http://{host}:{port}"):
                server.run()
        else:
            server.run()
    finally:
        service.close()
    return 1 if service.fault is not None or not server.started else 0
