"""A node's own storage: loads from disk and host memory, host copies, and the release of what leaves its memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from lambdascale.core import UserError
from lambdascale.core.checks import require
from lambdascale.core.commands import LoadBlocks
from lambdascale.inference.loading import Load
from lambdascale.inference.residency import StoreTier
from lambdascale.inference.store import BlockInUseError, BlockStore
from lambdascale.live.node.jobs import About, Jobs
from lambdascale.live.node.order import Order
from lambdascale.live.node.reports import Reports
from lambdascale.transport import TokenBucket
from lambdascale.transport.pacing import take

_RETRY_S = 0.01
_RETRIES = 3000


@dataclass(frozen=True, kw_only=True)
class Links:
    """Pacing of storage and of PCIe, which sends from host copies take too; None: not paced.

    ``remote`` None: the cluster has no remote store.
    """

    ssd: TokenBucket | None = None
    pcie: TokenBucket | None = None
    remote: TokenBucket | None = None


class Loads:
    """Loads, host copies, releases and evictions, each begun when ``order`` says so. For the jobs' thread.

    ``preloaded``: every model stays on the device from the start (ideal scaling's "instant" loads).
    """

    def __init__(self, store: BlockStore, reports: Reports, jobs: Jobs, order: Order, *, links: Links, preloaded: bool) -> None:
        self._store, self._reports, self._jobs, self._order = store, reports, jobs, order
        self._links = links
        self._preloaded = preloaded
        self._loads: dict[int, Load] = {}  # by transfer; cancelled ones excepted
        self._running: list[
            Load
        ] = []  # once for each job that waits for the end: threads may touch the store's memory until then

    def close(self) -> None:
        """Cancel loads and wait for their ends: none touches the node's memory afterwards. After the jobs' threads have ended."""
        for load in self._running:
            load.cancel()
        for load in self._running:
            load.join()

    def cancel(self, number: int) -> None:
        """Stop a load after its block under way; later commands of the model wait for that."""
        load = self._loads.pop(number, None)
        if load is not None:
            load.cancel()
            self._order.hold(load.model)
            about = About(f"the cancellation of transfer {number}", model=load.model)
            self._when_ended(load, about, lambda _: self._order.let_go(load.model))

    def cancel_all(self, model: str) -> None:
        """Stop all loads of a model that leaves this node."""
        for number in [number for number, load in self._loads.items() if load.model == model]:
            self.cancel(number)

    # -- loads -------------------------------------------------------------------------------------------------------

    def may_load(self, command: LoadBlocks) -> bool:
        """Return False while senders of a cancelled multicast may still write to blocks of the load."""
        return not any(self._store.awaited(command.model, block) for block in command.blocks)

    def load(self, command: LoadBlocks) -> None:
        """Load blocks from this node's own storage. UserError or CapacityError if that is not possible."""
        from_host = command.tier == "host"
        require(
            command.tier != "remote" or self._links.remote is not None,
            "this cluster has no remote store: cluster.remote_bytes_per_s is 0",
        )
        if from_host and not all(self._is_near(command.model, block) for block in command.blocks):
            raise UserError(f"node {self._reports.node} has no host copy of {command.model}")
        if command.loader == "sequential" and not from_host:
            self._load_twice(command)
        else:
            self._load_up(command, [*self._storage(command), *_given(self._links.pcie)])

    def _is_near(self, model: str, block: int) -> bool:
        return self._store.holds(model, block, "host") or self._store.holds(model, block, "gpu")

    def _storage(self, command: LoadBlocks) -> list[TokenBucket]:
        """Return the pacing of a command's blocks on their way into host memory; none if they are in it already."""
        return _given({"ssd": self._links.ssd, "remote": self._links.remote}.get(command.tier))

    def _load_up(self, command: LoadBlocks, ways: Sequence[TokenBucket]) -> Load:
        """Load to the device over ``ways`` at once, and report each block. The tier "instant" takes none of them."""
        about = _about(command)

        def arrived(model: str, block: int) -> None:
            self._jobs.do(about, lambda: self._reports.arrived(command.transfer_id, model, block))

        load = self._paced(command, () if command.tier == "instant" else ways, "gpu", arrived)
        self._watch(command, load)
        return load

    def _paced(
        self, command: LoadBlocks, ways: Sequence[TokenBucket], to: StoreTier, then: Callable[[str, int], None] = lambda *_: None
    ) -> Load:
        """Load blocks: ``then(model, block)`` follows each once it has landed and all ``ways`` have had time for it."""
        store, model = self._store, command.model
        sizes = store.model(model).block_bytes

        def arrived(model: str, block: int) -> None:
            take(ways, sizes[block])
            then(model, block)

        with ExitStack() as ended:
            for way in ways:
                way.queued()  # it is busy from now on, while blocks are read as well as between them
                ended.callback(way.done)
            load = store.load(model, command.blocks, to=to, keep_host=False, on_block=arrived)
            done = ended.pop_all()
        load.when_ended(lambda _: done.close())
        return load

    def _load_twice(self, command: LoadBlocks) -> None:
        """Load everything into host memory before the first block goes to the device; then the host copy is dropped."""
        dropping = About("LoadBlocks", model=command.model)

        def second(error: Exception | None) -> None:
            up = None
            try:
                if error is None and not first.cancelled:
                    up = self._load_up(command, _given(self._links.pcie))
            finally:
                if up is None:
                    self._evict(dropping, "host")
                else:
                    self._when_ended(up, dropping, lambda _: self._evict(dropping, "host"))

        first = self._paced(command, self._storage(command), "host")
        self._watch(command, first, second)

    def _watch(self, command: LoadBlocks, load: Load, then: Callable[[Exception | None], None] | None = None) -> None:
        """Report a load's failure and forget it when it has ended, then do ``then``."""
        about, number = _about(command), command.transfer_id
        self._loads[number] = load

        def ended(error: Exception | None) -> None:
            if self._loads.get(number) is load:
                del self._loads[number]
            if error is not None:
                self._reports.failed(about, error)
            if then is not None:
                then(error)

        self._when_ended(load, about, ended)

    def _when_ended(self, load: Load, about: About, call: Callable[[Exception | None], None]) -> None:
        """Call ``call(error)`` on the jobs' thread once a load has ended."""
        self._running.append(load)

        def ended(error: Exception | None) -> None:
            self._running.remove(load)
            call(error)

        load.when_ended(lambda error: self._jobs.do(about, lambda: ended(error)))

    # -- copies and releases -----------------------------------------------------------------------------------------

    def place_copy(self, model: str, done: Callable[[], None]) -> None:
        """Make a host copy, then call ``done``; later commands of the model wait. CapacityError without room."""
        about = About("PlaceCopy", model=model)
        load = self._store.load(model, range(len(self._store.model(model).blocks)), to="host")

        def ended(error: Exception | None) -> None:
            if error is None:
                done()
            else:
                self._reports.failed(about, error)
            self._order.let_go(model)

        self._order.hold(model)
        self._when_ended(load, about, ended)

    def release(self, model: str, keep_host: bool) -> None:
        """Free a model's memory, once its instances have stopped; later commands of the model wait.

        ``keep_host``: keep a copy in host memory. If it does not fit, that is reported, and the device is freed all the same.
        """
        about = About("ReleaseNode", model=model)
        self._reports.forget(model)
        if self._preloaded:
            return
        if keep_host:
            self._order.hold(model)
            self._jobs.work(about, partial(self._store.mirror, model), partial(self._mirrored, about))
            return
        self._evict(about, "gpu")
        if self._store.landing_tier == "host":
            self._evict(about, "host")

    def _mirrored(self, about: About, error: Exception | None) -> None:
        if error is not None:
            self._reports.failed(about, error)
        self._evict(about, "gpu")
        self._order.let_go(about.model)

    def evict(self, model: str, tier: StoreTier) -> None:
        """Drop a copy; later commands of the model wait."""
        self._evict(About("EvictBlocks", model=model), tier)

    def _evict(self, about: About, tier: StoreTier) -> None:
        self._order.hold(about.model)
        self._try_to_evict(about, tier, _RETRIES)

    def _try_to_evict(self, about: About, tier: StoreTier, tries: int) -> None:
        """Drop a copy, or try again a little later: the last read of it may be ending just now."""
        again = False
        try:
            self._store.evict(about.model, tier)
        except BlockInUseError as error:
            again = tries > 0
            if not again:
                self._reports.failed(about, f"node {self._reports.node}: {error}")
        finally:
            if not again:
                self._order.let_go(about.model)
        if again:
            self._jobs.later(_RETRY_S, about, lambda: self._try_to_evict(about, tier, tries - 1))


def _given(way: TokenBucket | None) -> list[TokenBucket]:
    return [] if way is None else [way]


def _about(command: LoadBlocks) -> About:
    return About("LoadBlocks", command.transfer_id, command.model)
