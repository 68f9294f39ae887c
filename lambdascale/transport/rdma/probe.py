"""Test of a port: two endpoints of this process write to each other through it."""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import dataclass, replace

from lambdascale.transport.base import Handlers, TransportError
from lambdascale.transport.rdma.endpoint import RdmaEndpoint
from lambdascale.transport.rdma.options import RdmaOptions
from lambdascale.transport.rdma.ports import Choice

_PATIENCE_S = 60.0
_KEY_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Loopback:
    """Result of a test. ``choice`` has the GID and MTU used; ``intact`` is true if every byte arrived unchanged."""

    choice: Choice
    bytes_per_s: float
    intact: bool


def loopback(options: RdmaOptions, size: int) -> Loopback:
    """Write ``size`` random bytes through a port and compare them; TransportError or UserError if they do not arrive."""
    written = threading.Semaphore(0)
    lost: list[str] = []

    def note_loss(peer: int, reason: str) -> None:
        lost.append(reason)
        written.release()

    handlers = Handlers(on_write=lambda *_: written.release(), on_message=lambda *_: None, on_lost=note_loss)
    key = secrets.token_bytes(_KEY_BYTES)
    options = replace(options, windows=False, gpudirect="off")
    two, one = (RdmaEndpoint(node, handlers, key, options=options) for node in range(2))
    try:
        source, target = (endpoint.allocate(size) for endpoint in (one, two))
        assert isinstance(source, memoryview), "the host's memory is tried"
        source[:] = secrets.token_bytes(size)
        one.register(source)
        two.register(target)
        one.connect(0, two.address)
        began = time.monotonic()
        one.write(0, source, 0, 0)
        told = written.acquire(timeout=_PATIENCE_S)
        took_s = time.monotonic() - began
        if lost or not told:
            raise TransportError(lost[0] if lost else f"nothing has arrived after {_PATIENCE_S:.0f} s")
        intact = bytes(source) == bytes(target)
        return Loopback(choice=one.choices[0], bytes_per_s=size / took_s, intact=intact)
    finally:
        one.close()
        two.close()
