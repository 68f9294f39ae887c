"""A node's block movement: multicasts and loads. All their state belongs to one thread, which never waits."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor

from lambdascale.core import NodeId
from lambdascale.core.commands import EvictBlocks, LoadBlocks, ReleaseNode, StartMulticast
from lambdascale.core.events import BlockArrived, CommandFailed
from lambdascale.inference.residency import StoreTier
from lambdascale.inference.store import BlockStore
from lambdascale.live.node.jobs import About, Job, Jobs, start_timer
from lambdascale.live.node.loads import Links, Loads
from lambdascale.live.node.multicasts import Broadcasts, Multicasts, number_of
from lambdascale.live.node.order import Order
from lambdascale.live.node.reports import Reports
from lambdascale.live.node.window import Window
from lambdascale.live.wire import Ready
from lambdascale.transport import Endpoint


class Mover:
    """Carries out what concerns blocks; may be told from any thread.

    ``report`` takes events for the controller, ``fault`` the reason why this node cannot be relied on any more. ``window`` and
    ``collective``: see Multicasts; ``preloaded``: see Loads. ``thread``, ``worker`` and ``timer``: see Jobs.
    """

    def __init__(
        self,
        node: NodeId,
        store: BlockStore,
        endpoint: Endpoint,
        report: Callable[[BlockArrived | CommandFailed], None],
        fault: Callable[[str], None],
        *,
        window: Window,
        links: Links,
        collective: Broadcasts,
        preloaded: bool = False,
        thread: Executor | None = None,
        worker: Executor | None = None,
        timer: Callable[[float, Job], None] = start_timer,
    ) -> None:
        reports = Reports(node, report, fault)
        self._jobs = Jobs(
            ThreadPoolExecutor(1, "mover", store.use_device) if thread is None else thread,
            ThreadPoolExecutor(1, "lander", store.use_device) if worker is None else worker,
            reports.failures,
            timer,
        )
        self._order = Order(reports.failed)
        self._loads = Loads(store, reports, self._jobs, self._order, links=links, preloaded=preloaded)
        self._multicasts = Multicasts(
            store,
            endpoint,
            reports,
            self._jobs,
            window=window,
            pcie=links.pcie,
            collective=collective,
            freed=self._order.retry,
        )

    def close(self) -> None:
        """Cancel what is under way; nothing touches the node's memory afterwards, which may be the endpoint's."""
        self._jobs.close()
        self._loads.close()

    # -- commands ----------------------------------------------------------------------------------------------------

    def multicast(self, command: StartMulticast) -> None:
        """Take part in a multicast."""
        about = About("StartMulticast", command.transfer_id, command.model)
        self._jobs.do(about, lambda: self._order.submit(command.model, about, lambda: self._multicasts.start(command)))

    def load(self, command: LoadBlocks) -> None:
        """Load blocks from this node's own storage."""
        about, loads = About("LoadBlocks", command.transfer_id, command.model), self._loads
        self._jobs.do(
            about,
            lambda: self._order.submit(command.model, about, lambda: loads.load(command), lambda: loads.may_load(command)),
        )

    def cancel(self, transfer_id: int) -> None:
        """Stop a multicast or load."""

        def cancel() -> None:
            self._order.cancel(transfer_id)
            self._loads.cancel(transfer_id)
            self._multicasts.cancel(transfer_id)

        # The controller knows a cancelled transfer no more: a failure here is the node's.
        self._jobs.do(About(f"the cancellation of transfer {transfer_id}"), cancel)

    def place_copy(self, model: str, done: Callable[[], None]) -> None:
        """Make a host copy, then call ``done``."""
        about = About("PlaceCopy", model=model)
        self._jobs.do(about, lambda: self._order.submit(model, about, lambda: self._loads.place_copy(model, done)))

    def release(self, command: ReleaseNode, after: Future[None]) -> None:
        """Free the model's memory once ``after`` is done: what used it has stopped."""
        model, about = command.model, About("ReleaseNode", model=command.model)
        receiving = self._multicasts.receiving

        def stop() -> None:
            receiving.cancel_all(model)
            self._loads.cancel_all(model)

        def submit() -> None:
            self._order.submit(model, about, stop)
            self._order.submit(
                model,
                about,
                lambda: self._loads.release(model, command.keep_host),
                lambda: after.done() and not receiving.is_receiving(model),
            )

        self._jobs.do(about, submit)
        after.add_done_callback(lambda _: self._jobs.do(about, lambda: self._order.retry(model)))

    def evict(self, command: EvictBlocks) -> None:
        """Drop a copy."""
        tier: StoreTier = "gpu" if command.tier == "gpu" else "host"
        model, about = command.model, About("EvictBlocks", model=command.model)
        self._jobs.do(about, lambda: self._order.submit(model, about, lambda: self._loads.evict(model, tier)))

    # -- what other nodes and broadcasts report ----------------------------------------------------------------------

    def ready(self, peer: NodeId, message: Ready) -> None:
        """Note where a receiver wants its block."""
        self._jobs.do(_of_multicast(message.transfer_id), lambda: self._multicasts.ready(peer, message))

    def written(self, peer: NodeId, immediate: int, xxh3_64: int | None = None) -> None:
        """Note that a peer's write is complete; ``xxh3_64``: hash of its bytes, if the transport has computed it."""
        about = _of_multicast(number_of(immediate))
        self._jobs.do(about, lambda: self._multicasts.written(peer, immediate, xxh3_64))

    def broadcast_ended(self, number: int, error: str) -> None:
        """Note the end of a broadcast; ``error`` says why before its time, "" if it was complete."""
        self._jobs.do(_of_multicast(number), lambda: self._multicasts.receiving.broadcast_ended(number, error))

    def lost(self, peer: NodeId) -> None:
        """Expect nothing of a lost peer any more; the controller will say what follows."""
        self._jobs.do(About(f"the loss of node {peer}"), lambda: self._multicasts.lost(peer))


def _of_multicast(number: int) -> About:
    return About("StartMulticast", number)
