"""Proof that both ends of a new connection belong to the cluster, before either end acts on what the other says.

The end that connects (the caller, the node with the higher id) and the end that listens exchange challenges. Each then proves
with an HMAC that it knows the cluster's key. The HMAC covers the protocol's version, the role of the one who proves, both
challenges, both parties and the address that was dialled. A proof is therefore of no use in the other direction, on another
connection, for another node, or through somebody who listens at another address and passes the bytes on. The caller proves first:
a stranger gets no proof from a node that listens. What follows the handshake is neither encrypted nor authenticated: for trusted
networks and loopback.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lambdascale.core import NodeId

_MAGIC = b"lambdascale/3"
_HELLO = struct.Struct(f"!{len(_MAGIC)}s32sII")  # magic with the version, challenge, node, generation
_PARTIES = struct.Struct("!IIII")
_PROOF_BYTES = 32

Role = Literal["calls", "listens"]


@dataclass(frozen=True, slots=True)
class Party:
    """A node's process. ``generation`` counts the processes that the node has had before: restarts make a new party."""

    node: NodeId
    generation: int


@dataclass(frozen=True, slots=True)
class _Meeting:
    """Statements of both ends, and their address: all that a proof covers."""

    caller: Party
    listener: Party
    caller_challenge: bytes
    listener_challenge: bytes
    address: str

    def proof(self, key: bytes, role: Role) -> bytes:
        parties = _PARTIES.pack(self.caller.node, self.caller.generation, self.listener.node, self.listener.generation)
        # All parts but the last have a fixed length or end with a zero byte: no two meetings give the same bytes.
        said = (_MAGIC, role.encode() + b"\0", self.caller_challenge, self.listener_challenge, parties, self.address.encode())
        return hmac.digest(key, b"".join(said), "sha256")


class _Wire:
    """A socket that is given up at a deadline, however slowly its peer talks."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self._sock = sock
        self._deadline = time.monotonic() + timeout_s

    def _remaining(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("it did not introduce itself in time")
        return left

    def send(self, data: bytes) -> None:
        self._sock.settimeout(self._remaining())
        self._sock.sendall(data)

    def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            self._sock.settimeout(self._remaining())
            part = self._sock.recv(size - len(data))
            if not part:
                raise EOFError("the connection ended")
            data += part
        return data

    def hello(self) -> tuple[bytes, Party]:
        magic, challenge, node, generation = _HELLO.unpack(self.receive(_HELLO.size))
        if magic != _MAGIC:
            raise EOFError("it speaks another protocol")
        return challenge, Party(node, generation)


class Handshake:
    """One node's side of all its handshakes. Each is given up after ``timeout_s`` seconds."""

    def __init__(self, key: bytes, me: Party, timeout_s: float) -> None:
        self._key = key
        self._me = me
        self._timeout_s = timeout_s

    def call(self, sock: socket.socket, address: str, check: Callable[[Party], None]) -> Party:
        """Introduce this node at ``address`` and return the party that listens there.

        ``check`` raises if this is not the party wanted; it is asked before this node proves anything. OSError or EOFError if the
        other end does not know the key.
        """
        wire, mine = _Wire(sock, self._timeout_s), secrets.token_bytes(32)
        wire.send(self._hello(mine))
        theirs, listener = wire.hello()
        check(listener)
        meeting = _Meeting(self._me, listener, mine, theirs, address)
        wire.send(meeting.proof(self._key, "calls"))
        self._verify(meeting, "listens", wire.receive(_PROOF_BYTES))
        return listener

    def listen(self, sock: socket.socket, address: str, check: Callable[[Party], None]) -> Party:
        """Return the party that calls at this node's ``address``; ``check`` and errors as for ``call``."""
        wire, mine = _Wire(sock, self._timeout_s), secrets.token_bytes(32)
        theirs, caller = wire.hello()
        check(caller)
        wire.send(self._hello(mine))
        meeting = _Meeting(caller, self._me, theirs, mine, address)
        self._verify(meeting, "calls", wire.receive(_PROOF_BYTES))
        wire.send(meeting.proof(self._key, "listens"))
        return caller

    def _hello(self, challenge: bytes) -> bytes:
        return _HELLO.pack(_MAGIC, challenge, self._me.node, self._me.generation)

    def _verify(self, meeting: _Meeting, role: Role, proof: bytes) -> None:
        if not hmac.compare_digest(meeting.proof(self._key, role), proof):
            raise EOFError("it does not know the cluster's key")
