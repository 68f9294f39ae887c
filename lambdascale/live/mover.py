"""A node's part in multicasts and loads: it carries whole plans out by itself.

Every node sends and receives its own transfers in the plan's order: a receiver says whose turn it is and where it wants the
block, the sender writes as soon as it holds it; nobody asks the controller. So later rounds never overtake earlier ones, and a
paced link carries one block at a time in each direction. A block is verified before it counts and before it is passed on. All
state belongs to one thread.

A one-sided write cannot be called back. So a cancelled multicast keeps its receivers' memory until every sender whose turn it was
has written or has said that it writes no more (a fence: an empty write behind all others).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from threading import Timer

import torch

from lambdascale.core import NodeId
from lambdascale.core.commands import EvictBlocks, LoadBlocks, StartMulticast, Tier
from lambdascale.core.events import AnyEvent, BlockArrived, CommandFailed
from lambdascale.core.plan import Transfer
from lambdascale.inference.loading import Load
from lambdascale.inference.residency import StoreTier
from lambdascale.inference.store import BlockInUseError, BlockStore
from lambdascale.live.wire import Ready, encode
from lambdascale.transport import DeviceMemory, Endpoint, Memory, TokenBucket, TransportError, gpu_of

BLOCK_BITS = 24
_FENCE = (1 << BLOCK_BITS) - 1
_RETRY_S = 0.01
_RETRIES = 500


@dataclass
class _Outgoing:
    """What this node sends in a multicast."""

    command: StartMulticast
    tier: StoreTier
    sends: deque[Transfer]
    in_flight: int = 0
    cancelled: bool = False


@dataclass
class _Incoming:
    """What this node receives in a multicast: where to, in which order, and who may write which block now."""

    command: StartMulticast
    missing: set[int]
    offsets: dict[int, int] = field(default_factory=dict)
    turns: deque[Transfer] = field(default_factory=deque)
    granted: dict[int, NodeId] = field(default_factory=dict)
    cancelled: bool = False
    admitted: tuple[NodeId, ...] = ()  # who may write to this node's memory for it

    def forget(self, sender: NodeId) -> None:
        """This sender writes nothing any more."""
        self.granted = {block: node for block, node in self.granted.items() if node != sender}


@dataclass(frozen=True, kw_only=True)
class Links:
    """How slow storage is made to look, None: as fast as it is."""

    ssd: TokenBucket | None = None
    pcie: TokenBucket | None = None


@dataclass
class _State:
    outgoing: dict[int, _Outgoing] = field(default_factory=dict)
    incoming: dict[int, _Incoming] = field(default_factory=dict)
    ready: dict[int, dict[NodeId, dict[int, int | None]]] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    loads: dict[int, Load] = field(default_factory=dict)
    delayed: list[LoadBlocks] = field(default_factory=list)
    placing: set[str] = field(default_factory=set)
    told: set[tuple[str, int]] = field(default_factory=set)


class Mover:
    """``report`` takes events for the controller. ``window``: how many of this node's sends may be under
    way at once, and how many of its receives.

    ``collective`` takes broadcasts over; it tells of its progress by ``written`` and ``broadcast_ended``, as a peer would.

    ``preloaded``: every model stays on the device from the start (ideal scaling's "instant" loads).
    """

    def __init__(
        self,
        node: NodeId,
        store: BlockStore,
        endpoint: Endpoint,
        report: Callable[[AnyEvent], None],
        *,
        window: int,
        links: Links,
        collective: Callable[[StartMulticast, StoreTier], None],
        preloaded: bool = False,
    ) -> None:
        self._node = node
        self._store = store
        self._endpoint = endpoint
        self._report = report
        self._window = window
        self._links = links
        self._collective = collective
        self._preloaded = preloaded
        self._state = _State()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mover")

    def close(self) -> None:
        """Cancel what is under way; no load touches the node's memory afterwards, which may be the endpoint's."""
        loads = list(self._state.loads.values())
        for load in loads:
            load.cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)
        for load in loads:
            with suppress(Exception):  # nobody is left to be told
                load.wait()

    def _do(self, job: Callable[[], None]) -> None:
        try:
            self._thread.submit(self._guarded, job)
        except RuntimeError:
            return  # closed: nobody waits for this any more

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:  # a fault of ours: the controller must not wait for ever
            self._report(CommandFailed(0.0, "Mover", f"node {self._node}: {type(error).__name__}: {error}"))
            raise

    # -- what the node is told ---------------------------------------------------------------------------------------

    def multicast(self, command: StartMulticast) -> None:
        """Take part in a multicast."""
        self._do(lambda: self._start(command))

    def load(self, command: LoadBlocks) -> None:
        """Load blocks from this node's own storage."""
        self._do(lambda: self._load(command))

    def cancel(self, transfer_id: int) -> None:
        """Stop a multicast or load."""
        self._do(lambda: self._cancel(transfer_id))

    def place_copy(self, model: str, done: Callable[[], None]) -> None:
        """Have a host copy."""
        self._do(lambda: self._place(model, done))

    def release(self, model: str, keep_host: bool, after: Future[None]) -> None:
        """Free device memory once ``after`` (what used it has stopped)."""
        self._do(lambda: self._release(model, keep_host, after))

    def evict(self, command: EvictBlocks) -> None:
        """Drop a copy."""
        tier: StoreTier = "gpu" if command.tier == "gpu" else "host"
        self._do(lambda: self._evict(command.model, tier, _RETRIES))

    def ready(self, peer: NodeId, message: Ready) -> None:
        """A receiver says where it wants its blocks."""
        self._do(lambda: self._note_ready(peer, message))

    def written(self, peer: NodeId, immediate: int, xxh3_64: int | None = None) -> None:
        """A peer's write is complete; the hash of its bytes, where the transport has it already."""
        self._do(lambda: self._written(peer, immediate >> BLOCK_BITS, immediate & _FENCE, xxh3_64))

    def lost(self, peer: NodeId) -> None:
        """A peer is gone; the controller will say what follows."""
        self._do(lambda: self._lost(peer))

    # -- sending -----------------------------------------------------------------------------------------------------

    def _start(self, command: StartMulticast) -> None:
        plan, number = command.plan, command.transfer_id
        if command.transport == "collective":
            self._join_broadcast(command)
            return
        sends = deque(t for transfers in plan.rounds for t in transfers if t.src == self._node)
        if sends:
            if self._store.landing_tier == "host":
                self._store.mirror(command.model)  # endpoints send from host memory
            self._state.outgoing[number] = _Outgoing(command, self._source_tier(command), sends)
        receives = [t for transfers in plan.rounds for t in transfers if t.dst == self._node]
        if receives:
            self._receive(command, receives)
        self._pump(number)

    def _join_broadcast(self, command: StartMulticast) -> None:
        """This node itself counts as the sender: it is what may still write to the memory."""
        blocks = {t.block for transfers in command.plan.rounds for t in transfers}
        blocks = {block for block in blocks if not self._store.holds(command.model, block, self._source_tier(command))}
        if blocks:
            try:
                self._store.reserve(command.model, sorted(blocks))
            except ValueError as error:
                self._fail("StartMulticast", str(error), command.transfer_id)
                return
            granted = dict.fromkeys(blocks, self._node)
            self._state.incoming[command.transfer_id] = _Incoming(command, blocks, granted=granted)
        self._collective(command, self._source_tier(command))

    def broadcast_ended(self, number: int, error: str) -> None:
        """A broadcast is over; ``error`` says why before its time."""
        self._do(lambda: self._broadcast_ended(number, error))

    def _broadcast_ended(self, number: int, error: str) -> None:
        incoming = self._state.incoming.get(number)
        if incoming is None:
            return
        if error and not incoming.cancelled:
            # If a member died, the controller knows already or will soon; this tells it only what it would wait for in vain.
            incoming.cancelled = True
            self._fail("StartMulticast", error, number)
        incoming.forget(self._node)
        self._settle(number, incoming)

    def _source_tier(self, command: StartMulticast) -> StoreTier:
        tiers: dict[NodeId, Tier] = dict(zip(command.plan.sources, command.source_tiers, strict=True))
        # A destination passes on what it has received: blocks stay in the landing tier at least until the multicast ends.
        tier = tiers.get(self._node, self._store.landing_tier)
        return "host" if tier == "host" else "gpu" if self._store.landing_tier == "gpu" else "host"

    def _pump(self, number: int) -> None:
        """Start the next sends, in order, as far as the window, the blocks and the receivers' turns allow."""
        out = self._state.outgoing.get(number)
        if out is None:
            return
        while out.sends and out.in_flight < self._window:
            transfer, model = out.sends[0], out.command.model
            offsets = self._state.ready.get(number, {}).get(transfer.dst, {})
            if transfer.block not in offsets:
                return
            offset = offsets[transfer.block]
            if offset is not None and not self._store.holds(model, transfer.block, out.tier):
                return
            out.sends.popleft()
            if offset is not None:  # otherwise it came to the receiver another way
                self._send(number, out, transfer, offset)
        if not out.sends and not out.in_flight:
            self._end_outgoing(number, out)

    def _send(self, number: int, out: _Outgoing, transfer: Transfer, offset: int) -> None:
        stack = ExitStack()
        (data,) = stack.enter_context(self._store.using(out.command.model, [transfer.block], out.tier))
        out.in_flight += 1

        def sent(future: Future[None]) -> None:
            stack.close()
            self._do(lambda: self._sent(number, out))

        immediate = number << BLOCK_BITS | transfer.block
        try:
            self._endpoint.write(transfer.dst, _memory(data), offset, immediate).add_done_callback(sent)
        except TransportError:
            # The receiver is gone: the controller will re-plan, and what is still to be sent to others goes on.
            stack.close()
            out.in_flight -= 1

    def _sent(self, number: int, out: _Outgoing) -> None:
        out.in_flight -= 1
        self._pump(number)

    def _end_outgoing(self, number: int, out: _Outgoing) -> None:
        del self._state.outgoing[number]
        self._state.ended.add(number)
        told = self._state.ready.pop(number, {})
        if out.cancelled:
            for receiver in told:
                self._fence(receiver, number)

    def _fence(self, receiver: NodeId, number: int) -> None:
        """Tell a receiver that this node writes no more in a multicast."""
        with suppress(TransportError):  # it is gone itself
            self._endpoint.write(receiver, memoryview(b""), 0, number << BLOCK_BITS | _FENCE)

    def _note_ready(self, peer: NodeId, message: Ready) -> None:
        number = message.transfer_id
        if number in self._state.ended:  # cancelled here, and not yet there
            self._fence(peer, number)
            return
        self._state.ready.setdefault(number, {}).setdefault(peer, {})[message.block] = message.offset
        self._pump(number)

    # -- receiving ---------------------------------------------------------------------------------------------------

    def _receive(self, command: StartMulticast, receives: list[Transfer]) -> None:
        model = command.model
        blocks = [t.block for t in receives if not self._store.holds(model, t.block, self._store.landing_tier)]
        try:
            offsets = self._store.reserve(model, blocks)
        except ValueError as error:
            self._fail("StartMulticast", str(error), command.transfer_id)
            return
        senders = tuple(dict.fromkeys(t.src for t in receives))
        incoming = _Incoming(command, set(blocks), offsets, deque(receives), admitted=senders)
        self._state.incoming[command.transfer_id] = incoming
        for sender in senders:
            with suppress(TransportError):  # as below
                self._endpoint.admit(sender)
        self._take_turns(command.transfer_id, incoming)

    def _take_turns(self, number: int, incoming: _Incoming) -> None:
        """Let the next senders write, in the plan's order, as far as the window allows."""
        while incoming.turns and not incoming.cancelled and len(incoming.granted) < self._window:
            transfer = incoming.turns.popleft()
            wanted = transfer.block in incoming.missing
            message = Ready(number, transfer.block, incoming.offsets[transfer.block] if wanted else None)
            with suppress(TransportError):  # the controller hears of the loss and re-plans
                self._endpoint.send(transfer.src, encode(message))
                if wanted:
                    incoming.granted[transfer.block] = transfer.src

    def _written(self, peer: NodeId, number: int, block: int, xxh3_64: int | None) -> None:
        incoming = self._state.incoming.get(number)
        if incoming is None:
            return
        if block == _FENCE:
            incoming.forget(peer)
            self._settle(number, incoming)
            return
        incoming.granted.pop(block, None)
        self._take_turns(number, incoming)
        self._arrived(number, incoming, block, xxh3_64)
        self._settle(number, incoming)

    def _arrived(self, number: int, incoming: _Incoming, block: int, xxh3_64: int | None) -> None:
        """A block's bytes are all there: verify, tell, pass on."""
        model = incoming.command.model
        if block in incoming.missing:
            if not self._store.holds(model, block, self._store.landing_tier) and not self._landed(incoming, block, xxh3_64):
                return
            incoming.missing.discard(block)
        for other in list(self._state.outgoing):
            self._pump(other)
        if not incoming.missing and not incoming.cancelled:
            self._end_incoming(number)

    def _end_incoming(self, number: int) -> None:
        """Nobody writes for it any more."""
        for peer in self._state.incoming.pop(number).admitted:
            self._endpoint.dismiss(peer)

    def _landed(self, incoming: _Incoming, block: int, xxh3_64: int | None) -> bool:
        number, model = incoming.command.transfer_id, incoming.command.model
        try:
            self._store.land(model, block, xxh3_64)
            if self._store.landing_tier != "gpu":
                self._store.load(model, [block], to="gpu").wait()
        except ValueError as error:
            self._fail("StartMulticast", str(error), number)
            return False
        self._tell_arrived(number, model, block)
        return True

    def _tell_arrived(self, number: int, model: str, block: int) -> None:
        """Once for each block on the device, however many transfers were to bring it."""
        if (model, block) not in self._state.told:
            self._state.told.add((model, block))
            self._report(BlockArrived(0.0, number, self._node, model, block))

    def _settle(self, number: int, incoming: _Incoming) -> None:
        """Free the memory of a cancelled multicast once nobody writes to it any more."""
        if not incoming.cancelled or incoming.granted:
            return
        self._end_incoming(number)
        model = incoming.command.model
        wanted = {block for other in self._state.incoming.values() if other.command.model == model for block in other.missing}
        self._store.abandon(model, incoming.missing - wanted)
        self._load_delayed()

    def _load_delayed(self) -> None:
        """Try again the loads that had to wait."""
        delayed, self._state.delayed = self._state.delayed, []
        for command in delayed:
            self._load(command)

    # -- ends --------------------------------------------------------------------------------------------------------

    def _cancel(self, number: int) -> None:
        self._state.delayed = [command for command in self._state.delayed if command.transfer_id != number]
        if number in self._state.loads:
            self._state.loads.pop(number).cancel()
        out = self._state.outgoing.get(number)
        if out is not None:
            out.cancelled = True
            out.sends.clear()
            if not out.in_flight:
                self._end_outgoing(number, out)
        incoming = self._state.incoming.get(number)
        if incoming is not None:
            incoming.cancelled = True
            self._settle(number, incoming)

    def _lost(self, peer: NodeId) -> None:
        for number, incoming in list(self._state.incoming.items()):
            incoming.forget(peer)
            incoming.turns = deque(t for t in incoming.turns if t.src != peer)
            self._take_turns(number, incoming)
            self._settle(number, incoming)
        for told in self._state.ready.values():
            told.pop(peer, None)
        for number, out in list(self._state.outgoing.items()):
            # Nothing can be sent to the dead: do not let it hold up what others wait for.
            out.sends = deque(t for t in out.sends if t.dst != peer)
            self._pump(number)

    def _fail(self, command: str, reason: str, number: int) -> None:
        self._report(CommandFailed(0.0, command, reason, transfer_id=number))

    # -- loads and memory --------------------------------------------------------------------------------------------

    def _load(self, command: LoadBlocks) -> None:
        model, number = command.model, command.transfer_id
        # Until the senders of a cancelled multicast are known to be through, or a host copy that a GPU's load needs is there.
        if any(self._store.awaited(model, block) for block in command.blocks) or model in self._state.placing:
            self._state.delayed.append(command)
            return
        if command.tier == "remote":
            self._fail("LoadBlocks", "a live cluster has no remote store", number)
            return
        from_host = command.tier == "host"
        if from_host and not all(self._store.holds(model, block, "host") for block in command.blocks):
            self._fail("LoadBlocks", f"node {self._node} has no host copy of {model}", number)
            return
        try:
            if command.loader == "sequential" and not from_host:
                self._load_twice(command)
            else:
                pace = None if command.tier == "instant" else self._links.pcie if from_host else self._links.ssd
                self._state.loads[number] = self._store.load(
                    model, command.blocks, keep_host=False, on_block=self._arrival(command, pace)
                )
        except ValueError as error:
            self._fail("LoadBlocks", str(error), number)
            return
        self._watch(number, self._state.loads[number])

    def _load_twice(self, command: LoadBlocks) -> None:
        """Everything into host memory before the first block goes to the device."""
        model, number = command.model, command.transfer_id
        sizes = self._store.model(model).block_bytes

        def on_host(_: str, block: int) -> None:
            if self._links.ssd is not None:
                self._links.ssd.take(sizes[block])
            if len(load.landed) == len(load.blocks):
                self._do(second)

        def second() -> None:
            if number in self._state.loads:
                up = self._store.load(model, command.blocks, keep_host=False, on_block=self._arrival(command, self._links.pcie))
                self._state.loads[number] = up
                self._watch(number, up)
                up.when_ended(lambda _: self._do(lambda: self._evict(model, "host", _RETRIES)))

        load = self._state.loads[number] = self._store.load(model, command.blocks, to="host", on_block=on_host)

    def _arrival(self, command: LoadBlocks, pace: TokenBucket | None) -> Callable[[str, int], None]:
        sizes = self._store.model(command.model).block_bytes

        def arrived(model: str, block: int) -> None:
            if pace is not None:
                pace.take(sizes[block])
            self._do(lambda: self._tell_arrived(command.transfer_id, model, block))

        return arrived

    def _watch(self, number: int, load: Load) -> None:
        """Tell the controller if a load fails; forget it when it has ended."""

        def ended(error: Exception | None) -> None:
            def note() -> None:
                if self._state.loads.get(number) is load:
                    del self._state.loads[number]
                if error is not None:
                    self._fail("LoadBlocks", str(error), number)

            self._do(note)

        load.when_ended(ended)

    def _place(self, model: str, done: Callable[[], None]) -> None:
        everything = range(len(self._store.model(model).blocks))

        def ended(error: Exception | None) -> None:
            if error is not None:
                self._report(CommandFailed(0.0, "PlaceCopy", str(error)))
            done()
            self._do(placed)

        def placed() -> None:
            self._state.placing.discard(model)
            self._load_delayed()

        self._state.placing.add(model)
        self._store.load(model, everything, to="host").when_ended(ended)

    def _release(self, model: str, keep_host: bool, after: Future[None]) -> None:
        after.result()
        self._state.told = {key for key in self._state.told if key[0] != model}
        if self._preloaded:
            return
        try:
            if keep_host:
                self._store.demote(model)
                return
        except BlockInUseError:
            pass  # copied, and still being sent from the device: it goes when that has ended
        self._evict(model, "gpu", _RETRIES)
        if self._store.landing_tier == "host" and not keep_host:
            self._evict(model, "host", _RETRIES)

    def _evict(self, model: str, tier: StoreTier, tries: int) -> None:
        """The last read of a copy may be ending just now: then again a moment later."""
        try:
            self._store.evict(model, tier)
        except BlockInUseError:
            if not tries:
                raise
            self._later(lambda: self._evict(model, tier, tries - 1))

    def _later(self, job: Callable[[], None]) -> None:
        timer = Timer(_RETRY_S, self._do, (job,))
        timer.daemon = True
        timer.start()


def _memory(data: torch.Tensor) -> Memory:
    """A block, as endpoints take it."""
    if data.device.type == "cpu":
        return data.numpy().data
    return DeviceMemory(gpu_of(data.device.index), data.data_ptr(), data.numel())
