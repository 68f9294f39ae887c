"""Nodes' compute without threads, processes or tensors: a tiny model whose every token depends on all KV of its request."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from zlib import crc32

from torch import OutOfMemoryError

from lambdascale.control.batching import BatchLimits
from lambdascale.core.commands import KvPolicy, Repartition, Serve, StopInstance, SwitchMode
from lambdascale.core.events import CommandFailed
from lambdascale.core.plan import Stage
from lambdascale.inference.batch import Ticket
from lambdascale.live import wire
from lambdascale.live.node.compute import Compute
from lambdascale.live.node.kv_places import KvTraffic
from lambdascale.live.node.mode_switch import KvData
from lambdascale.live.node.parcels import Parcels
from lambdascale.live.node.places import Area, Tell
from lambdascale.transport import Memory, TransportError

PAGE = 4096
BLOCKS, LAYERS_PER_BLOCK, VOCAB, SLOT_TOKENS = 4, 2, 50, 40
LAYERS = BLOCKS * LAYERS_PER_BLOCK
Kv = dict[int, list[int]]  # by layer: a value for each token of a slot


def layer_output(layer: int, kv: Sequence[int]) -> int:
    """A layer's output for the newest of these tokens: it depends on all of them and their order."""
    return crc32(repr((layer, *kv)).encode())


def expected_answer(ticket: Ticket) -> list[int]:
    """The model's answer, without batches, stages or KV memory."""
    tokens, kv = list(ticket.tokens), {layer: [] for layer in range(LAYERS)}
    for position in range(ticket.prompt_tokens + ticket.max_tokens - 1):
        value = tokens[position]
        for layer in range(LAYERS):
            kv[layer].append(value)
            value = layer_output(layer, kv[layer])
        if position + 1 >= len(tokens):
            tokens.append(value % VOCAB)
    return tokens[ticket.prompt_tokens :]


class FakeRunner:
    """Computes the tiny model's layers of a range of blocks. Tokens without KV before them are an error."""

    def __init__(self, blocks: range, slots: int, log: list[str]) -> None:
        self.layers = range(blocks.start * LAYERS_PER_BLOCK, blocks.stop * LAYERS_PER_BLOCK)
        self.slots = slots
        self.kv_bytes = 4
        self.closed = False
        self.prefilled = 0  # tokens
        self.prepared = 0  # forms of iterations, of three
        self.landed = 0  # passes whose inputs had been written to the node's memory
        self.kv: dict[tuple[int, int], list[int]] = {}  # slot, layer
        self._log = log

    def run(self, work: wire.Pass, inputs: Sequence[int] | bytes | Memory) -> list[int] | bytes:
        assert not self.closed, "a closed runner runs"
        if isinstance(inputs, memoryview):
            self.landed += 1
            inputs = bytes(inputs)
        self.prefilled += work.prefill_tokens
        self._log.append(f"run {self.layers.start}-{self.layers.stop}")
        values = (
            [int.from_bytes(inputs[i : i + 4], "big") for i in range(0, len(inputs), 4)] if isinstance(inputs, bytes) else inputs
        )
        assert isinstance(inputs, bytes) == (self.layers.start > 0), "token ids for the first layer, hidden states for the others"
        places = [(s.slot, s.start + token) for s in work.batch.segments for token in range(s.tokens)]
        outputs = [self._through(slot, at, value) for (slot, at), value in zip(places, values, strict=True)]
        if self.layers.stop == LAYERS:
            return [outputs[row] % VOCAB for row in work.batch.wanted]
        return b"".join(value.to_bytes(4, "big") for value in outputs)

    def _through(self, slot: int, position: int, value: int) -> int:
        assert slot < self.slots, f"a runner of {self.slots} slots has no slot {slot}"
        for layer in self.layers:
            kv = self.kv.setdefault((slot, layer), [])
            assert len(kv) >= position, f"slot {slot} has KV of {len(kv)} tokens in layer {layer}, {position} are needed"
            kv[position:] = [value]
            value = layer_output(layer, kv)
        return value

    def record_ahead(self, urgent: Callable[[], bool]) -> bool:
        assert not self.closed, "a closed runner prepares"
        self.prepared += 1
        return self.prepared < 3

    def read_kv(self, slot: int, tokens: int, layers: range) -> bytes:
        assert not self.closed, "a closed runner is read"
        assert layers
        assert set(layers) <= set(self.layers)
        assert all(len(self.kv[slot, layer]) >= tokens for layer in layers)
        return b"".join(value.to_bytes(4, "big") for layer in layers for value in self.kv[slot, layer][:tokens])

    def write_kv(self, slot: int, layers: range, data: bytes) -> None:
        assert not self.closed, "a closed runner is written"
        assert layers
        assert set(layers) <= set(self.layers)
        assert slot < self.slots
        tokens = len(data) // 4 // len(layers)
        values = [int.from_bytes(data[i : i + 4], "big") for i in range(0, len(data), 4)]
        for place, layer in enumerate(layers):
            self.kv[slot, layer] = values[place * tokens : (place + 1) * tokens]

    def close(self) -> None:
        assert not self.closed, "a runner is closed twice"
        self.closed = True


class FakeExecutor:
    """Makes fake runners, except for models in ``too_large``, and as long as ``room`` has the KV slots of all their layers."""

    def __init__(self) -> None:
        self.room = 1 << 30
        self.reserves = False
        self.made: list[FakeRunner] = []
        self.log: list[str] = []
        self.too_large: set[str] = set()

    def layers(self, model: str, first_block: int, last_block: int) -> range:
        return range(first_block * LAYERS_PER_BLOCK, (last_block + 1) * LAYERS_PER_BLOCK)

    def runner(self, model: str, first_block: int, last_block: int, slots: int) -> FakeRunner:
        if model in self.too_large:
            raise MemoryError(f"{slots} KV slots do not fit")
        runner = FakeRunner(range(first_block, last_block + 1), slots, self.log)
        if sum(each.slots * len(each.layers) for each in (*self.open, runner)) > self.room:
            raise OutOfMemoryError("no room")
        self.made.append(runner)
        return runner

    @property
    def open(self) -> list[FakeRunner]:
        return [runner for runner in self.made if not runner.closed]


@dataclass(frozen=True)
class Placed:
    """Writes of a node into another's memory that are under way."""

    data: bytes
    offset: int


class FakePlaces:
    """The part of a node's endpoint that places hidden states and KV: in order with its messages."""

    def __init__(self, node: int, wires: dict[tuple[int, int], deque[wire.Peer | Placed]], dead: set[int]) -> None:
        self._node, self._wires, self._dead = node, wires, dead

    def place(self, peer: int, data: Memory, offset: int) -> Future[None]:
        assert offset >= PAGE, "the arena is for blocks"
        if peer in self._dead:
            raise TransportError(f"node {peer} is lost")
        self._wires.setdefault((self._node, peer), deque()).append(Placed(bytes(data), offset))
        done = Future[None]()
        done.set_result(None)
        return done


class FakeCluster:
    """Nodes and the connections between them. Messages keep their order per connection only; ``run`` may choose what happens next
    at random. Each node has room for ``places`` batches' hidden states behind a page that is not theirs, and behind them for
    ``kv_places`` parts of KV of ``kv_place_bytes``: two layers of the longest sequence.
    """

    kv_place_bytes = 2 * 4 * SLOT_TOKENS

    def __init__(
        self,
        nodes: int,
        max_batch: int = 2,
        max_tokens: int = 8,
        kv_tokens: int = 2 * SLOT_TOKENS,
        places: int = 3,
        kv_places: int = 2,
    ) -> None:
        self.kv_tokens = kv_tokens
        self.kv_places = kv_places
        self.wires: dict[tuple[int, int], deque[wire.Peer | Placed]] = {}
        self.memories = [bytearray((1 + places) * PAGE + kv_places * self.kv_place_bytes) for _ in range(nodes)]
        self.dead: set[int] = set()
        self.said: list[wire.ToController] = []
        self.said_by: list[deque[wire.ToController]] = [deque() for _ in range(nodes)]
        self.executors = [FakeExecutor() for _ in range(nodes)]
        limits = BatchLimits(max_batch=max_batch, max_tokens=max_tokens)
        self.nodes = [self._node(node, limits) for node in range(nodes)]
        self.orders: list[deque[tuple[str, object]]] = [deque() for _ in range(nodes)]  # from the controller
        self.tickets: dict[int, Ticket] = {}
        self.served: dict[int, Serve] = {}

    def _node(self, node: int, limits: BatchLimits) -> Compute:
        def send(peer: int, message: wire.Peer) -> bool:
            decoded = wire.to_peer(wire.encode(message))
            if peer not in self.dead:
                self.wires.setdefault((node, peer), deque()).append(decoded)
            return peer not in self.dead

        area = Area(FakePlaces(node, self.wires, self.dead), memoryview(self.memories[node])[PAGE:], PAGE)
        kv_begin = area.nbytes - self.kv_places * self.kv_place_bytes

        def parcels(tell: Tell) -> Parcels:
            return Parcels(node, area.part(0, kv_begin), lambda model: 4 * limits.max_tokens, tell)

        def kv(tell: Tell, bring: Callable[[KvData], None], no_more: Callable[[int], None]) -> KvTraffic:
            size = self.kv_place_bytes if self.kv_places else 0
            return KvTraffic(node, area.part(kv_begin, self.kv_places * size), size, tell, bring, no_more)

        def report(message: wire.ToController) -> None:
            self.said.append(message)
            self.said_by[node].append(wire.to_controller(wire.encode(message)))

        vocab = lambda model: VOCAB  # noqa: E731 (as short as it is)
        return Compute(node, self.executors[node], limits, SLOT_TOKENS, vocab, report, send, parcels, kv)

    # -- what a controller says --------------------------------------------------------------------------------------

    def order(self, node: int, method: str, message: object) -> None:
        self.orders[node].append((method, message))

    def serve(self, instance: int, *stages: Stage) -> None:
        command = self.served[instance] = Serve(instance, "tiny", stages, (1,) * BLOCKS, self.kv_tokens)
        for node in dict.fromkeys(stage.node for stage in stages):
            self.order(node, "serve", command)

    def assign(self, instance: int, head: int, *requests: int) -> None:
        for request_id in requests:
            prompt = [(7 * request_id + i) % VOCAB for i in range(3 + request_id % 9)]
            self.tickets[request_id] = Ticket(request_id, prompt, len(prompt), 6 + request_id % 5)
        self.order(head, "take", wire.Assign(instance, tuple(copy(self.tickets[request_id]) for request_id in requests)))

    def repartition(
        self, instance: int, version: int, head: int, nodes: Sequence[int], batches: int, kv: KvPolicy, *stages: Stage
    ) -> None:
        first = self.served[instance]
        assert first.stages[0].node == head
        message = wire.NewStages(Repartition(instance, stages, kv, self.kv_tokens), version, first, batches)
        for node in nodes:
            self.order(node, "repartition", message)

    def switch(self, pipeline: int, head: int, moves: Sequence[tuple[int, int]], homes: dict[int, int], kv: KvPolicy) -> None:
        self.order(head, "switch", wire.Switch(SwitchMode(pipeline, tuple(moves), kv), homes))

    def stop(self, instance: int, *nodes: int) -> None:
        for node in nodes:
            self.order(node, "stop", StopInstance(instance).instance)

    # -- time --------------------------------------------------------------------------------------------------------

    def deliver(self, src: int, dst: int) -> None:
        """Let a node take the next message of another."""
        message = self.wires[src, dst].popleft()
        if isinstance(message, Placed):
            self.memories[dst][message.offset : message.offset + len(message.data)] = message.data
            return
        assert not isinstance(message, wire.Ready | wire.Rendezvous)
        self.nodes[dst].take(message)
        self.nodes[dst].step()

    def obey(self, node: int) -> None:
        """Let a node take the controller's next order."""
        method, message = self.orders[node].popleft()
        getattr(self.nodes[node], method)(message)
        self.nodes[node].step()

    def choices(self) -> list[tuple[str, int, int]]:
        """Messages that may be delivered next."""
        living = [node for node in range(len(self.nodes)) if node not in self.dead]
        found = [("deliver", src, dst) for (src, dst), queue in sorted(self.wires.items()) if queue and dst in living]
        found += [("obey", node, 0) for node in living if self.orders[node]]
        return found + [("step", node, 0) for node in living if self.nodes[node]._worker._due()]

    def happen(self, choice: tuple[str, int, int]) -> None:
        kind, first, second = choice
        if kind == "deliver":
            self.deliver(first, second)
        elif kind == "obey":
            self.obey(first)
        else:
            self.nodes[first].step()

    def run(self, rng: random.Random | None = None, limit: int = 20_000, steps: int | None = None) -> None:
        """Go on until nothing can happen (or ``steps`` times)."""
        for _ in range(limit if steps is None else steps):
            choices = self.choices()
            if not choices:
                return
            self.happen(choices[0] if rng is None else rng.choice(choices))
        assert steps is not None, "the nodes never come to rest"

    def run_noting(self) -> list[wire.Peer | Placed]:
        """Go on until nothing can happen; return the messages that went from node to node, in order."""
        sent = []
        while choices := self.choices():
            kind, src, dst = choices[0]
            if kind == "deliver":
                sent.append(self.wires[src, dst][0])
            self.happen(choices[0])
        return sent

    # -- what came of it ---------------------------------------------------------------------------------------------

    def failures(self) -> list[CommandFailed]:
        return [m.event for m in self.said if isinstance(m, wire.Happened) and isinstance(m.event, CommandFailed)]

    def tokens(self) -> list[wire.Token]:
        return [token for m in self.said if isinstance(m, wire.Tokens) for token in m.tokens]

    def answers(self) -> dict[int, list[int]]:
        """Answers by request; a token that comes again must be the same, and none may be left out."""
        found: dict[int, list[int]] = {request_id: [] for request_id in self.tickets}
        for token in self.tokens():
            answer = found[token.request_id]
            assert token.index <= len(answer), f"request {token.request_id}: token {token.index} after {len(answer)}"
            if token.index < len(answer):
                assert answer[token.index] == token.token
            else:
                answer.append(token.token)
        return found

    def landed(self) -> int:
        """Passes whose hidden states had been written to the node's memory."""
        return sum(runner.landed for executor in self.executors for runner in executor.made)

    def check(self) -> None:
        """Every request has the model's answer, and nothing failed."""
        assert self.failures() == []
        assert self.answers() == {request_id: expected_answer(ticket) for request_id, ticket in self.tickets.items()}


def copy(ticket: Ticket) -> Ticket:
    return Ticket(ticket.request_id, list(ticket.tokens), ticket.prompt_tokens, ticket.max_tokens)


def stages(*shares: tuple[int, int, int]) -> tuple[Stage, ...]:
    return tuple(Stage(*share) for share in shares)


def replica(node: int) -> tuple[int, int, int]:
    """The stage of a replica, for ``stages``."""
    return (node, 0, 3)


def run_until_tokens(cluster: FakeCluster, count: int) -> None:
    """Run until so many tokens were reported."""
    while len(cluster.tokens()) < count:
        cluster.run(steps=1)


def move_to_replicas(cluster: FakeCluster, kv: KvPolicy) -> None:
    """Start replicas 2 and 3 on nodes 0 and 1, and dissolve pipeline 1 of three nodes: its requests 1 to 4 go there in turn."""
    done = {token.request_id for token in cluster.tokens() if token.finished}
    cluster.serve(2, *stages(replica(0)))
    cluster.serve(3, *stages(replica(1)))
    moves = [(request_id, 2 + request_id % 2) for request_id in (1, 2, 3, 4) if request_id not in done]
    cluster.switch(1, 0, moves, {2: 0, 3: 1}, kv)
    if kv == "recompute":
        cluster.stop(1, 1, 2)
