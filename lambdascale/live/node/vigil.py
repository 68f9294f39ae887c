"""A node's watch over the controller: it ends when the controller has ended, or is silent."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing import parent_process

import zmq

from lambdascale.live.node_config import Access

_STEP_S = 0.25


class Vigil:
    """Heartbeats of the controller, taken by ``look``. For the main thread.

    Silence counts while this process runs: each look adds a quarter of a second at most, so that a node which was stopped, alone
    or with its machine, hears the controller first.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], access: Access, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._socket = context.socket(zmq.SUB)
        self._socket.curve_serverkey = access.server_public
        self._socket.curve_publickey, self._socket.curve_secretkey = access.client_public, access.client_secret
        self._socket.linger = 0
        self._socket.subscribe(b"")
        self._socket.connect(access.pulse)
        launcher = parent_process()  # the controller, on its own host
        self._launcher = None if launcher is None else launcher.sentinel
        self._patience_s = access.patience_s
        self._clock = clock
        self._looked = clock()
        self._silent_s = 0.0
        self.verdict = ""  # the reason why the controller is taken for lost

    def watch(self, poller: zmq.Poller) -> None:
        """Register with a poller, which wakes up for heartbeats."""
        poller.register(self._socket, zmq.POLLIN)
        if self._launcher is not None:
            poller.register(self._launcher, zmq.POLLIN)

    def look(self, ready: dict[object, int]) -> None:
        """Take the heartbeats that a poller has found, or record that time has passed without any."""
        now = self._clock()
        step, self._looked = min(now - self._looked, _STEP_S), now
        if self._socket in ready:
            self._silent_s = 0.0
            while self._socket.poll(0, zmq.POLLIN):
                self._socket.recv()
        else:
            self._silent_s += step
        if self._launcher in ready:
            self.verdict = "the controller has ended"
        elif self._silent_s > self._patience_s:
            self.verdict = f"the controller is silent for {self._silent_s:.1f} s"

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
