"""LiveBackend one message at a time: a hub and a launcher that are scripted, and a clock that stands still until it is moved.

rig = Rig(nodes=2)                      # started: its first events are NodeJoined
rig.say(0, wire.Beat())                 # a message of node 0
rig.events()                            # all events that follow from what was said
rig.backend.submit(command)
rig.sent(0)                             # messages to node 0 since the last look
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from msgspec import Struct

from lambdascale.core import Failure, Request, TracedRequest
from lambdascale.core.events import Event
from lambdascale.inference.batch import Ticket
from lambdascale.inference.sampling import Sampling
from lambdascale.live import wire
from lambdascale.live.controller.backend import LiveBackend
from lambdascale.live.controller.hub import Hub
from lambdascale.live.controller.launch import End, Launcher
from lambdascale.live.node_config import NodeConfig


class Config(Struct, frozen=True):
    """The part of a NodeConfig that the controller looks at."""

    node: int
    generation: int = 0


class Quiet(Exception):
    """Nothing more was said: the backend would wait now."""


class FakeHub:
    """Gives out one message at a poll, and raises Quiet at the second poll in a row that has none."""

    def __init__(self) -> None:
        self.inbox: deque[tuple[int, wire.ToController]] = deque()
        self.outbox: list[tuple[int, wire.ToAgent]] = []
        self.generations: dict[int, int] = {}
        self.answering = True  # nodes connect to each other as soon as they are told to
        self._quiet = False

    def poll(self, timeout_s: float) -> tuple[list[tuple[int, wire.ToController]], set[int]]:
        if self.inbox:
            self._quiet = False
            return [self.inbox.popleft()], set()
        if self._quiet:
            self._quiet = False
            raise Quiet
        self._quiet = True
        return [], set()

    def send(self, node: int, message: wire.ToAgent) -> None:
        wire.encode(message)  # what cannot be encoded fails here as it does on the wire
        if self.answering and isinstance(message, wire.Directory):
            self.inbox.append((node, wire.Connected(node, message.number)))
        self.outbox.append((node, message))

    def expect(self, node: int, generation: int) -> None:
        self.generations[node] = generation

    def wake(self) -> None: ...

    def watch(self, descriptors: set[int]) -> None: ...

    def close(self) -> None: ...


class FakeLauncher:
    """A launcher whose processes say hello at once, until they are in ``ended``."""

    host = "127.0.0.1"
    stillborn = False  # new processes end before they say anything
    status: int | None = None  # with which processes end

    def __init__(self, hub: FakeHub) -> None:
        self._hub = hub
        self.started: list[tuple[int, int]] = []  # node, generation
        self.killed: list[int] = []
        self.ended: set[int] = set()

    def start(self, configs: Sequence[NodeConfig]) -> None:
        for config in configs:
            self.started.append((config.node, config.generation))
            if self.stillborn:
                self.ended.add(config.node)
            else:
                self.ended.discard(config.node)
                self._hub.inbox.append((config.node, self.greeting(config)))

    @staticmethod
    def greeting(config: NodeConfig) -> wire.ToController:
        """The first message of a process."""
        return wire.Hello(config.node, f"{config.node}.{config.generation}", 1)

    def sentinels(self) -> dict[int, int]:
        return {}

    def dead(self) -> dict[int, End]:
        return {node: End.of(self.status) for node in sorted(self.ended)}

    def kill(self, node: int) -> None:
        self.killed.append(node)
        self.ended.add(node)

    def close(self) -> None: ...


@dataclass
class HeardAnswer:
    """A sink."""

    tokens_: list[int] = field(default_factory=list)
    finished: bool = False
    failures: list[Failure] = field(default_factory=list)

    def tokens(self, tokens: Sequence[int], finished: bool) -> None:
        self.tokens_ += tokens
        self.finished = self.finished or finished

    def failed(self, failure: Failure) -> None:
        self.failures.append(failure)


class Rig:
    """A started backend for a front end (``trace`` empty) or a trace."""

    def __init__(self, nodes: int = 2, *, trace: Sequence[TracedRequest] = (), **settings: Any) -> None:
        self.hub = FakeHub()
        self.launcher = FakeLauncher(self.hub)
        self.now_s = 100.0
        options: dict[str, Any] = {"silence_s": 10.0, "open_ended": not trace} | settings
        self.backend = LiveBackend(
            launcher=cast(Launcher, self.launcher),
            hub=cast(Hub, self.hub),
            trace=trace,
            ticket_of=lambda request: ticket(request.request_id),
            clock=lambda: self.now_s,
            **options,
        )
        self.backend.start([cast(NodeConfig, Config(node)) for node in range(nodes)])

    def say(self, node: int, *messages: wire.ToController) -> None:
        """Messages of a node, heard one after the other."""
        self.hub.inbox.extend((node, message) for message in messages)

    def events(self) -> list[Event]:
        """Everything that happens until the backend waits, or has ended."""
        found: list[Event] = []
        try:
            while (event := self.backend.next_event()) is not None:
                found.append(event)
        except Quiet:
            pass
        return found

    def after(self, seconds: float, beats: Sequence[int] = ()) -> list[Event]:
        """Let time pass, in steps in which the nodes of ``beats`` are heard of; the events."""
        found: list[Event] = []
        end = self.now_s + seconds
        while self.now_s < end:
            self.now_s = min(end, self.now_s + 0.25)
            for node in beats:
                self.say(node, wire.Beat())
            found += self.events()
        return found

    def sent(self, node: int | None = None) -> list[wire.ToAgent]:
        """Messages since the last look, to one node or to all."""
        taken, self.hub.outbox = self.hub.outbox, []
        return [m for to, m in taken if node in (None, to)]

    def offer(self, request_id: int, prompt: Sequence[int] = (1, 2), **sampling: Any) -> HeardAnswer:
        """A request of a front end."""
        sink = HeardAnswer()
        request = Request(request_id, self.backend.now(), "m", len(prompt), 4)
        self.backend.offer(request, ticket(request_id, prompt, **sampling), sink)
        return sink


def ticket(request_id: int, prompt: Sequence[int] = (1, 2), **sampling: Any) -> Ticket:
    """The contents of a request for four tokens."""
    return Ticket(request_id, list(prompt), len(prompt), 4, Sampling(**sampling))
