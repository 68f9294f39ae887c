"""What a node does with blocks: multicasts and loads, on one thread to which all their state belongs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from lambdascale.core import NodeId
from lambdascale.core.commands import EvictBlocks, LoadBlocks, StartMulticast
from lambdascale.core.events import AnyEvent
from lambdascale.inference.residency import StoreTier
from lambdascale.inference.store import BlockStore
from lambdascale.live.node.loads import Links, Loads
from lambdascale.live.node.multicasts import Multicasts
from lambdascale.live.node.reports import Reports
from lambdascale.live.wire import Ready
from lambdascale.transport import Endpoint


class Mover:
    """``report`` takes events for the controller; ``window`` and ``collective``: see Multicasts; ``preloaded``: see Loads."""

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
        self._reports = Reports(node, report)
        self._loads = Loads(store, self._reports, self._do, links=links, preloaded=preloaded)
        self._multicasts = Multicasts(
            store, endpoint, self._reports, self._do, window=window, collective=collective, freed=self._loads.retry
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mover")

    def close(self) -> None:
        """Cancel what is under way; no load touches the node's memory afterwards, which may be the endpoint's."""
        self._loads.close(lambda: self._thread.shutdown(wait=True, cancel_futures=True))

    def _do(self, job: Callable[[], None]) -> None:
        try:
            self._thread.submit(self._guarded, job)
        except RuntimeError:
            return  # closed: nobody waits for this any more

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:  # a fault of ours: the controller must not wait for ever
            self._reports.failed("Mover", f"node {self._reports.node}: {type(error).__name__}: {error}")
            raise

    def multicast(self, command: StartMulticast) -> None:
        """Take part in a multicast."""
        self._do(lambda: self._multicasts.start(command))

    def load(self, command: LoadBlocks) -> None:
        """Load blocks from this node's own storage."""
        self._do(lambda: self._loads.load(command))

    def cancel(self, transfer_id: int) -> None:
        """Stop a multicast or load."""
        self._do(lambda: self._cancel(transfer_id))

    def _cancel(self, transfer_id: int) -> None:
        self._loads.cancel(transfer_id)
        self._multicasts.cancel(transfer_id)

    def place_copy(self, model: str, done: Callable[[], None]) -> None:
        """Have a host copy."""
        self._do(lambda: self._loads.place_copy(model, done))

    def release(self, model: str, keep_host: bool, after: Future[None]) -> None:
        """Free device memory once ``after`` (what used it has stopped)."""
        self._do(lambda: self._loads.release(model, keep_host, after))

    def evict(self, command: EvictBlocks) -> None:
        """Drop a copy."""
        tier: StoreTier = "gpu" if command.tier == "gpu" else "host"
        self._do(lambda: self._loads.evict(command.model, tier))

    def ready(self, peer: NodeId, message: Ready) -> None:
        """A receiver says where it wants its blocks."""
        self._do(lambda: self._multicasts.note_ready(peer, message))

    def written(self, peer: NodeId, immediate: int, xxh3_64: int | None = None) -> None:
        """A peer's write is complete; the hash of its bytes, where the transport has it already."""
        self._do(lambda: self._multicasts.written(peer, immediate, xxh3_64))

    def broadcast_ended(self, number: int, error: str) -> None:
        """A broadcast is over; ``error`` says why before its time."""
        self._do(lambda: self._multicasts.broadcast_ended(number, error))

    def lost(self, peer: NodeId) -> None:
        """A peer is gone; the controller will say what follows."""
        self._do(lambda: self._multicasts.lost(peer))
