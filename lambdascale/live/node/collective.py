"""Broadcast by torch.distributed, for the NCCL baseline: a communicator over all members first, then block after block.

The communicator is built anew for every scale-out, and its set-up is part of the measured time; a member that dies breaks it for
all. NCCL writes blocks straight to the device arena, gloo to where blocks land. A source does not compute while it broadcasts
(reference, section 2.2).
"""

from __future__ import annotations

import queue
import socket
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from lambdascale.core import ClusterSpec, NodeId
from lambdascale.core.commands import StartMulticast
from lambdascale.core.events import SetUpDone
from lambdascale.inference.residency import StoreTier
from lambdascale.inference.store import BlockStore
from lambdascale.live.communicator_choice import Kind
from lambdascale.live.node.communicators import TIMEOUT_S, Communicator, Gloo, Nccl
from lambdascale.live.wire import Peer, Rendezvous
from lambdascale.transport import TokenBucket
from lambdascale.transport.pacing import take

_PACED_S = 0.02  # a paced broadcast moves in pieces of this duration
_MEETINGS = 64
_CANCELLED = "it was cancelled during its set-up"


@dataclass(frozen=True)
class Outlet:
    """Callbacks through which a broadcast reports progress, from its own thread.

    ``written(transfer, block)``; ``ended(transfer, error)`` with "" for success; ``occupy(busy)``: the device is taken or free
    again; ``send`` a message to another node; ``report`` an event to the controller.
    """

    written: Callable[[int, int], None]
    ended: Callable[[int, str], None]
    occupy: Callable[[bool], None]
    send: Callable[[NodeId, Peer], object]
    report: Callable[[SetUpDone], None]


@dataclass
class _Meeting:
    """A broadcast that is expected or under way: its rendezvous, and the members that were lost meanwhile.

    ``begun``: blocks are moving; ``cancelled`` before that.
    """

    addresses: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    lost: set[NodeId] = field(default_factory=set)
    begun: bool = False
    cancelled: bool = False


def paced_pieces(cluster: ClusterSpec) -> int:
    """Return the bytes that a paced broadcast moves at once: what the cluster's slowest link takes 20 ms for."""
    slowest = min(kind.nic_bytes_per_s for kind in cluster.kinds) * cluster.rdma_efficiency
    return max(1 << 16, int(slowest * _PACED_S))


class Collective:
    """A node's part in broadcasts. Each runs in a thread of its own.

    ``piece_bytes``: a block moves in pieces of so many bytes (None: as a whole); the same for all members, whatever their links.
    """

    def __init__(
        self,
        node: NodeId,
        host: str,
        store: BlockStore,
        link: TokenBucket | None,
        outlet: Outlet,
        kind: Kind = "gloo",
        piece_bytes: int | None = None,
    ) -> None:
        self._node = node
        self._host = host
        self._store = store
        self._link = link
        self._outlet = outlet
        self._kind = kind
        self._piece_bytes = piece_bytes
        # Guards the table, which other threads look up and change. A rendezvous may come before its broadcast starts here, or
        # after it has failed: of those without a broadcast, the oldest are dropped.
        self._lock = threading.Lock()
        self._meetings: OrderedDict[int, _Meeting] = OrderedDict()

    def start(self, command: StartMulticast, tier: StoreTier, over: TokenBucket | None = None) -> None:
        """Take part; ``tier`` is where this node has the blocks it holds, ``over`` what paces them beside the link."""
        self._meeting(command.transfer_id)  # what is begun here can be cancelled
        threading.Thread(target=self._run, args=(command, tier, over), name="collective", daemon=True).start()

    def cancel(self, number: int) -> None:
        """Give a broadcast up whose set-up is under way: it writes nothing any more, however long that takes.

        One whose blocks are moving goes on to its end, as all its members do.
        """
        with self._lock:
            meeting = self._meetings.get(number)
            if meeting is None or meeting.begun:
                return
            meeting.cancelled = True
        meeting.addresses.put("")  # a member that waits for the rendezvous waits no longer
        self._outlet.ended(number, _CANCELLED)

    def rendezvous(self, message: Rendezvous) -> None:
        """Note where the members of a broadcast meet."""
        self._meeting(message.transfer_id).addresses.put(message.address)

    def lost(self, peer: NodeId) -> None:
        """Break off the broadcasts under way that a lost node is a member of."""
        with self._lock:
            for meeting in self._meetings.values():
                meeting.lost.add(peer)

    def _meeting(self, number: int) -> _Meeting:
        with self._lock:
            meeting = self._meetings.setdefault(number, _Meeting())
            self._meetings.move_to_end(number)
            while len(self._meetings) > _MEETINGS:
                self._meetings.popitem(last=False)
            return meeting

    def _run(self, command: StartMulticast, tier: StoreTier, over: TokenBucket | None) -> None:
        error = ""
        try:
            self._store.use_device()
            self._broadcast(command, tier, over)
        except Exception as failure:  # any exception: the controller must not wait for this broadcast
            if not isinstance(failure, RuntimeError | ValueError | queue.Empty):
                traceback.print_exc()
                failure = RuntimeError(f"{type(failure).__name__}: {failure}")
            # gloo's errors are several lines long and name a source file.
            error = f"the broadcast broke: {str(failure).splitlines()[0] if str(failure) else 'no rendezvous came'}"
        finally:
            with self._lock:
                self._meetings.pop(command.transfer_id, None)
            self._outlet.ended(command.transfer_id, error)

    def _broadcast(self, command: StartMulticast, tier: StoreTier, over: TokenBucket | None) -> None:
        ways = [way for way in (self._link, over) if way is not None]
        with self._communicator(command) as group, self._begun(command.transfer_id), self._occupied(command):
            if self._node in command.plan.destinations:
                self._outlet.report(SetUpDone(0.0, command.transfer_id, self._node))
            for block, root in roots(command):
                with ExitStack() as stack:
                    data = self._tensor(command, block, tier, stack)
                    self._one(command.plan.members.index(root), group, data, ways if self._node == root else [])
                if self._node != root:
                    self._outlet.written(command.transfer_id, block)

    @contextmanager
    def _begun(self, number: int) -> Iterator[None]:
        """Let blocks move from now on; RuntimeError if the broadcast was cancelled before."""
        meeting = self._meeting(number)
        with self._lock:
            if meeting.cancelled:
                raise RuntimeError(_CANCELLED)
            meeting.begun = True
        yield

    @contextmanager
    def _occupied(self, command: StartMulticast) -> Iterator[None]:
        """Keep a source from computing meanwhile."""
        if self._node not in command.plan.sources:
            yield
            return
        self._outlet.occupy(True)
        try:
            yield
        finally:
            self._outlet.occupy(False)

    def _communicator(self, command: StartMulticast) -> Communicator:
        members, timeout = command.plan.members, timedelta(seconds=TIMEOUT_S)
        meeting = self._meeting(command.transfer_id)
        rank, size = members.index(self._node), len(members)
        tcp_store: Any = distributed.TCPStore  # type: ignore[attr-defined]  # missing from the stubs
        if rank == 0:
            # By itself, the store listens on all interfaces.
            with socket.create_server((self._host, 0)) as listening:
                port = listening.getsockname()[1]
                given = {"wait_for_workers": False, "master_listen_fd": listening.detach()}
            store = tcp_store(self._host, port, size, True, timeout, **given)
            for other in members[1:]:
                self._outlet.send(other, Rendezvous(command.transfer_id, f"{self._host}:{store.port}"))
        else:
            address = meeting.addresses.get(timeout=TIMEOUT_S)
            if not address:
                raise RuntimeError(_CANCELLED)
            host, _, port = address.rpartition(":")
            store = tcp_store(host, int(port), size, False, timeout)
        if self._kind == "gloo":
            return Gloo(store, rank, size, self._host)
        return Nccl(store, rank, size, self._store.device, lambda: self._losses(meeting, members))

    def _losses(self, meeting: _Meeting, members: Sequence[NodeId]) -> str:
        with self._lock:
            return " and ".join(f"node {node} is lost" for node in members if node in meeting.lost)

    def _tensor(self, command: StartMulticast, block: int, tier: StoreTier, stack: ExitStack) -> torch.Tensor:
        """Return the memory of a block: where this node has it, where it is to land, or scratch memory if it is not needed."""
        model = command.model
        if self._store.holds(model, block, tier):
            (held,) = stack.enter_context(self._store.using(model, [block], tier))
            return held
        if self._store.awaited(model, block):
            return self._store.landing(model, block)
        if self._node in command.plan.sources:
            raise ValueError(f"node {self._node} does not hold block {block} of {model}, which it is to broadcast")
        # It is on the device already, and not where blocks land: every member takes part, so the bytes come all the same.
        device = self._store.device if tier == "gpu" else torch.device("cpu")
        return torch.empty(self._store.model(model).block_bytes[block], dtype=torch.uint8, device=device)

    def _one(self, root: int, group: Communicator, data: torch.Tensor, ways: Sequence[TokenBucket]) -> None:
        """Broadcast a block from a rank, over what paces this node's sends if it is the root."""
        step = self._piece_bytes or data.numel()
        with ExitStack() as ended:
            for way in ways:
                ended.enter_context(way.busy())
            for begin in range(0, data.numel(), step):
                piece = data[begin : begin + step]
                take(ways, piece.numel())
                group.broadcast(piece, root)


def roots(command: StartMulticast) -> Iterator[tuple[int, NodeId]]:
    """Yield every block of a plan and its first holder, in the plan's order."""
    seen: set[int] = set()
    for sends in command.plan.rounds:
        for send in sends:
            if send.block not in seen:
                seen.add(send.block)
                yield send.block, send.src
