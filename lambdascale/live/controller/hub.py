"""The controller's end of the control channel: one socket to all agents, authenticated with CURVE, polled by one thread."""

from __future__ import annotations

import hmac
import secrets
import socket

import zmq
from zmq.auth.thread import ThreadAuthenticator

from lambdascale.core import NodeId
from lambdascale.live import wire
from lambdascale.live.controller.pulse import PATIENCE_S, Pulse
from lambdascale.live.node_config import Access

_HANDSHAKE_MS = 5000
_AT_A_TIME = 4096  # messages taken at a time: an agent that never stops sending must not keep the controller from its other work


class _OnlyOurs:
    """Admits clients that have the cluster's key."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        """Return True if ZAP may let this key in."""
        return hmac.compare_digest(key, self._public)


class Hub:
    """``wake`` may be called from any thread; all else belongs to one. ``patience_s``: see Access.

    Each process of a node has an identity of its own, ``node.generation``: the hub talks with the one expected and hears no
    other.
    """

    def __init__(self, host: str, patience_s: float = PATIENCE_S) -> None:
        server_public, server_secret = zmq.curve_keypair()
        client_public, client_secret = zmq.curve_keypair()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", _OnlyOurs(client_public))
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_server = True
        self._socket.curve_secretkey, self._socket.curve_publickey = server_secret, server_public
        self._socket.linger = 500
        self._socket.router_handover = True
        self._socket.sndhwm = 0  # no bound: a full queue would drop what is sent to a node that stands still for a while
        self._socket.maxmsgsize = wire.MOST_BYTES
        self._socket.handshake_ivl = _HANDSHAKE_MS
        port = self._socket.bind_to_random_port(f"tcp://{host}")
        self._pulse = Pulse(self._context, host, (server_secret, server_public))
        self._waker, self._woken = socket.socketpair()
        for end in (self._waker, self._woken):
            end.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._woken.fileno(), zmq.POLLIN)
        self._watched: set[int] = set()
        self._generations: dict[NodeId, int] = {}  # 0 for nodes without one
        self.access = Access(
            controller=f"tcp://{host}:{port}",
            pulse=f"tcp://{host}:{self._pulse.port}",
            server_public=server_public,
            client_public=client_public,
            client_secret=client_secret,
            nodes_key=secrets.token_bytes(32),
            patience_s=patience_s,
        )

    def expect(self, node: NodeId, generation: int) -> None:
        """Talk with this process of the node from now on."""
        self._generations[node] = generation

    def _identity(self, node: NodeId) -> bytes:
        return b"%d.%d" % (node, self._generations.get(node, 0))

    def watch(self, descriptors: set[int]) -> None:
        """Return from ``poll`` also when one of these becomes readable."""
        for old in self._watched - descriptors:
            self._poller.unregister(old)
        for new in descriptors - self._watched:
            self._poller.register(new, zmq.POLLIN)
        self._watched = set(descriptors)

    def wake(self) -> None:
        """Let ``poll`` return."""
        try:
            self._waker.send(b"x")
        except (BlockingIOError, OSError):
            return  # it is awake, or closed

    def poll(self, timeout_s: float) -> tuple[list[tuple[NodeId, wire.ToController]], set[int]]:
        """Return the messages of agents, in order, and the watched descriptors that are readable. Garbage is left out.

        What comes beyond some thousand messages is left for the next time.
        """
        self._pulse.allow()
        ready = dict(self._poller.poll(max(0, int(timeout_s * 1000 + 0.999))))
        if self._woken.fileno() in ready:
            self._woken.recv(4096)
        messages = []
        for _ in range(_AT_A_TIME):
            if not self._socket.poll(0, zmq.POLLIN):
                break
            try:
                identity, data = self._socket.recv_multipart()
                node, message = int(identity.partition(b".")[0]), wire.to_controller(data)
            except ValueError:  # Garbled, an odd identity, or several parts
                continue
            if identity == self._identity(node):
                messages.append((node, message))
        return messages, self._watched & ready.keys()

    def send(self, node: NodeId, message: wire.ToAgent) -> None:
        """Send to an agent; to nobody if its process has ended."""
        self._socket.send_multipart([self._identity(node), wire.encode(message)])

    def close(self) -> None:
        """Close the socket; the port is free afterwards."""
        self._pulse.close()
        self._socket.close()
        self._authenticator.stop()
        self._context.term()
        self._waker.close()
        self._woken.close()
