"""A node's part in multicasts: it carries whole plans out by itself.

Every node sends and receives its own sends in the plan's order; nobody asks the controller. See sending and receiving.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from lambdascale.core import NodeId
from lambdascale.core.commands import StartMulticast, Tier
from lambdascale.inference.residency import StoreTier
from lambdascale.inference.store import BlockStore
from lambdascale.live.node.jobs import About, Jobs
from lambdascale.live.node.receiving import Receiving
from lambdascale.live.node.reports import Reports
from lambdascale.live.node.sending import BLOCK_BITS, FENCE, Sending
from lambdascale.live.node.window import Window
from lambdascale.live.wire import Ready
from lambdascale.transport import Endpoint, TokenBucket

__all__ = ["BLOCK_BITS", "Broadcasts", "Multicasts"]


class Broadcasts(Protocol):
    """Carries broadcasts out; reports their progress by ``written`` and ``broadcast_ended``, as a peer would."""

    def start(self, command: StartMulticast, tier: StoreTier, over: TokenBucket | None) -> None:
        """Take part in one: ``tier`` is where this node has the blocks it holds, ``over`` what paces them beside the link."""
        ...

    def cancel(self, number: int) -> None:
        """Give one up before its blocks move; do nothing otherwise."""
        ...


class Multicasts:
    """``freed(model)`` is called when memory that was reserved for a transfer has been given up. For the jobs' thread.

    ``window``: see Window. ``pcie`` paces, beside the link, what a source sends from its host copy.
    """

    def __init__(
        self,
        store: BlockStore,
        endpoint: Endpoint,
        reports: Reports,
        jobs: Jobs,
        *,
        window: Window,
        pcie: TokenBucket | None,
        collective: Broadcasts,
        freed: Callable[[str], None],
    ) -> None:
        self._node, self._pcie = reports.node, pcie
        self._store, self._reports, self._jobs = store, reports, jobs
        self._collective = collective
        self._joining: set[int] = set()  # broadcasts whose blocks are being copied to where they are sent from
        self.sending = Sending(store, endpoint, reports, jobs, window=window)
        self.receiving = Receiving(store, endpoint, reports, jobs, window=window, usable=self.sending.pump, freed=freed)

    def start(self, command: StartMulticast) -> None:
        """Take part in a multicast. CapacityError without room for its blocks."""
        if command.multicast == "collective":
            self._prepare_broadcast(command)
            return
        everything = [send for sends in command.plan.rounds for send in sends]
        receives = [send for send in everything if send.dst == self._node]
        if receives:
            self.receiving.start(command, receives)
        sends = deque(send for send in everything if send.src == self._node)
        if sends:
            self.sending.start(command, sends, self._source_tier(command), self._over(command))

    def cancel(self, number: int) -> None:
        """Stop a multicast."""
        self._joining.discard(number)
        self.sending.cancel(number)
        self.receiving.cancel(number)
        self._collective.cancel(number)

    def lost(self, peer: NodeId) -> None:
        """Expect nothing of a lost node any more; the controller will say what follows."""
        self.receiving.lost(peer)
        self.sending.lost(peer)

    def ready(self, peer: NodeId, message: Ready) -> None:
        """Note where a receiver wants a block."""
        self.sending.ready(peer, message)

    def written(self, peer: NodeId, immediate: int, xxh3_64: int | None) -> None:
        """Note that a peer's write, or its fence, is complete; ``xxh3_64``: hash of its bytes, if the transport has it."""
        number, block = number_of(immediate), immediate & FENCE
        if block == FENCE:
            self.receiving.fenced(peer, number)
        else:
            self.receiving.written(peer, number, block, xxh3_64)

    def _tier(self, command: StartMulticast) -> Tier:
        """Return where this node has the blocks that it sends, as the control plane knows it."""
        tiers: dict[NodeId, Tier] = dict(zip(command.plan.sources, command.source_tiers, strict=True))
        # A destination passes on what it has received: blocks stay where they land at least until the multicast ends.
        return tiers.get(self._node, "gpu")

    def _source_tier(self, command: StartMulticast) -> StoreTier:
        return "host" if self._tier(command) == "host" or self._store.landing_tier == "host" else "gpu"

    def _over(self, command: StartMulticast) -> TokenBucket | None:
        """Return what paces this node's sends beside its link: PCIe, from a host copy, as in the simulator."""
        return self._pcie if self._tier(command) == "host" else None

    # -- broadcasts --------------------------------------------------------------------------------------------------

    def _prepare_broadcast(self, command: StartMulticast) -> None:
        """Copy a source's blocks from a GPU to the host where broadcasts go through host memory; then join."""
        number = command.transfer_id
        if self._node not in command.plan.sources or self._store.landing_tier == "gpu":
            self._join_broadcast(command)
            return
        about = About("StartMulticast", number, command.model)

        def prepared(error: Exception | None) -> None:
            if error is not None:
                self._reports.failed(about, error)
            elif number in self._joining:
                self._join_broadcast(command)
            self._joining.discard(number)

        self._joining.add(number)
        self._jobs.work(about, partial(self._store.mirror, command.model), prepared)

    def _join_broadcast(self, command: StartMulticast) -> None:
        tier = self._source_tier(command)
        if self._node not in command.plan.sources:
            self.receiving.join(command, sorted({send.block for sends in command.plan.rounds for send in sends}))
        self._collective.start(command, tier, self._over(command))


def number_of(immediate: int) -> int:
    """Return the transfer that a write belongs to."""
    return immediate >> BLOCK_BITS
