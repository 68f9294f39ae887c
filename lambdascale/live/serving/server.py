"""``lambdascale serve``: a control plane over live nodes, behind the front end, until somebody stops it."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import uvicorn

from lambdascale.checkpoints import PackedModel
from lambdascale.control import Observer, SystemConfig, build_system, drive
from lambdascale.core import ClusterSpec, Failure, UserError
from lambdascale.live.config import LiveConfig
from lambdascale.live.controller.backend import LiveBackend
from lambdascale.live.serving.connections import Connection, ConnectionLimits
from lambdascale.live.serving.frontend import FrontEnd
from lambdascale.live.serving.options import HEAD_BYTES, HttpOptions
from lambdascale.live.serving.state import ClusterState
from lambdascale.live.serving.text import Text
from lambdascale.live.serving.view import View

_LINGER_S = 5
_BACKLOG = 1024
_HANDSHAKE_S = 10.0  # of TLS
_MOST_LOAD = 1 << 20  # requests with which no policy wants more replicas
_STOPPING = Failure("stopping", "the server is stopping")
_FAILED = Failure("server_failed", "the server has failed")
_NO_NODE = "no node is alive"


class Service:
    """A cluster that serves one model. ``backend`` runs already; ``close()`` ends everything. ``observers`` belong to the control
    thread until then.
    """

    def __init__(
        self,
        *,
        config: LiveConfig,
        model: PackedModel,
        cluster: ClusterSpec,
        system: SystemConfig,
        options: HttpOptions,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.text = Text(model.directory)
        named = [(model.name, model)]
        plane = build_system(system, cluster=config.seen(cluster, named, system), models=[model.spec])
        self.state = ClusterState(len(model.blocks))
        self.backend: LiveBackend = config.start(cluster=cluster, models=named, system=system, open_ended=True)
        self._model = model.name
        self._to_zero = system.autoscaler.min_replicas == 0
        self._stopping = False
        self.fault: BaseException | None = None
        self.on_fault: Callable[[], None] = _nothing

        def run() -> None:
            try:
                drive(plane, self.backend, [self.state, *observers])
            except BaseException as error:
                self.fault = error
                if not isinstance(error, UserError):
                    traceback.print_exc()
                self.backend.fail_all(_FAILED)
                self.on_fault()

        self._thread = threading.Thread(target=run, name="control", daemon=True)
        self._thread.start()
        self.front_end = FrontEnd(
            model=model.name,
            text=self.text,
            cluster=self.backend,
            state=self.state,
            options=options,
            slot_tokens=config.slot_tokens,
            window=window_of(system, cluster.nodes),
            ill=self.ill,
            closed=self.closed,
            unready=self.unready,
        )

    def ill(self) -> str:
        """Return the reason why the cluster can answer nothing, "" if the control thread runs and a node is alive."""
        return self._ended() or ("" if self.state.nodes_alive else _NO_NODE)

    def closed(self) -> str:
        """Return why no request is taken, "" if one is. While no node is alive, requests wait for one that is started again."""
        return self._ended() or ("" if self.state.nodes_alive or self.state.nodes_returning else _NO_NODE)

    def _ended(self) -> str:
        if self.fault is not None:
            return _FAILED.text
        return _STOPPING.text if self._stopping or not self._thread.is_alive() else ""

    def unready(self) -> str:
        """Return why no request would be answered right now, "" if one would.

        The initial loads are complete and an instance serves the model, or none has to: a cluster that may shrink to 0 nodes
        starts one at the first request.
        """
        if self.backend.now() == 0:
            return f"{self._model} is being loaded"
        return "" if self._to_zero or self.state.serves(self._model) else f"no instance serves {self._model}"

    def stop_answering(self) -> None:
        """Take no new requests; clients of those under way are told."""
        self._stopping = True
        self.backend.end(_STOPPING)

    def close(self) -> None:
        """End the nodes; nothing stays behind."""
        self.stop_answering()
        self._thread.join()
        self.backend.close()


def window_of(system: SystemConfig, nodes: int) -> int:
    """Return how many requests the cluster is given at a time.

    As many as all nodes run at once, one batch more, so that a free slot finds a request waiting, and no fewer than make the
    autoscaler want as many nodes as it ever does.
    """
    scaler = system.autoscaler
    most = min(nodes, scaler.desired(_MOST_LOAD, 0))
    low, high = 0, _MOST_LOAD  # desired(high) reaches it, desired(low - 1) does not
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if scaler.desired(middle, 0) >= most else (middle + 1, high)
    return max((nodes + 1) * system.batching.max_batch, low)


def _nothing() -> None:
    """Do nothing."""


class _Server(uvicorn.Server):
    """Calls ``on_ready`` once requests are answered; tells the service first when asked to stop, so that open streams end."""

    def __init__(
        self, service: Service, options: HttpOptions, bound: socket.socket, on_ready: Callable[[], None] = _nothing
    ) -> None:
        # "error": nothing that a stranger sends is written to the log. No proxy is believed, since anybody can claim to be one.
        super().__init__(
            uvicorn.Config(
                service.front_end.app,
                http="h11",
                ws="none",
                log_level="error",
                lifespan="off",
                proxy_headers=False,
                server_header=False,
                h11_max_incomplete_event_size=HEAD_BYTES,
                timeout_graceful_shutdown=_LINGER_S,
            )
        )
        self.service = service
        self._options = options
        self._bound = bound
        self._on_ready: Callable[[], None] | None = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen. uvicorn's own would let TLS handshakes take a minute."""
        await super().startup(sockets=[])
        limits = ConnectionLimits(
            connections=self._options.connections,
            receive_s=self._options.receive_timeout_s,
            send_s=self._options.send_timeout_s,
        )
        tally = self.service.front_end.tally
        tls = self._options.tls()
        try:
            listening = await asyncio.get_running_loop().create_server(
                lambda: Connection(self.config, self.server_state, limits, tally),
                sock=self._bound,
                ssl=tls,
                ssl_handshake_timeout=None if tls is None else _HANDSHAKE_S,
                backlog=_BACKLOG,
            )
        except OSError as error:
            raise UserError(f"cannot listen on {self._options.url}: {error}") from error
        self.servers.append(listening)

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second, from the moment on that the port is open."""
        if self._on_ready is not None and not self.service.ill() and not self.service.unready():
            self._on_ready()
            self._on_ready = None
        return await super().on_tick(counter)

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
        """Handle a signal."""
        self.service.stop_answering()
        super().handle_exit(sig, frame)


def serve(
    service: Service, options: HttpOptions, bound: socket.socket, *, view: bool, on_ready: Callable[[], None] = _nothing
) -> int:
    """Answer requests until a signal; return the exit status. ``on_ready`` is called once the model is served.

    UserError if the cluster cannot be set up, for instance with a damaged model.
    """
    server = _Server(service, options, bound, on_ready)

    def stop() -> None:
        server.should_exit = True

    service.on_fault = stop
    if service.fault is not None:  # the control thread ended before it could call
        stop()
    try:
        if view:
            with View(service.state, options.url):
                server.run()
        else:
            server.run()
    finally:
        service.close()
    if isinstance(service.fault, UserError):
        raise service.fault
    return 1 if service.fault is not None or not server.started else 0
