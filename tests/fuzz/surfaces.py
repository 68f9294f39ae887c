"""What takes bytes of others, in process: each tries mutated messages and says whether it took or refused them."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any, Protocol, cast

from lambdascale.control import build_system
from lambdascale.core.commands import CancelTransfer, LoadBlocks, Serve, StopInstance, SwitchMode
from lambdascale.core.events import BlockArrived, CommandFailed
from lambdascale.core.plan import Stage
from lambdascale.inference.batch import Ticket
from lambdascale.live import wire
from lambdascale.live.node.agent import Agent
from lambdascale.live.serving.connections import Connection, ConnectionLimits
from lambdascale.live.serving.frontend import FrontEnd
from lambdascale.live.serving.options import HttpOptions
from lambdascale.live.serving.server import _Server
from lambdascale.live.serving.state import ClusterState
from lambdascale.live.serving.text import Text
from lambdascale.testing.systems import small_cluster, small_model
from lambdascale.transport import Handlers, TransportError
from lambdascale.transport.handshake import Handshake, Party
from lambdascale.transport.tcp import TcpEndpoint, _Connection
from tests.fuzz.mutations import Mutator, of_bytes, of_json, of_msgpack
from tests.node.fakes import FakeCluster, replica, run_until_tokens, stages
from tests.serving.harness import Cluster, post
from tests.unit.live_backend_rig import Rig
from tests.unit.test_odd_messages import SYSTEM, play

REFUSALS = {400, 401, 403, 404, 405, 408, 413, 415, 421, 431, 501}
# Messages that one controller, node or server gets before a new one takes its place.
BATCH = 50
_PATIENCE_S = 20.0


class Surface(Protocol):
    """``corpus``: valid messages. A message that is neither taken nor refused raises."""

    name: str
    corpus: list[bytes]

    def mutator(self, rng: Random) -> Mutator:
        """Return what changes its messages."""
        ...

    def begin(self) -> None:
        """Start anew; called before every ``BATCH`` messages."""
        ...

    def attempt(self, data: bytes) -> bool:
        """Return True if the bytes are taken for a message, False if they are refused."""
        ...

    def end(self) -> None:
        """Check that valid messages are still taken; called after every ``BATCH`` messages."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class _Bytes:
    """Messages of no general format, to something that keeps nothing."""

    def mutator(self, rng: Random) -> Mutator:
        return of_bytes(rng)

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def close(self) -> None: ...


class _Packed(_Bytes):
    """Messages in msgpack."""

    def mutator(self, rng: Random) -> Mutator:
        return of_msgpack(rng)


class Controller(_Packed):
    """Messages of nodes to a controller at work, decoded as the hub does; requests wait and are under way."""

    name = "controller"

    def __init__(self) -> None:
        said: list[wire.ToController] = [
            *(wire.Hello(node, f"{node}.0", 17, {"imports": 0.5}) for node in range(3)),
            wire.Connected(1, 1),
            wire.Placed(0, "m"),
            wire.Severed(2, "cut"),
            wire.Unreached(1, "no route"),
            wire.Beat(),
            wire.Fault(1, "out of memory", users=False),
        ]
        for number in range(1, 9):
            said += [
                wire.Happened(BlockArrived(0.0, number, number % 3, "m", number % 4)),
                wire.Happened(CommandFailed(0.0, "LoadBlocks", "damaged", transfer_id=number)),
                wire.Happened(CommandFailed(0.0, "Serve", "broken", instance=number)),
                wire.Tokens(number, "local", (wire.Token(1, 0, 65, finished=False), wire.Token(2, 0, 66, finished=True)), (3,)),
                wire.Aborted(number, 1),
                wire.Resumed(number, {1: (65, 66), 2: ()}, frozenset({2})),
            ]
        self.corpus = [wire.encode(message) for message in said]
        self._count = 0

    def begin(self) -> None:
        self._rig = Rig(nodes=3, restarts=3)
        self._plane = build_system(SYSTEM, cluster=small_cluster(nodes=3), models=[small_model("m")])
        self._said = 0
        play(self._rig, self._plane)
        for number in (1, 2, 3):
            self._rig.offer(number)
        play(self._rig, self._plane)

    def attempt(self, data: bytes) -> bool:
        try:
            message = wire.to_controller(data)
        except wire.Garbled:
            return False
        self._said += 1
        self._rig.say(self._said % 3, message)
        play(self._rig, self._plane)
        return True

    def end(self) -> None:
        self._rig.offer(9)
        play(self._rig, self._plane)


class AgentLine(_Packed):
    """Messages of the controller, as an agent decodes them. What they order is carried out unasked: the controller is trusted."""

    name = "agent"

    def __init__(self) -> None:
        ticket = Ticket(1, [3, 4, 5], 3, 6)
        said: list[wire.ToAgent] = [
            wire.Directory(2, {0: "127.0.0.1:4000", 1: "127.0.0.1:4001"}, {0: 0, 1: 2}),
            wire.Sever(1),
            wire.Do(Serve(4, "m", (Stage(0, 0, 1), Stage(1, 2, 3)), (10, 10, 10, 10), 100)),
            wire.Do(LoadBlocks(3, "m", 0, (0, 1), (10, 10), "ssd", "pipelined")),
            wire.Do(CancelTransfer(3)),
            wire.Do(StopInstance(4)),
            wire.Assign(4, (ticket, Ticket(2, [9], 1, 4))),
            wire.Switch(SwitchMode(4, ((1, 5), (2, 6)), "copy"), {5: 0, 6: 1}),
            wire.Abort(1),
            wire.Shutdown(),
        ]
        self.corpus = [wire.encode(message) for message in said]

    def attempt(self, data: bytes) -> bool:
        try:
            wire.to_agent(data)
        except wire.Garbled:
            return False
        return True


class Peers(_Packed):
    """Messages of other nodes to one with instances at work. The corpus is what nodes say at a mode switch and a repartition."""

    name = "peers"

    def __init__(self) -> None:
        cluster = self._cluster()
        cluster.switch(1, 0, [(1, 2)], {2: 1}, "copy")
        cluster.repartition(3, 1, 1, [0, 1], 2, "copy", *stages((0, 0, 1), (1, 2, 3)))
        sent = [message for message in cluster.run_noting() if isinstance(message, wire.Message)]
        sent += [wire.Ready(1, 2, 4096), wire.Ready(1, 2, None), wire.Rendezvous(4, "127.0.0.1:5000")]
        self.corpus = [wire.encode(message) for message in sent]

    @staticmethod
    def _cluster() -> FakeCluster:
        cluster = FakeCluster(2)
        cluster.serve(1, *stages((0, 0, 1), (1, 2, 3)))
        cluster.serve(2, *stages(replica(1)))
        cluster.serve(3, *stages(replica(1)))
        cluster.assign(1, 0, 1, 2)
        cluster.assign(3, 1, 3)
        run_until_tokens(cluster, 4)
        return cluster

    def begin(self) -> None:
        self._at_work = self._cluster()
        node = self._at_work.nodes[1]
        none = SimpleNamespace(ready=lambda peer, message: None, rendezvous=lambda message: None)
        self._agent = cast(Agent, SimpleNamespace(compute=node, mover=none, collective=none))

    def attempt(self, data: bytes) -> bool:
        try:
            Agent._on_message(self._agent, 0, data)
        except EOFError:
            return False
        for _ in range(20):
            if not self._at_work.nodes[1].step():
                break
        return True


class Frames(_Bytes):
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


class Handshakes(_Bytes):
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
            from lambdascale.transport.handshake import _HELLO, _Meeting

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


class Http(_Bytes):
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


def surfaces(text: Text) -> list[tuple[Surface, float]]:
    """Return all surfaces, each with its share of the messages."""
    return [
        (Controller(), 0.30),
        (AgentLine(), 0.15),
        (Peers(), 0.15),
        (Frames(), 0.15),
        (Handshakes(), 0.10),
        (Http(text, whole=False), 0.10),
        (Http(text, whole=True), 0.05),
    ]
