"""A node's loads from its own storage, and what leaves its memory again."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Timer

from lambdascale.core.commands import LoadBlocks
from lambdascale.inference.loading import Load
from lambdascale.inference.residency import StoreTier
from lambdascale.inference.store import BlockInUseError, BlockStore
from lambdascale.live.node.reports import Reports
from lambdascale.transport import TokenBucket

_RETRY_S = 0.01
_RETRIES = 500


@dataclass(frozen=True, kw_only=True)
class Links:
    """How slow storage is made to look, None: as fast as it is."""

    ssd: TokenBucket | None = None
    pcie: TokenBucket | None = None


class Loads:
    """One thread's: ``do`` brings a call there.

    ``preloaded``: every model stays on the device from the start (ideal scaling's "instant" loads).
    """

    def __init__(
        self, store: BlockStore, reports: Reports, do: Callable[[Callable[[], None]], None], *, links: Links, preloaded: bool
    ) -> None:
        self._store = store
        self._reports = reports
        self._do = do
        self._links = links
        self._preloaded = preloaded
        self._loads: dict[int, Load] = {}
        self._delayed: list[LoadBlocks] = []
        self._placing: set[str] = set()

    def close(self, end_thread: Callable[[], None]) -> None:
        """Cancel what is under way, end the thread, and wait: no load touches the node's memory afterwards."""
        loads = list(self._loads.values())
        for load in loads:
            load.cancel()
        end_thread()
        for load in loads:
            load.join()

    def cancel(self, number: int) -> None:
        """Stop a load."""
        self._delayed = [command for command in self._delayed if command.transfer_id != number]
        if number in self._loads:
            self._loads.pop(number).cancel()

    def retry(self) -> None:
        """Try again the loads that had to wait."""
        delayed, self._delayed = self._delayed, []
        for command in delayed:
            self.load(command)

    def load(self, command: LoadBlocks) -> None:
        """Load blocks from this node's own storage."""
        model, number = command.model, command.transfer_id
        # Until the senders of a cancelled multicast are known to be through, or a host copy that a GPU's load needs is there.
        if any(self._store.awaited(model, block) for block in command.blocks) or model in self._placing:
            self._delayed.append(command)
            return
        if command.tier == "remote":
            self._reports.failed("LoadBlocks", "a live cluster has no remote store", number)
            return
        from_host = command.tier == "host"
        if from_host and not all(self._store.holds(model, block, "host") for block in command.blocks):
            self._reports.failed("LoadBlocks", f"node {self._reports.node} has no host copy of {model}", number)
            return
        try:
            if command.loader == "sequential" and not from_host:
                self._load_twice(command)
            else:
                pace = None if command.tier == "instant" else self._links.pcie if from_host else self._links.ssd
                self._loads[number] = self._store.load(
                    model, command.blocks, keep_host=False, on_block=self._arrival(command, pace)
                )
        except ValueError as error:
            self._reports.failed("LoadBlocks", str(error), number)
            return
        self._watch(number, self._loads[number])

    def _load_twice(self, command: LoadBlocks) -> None:
        """Everything into host memory before the first block goes to the device."""
        model, number = command.model, command.transfer_id
        sizes = self._store.model(model).block_bytes
        coming = set(command.blocks)

        def on_host(_: str, block: int) -> None:
            if self._links.ssd is not None:
                self._links.ssd.take(sizes[block])
            coming.discard(block)
            if not coming:
                self._do(second)

        def second() -> None:
            if number in self._loads:
                up = self._store.load(model, command.blocks, keep_host=False, on_block=self._arrival(command, self._links.pcie))
                self._loads[number] = up
                self._watch(number, up)
                up.when_ended(lambda _: self._do(lambda: self.evict(model, "host")))

        self._loads[number] = self._store.load(model, command.blocks, to="host", on_block=on_host)

    def _arrival(self, command: LoadBlocks, pace: TokenBucket | None) -> Callable[[str, int], None]:
        sizes = self._store.model(command.model).block_bytes

        def arrived(model: str, block: int) -> None:
            if pace is not None:
                pace.take(sizes[block])
            self._do(lambda: self._reports.arrived(command.transfer_id, model, block))

        return arrived

    def _watch(self, number: int, load: Load) -> None:
        """Tell the controller if a load fails; forget it when it has ended."""

        def ended(error: Exception | None) -> None:
            def note() -> None:
                if self._loads.get(number) is load:
                    del self._loads[number]
                if error is not None:
                    self._reports.failed("LoadBlocks", str(error), number)

            self._do(note)

        load.when_ended(ended)

    def place_copy(self, model: str, done: Callable[[], None]) -> None:
        """Have a host copy."""
        everything = range(len(self._store.model(model).blocks))

        def ended(error: Exception | None) -> None:
            if error is not None:
                self._reports.failed("PlaceCopy", str(error))
            done()
            self._do(placed)

        def placed() -> None:
            self._placing.discard(model)
            self.retry()

        self._placing.add(model)
        self._store.load(model, everything, to="host").when_ended(ended)

    def release(self, model: str, keep_host: bool, after: Future[None]) -> None:
        """Free device memory once ``after`` (what used it has stopped)."""
        after.result()
        self._reports.forget(model)
        if self._preloaded:
            return
        try:
            if keep_host:
                self._store.demote(model)
                return
        except BlockInUseError:
            pass  # copied, and still being sent from the device: it goes when that has ended
        self.evict(model, "gpu")
        if self._store.landing_tier == "host" and not keep_host:
            self.evict(model, "host")

    def evict(self, model: str, tier: StoreTier, tries: int = _RETRIES) -> None:
        """Drop a copy. The last read of a copy may be ending just now: then again a moment later."""
        try:
            self._store.evict(model, tier)
        except BlockInUseError:
            if not tries:
                raise
            self._later(lambda: self.evict(model, tier, tries - 1))

    def _later(self, job: Callable[[], None]) -> None:
        timer = Timer(_RETRY_S, self._do, (job,))
        timer.daemon = True
        timer.start()
