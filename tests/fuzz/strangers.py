"""Parts that take bytes of strangers at a port, in process: frames, handshakes, HTTP."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any, cast

from lambdascale.live import wire
from lambdascale.live.node.agent import Agent
from lambdascale.live.serving.connections import Connection, ConnectionLimits
from lambdascale.live.serving.frontend import FrontEnd
from lambdascale.live.serving.options import HttpOptions
from lambdascale.live.serving.server import _Server
from lambdascale.live.serving.state import ClusterState
from lambdascale.live.serving.text import Text
from lambdascale.transport import Handlers, TransportError
from lambdascale.transport.handshake import _HELLO, Handshake, Party, _Meeting
from lambdascale.transport.tcp import TcpEndpoint, _Connection
from tests.fuzz.mutations import Mutator, of_bytes, of_json
from tests.fuzz.surfaces import Bytes
from tests.serving.harness import Cluster, post

REFUSALS = {400, 401, 403, 404, 405, 408, 413, 415, 421, 431, 501}
_PATIENCE_S = 20.0


class Frames(Bytes):
    """Frames of a node with the key, as the receiving thread of a TCP connection takes them."""

    name = "frames"
    _HEAD = struct.Struct("!BQQQ")

    def __init__(self) -> None:
        message = wire.encode(wire.Ready(1, 2, 4096))
        data, hashed, written, told, bye, placed = range(6)
        head = self._HEAD.pack
        parts = [
            head(data, 0, 64, 32) + b"d" * 32 + head(written, 7, 64, 32),
            head(data, 0, 0, 8) + b"e" * 8 + head(hashed, 12345, 0, 0) + head(written, 1, 0, 8),
            head(told, 0, 0, len(message)) + message,
            head(placed, 0, 4096, 16) + b"p" * 16,
        ]
        self.corpus = [b"".join(parts[first:] + parts[:first]) + head(bye, 0, 0, 0) for first in range(len(parts))]
        agent = cast(Agent, SimpleNamespace(mover=SimpleNamespace(ready=lambda peer, ready: None)))
        agent.collective = cast(Any, SimpleNamespace(rendezvous=lambda message: None))
        agent.compute = cast(Any, SimpleNamespace(peer=lambda message: None))
        handlers = Handlers(
            on_write=lambda *_: None,
            on_checked=lambda *_: None,
            on_message=lambda peer, each: Agent._on_message(agent, peer, each),
            on_lost=lambda *_: None,
        )
        self._endpoint: Any = SimpleNamespace(handlers=handlers, memory=memoryview(bytearray(1 << 16)), link=None)

    def attempt(self, data: bytes) -> bool:
        connection = _Connection(cast(TcpEndpoint, self._endpoint), 1, cast(Any, _Script(lambda sent: data)), None)
        try:
            while connection._receive_one():
                pass
        except (OSError, EOFError):
            return False
        return True

    def end(self) -> None:
        assert self.attempt(self.corpus[0]), "a valid stream is refused"


class _Script:
    """A socket whose other end says what ``reply`` makes of all that was sent to it, then nothing more."""

    def __init__(self, reply: Callable[[bytes], bytes]) -> None:
        self._reply = reply
        self._sent = b""
        self._at = 0

    def sendall(self, data: bytes) -> None:
        self._sent += data

    def recv(self, size: int) -> bytes:
        part = self._reply(self._sent)[self._at : self._at + size]
        self._at += len(part)
        return part

    def recv_into(self, target: memoryview) -> int:
        part = self.recv(len(target))
        target[: len(part)] = part
        return len(part)

    def settimeout(self, seconds: float | None) -> None: ...

    def setsockopt(self, *option: int) -> None: ...


class Handshakes(Bytes):
    """Strangers at both ends of a handshake, with a recorded one changed, or with what the node itself says: nobody gets in."""

    name = "handshakes"
    _KEY = b"k" * 32
    _ADDRESS = "127.0.0.1:4000"

    def __init__(self) -> None:
        self._shakes = [Handshake(self._KEY, Party(node, 0), _PATIENCE_S) for node in (0, 1)]
        self.corpus = [*self._recorded(), b"mirror"]
        self._calls = 0

    def _recorded(self) -> list[bytes]:
        """Return what the caller and the listener of a right handshake say."""
        said: list[bytes] = []
        hello = self._shakes[1]._hello(b"c" * 32)

        def answered(sent: bytes) -> bytes:
            if len(sent) < len(hello):
                return hello
            challenge = _HELLO.unpack(sent[: _HELLO.size])[1]
            proof = _Meeting(Party(1, 0), Party(0, 0), b"c" * 32, challenge, self._ADDRESS).proof(self._KEY, "calls")
            said[:] = [hello + proof, sent]
            return hello + proof

        script = _Script(answered)
        assert self._shakes[0].listen(cast(Any, script), self._ADDRESS, lambda party: None) == Party(1, 0)
        return [said[0], script._sent]

    def attempt(self, data: bytes) -> bool:
        self._calls += 1
        end = self._shakes[self._calls % 2]
        meet = end.call if self._calls % 2 else end.listen
        mirrored = data.startswith(b"mirror")
        hello = self._shakes[0]._hello(b"m" * 32)
        script = _Script(lambda sent: (sent or hello) + data[6:] if mirrored else data)
        try:
            meet(cast(Any, script), self._ADDRESS, lambda party: None)
        except (OSError, EOFError, TransportError):
            return False
        raise AssertionError("a stranger gets in")

    def end(self) -> None:
        self._recorded()


class _Pipe(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 40000), "sockname": ("127.0.0.1", 8000)})
        self.written = b""
        self._closing = False

    def write(self, data: Any) -> None:
        self.written += data

    def write_eof(self) -> None: ...

    def can_write_eof(self) -> bool:
        return True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._closing = True

    abort = close


class Http(Bytes):
    """Requests to the HTTP server, whole or their bodies alone, as its connections take them from the event loop."""

    def __init__(self, text: Text, *, whole: bool) -> None:
        self.name = "HTTP requests" if whole else "HTTP bodies"
        self._whole = whole
        self._text = text
        completion = {"model": "tiny", "prompt": "a", "max_tokens": 2, "temperature": 0.5, "seed": 7, "stop": ["x", "y"]}
        more = {
            "model": "tiny",
            "prompt": [[1, 2], [3]],
            "max_tokens": 1,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        parts = [{"type": "text", "text": "a"}]
        messages = [{"role": "system", "content": "a"}, {"role": "user", "content": parts}]
        chat = {"model": "tiny", "messages": messages, "max_tokens": 2, "top_p": 0.9, "n": 1, "logit_bias": {}}
        self.corpus = [json.dumps(body).encode() for body in (completion, more, chat)]
        if whole:
            self.corpus = [self._request(body) for body in self.corpus]
            self.corpus += [
                b"GET /%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % path for path in (b"health", b"v1/models")
            ]
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._unforeseen)
        self._failures: list[str] = []

    @staticmethod
    def _request(body: bytes) -> bytes:
        path = b"/v1/chat/completions" if b'"messages"' in body else b"/v1/completions"
        return post(body, b"Content-Type: application/json", b"Connection: close", path=path)

    def _unforeseen(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._failures.append(f"{context.get('exception') or context['message']!r}")

    def mutator(self, rng: Random) -> Mutator:
        return of_bytes(rng) if self._whole else of_json(rng)

    def begin(self) -> None:
        options = HttpOptions(port=8000)
        front_end = FrontEnd(
            model="tiny",
            text=self._text,
            cluster=Cluster(),
            state=ClusterState(8),
            options=options,
            slot_tokens=64,
            window=40,
            closed=lambda: "",
            ill=lambda: "",
            unready=lambda: "",
        )
        service: Any = SimpleNamespace(front_end=front_end)
        server = _Server(service, options, cast(Any, None))
        server.config.load()
        self._server, self._front_end = server, front_end

    def attempt(self, data: bytes) -> bool:
        written = self._loop.run_until_complete(asyncio.wait_for(self._exchange(data), _PATIENCE_S))
        assert not self._failures, self._failures
        if not written:
            return False
        assert written.startswith(b"HTTP/1.1 "), written[:100]
        status = int(written[9:12])
        assert status == 200 or status in REFUSALS, written[:300]
        return status == 200

    async def _exchange(self, data: bytes) -> bytes:
        limits = ConnectionLimits(connections=10, receive_s=_PATIENCE_S, send_s=_PATIENCE_S)
        state, pipe = self._server.server_state, _Pipe()
        connection = Connection(self._server.config, state, limits, self._front_end.tally)
        connection.connection_made(pipe)
        connection.data_received(data if self._whole else self._request(data))
        if connection.cycle is not None and connection.cycle.more_body:  # it never comes: the client hangs up
            connection.connection_lost(None)
        while state.tasks:
            await asyncio.wait(set(state.tasks))
            await asyncio.sleep(0)  # their callbacks
        if connection in state.connections:
            connection.connection_lost(None)
        return pipe.written

    def end(self) -> None:
        valid = self.corpus[0]
        assert self.attempt(valid), "a valid request is refused"
        self._front_end._tokenizers.shutdown()

    def close(self) -> None:
        self._loop.close()
