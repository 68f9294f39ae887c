"""Heartbeats of the controller: nodes end themselves when they see none for a while (see live.node.vigil)."""

from __future__ import annotations

import threading
import time

import zmq

EVERY_S = 0.25
PATIENCE_S = 1.5  # of a server's nodes: six heartbeats are missing
_STALL_S = 20.0


class Pulse:
    """Sends a heartbeat four times a second from a thread of its own, while the control thread may be busy.

    It stops when the control thread has not called ``allow`` for 20 s, so that nodes end instead of waiting for it.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], host: str, keys: tuple[bytes, bytes]) -> None:
        self._socket = context.socket(zmq.PUB)
        self._socket.curve_server = True
        self._socket.curve_secretkey, self._socket.curve_publickey = keys
        self._socket.linger = 0
        self.port = self._socket.bind_to_random_port(f"tcp://{host}")
        self._allowed = time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def allow(self) -> None:
        """Record that the control thread works."""
        self._allowed = time.monotonic()

    def _beat(self) -> None:
        while not self._closing.wait(EVERY_S):
            if time.monotonic() - self._allowed < _STALL_S:
                self._socket.send(b"")

    def close(self) -> None:
        """Send nothing more."""
        self._closing.set()
        self._thread.join()
        self._socket.close()
