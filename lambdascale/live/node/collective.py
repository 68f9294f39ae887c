"""Broadcast by torch.distributed, for the NCCL baseline: a communicator over all members first, then block after block.

The communicator is really built, at every scale-out anew, and really paid for; a member that dies breaks it for all. NCCL brings
blocks straight to the device arena, gloo to where blocks land. While it broadcasts, a source does not compute (reference,
section 2.2).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from lambdascale.core import NodeId
from lambdascale.core.commands import StartMulticast
from lambdascale.inference.residency import StoreTier
from lambdascale.inference.store import BlockStore
from lambdascale.live.node.communicators import TIMEOUT_S, Communicator, Gloo, Kind, Nccl
from lambdascale.live.wire import Peer, Rendezvous
from lambdascale.transport import TokenBucket

_PACED_S = 0.02  # a paced broadcast moves in pieces of this duration


@dataclass(frozen=True)
class Outlet:
    """Whom a broadcast tells: a block is written, it has ended (with an error or ""), the device is busy or free again."""

    written: Callable[[int, int], None]
    ended: Callable[[int, str], None]
    occupy: Callable[[bool], None]
    send: Callable[[NodeId, Peer], None]


class Collective:
    """A node's part in broadcasts. Each runs in a thread of its own."""

    def __init__(
        self, node: NodeId, host: str, store: BlockStore, link: TokenBucket | None, outlet: Outlet, kind: Kind = "gloo"
    ) -> None:
        self._node = node
        self._host = host
        self._store = store
        self._link = link
        self._outlet = outlet
        self._kind = kind
        self._lost: set[NodeId] = set()
        self._lock = threading.Lock()
        self._meetings: dict[int, queue.SimpleQueue[str]] = {}

    def start(self, command: StartMulticast, tier: StoreTier) -> None:
        """Take part; ``tier`` is where this node has the blocks it holds."""
        threading.Thread(target=self._run, args=(command, tier), name="collective", daemon=True).start()

    def rendezvous(self, message: Rendezvous) -> None:
        """Where the members of a broadcast meet."""
        self._meeting(message.transfer_id).put(message.address)

    def lost(self, peer: NodeId) -> None:
        """A node is gone: broadcasts with it as a member are over."""
        self._lost.add(peer)

    def _meeting(self, number: int) -> queue.SimpleQueue[str]:
        with self._lock:
            return self._meetings.setdefault(number, queue.SimpleQueue())

    def _run(self, command: StartMulticast, tier: StoreTier) -> None:
        error = ""
        try:
            self._broadcast(command, tier)
        except (RuntimeError, ValueError, queue.Empty) as failure:
            # gloo's errors are several lines long and name a source file.
            error = f"the broadcast broke: {str(failure).splitlines()[0] if str(failure) else 'nobody came'}"
        with self._lock:
            self._meetings.pop(command.transfer_id, None)
        self._outlet.ended(command.transfer_id, error)

    def _broadcast(self, command: StartMulticast, tier: StoreTier) -> None:
        with self._communicator(command) as group, self._occupied(command):
            for block, root in roots(command):
                with ExitStack() as stack:
                    self._one(command, block, root, group, self._tensor(command, block, tier, stack))
                if self._node != root:
                    self._outlet.written(command.transfer_id, block)

    @contextmanager
    def _occupied(self, command: StartMulticast) -> Iterator[None]:
        """Meanwhile, a source computes nothing."""
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
        rank, size = members.index(self._node), len(members)
        tcp_store: Any = distributed.TCPStore  # type: ignore[attr-defined]
        if rank == 0:
            store = tcp_store(self._host, 0, size, True, timeout, wait_for_workers=False)
            for other in members[1:]:
                self._outlet.send(other, Rendezvous(command.transfer_id, f"{self._host}:{store.port}"))
        else:
            host, _, port = self._meeting(command.transfer_id).get(timeout=TIMEOUT_S).rpartition(":")
            store = tcp_store(host, int(port), size, False, timeout)
        if self._kind == "gloo":
            return Gloo(store, rank, size)
        return Nccl(store, rank, size, self._store.device, lambda: self._who_is_gone(members))

    def _who_is_gone(self, members: Sequence[NodeId]) -> str:
        return " and ".join(f"node {node} is gone" for node in members if node in self._lost)

    def _tensor(self, command: StartMulticast, block: int, tier: StoreTier, stack: ExitStack) -> torch.Tensor:
        """The memory of a block: what is there, or where it is to land."""
        if self._store.holds(command.model, block, tier):
            (held,) = stack.enter_context(self._store.using(command.model, [block], tier))
            return held
        return self._store.landing(command.model, block)

    def _one(self, command: StartMulticast, block: int, root: NodeId, group: Communicator, data: torch.Tensor) -> None:
        rank = command.plan.members.index(root)
        step = data.numel() if self._link is None else max(1 << 16, int(self._link.bytes_per_s * _PACED_S))
        for begin in range(0, data.numel(), step):
            piece = data[begin : begin + step]
            if self._link is not None and self._node == root:
                self._link.take(piece.numel())
            group.broadcast(piece, rank)


def roots(command: StartMulticast) -> Iterator[tuple[int, NodeId]]:
    """Every block of a plan and who has it first, in the plan's order."""
    seen: set[int] = set()
    for transfers in command.plan.rounds:
        for transfer in transfers:
            if transfer.block not in seen:
                seen.add(transfer.block)
                yield transfer.block, transfer.src
