"""A node's socket to the controller."""

from __future__ import annotations

import socket
from collections import deque

import zmq

from lambdascale.live import wire
from lambdascale.live.node.vigil import Vigil
from lambdascale.live.node_config import NodeConfig

LEFT = 3  # exit status of a node that has lost the controller


class Line:
    """The socket to the controller. ``say`` may be called from any thread; the rest belongs to the main one."""

    def __init__(self, config: NodeConfig) -> None:
        access = config.access
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.identity = b"%d.%d" % (config.node, config.generation)
        self._socket.curve_serverkey = access.server_public
        self._socket.curve_publickey, self._socket.curve_secretkey = access.client_public, access.client_secret
        self._socket.linger = 1000
        self._socket.sndhwm = 0  # no bound: a full queue would make send() wait for a controller that does not read
        self._socket.maxmsgsize = wire.MOST_BYTES
        self._socket.connect(access.controller)
        self._out: deque[wire.ToController] = deque()
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._woken.fileno(), zmq.POLLIN)
        self._vigil = Vigil(self._context, access)
        self._vigil.watch(self._poller)
        # The cluster's start would end with this node, until it knows the others; one that is started again is replaced.
        self._starting = config.generation == 0
        if not self._starting:
            self._vigil.settle()

    @property
    def lost(self) -> str:
        """Reason why the controller is taken for lost, "" while it lives."""
        return self._vigil.verdict

    def say(self, message: wire.ToController) -> None:
        """Queue a message for the controller."""
        self._out.append(message)
        try:
            self._waker.send(b"x")
        except BlockingIOError:
            pass  # awake already
        except OSError:
            return  # closed

    def poll(self, timeout_s: float) -> list[wire.ToAgent]:
        """Send what is queued; return what the controller has said within the time."""
        self._flush()
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        self._vigil.look(ready)
        if self._woken.fileno() in ready:
            self._woken.recv(4096)
        self._flush()
        messages = []
        while self._socket.poll(0, zmq.POLLIN):
            messages.append(wire.to_agent(self._socket.recv()))
        if self._starting and any(isinstance(message, wire.Directory) for message in messages):
            self._starting = False
            self._vigil.settle()
        return messages

    def _flush(self) -> None:
        while self._out:
            self._socket.send(wire.encode(self._out.popleft()))

    def close(self) -> None:
        """Send what is queued and close the socket."""
        self._flush()
        self._vigil.close()
        self._socket.close()
        self._context.term()
        self._waker.close()
        self._woken.close()
