"""Queue of what waits to be sent to a peer, and its order: frames before messages before chunks of writes.

Everything here is called under the connection's lock. A step has the number of bytes it will move, so that a paced link can
delay it, and posts them when called. Room for it stays free meanwhile, since only one thread takes steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lambdascale.transport.base import Memory, TransportError
from lambdascale.transport.rdma import frames
from lambdascale.transport.rdma.frames import Card, Chunk, Frame, Kind

if TYPE_CHECKING:
    from lambdascale.transport.pacing import TokenBucket
    from lambdascale.transport.rdma.lane import Lane, Window
    from lambdascale.transport.rdma.slots import Slots

_NOTHING = memoryview(b"")


@dataclass(frozen=True, slots=True)
class Source:
    """Registered memory that a write is sent from, with its key for each rail; ``release`` is called once it has arrived."""

    address: int
    size: int
    keys: Sequence[int]
    release: Callable[[], None]


@dataclass(eq=False)
class Write:
    """A write that has not arrived completely. ``data`` keeps the memory alive."""

    data: Memory
    source: Source
    offset: int
    immediate: int
    pieces: Iterator[Chunk]
    left: int  # number of rails whose last chunk has not arrived
    rails: int
    ways: Sequence[TokenBucket] = ()
    serial: int = -1
    done: Future[None] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.next: Chunk | None = next(self.pieces)


@dataclass(eq=False)
class Message:
    """A message that has not arrived completely; ``at`` bytes have been posted."""

    data: memoryview
    at: int = 0
    done: Future[None] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class Step:
    """A work request that can be posted now. ``paced_bytes``: the bytes that ``ways`` count, or without any a paced link."""

    paced_bytes: int
    post: Callable[[], None]
    ways: Sequence[TokenBucket] = ()


class Outbox:
    """See the module. ``step_bytes`` is the size of a chunk."""

    def __init__(self, lanes: Sequence[Lane], slots: Slots, theirs: Card, step_bytes: int) -> None:
        self._lanes, self._slots, self._theirs = lanes, slots, theirs
        self._step_bytes = step_bytes
        self._messages: deque[Message] = deque()
        self._writes: deque[Write] = deque()
        self._incomplete: set[Write | Message] = set()
        self._frames: deque[Frame] = deque()  # frames that need no credit
        self._own_frames: deque[tuple[Frame, bytes]] = deque()  # frames that need one
        self._binds: deque[tuple[int, Window, Callable[[], None]]] = deque()
        keys = [card.key for card in theirs.rails]
        self.keys = keys if any(keys) else []  # of the peer's memory; empty while it does not admit this node
        self._written = 0
        self._goodbye = False
        self.said_goodbye = False

    # -- queueing ----------------------------------------------------------------------------------------------------

    def write(self, data: Memory, source: Source, offset: int, immediate: int, ways: Sequence[TokenBucket] = ()) -> Future[None]:
        """Queue a write; the future is done once it has arrived."""
        size, count = source.size, len(self._lanes)
        used = frames.rails_used(size, self._step_bytes, count)
        job = Write(data, source, offset, immediate, frames.chunks(size, self._step_bytes, count), used, used, ways)
        self._writes.append(job)
        self._incomplete.add(job)
        return job.done

    def message(self, data: bytes) -> Future[None]:
        """Queue a message; the future is done once it has arrived."""
        job = Message(memoryview(data))
        self._messages.append(job)
        self._incomplete.add(job)
        return job.done

    def credit(self, rail: int, count: int) -> None:
        """Queue a frame that returns ``count`` credits of ``rail`` to the peer."""
        self._frames.append(Frame(Kind.CREDIT, rail, count))

    def bind(self, rail: int, window: Window, done: Callable[[], None]) -> None:
        """Queue the binding of a window; ``done`` is called once it is open."""
        self._binds.append((rail, window, done))

    def tell_keys(self, keys: bytes) -> None:
        """Queue a frame with the keys of this node's memory."""
        self._own_frames.append((Frame(Kind.KEYS), keys))

    def goodbye(self) -> None:
        """Queue the goodbye, to be sent after everything else."""
        self._goodbye = True

    def fail(self) -> list[Future[None]]:
        """Drop everything and return the futures of what has not arrived. Nothing may be in flight any more."""
        jobs, self._incomplete = self._incomplete, set()
        for job in jobs:
            if isinstance(job, Write):
                job.source.release()
        return [job.done for job in jobs]

    # -- choosing the next step --------------------------------------------------------------------------------------

    def step(self) -> Step | None:
        """Choose the next step; None if nothing waits or no room is left. TransportError for a write beyond the peer's memory."""
        lane = self._lanes[0]
        if self._binds:
            rail, window, done = self._binds[0]
            return Step(0, lambda: self._bind(rail, window, done))
        if self._slots.free:
            if self._frames:
                return Step(0, lambda: self._send(self._frames.popleft()))
            if lane.receives.credits:
                if self._own_frames:
                    return Step(0, self._send_own_frame)
                if self._messages:
                    return self._message_step(self._messages[0])
                if self._writes and self._writes[0].serial < 0 and not self.is_shut_out:
                    return self._announce_step(self._writes[0])
                if self._goodbye and not self._writes and not self.said_goodbye:
                    return Step(0, self._say_goodbye)
        if self._writes and self._writes[0].serial >= 0:
            return self._chunk_step(self._writes[0])
        return None

    def _bind(self, rail: int, window: Window, done: Callable[[], None]) -> None:
        self._binds.popleft()
        self._lanes[rail].bind(window, done)

    def _send_own_frame(self) -> None:
        frame, piece = self._own_frames.popleft()
        self._lanes[0].receives.take()
        self._send(frame, memoryview(piece))

    @property
    def is_shut_out(self) -> bool:
        """True if the next write waits for the peer to admit this node."""
        return bool(self._writes) and self._writes[0].serial < 0 and not self.keys and self._writes[0].source.size > 0

    def _say_goodbye(self) -> None:
        self.said_goodbye = True
        self._lanes[0].receives.take()
        self._send(Frame(Kind.BYE, first=self._written))

    def _message_step(self, job: Message) -> Step:
        piece = job.data[job.at : job.at + self._slots.piece_bytes]

        def post() -> None:
            job.at += len(piece)
            last = job.at == len(job.data)
            if last:
                self._messages.popleft()
            self._lanes[0].receives.take()
            self._send(Frame(Kind.MESSAGE, first=len(job.data)), piece, (lambda: self._arrived(job)) if last else None)

        return Step(len(piece), post)

    def _announce_step(self, job: Write) -> Step:
        end = job.offset + job.source.size
        if end > self._theirs.size:
            raise TransportError(f"a write to bytes {job.offset} to {end} of {self._theirs.size}")

        def post() -> None:
            job.serial = self._written % frames.SERIALS
            self._written += 1
            self._lanes[0].receives.take()
            self._send(frames.announcement(job.serial, job.rails, job.immediate, job.offset, job.source.size))

        return Step(0, post)

    def _chunk_step(self, job: Write) -> Step | None:
        chunk = job.next
        assert chunk is not None, "a write leaves the queue with its last chunk"
        lane = self._lanes[chunk.rail]
        if not lane.has_room or (chunk.last and not lane.receives.credits):
            return None
        return Step(chunk.size, lambda: self._post_chunk(job, chunk, lane), job.ways)

    def _post_chunk(self, job: Write, chunk: Chunk, lane: Lane) -> None:
        job.next = next(job.pieces, None)
        if job.next is None:
            self._writes.popleft()
        if chunk.last:
            lane.receives.take()
        lane.write(
            job.source.address + chunk.begin,
            chunk.size,
            job.source.keys[chunk.rail],
            to=self._theirs.address + job.offset + chunk.begin,
            remote_key=self.keys[chunk.rail] if self.keys else 0,  # an empty write needs no key
            immediate=job.serial if chunk.last else None,
            done=(lambda: self._rail_arrived(job)) if chunk.last else None,
        )

    def _send(self, frame: Frame, piece: memoryview = _NOTHING, then: Callable[[], None] | None = None) -> None:
        slots = self._slots
        slot = slots.free.popleft()
        size = slots.fill(slot, frame, piece)

        def done() -> None:
            slots.free.append(slot)
            if then is not None:
                then()

        self._lanes[0].send(slots.address(slot), size, slots.key, done)

    # -- arrivals (called without the lock, by the one thread that polls completions) --------------------------------

    def _rail_arrived(self, job: Write) -> None:
        job.left -= 1
        if not job.left:
            job.source.release()
            self._arrived(job)

    def _arrived(self, job: Write | Message) -> None:
        self._incomplete.discard(job)
        job.done.set_result(None)
