"""The RDMA transport: one-sided writes into registered memory over reliable connections, by pyverbs.

Peers introduce themselves over an authenticated socket, where each sends the other its queue pairs and the key of its memory; a
process without the cluster's key learns neither. Connections are made once and kept, so that no scale-out waits for one.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from functools import partial

from msgspec import MsgspecError, msgpack
from pyverbs.pyverbs_error import PyverbsError

from lambdascale.core import NodeId
from lambdascale.core.checks import require
from lambdascale.transport.base import Handlers, Memory, TransportError
from lambdascale.transport.cuda import CudaError, DeviceMemory, Gpu, address_of
from lambdascale.transport.pacing import TokenBucket
from lambdascale.transport.rdma import gpudirect
from lambdascale.transport.rdma.connection import RdmaConnection
from lambdascale.transport.rdma.device import Device, Region, list_ports, register
from lambdascale.transport.rdma.device import guarded as translated
from lambdascale.transport.rdma.frames import Card
from lambdascale.transport.rdma.lane import Lane
from lambdascale.transport.rdma.options import RdmaOptions
from lambdascale.transport.rdma.outbox import Source
from lambdascale.transport.rdma.ports import choose
from lambdascale.transport.rdma.slots import SLOT_BYTES, Slots
from lambdascale.transport.rdma.watch import Watch, guarded
from lambdascale.transport.sockets import SocketEndpoint, fill

# Receives per rail; spare ones for frames without credit: a goodbye, and per rail as many credit frames as can be in flight.
_RECEIVES, _SPARE_PER_RAIL = 64, 8
_SENDS = 16
_LENGTH = struct.Struct("!I")
_LARGEST_CARD = 1 << 16
# Made on import, since msgspec crashes when two threads are the first to decode a type.
_cards = msgpack.Decoder(Card)


class RdmaEndpoint(SocketEndpoint[RdmaConnection]):
    """An Endpoint over RDMA devices. UserError if none exists, or one that ``options`` names is missing.

    ``gpu`` provides the registered memory unless ``options.gpudirect`` is off.
    """

    def __init__(
        self,
        node: NodeId,
        handlers: Handlers,
        key: bytes,
        *,
        host: str = "127.0.0.1",
        link: TokenBucket | None = None,
        generation: int = 0,
        options: RdmaOptions | None = None,
        gpu: Gpu | None = None,
    ) -> None:
        self.options = options or RdmaOptions()
        self.on_device = self.options.gpudirect != "off"
        require(not self.on_device or gpu is not None, f"rdma.gpudirect={self.options.gpudirect} needs device cuda")
        self._gpu = gpu
        self._arena: DeviceMemory | None = None
        self.choices = choose(list_ports(), self.options, host)
        self._devices = [Device(choice) for choice in self.choices]
        self.windows = self._use_windows()
        self._target: Region | None = None
        self._sources: list[Region] = []
        self._live: set[RdmaConnection] = set()
        self.watch = Watch(f"rdma-watch-{node}", self._check)
        super().__init__(node, handlers, key, host=host, link=link, generation=generation)

    def _use_windows(self) -> bool:
        possible = all(device.has_windows for device in self._devices)
        wanted = self.options.windows
        require(possible or not wanted, "rdma.windows: a device has no memory windows of type 2B")
        return possible if wanted is None else wanted

    @property
    def step_bytes(self) -> int:
        """Size of a chunk in bytes; small on a paced link, so that messages do not wait long."""
        return self.options.chunk_bytes if self.link is None else min(self.options.chunk_bytes, self.link.piece_bytes)

    def allocate(self, size: int) -> Memory:
        """See Endpoint. Host memory, or with GPUDirect the GPU's (UserError for a second call)."""
        if self._gpu is None or not self.on_device:
            return super().allocate(size)
        require(self._arena is None, "an endpoint's GPU memory is allocated once")
        self._arena = self._gpu.allocate(size)
        return self._arena

    def register(self, memory: Memory) -> None:
        """See Endpoint. TransportError beyond the limit on locked memory, UserError for a second call or without GPUDirect."""
        require(self._target is None, "an endpoint's memory is registered once")
        super().register(memory)
        if memory.nbytes:
            self._target = self._register_target()
            self._sources.append(self._target)

    def _register_target(self) -> Region:
        memory, windows = self.memory, self.windows
        if isinstance(memory, DeviceMemory):
            return gpudirect.register(self._devices, memory, self.options.gpudirect, remote=not windows, windows=windows)
        return register(self._devices, address_of(memory), memory.nbytes, remote=not windows, windows=windows)

    def register_source(self, memory: memoryview) -> None:
        """See Endpoint."""
        if memory.nbytes:
            self._sources.append(register(self._devices, address_of(memory), memory.nbytes))

    def source(self, address: int, size: int) -> Source:
        """Registered source of a write; memory not registered before is registered until the write has arrived."""
        if not size:
            return Source(address, 0, [0] * len(self._devices), lambda: None)
        for region in self._sources:
            if region.has(address, size):
                return Source(region.place(address), size, region.local_keys, lambda: None)
        region = register(self._devices, address, size)
        return Source(address, size, region.local_keys, region.close)

    def admit(self, peer: NodeId) -> None:
        """See Endpoint."""
        self._connection(peer).admit()

    def dismiss(self, peer: NodeId) -> None:
        """See Endpoint."""
        with suppress(TransportError):  # the connection is lost, and its keys are void
            self._connection(peer).dismiss()

    def make(self, peer: NodeId, sock: socket.socket) -> RdmaConnection:
        """See SocketEndpoint. Both ends are ready to receive before either learns that the connection is made."""
        lanes: list[Lane] = []
        slots = Slots(self._devices[0], self._receives(0), _SENDS)
        try:
            for rail, device in enumerate(self._devices):
                lanes.append(translated(partial(self._lane, rail, device, slots)))
            theirs = self._exchange(sock, self._card(lanes))
            if len(theirs.rails) != len(lanes):
                raise TransportError(f"node {peer} has {len(theirs.rails)} rails, this one {len(lanes)}: name as many devices")
            for lane, card in zip(lanes, theirs.rails, strict=True):
                translated(partial(lane.connect, card))
                lane.receives.credits = theirs.receives
        except BaseException:
            for lane in lanes:
                lane.close()
            slots.close()
            raise
        connection = RdmaConnection(self, peer, sock, lanes, slots, theirs, self._target if self.windows else None)
        self._live.add(connection)
        return connection

    def _receives(self, rail: int) -> int:
        """Number of receives to post on a rail; the peer has credit for _RECEIVES of them."""
        return _RECEIVES + (_SPARE_PER_RAIL * len(self._devices) if rail == 0 else 0)

    def _lane(self, rail: int, device: Device, slots: Slots) -> Lane:
        count = self._receives(rail)
        lane = Lane(
            device, receives=_RECEIVES, spare=count - _RECEIVES, sends=_SENDS + self.options.depth, depth=self.options.depth
        )
        for slot in range(count):
            # Sends arrive on the first rail; on the others, receives take only immediates.
            lane.receive(slot, slots.address(slot), SLOT_BYTES if rail == 0 else 0, slots.key)
        return lane

    def _card(self, lanes: list[Lane]) -> Card:
        keys = self._target.remote_keys if self._target and not self.windows else [0] * len(lanes)
        address = self._target.origin if self._target else 0
        rails = tuple(lane.card(key) for lane, key in zip(lanes, keys, strict=True))
        return Card(address, len(self.memory), _RECEIVES, rails)

    @staticmethod
    def _exchange(sock: socket.socket, mine: Card) -> Card:
        data = msgpack.encode(mine)
        sock.sendall(_LENGTH.pack(len(data)) + data)
        head = bytearray(_LENGTH.size)
        fill(sock, memoryview(head))
        (size,) = _LENGTH.unpack(head)
        if size > _LARGEST_CARD:
            raise EOFError(f"it introduces itself with {size} bytes")
        answer = bytearray(size)
        fill(sock, memoryview(answer))
        try:
            return _cards.decode(answer)
        except MsgspecError as error:
            raise EOFError(f"it does not introduce itself as expected: {error}") from error

    def freed(self, connection: RdmaConnection) -> None:
        """Forget a connection that has closed its queue pairs."""
        self._live.discard(connection)

    def _check(self) -> None:
        for connection in list(self._live):
            guarded(connection.check, connection.failed)

    def close(self) -> None:
        """See Endpoint."""
        if self._closed:
            return
        super().close()
        self.watch.close()
        closing: list[Region | Device] = [*self._sources, *self._devices]
        for each in closing:
            with suppress(PyverbsError):  # a removed device refuses to free its objects, which no longer matter
                each.close()
        if self._arena is not None:
            with suppress(CudaError):
                self._arena.gpu.free(self._arena)
