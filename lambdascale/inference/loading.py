"""Loads of blocks into the tiers of a store: disk to host arena to device arena.

A load reserves its memory before anything moves, so that it cannot fail halfway for lack of room. Blocks land in the order
asked for and are usable one by one; the next one is being read while the last is finished.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lambdascale.checkpoints import PackedModel
from lambdascale.checkpoints.safetensors_file import ALIGNMENT
from lambdascale.core import UserError
from lambdascale.inference import devices
from lambdascale.inference.copies import BoundedCopies
from lambdascale.inference.reader import ChecksumError, ChunkReader, Parts
from lambdascale.inference.residency import Key, Residency, StoreTier
from lambdascale.inference.staging import Staging
from lambdascale.inference.verification import Verify, is_verified

OnBlock = Callable[[str, int], None]


class BlockError(UserError):
    """A block that cannot be loaded or is damaged: the message names block and file. The store is as it was before the block."""

    def __init__(self, model: str, block: int, file: Path, reason: str) -> None:
        super().__init__(f"block {block} of {model} ({file}): {reason}")
        self.model, self.block, self.file = model, block, file


class Load:
    """A load under way. ``blocks`` are in the order of loading; ``landed`` grows as blocks become usable."""

    def __init__(self, model: str, blocks: Sequence[int]) -> None:
        self.model = model
        self.blocks = tuple(blocks)
        self.landed: list[int] = []
        # Guards _callbacks and the setting of _ended: each callback is called once, whenever it was added.
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[Exception | None], None]] = []
        self._cancelled = threading.Event()
        self._ended = threading.Event()
        self._error: Exception | None = None

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for the end. Raises the load's error (BlockError), or TimeoutError if it takes longer."""
        if not self._ended.wait(timeout_s):
            raise TimeoutError(f"loading {self.model} takes longer than {timeout_s} s")
        if self._error is not None:
            raise self._error

    def join(self) -> None:
        """Wait for the end, successful or not."""
        self._ended.wait()

    def when_ended(self, call: Callable[[Exception | None], None]) -> None:
        """Call ``call(error)`` from the loading thread when the load ends; at once if it has ended already."""
        with self._lock:
            if not self.ended:
                self._callbacks.append(call)
                return
        call(self._error)

    def cancel(self) -> None:
        """Stop after the block under way; blocks that landed stay."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Return True if ``cancel`` was called."""
        return self._cancelled.is_set()

    @property
    def ended(self) -> bool:
        """Return True once the load has ended or failed: no further block of it arrives."""
        return self._ended.is_set()

    def end(self, error: Exception | None) -> None:
        """Mark the load as ended, with its error if it failed. For the loader only."""
        with self._lock:
            self._error = error
            self._ended.set()
        for call in self._callbacks:
            call(error)


@dataclass
class _Job:
    """A load and its memory: ``taken`` for blocks to come, ``held`` where blocks were resident already, until the load ends."""

    model: PackedModel
    load: Load
    to: StoreTier
    keep_host: bool
    taken: list[tuple[StoreTier, Key]] = field(default_factory=list)
    held: list[tuple[StoreTier, Key]] = field(default_factory=list)


@dataclass
class _Move:
    """A block under way: its chunks in order, its open file and, if it is compared once it is on the device, its digest."""

    block: int
    path: Path
    failure: str = ""
    digest: int | None = None
    chunks: list[Future[None]] = field(default_factory=list)
    files: ExitStack = field(default_factory=ExitStack)

    def abandon(self) -> None:
        """Wait until no thread touches the block's memory any more; close its file."""
        for chunk in self.chunks:
            chunk.cancel()
        wait(self.chunks)
        self.files.close()


class Loader:
    """Loads into ``tiers``, which ``lock`` guards; the threads of ``reader`` do the reading and copying.

    ``device``: of the tier "gpu". ``verify``: the blocks whose checksums are compared when they are read (see ``is_verified``):
    those read straight to a GPU by ``digest(bytes, part bytes)`` where they are then, if the model has digests. ``staged``:
    blocks that host memory is not to keep go through a ring of two pieces for each reader (None: if the device is a GPU).
    """

    def __init__(
        self,
        tiers: Mapping[StoreTier, Residency],
        lock: threading.RLock,
        device: torch.device,
        reader: ChunkReader,
        *,
        verify: Verify,
        digest: Callable[[torch.Tensor, int], int],
        staged: bool | None = None,
    ) -> None:
        self._tiers, self._lock, self._device, self._reader, self._verify = tiers, lock, device, reader, verify
        self._digest = digest
        self._stream = None if device.type == "cpu" else torch.cuda.Stream(device)
        self._copies = BoundedCopies(device, self._stream)
        self._staging = None
        if device.type != "cpu" if staged is None else staged:
            self._staging = Staging(device, self._stream, 2 * reader.threads, reader.chunk_bytes)
        self._loads: set[Load] = set()

    @property
    def busy(self) -> bool:
        """True while loads are under way."""
        return bool(self._loads)

    def close(self) -> None:
        """Cancel loads and wait for their ends."""
        loads = list(self._loads)
        for load in loads:
            load.cancel()
        for load in loads:
            load.join()
        if self._staging is not None:
            self._staging.close()

    def begin(self, model: PackedModel, load: Load, to: StoreTier, *, keep_host: bool, on_block: OnBlock | None) -> None:
        """Start a load; see ``BlockStore.load``. Nothing has begun if it raises."""
        with self._lock:
            job = self._reserve(model, load, to, keep_host)
            self._loads.add(load)
        threading.Thread(target=self._run, args=(job, on_block), name=f"load-{model.name}", daemon=True).start()

    def _reserve(self, model: PackedModel, load: Load, to: StoreTier, keep_host: bool) -> _Job:
        """Reserve memory for every block that needs it, all or nothing, and hold blocks that are resident already."""
        # Other blocks are read into the device's memory: straight where that is a stand-in in host memory, else through the ring.
        via_host = keep_host or to == "host"
        job = _Job(model, load, to, keep_host)
        try:
            for key in self._tiers[to].in_order([(model.name, block) for block in load.blocks]):
                there = key in self._tiers[to].complete
                for tier in _ON_THE_WAY[to]:
                    if key in self._tiers[tier].complete:
                        job.held.append((tier, key))
                    elif not there and (tier == "gpu" or via_host):
                        self._tiers[tier].take(model, key)
                        job.taken.append((tier, key))
        except ValueError:
            for tier, key in job.taken:
                self._tiers[tier].drop(key)
            raise
        for tier, key in job.held:
            self._tiers[tier].use(key)
        return job

    def _run(self, job: _Job, on_block: OnBlock | None) -> None:
        error: Exception | None = None
        devices.use(self._device)
        try:
            self._bring(job, on_block)
        except Exception as failure:  # raised again by ``wait``, also if on_block raised it
            error = failure
        finally:
            self._copies.wait()  # after a failure, copies may still write to memory that is freed now
            with self._lock:
                self._settle(job)
                self._loads.discard(job.load)
            job.load.end(error)

    def _settle(self, job: _Job) -> None:
        """Free the memory of blocks that did not land, and release blocks that were resident."""
        for tier, key in job.held:
            self._tiers[tier].release(key)
        for tier, key in job.taken:
            residency = self._tiers[tier]
            if key in residency.offsets and key not in residency.complete:
                residency.drop(key)

    def _bring(self, job: _Job, on_block: OnBlock | None) -> None:
        """Load block after block; the next one is read while the last is checked."""
        ahead: _Move | None = None
        blocks = list(job.load.blocks)
        try:
            while (ahead is not None or blocks) and not job.load.cancelled:
                move = ahead or self._begin(job, blocks.pop(0))
                ahead = None
                ahead = self._begin(job, blocks.pop(0)) if blocks else None
                self._finish(job, move)
                if on_block is not None:
                    on_block(job.model.name, move.block)
        finally:
            if ahead is not None:
                ahead.abandon()

    def _begin(self, job: _Job, block: int) -> _Move:
        """Start the reads or copies that bring a block; they go on in the readers' threads."""
        key, path = (job.model.name, block), job.model.path(block)
        move = _Move(block, path)
        if key in self._tiers[job.to].complete:
            return move
        described = job.model.blocks[block]
        size = described.size_bytes
        if key in self._tiers["host"].complete:
            move.chunks = self._reader.each_chunk(size, self._copier(key, size))
            return move
        through_host = key in self._tiers["host"].offsets
        target = self._tiers["host" if through_host else "gpu"]
        try:
            descriptor = move.files.enter_context(self._reader.open(path))
        except (OSError, UserError) as error:
            # Raised in this block's turn, after the blocks before it have landed.
            move.failure = f"cannot be opened: {getattr(error, 'strerror', None) or error}"
            return move
        verified = is_verified(self._verify, block, len(job.model.blocks))
        parts = Parts(job.model.part_bytes, described.parts) if verified else None
        begin = described.data_offset
        if self._staging is not None and not through_host:
            memory = target.arena.view(target.offsets[key], size)
            if verified and described.digests:
                move.digest, parts = described.digest, None
            move.chunks = self._reader.read_staged(descriptor, begin, memory, size, self._staging, parts)
            return move
        # Whole pages are read, and the extent has room for them.
        pages = target.arena.view(target.offsets[key], -(-size // ALIGNMENT) * ALIGNMENT).numpy().data
        after = self._copier(key, size) if through_host and job.to == "gpu" else _nothing
        move.chunks = self._reader.read(descriptor, begin, pages, size, after, parts)
        return move

    def _copier(self, key: Key, size: int) -> Callable[[int, int], None]:
        """Return a function that begins to copy a range of a block from host to device memory."""
        host, device = self._tiers["host"], self._tiers["gpu"]
        source, target = host.arena.view(host.offsets[key], size), device.arena.view(device.offsets[key], size)

        return lambda begin, end: self._copies.start(target[begin:end], source[begin:end])

    def _finish(self, job: _Job, move: _Move) -> None:
        """Wait for a block's chunks and make the block resident."""
        key = job.model.name, move.block
        if move.failure:
            raise BlockError(*key, move.path, move.failure)
        try:
            for chunk in move.chunks:
                chunk.result()
        except ChecksumError as error:
            raise BlockError(*key, move.path, f"is damaged: {error}") from error
        except (OSError, EOFError) as error:
            raise BlockError(*key, move.path, f"cannot be read: {error}") from error
        finally:
            move.abandon()
        self._copies.wait()
        self._compare(job, move)
        with self._lock:
            for tier in _ON_THE_WAY[job.to]:
                residency = self._tiers[tier]
                if (tier, key) in job.taken and (tier == job.to or job.keep_host):
                    residency.complete.add(key)
                elif (tier, key) in job.taken:
                    residency.drop(key)
        job.load.landed.append(move.block)

    def _compare(self, job: _Job, move: _Move) -> None:
        """Compare the digest of a block that has been copied to the device, if it is to be; BlockError if it is another."""
        if move.digest is None:
            return
        key, residency = (job.model.name, move.block), self._tiers["gpu"]
        data = residency.arena.view(residency.offsets[key], job.model.block_bytes[move.block])
        found = self._digest(data, job.model.part_bytes)
        if found != move.digest:
            reason = f"is damaged: its digest is {found:016x}, the manifest says {move.digest:016x}"
            raise BlockError(*key, move.path, reason)


# The tiers a block passes on its way up from the disk.
_ON_THE_WAY: dict[StoreTier, tuple[StoreTier, ...]] = {"host": ("host",), "gpu": ("host", "gpu")}


def _nothing(begin: int, end: int) -> None:
    """Do nothing after a chunk: it stays where it was read to."""
