"""Processes that carry out multicast plans over a transport and do nothing else, for tests and measurements of transports.

A live node does the same with a model's blocks (lambdascale.live.node.multicasts); here they are random bytes with known
checksums.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import xxhash

from lambdascale.core import MulticastPlan, NodeId, Send
from lambdascale.transport import DeviceMemory, Endpoint, Handlers, Memory, TransportError

_PATIENCE_S = 120.0
Make = Callable[[NodeId, Handlers], Endpoint]


def content(block: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pseudo-random bytes of a block, equal in every process."""
    return np.random.default_rng(block).integers(0, 256, size, dtype=np.uint8)


class Carrier:
    """A node's process. It sends its parent ("address", a), ("connected",), ("block", b), ("lost", peer) and ("idle", held)."""

    def __init__(self, node: NodeId, make: Make, pipe: Connection, blocks: int, block_bytes: int, holds: bool) -> None:
        self.node, self._pipe, self._size = node, pipe, block_bytes
        self._events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        handlers = Handlers(
            on_write=lambda peer, immediate, offset, size: self._events.put(("written", immediate)),
            on_message=lambda peer, data: None,
            on_lost=lambda peer, reason: self._events.put(("lost", peer)),
        )
        self._endpoint = make(node, handlers)
        self._memory = self._endpoint.allocate(blocks * block_bytes)
        contents = [content(block, block_bytes) for block in range(blocks)]
        self._sums = [xxhash.xxh3_64_intdigest(data.data) for data in contents]
        if holds:
            _fill(self._memory, np.concatenate(contents).tobytes())
        self._endpoint.register(self._memory)
        self._held = set(range(blocks)) if holds else set()
        self._sends: deque[Send] = deque()
        self._expected: set[int] = set()
        self._under_way = 0
        self._busy = False

    def serve(self) -> None:
        """Carry out the parent's commands until it sends "end"."""
        self._tell("address", self._endpoint.address)
        commands: dict[str, Callable[..., None]] = {"connect": self._connect, "carry": self._carry}
        while (said := self._next())[0] != "end":
            commands[said[0]](*said[1:])
            while self._busy:
                self._react(*self._events.get(timeout=_PATIENCE_S))
        self._endpoint.close()

    def _next(self) -> tuple[Any, ...]:
        """Wait for the parent's next command; report losses meanwhile."""
        while not self._pipe.poll(0.02):
            with suppress(queue.Empty):
                self._react(*self._events.get_nowait())
        said: tuple[Any, ...] = self._pipe.recv()
        return said

    def _tell(self, *words: Any) -> None:
        self._pipe.send(words)

    def _connect(self, addresses: dict[NodeId, str]) -> None:
        for node in self._endpoint.expect(dict.fromkeys(addresses, 0)):
            self._endpoint.connect(node, addresses[node])
        self._tell("connected")

    def _carry(self, plan: MulticastPlan) -> None:
        sends = [send for round_ in plan.rounds for send in round_]
        self._sends = deque(send for send in sends if send.src == self.node)
        self._expected = {send.block for send in sends if send.dst == self.node} - self._held
        self._busy = True
        for sender in {send.src for send in sends if send.dst == self.node}:
            # Never dismissed: after a death, writes of others that are in flight arrive after this node is idle.
            with suppress(TransportError):
                self._endpoint.admit(sender)
        self._pump()

    def _react(self, what: str, value: int) -> None:
        if what == "written":
            self._landed(value)
        elif what == "sent":
            self._under_way -= 1
        else:
            self._tell("lost", value)
            # Blocks still expected from others may depend on the lost node: the parent makes a new plan from the blocks held.
            self._sends.clear()
            self._expected.clear()
        self._pump()

    def _landed(self, block: int) -> None:
        data = self._memory[block * self._size : (block + 1) * self._size]
        if xxhash.xxh3_64_intdigest(data if isinstance(data, memoryview) else bytes(data)) != self._sums[block]:
            raise ValueError(f"block {block} is corrupted at node {self.node}")
        self._held.add(block)
        self._expected.discard(block)
        self._tell("block", block)

    def _pump(self) -> None:
        """Keep two sends in flight, so that the next is ready when one has finished."""
        while self._sends and self._under_way < 2 and self._sends[0].block in self._held:
            transfer = self._sends.popleft()
            begin = transfer.block * self._size
            try:
                sent = self._endpoint.write(transfer.dst, self._memory[begin : begin + self._size], begin, transfer.block)
            except TransportError:
                continue
            self._under_way += 1
            sent.add_done_callback(self._note_sent)
        if self._busy and not self._sends and not self._expected and not self._under_way:
            self._busy = False
            self._tell("idle", sorted(self._held))

    def _note_sent(self, future: Future[None]) -> None:
        self._events.put(("sent", 0))


def _fill(memory: Memory, data: bytes) -> None:
    if isinstance(memory, DeviceMemory):
        memory.fill(data)
    else:
        memory[:] = data


class Carriers:
    """Context manager of ``nodes`` processes, the first ``sources`` of which hold every block of ``block_bytes`` bytes.

    CUDA does not survive a fork: with GPUs, ``start_method`` is "spawn" and ``make`` a module's function.
    """

    def __init__(
        self, make: Make, *, nodes: int, sources: int, blocks: int, block_bytes: int, start_method: str = "fork"
    ) -> None:
        context: Any = multiprocessing.get_context(start_method)
        self.heard: list[tuple[NodeId, tuple[Any, ...]]] = []
        self._pipes: dict[NodeId, Connection] = {}
        self._processes = {}
        for node in range(nodes):
            ours, theirs = context.Pipe()
            arguments = (node, make, theirs, blocks, block_bytes, node < sources)
            self._processes[node] = context.Process(target=_be_a_carrier, args=arguments, daemon=True)
            self._processes[node].start()
            theirs.close()
            self._pipes[node] = ours

    def connect(self) -> None:
        """Connect every pair of nodes once, as a cluster does when it starts."""
        addresses = {node: words[1] for node, words in self.collect("address").items()}
        self.say("connect", addresses)
        self.collect("connected")

    def carry(self, plan: MulticastPlan) -> float:
        """Carry out a plan; return the seconds until every node has received and sent its blocks."""
        began = time.monotonic()
        self.say("carry", plan)
        self.held = {node: set(words[1]) for node, words in self.collect("idle").items()}
        return time.monotonic() - began

    def carry_and_kill(self, plan: MulticastPlan, victim: NodeId, after: int, at: NodeId) -> None:
        """Carry out a plan and kill ``victim`` once ``after`` blocks have come to ``at``.

        Waits until all others report its loss and idle.
        """
        self.say("carry", plan)
        blocks = 0
        while blocks < after:
            node, words = self._hear()
            blocks += node == at and words[0] == "block"
        pid = self._processes[victim].pid
        assert pid is not None, "it was started"
        os.kill(pid, signal.SIGKILL)
        self._processes[victim].join()
        del self._pipes[victim]
        self.collect("lost")
        self.held = {node: set(words[1]) for node, words in self.collect("idle").items()}

    def say(self, *words: Any) -> None:
        """Send a command to all living nodes."""
        for pipe in self._pipes.values():
            pipe.send(words)

    def collect(self, kind: str) -> dict[NodeId, tuple[Any, ...]]:
        """Wait for one message of this kind from every living node; return them by node."""
        found = {node: words for node, words in self.heard if words[0] == kind and node in self._pipes}
        self.heard = [entry for entry in self.heard if entry[1][0] != kind]
        while len(found) < len(self._pipes):
            node, words = self._hear()
            if words[0] == kind:
                found[node] = words
                self.heard.pop()
        return found

    def _hear(self) -> tuple[NodeId, tuple[Any, ...]]:
        ready = wait(list(self._pipes.values()), timeout=_PATIENCE_S)
        assert ready, f"no node sends anything; the last messages: {self.heard[-3:]}"
        for node, pipe in self._pipes.items():
            if pipe is ready[0]:
                self.heard.append((node, pipe.recv()))
        return self.heard[-1]

    def __enter__(self) -> Carriers:
        self.connect()
        return self

    def __exit__(self, *details: object) -> None:
        with suppress(OSError):
            self.say("end")
        for process in self._processes.values():
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes.values():
            pipe.close()


def _be_a_carrier(node: NodeId, make: Make, pipe: Connection, blocks: int, block_bytes: int, holds: bool) -> None:
    Carrier(node, make, pipe, blocks, block_bytes, holds).serve()
