"""Parts that take messages of nodes and of the controller, in process: each says that it took or refused the bytes."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Protocol, cast

from lambdascale.control import build_system
from lambdascale.core.commands import CancelTransfer, LoadBlocks, Serve, StopInstance, SwitchMode
from lambdascale.core.events import BlockArrived, CommandFailed, SetUpDone
from lambdascale.core.plan import Stage
from lambdascale.inference.batch import Ticket
from lambdascale.live import wire
from lambdascale.live.node.agent import Agent
from lambdascale.testing.systems import small_cluster, small_model
from tests.fuzz.mutations import Mutator, of_bytes, of_msgpack
from tests.node.fakes import FakeCluster, replica, run_until_tokens, stages
from tests.unit.live_backend_rig import Rig
from tests.unit.test_odd_messages import SYSTEM, play

# Messages that one controller, node or server gets before a new one takes its place.
BATCH = 50


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


class Bytes:
    """Messages of no general format, to something that keeps nothing."""

    def mutator(self, rng: Random) -> Mutator:
        return of_bytes(rng)

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def close(self) -> None: ...


class Packed(Bytes):
    """Messages in msgpack."""

    def mutator(self, rng: Random) -> Mutator:
        return of_msgpack(rng)


class Controller(Packed):
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
                wire.Happened(SetUpDone(0.0, number, number % 3)),
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


class AgentLine(Packed):
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


class Peers(Packed):
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
