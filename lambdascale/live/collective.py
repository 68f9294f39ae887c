"""Broadcast by torch.distributed, for the NCCL baseline: a communicator over all members first, then block after block.

The communicator is really built, at every scale-out anew, and really paid for; a member that dies breaks it for all. Over gloo,
in host memory. While it broadcasts, a source does not compute (reference, section 2.2).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from lambdascale.core import NodeId
from lambdascale.core.commands import StartMulticast
from lambdascale.inference.store import BlockStore, StoreTier
from lambdascale.live.wire import Peer, Rendezvous
from lambdascale.transport import TokenBucket

_TIMEOUT_S = 20.0
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

    def __init__(self, node: NodeId, host: str, store: BlockStore, link: TokenBucket | None, outlet: Outlet) -> None:
        self._node = node
        self._host = host
        self._store = store
        self._link = link
        self._outlet = outlet
        self._lock = threading.Lock()
        self._meetings: dict[int, queue.SimpleQueue[str]] = {}

    def start(self, command: StartMulticast, tier: StoreTier) -> None:
        """Take part; ``tier`` is where this node has the blocks it holds."""
        threading.Thread(target=self._run, args=(command, tier), name="collective", daemon=True).start()

    def rendezvous(self, message: Rendezvous) -> None:
        """Where the members of a broadcast meet."""
        self._meeting(message.transfer_id).put(message.address)

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
        group = self._communicator(command)
        is_source = self._node in command.plan.sources
        if is_source:
            self._outlet.occupy(True)
        try:
            for block, root in roots(command):
                with ExitStack() as stack:
                    self._one(command, block, root, group, self._tensor(command, block, tier, stack))
                if self._node != root:
                    self._outlet.written(command.transfer_id, block)
        finally:
            if is_source:
                self._outlet.occupy(False)

    def _communicator(self, command: StartMulticast) -> Any:
        members, timeout = command.plan.members, timedelta(seconds=_TIMEOUT_S)
        rank, size = members.index(self._node), len(members)
        tcp_store: Any = distributed.TCPStore  # type: ignore[attr-defined]
        if rank == 0:
            store = tcp_store(self._host, 0, size, True, timeout, wait_for_workers=False)
            for other in members[1:]:
                self._outlet.send(other, Rendezvous(command.transfer_id, f"{self._host}:{store.port}"))
        else:
            host, _, port = self._meeting(command.transfer_id).get(timeout=_TIMEOUT_S).rpartition(":")
            store = tcp_store(host, int(port), size, False, timeout)
        return distributed.ProcessGroupGloo(store, rank, size, timeout)

    def _tensor(self, command: StartMulticast, block: int, tier: StoreTier, stack: ExitStack) -> torch.Tensor:
        """The memory of a block: what is there, or where it is to land."""
        if self._store.holds(command.model, block, tier):
            (held,) = stack.enter_context(self._store.using(command.model, [block], tier))
            return held
        return self._store.landing(command.model, block)

    def _one(self, command: StartMulticast, block: int, root: NodeId, group: Any, data: torch.Tensor) -> None:
        options = distributed.BroadcastOptions()
        options.rootRank = command.plan.members.index(root)
        step = data.numel() if self._link is None else max(1 << 16, int(self._link.bytes_per_s * _PACED_S))
        for begin in range(0, data.numel(), step):
            piece = data[begin : begin + step]
            if self._link is not None and self._node == root:
                self._link.take(piece.numel())
            group.broadcast([piece], options).wait()


def roots(command: StartMulticast) -> Iterator[tuple[int, NodeId]]:
    """Every block of a plan and who has it first, in the plan's order."""
    seen: set[int] = set()
    for transfers in command.plan.rounds:
        for transfer in transfers:
            if transfer.block not in seen:
                seen.add(transfer.block)
                yield transfer.block, transfer.src
