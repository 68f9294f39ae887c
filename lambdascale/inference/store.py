"""The block store of a node: disk to host arena to device arena. It carries out; what to keep is decided elsewhere.

A load reserves its memory before anything moves, so that it can not fail halfway for lack of room. Blocks land in the order
asked for and are usable one by one; the next one is being read while the last is finished.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import xxhash

from lambdascale.checkpoints import PackedModel
from lambdascale.checkpoints.safetensors_file import ALIGNMENT
from lambdascale.core import CapacityError, UserError, parse_size
from lambdascale.core.checks import check_types, require
from lambdascale.inference.arena import Arena
from lambdascale.inference.read_back import ReadBack
from lambdascale.inference.reader import ChecksumError, ChunkReader, Direct, Parts
from lambdascale.inference.weights import BlockWeights

Tensor = torch.Tensor
StoreTier = Literal["host", "gpu"]
OnBlock = Callable[[str, int], None]
_Key = tuple[str, int]  # model and block


class BlockError(UserError):
    """A block that could not be brought: the message names block and file. The store is as it was before the block."""

    def __init__(self, model: str, block: int, file: Path, reason: str) -> None:
        super().__init__(f"block {block} of {model} ({file}): {reason}")
        self.model, self.block, self.file = model, block, file


class BlockInUseError(RuntimeError):
    """An eviction of something that is being used or loaded: the caller decided wrongly, nothing was evicted."""


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """``host_bytes`` and ``device_bytes`` are the arenas. ``device`` "cpu" makes the device arena a stand-in in host memory.

    ``readers`` threads read ``chunk_bytes`` at a time; ``direct``: see ChunkReader. ``verify``: compare checksums.
    ``land_on_device``: other nodes bring blocks straight into the arena of a GPU; into a stand-in's they always do.
    """

    host_bytes: int | str
    device_bytes: int | str
    device: str = "cpu"
    readers: int = 4
    chunk_bytes: int | str = "8MiB"
    direct: Direct = "auto"
    verify: bool = True
    land_on_device: bool = False

    def __post_init__(self) -> None:
        """Normalise sizes and validate."""
        check_types(self)
        for name in ("host_bytes", "device_bytes", "chunk_bytes"):
            object.__setattr__(self, name, parse_size(getattr(self, name)))
        require(self.readers >= 1, f"readers must be at least 1, not {self.readers}")
        require(int(self.chunk_bytes) >= 4096, f"chunk_bytes must be at least 4096, not {self.chunk_bytes}")


class Load:
    """A load under way. ``blocks`` is its order; ``landed`` grows as blocks become usable."""

    def __init__(self, model: str, blocks: Sequence[int]) -> None:
        self.model = model
        self.blocks = tuple(blocks)
        self.landed: list[int] = []
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[Exception | None], None]] = []
        self._cancelled = threading.Event()
        self._ended = threading.Event()
        self._error: Exception | None = None

    def wait(self, timeout_s: float | None = None) -> None:
        """Until it has ended; raises what went wrong (BlockError), TimeoutError if it takes longer."""
        if not self._ended.wait(timeout_s):
            raise TimeoutError(f"loading {self.model} takes longer than {timeout_s} s")
        if self._error is not None:
            raise self._error

    def when_ended(self, call: Callable[[Exception | None], None]) -> None:
        """``call(error)`` when nothing more will land, from the loading thread; at once if that is so already."""
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
        """Whether ``cancel`` was called."""
        return self._cancelled.is_set()

    @property
    def ended(self) -> bool:
        """Whether nothing more will land."""
        return self._ended.is_set()

    def end(self, error: Exception | None) -> None:
        """Called by the store."""
        with self._lock:
            self._error = error
            self._ended.set()
        for call in self._callbacks:
            call(error)


@dataclass
class _Residency:
    """A tier: its arena, where each block lies, and which are complete and how often used."""

    arena: Arena
    offsets: dict[_Key, int] = field(default_factory=dict)
    complete: set[_Key] = field(default_factory=set)
    uses: dict[_Key, int] = field(default_factory=dict)

    def release(self, key: _Key) -> None:
        """Undo one use."""
        self.uses[key] -= 1
        if not self.uses[key]:
            del self.uses[key]

    def drop(self, key: _Key) -> None:
        """Free a block's memory."""
        self.complete.discard(key)
        self.arena.extents.give_back(self.offsets.pop(key))


@dataclass
class _Job:
    """A load and its memory: what it took for blocks to come, and what was there already and is held until it ends."""

    model: PackedModel
    load: Load
    to: StoreTier
    keep_host: bool
    taken: list[tuple[StoreTier, _Key]] = field(default_factory=list)
    held: list[tuple[StoreTier, _Key]] = field(default_factory=list)


@dataclass
class _Move:
    """A block on its way: its chunks in order, what to close."""

    block: int
    path: Path
    failure: str = ""
    chunks: list[Future[None]] = field(default_factory=list)
    files: ExitStack = field(default_factory=ExitStack)

    def abandon(self) -> None:
        """Wait until no thread touches its memory any more; close its file."""
        for chunk in self.chunks:
            chunk.cancel()
        wait(self.chunks)
        self.files.close()


class BlockStore:
    """Blocks of packed models in two tiers. Thread-safe. CapacityError at start if an arena does not fit the machine.

    ``landing``: memory that other nodes may write blocks to, used as the arena of ``landing_tier``: the device's where that is
    host memory itself or ``config.land_on_device`` says so (then a tensor), else the host's.
    """

    def __init__(self, config: StoreConfig, landing: memoryview | Tensor | None = None) -> None:
        self.config = config
        self.device = torch.device(config.device)
        require(self.device.type in ("cpu", "cuda"), f"device must be cpu or cuda, not {config.device}")
        require(self.device.type == "cpu" or torch.cuda.is_available(), "device cuda is asked for, but torch finds no GPU")
        self._lock = threading.RLock()
        self._models: dict[str, PackedModel] = {}
        self._loads: set[Load] = set()
        self._awaited: set[_Key] = set()
        self.landing_tier: StoreTier = "gpu" if self.device.type == "cpu" or config.land_on_device else "host"
        self._read_back = ReadBack(self.device) if self.device.type != "cpu" and config.land_on_device else None
        given = {self.landing_tier: landing}
        host = Arena(int(config.host_bytes), torch.device("cpu"), "a host arena", given.get("host"))
        device = Arena(int(config.device_bytes), self.device, "a device arena", given.get("gpu"))
        self._stream = None if self.device.type == "cpu" else torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._tiers: dict[StoreTier, _Residency] = {"host": _Residency(host), "gpu": _Residency(device)}
        self.reader = ChunkReader(config.readers, int(config.chunk_bytes), config.direct)

    def close(self) -> None:
        """Cancel loads, wait for them, free the memory."""
        for load in list(self._loads):
            load.cancel()
        for load in list(self._loads):
            load._ended.wait()
        self.reader.close()
        for tier in self._tiers.values():
            tier.arena.close()

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def host_memory(self) -> memoryview:
        """The host tier's arena, for transports that want to know the memory they send from."""
        return self._tiers["host"].arena.bytes.numpy().data

    # -- what is where -----------------------------------------------------------------------------------------------

    def add(self, model: PackedModel) -> None:
        """Make a model known. UserError if another one has its name."""
        with self._lock:
            known = self._models.setdefault(model.name, model)
            require(
                known.directory.resolve() == model.directory.resolve(),
                f"two models are called {model.name}: {known.directory} and {model.directory}",
            )

    def model(self, name: str) -> PackedModel:
        """A known model; UserError otherwise."""
        require(name in self._models, f"the store does not know the model {name}")
        return self._models[name]

    def resident(self, name: str, tier: StoreTier) -> frozenset[int]:
        """Blocks of the model that are complete in a tier."""
        with self._lock:
            return frozenset(block for model, block in self._tiers[tier].complete if model == name)

    def holds(self, name: str, block: int, tier: StoreTier) -> bool:
        """Whether a block is complete in a tier."""
        return (name, block) in self._tiers[tier].complete

    def awaited(self, name: str, block: int) -> bool:
        """Whether memory is reserved for a block that others may write."""
        return (name, block) in self._awaited

    def free_bytes(self, tier: StoreTier) -> int:
        """Bytes of a tier's arena that nothing is kept or being loaded in."""
        return self._tiers[tier].arena.extents.free_bytes

    # -- use ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def using(self, name: str, blocks: Iterable[int], tier: StoreTier = "gpu") -> Iterator[list[Tensor]]:
        """The bytes of complete blocks, which are not evicted meanwhile. UserError if one is not there."""
        keys = [(name, block) for block in blocks]
        residency = self._tiers[tier]
        with self._lock:
            for key in keys:
                require(key in residency.complete, f"block {key[1]} of {name} is not in {tier} memory")
            for key in keys:
                residency.uses[key] = residency.uses.get(key, 0) + 1
        try:
            sizes = self.model(name).block_bytes
            yield [residency.arena.view(residency.offsets[key], sizes[key[1]]) for key in keys]
        finally:
            with self._lock:
                for key in keys:
                    residency.release(key)

    @contextmanager
    def weights(self, name: str, blocks: Sequence[int]) -> Iterator[list[BlockWeights]]:
        """The weights of blocks on the device, as views of the arena; they stay as long as the context."""
        layouts = self.model(name).layouts
        with self.using(name, blocks) as buffers:
            yield [BlockWeights(layouts[block], buffer) for block, buffer in zip(blocks, buffers, strict=True)]

    # -- eviction ----------------------------------------------------------------------------------------------------

    def evict(self, name: str, tier: StoreTier, blocks: Iterable[int] | None = None) -> int:
        """Drop blocks (None: all of the model that are complete) from a tier; the bytes freed.

        BlockInUseError, and nothing dropped, if one of them is in use or is the source or target of a load.
        """
        with self._lock:
            residency = self._tiers[tier]
            wanted = self.resident(name, tier) if blocks is None else set(blocks)
            keys = [(name, block) for block in sorted(wanted) if (name, block) in residency.offsets]
            for key in keys:
                if residency.uses.get(key) or key not in residency.complete:
                    raise BlockInUseError(f"block {key[1]} of {name} is in use in {tier} memory")
            before = residency.arena.extents.free_bytes
            for key in keys:
                residency.drop(key)
            return residency.arena.extents.free_bytes - before

    def demote(self, name: str) -> int:
        """``mirror``, then drop the model's blocks from the device; the bytes copied. BlockInUseError as ``evict``."""
        copied = self.mirror(name)
        self.evict(name, "gpu")
        return copied

    def mirror(self, name: str) -> int:
        """Copy the model's blocks from the device to host memory where they are missing there; the bytes copied.

        CapacityError, and nothing done, if host memory has no room.
        """
        model = self.model(name)
        with self._lock:
            missing = [(name, block) for block in sorted(self.resident(name, "gpu") - self.resident(name, "host"))]
            self._take_all(model, missing, "host")
        with self.using(name, [block for _, block in missing]) as sources:
            for key, source in zip(missing, sources, strict=True):
                residency = self._tiers["host"]
                residency.arena.view(residency.offsets[key], source.numel()).copy_(source)
        with self._lock:
            self._tiers["host"].complete.update(missing)
        return sum(model.block_bytes[block] for _, block in missing)

    # -- blocks that other nodes bring -------------------------------------------------------------------------------

    def reserve(self, name: str, blocks: Iterable[int]) -> dict[int, int]:
        """Memory for blocks that others will write: offsets in the landing arena. What is reserved already stays where it is.

        CapacityError, and nothing reserved, if there is no room for all; UserError for blocks that are there or being loaded.
        """
        model, residency = self.model(name), self._tiers[self.landing_tier]
        with self._lock:
            keys = [(name, block) for block in blocks]
            self._take_all(model, [key for key in keys if key not in self._awaited], self.landing_tier)
            self._awaited.update(keys)
            return {block: residency.offsets[name, block] for _, block in keys}

    def landing(self, name: str, block: int) -> Tensor:
        """The memory reserved for a block."""
        require((name, block) in self._awaited, f"block {block} of {name} is not awaited")
        residency = self._tiers[self.landing_tier]
        return residency.arena.view(residency.offsets[name, block], self.model(name).block_bytes[block])

    def land(self, name: str, block: int, xxh3_64: int | None = None) -> None:
        """A reserved block has been written: compare its checksum and make it resident. BlockError if it differs.

        ``xxh3_64``: of the bytes in the reserved memory, if somebody has computed it already.
        """
        model, key, residency = self.model(name), (name, block), self._tiers[self.landing_tier]
        require(key in self._awaited, f"block {block} of {name} is not awaited")
        wanted = model.blocks[block]
        data = residency.arena.view(residency.offsets[key], wanted.size_bytes)
        if self.config.verify:
            found = self._checksum(data) if xxh3_64 is None else f"{xxh3_64:016x}"
            if found != wanted.xxh3_64:
                raise BlockError(name, block, model.path(block), f"arrived with checksum {found} instead of {wanted.xxh3_64}")
        with self._lock:
            self._awaited.discard(key)
            residency.complete.add(key)

    def _checksum(self, landed: Tensor) -> str:
        return xxhash.xxh3_64_hexdigest(landed.numpy().data) if self._read_back is None else self._read_back.xxh3_64(landed)

    def abandon(self, name: str, blocks: Iterable[int]) -> None:
        """Nobody will write these reserved blocks any more: free their memory. Others are left alone."""
        with self._lock:
            for key in [(name, block) for block in blocks]:
                if key in self._awaited:
                    self._awaited.discard(key)
                    self._tiers[self.landing_tier].drop(key)

    def _take_all(self, model: PackedModel, keys: Sequence[_Key], tier: StoreTier) -> None:
        """Memory for all of them or none."""
        taken: list[_Key] = []
        try:
            for key in keys:
                self._take(model, key, tier)
                taken.append(key)
        except ValueError:
            for key in taken:
                self._tiers[tier].drop(key)
            raise

    # -- loading -----------------------------------------------------------------------------------------------------

    def load(
        self, name: str, blocks: Iterable[int], *, to: StoreTier = "gpu", keep_host: bool = True, on_block: OnBlock | None = None
    ) -> Load:
        """Bring blocks into a tier, in this order, from host memory where they are there and from disk otherwise.

        ``keep_host``: blocks read from disk stay in host memory too. Blocks that are there already land at once.
        ``on_block(model, block)`` is called from the loading thread for each that lands. CapacityError, and nothing begun, if
        there is no room for all; UserError for unknown blocks, and for blocks another load is bringing.
        """
        model, order = self.model(name), list(dict.fromkeys(blocks))
        unknown = [block for block in order if not 0 <= block < len(model.blocks)]
        require(not unknown, f"{name} has blocks 0 to {len(model.blocks) - 1}, not {unknown}")
        load = Load(name, order)
        with self._lock:
            job = self._reserve(model, load, to, keep_host)
            self._loads.add(load)
        threading.Thread(target=self._run, args=(job, on_block), name=f"load-{name}", daemon=True).start()
        return load

    def _reserve(self, model: PackedModel, load: Load, to: StoreTier, keep_host: bool) -> _Job:
        """Take memory for every block that needs it, all or nothing, and hold what is there already."""
        # A stand-in device is host memory itself: what is not to be kept twice is read straight into it.
        via_host = keep_host or to == "host" or self.device.type != "cpu"
        job = _Job(model, load, to, keep_host)
        try:
            for key in [(model.name, block) for block in load.blocks]:
                there = key in self._tiers[to].complete
                for tier in _ON_THE_WAY[to]:
                    if key in self._tiers[tier].complete:
                        job.held.append((tier, key))
                    elif not there and (tier == "gpu" or via_host):
                        self._take(model, key, tier)
                        job.taken.append((tier, key))
        except ValueError:
            for tier, key in job.taken:
                self._tiers[tier].drop(key)
            raise
        for tier, key in job.held:
            self._tiers[tier].uses[key] = self._tiers[tier].uses.get(key, 0) + 1
        return job

    def _take(self, model: PackedModel, key: _Key, tier: StoreTier) -> None:
        residency, size = self._tiers[tier], model.block_bytes[key[1]]
        require(key not in residency.offsets, f"block {key[1]} of {key[0]} is being loaded already")
        offset = residency.arena.extents.take(size)
        if offset is None:
            free = residency.arena.extents.free_bytes
            why = f"{free} bytes are free" + (", in pieces too small" if free >= size else "")
            raise CapacityError(f"no room for block {key[1]} of {key[0]} ({size} bytes) in {tier} memory: {why}")
        residency.offsets[key] = offset

    def _run(self, job: _Job, on_block: OnBlock | None) -> None:
        error: Exception | None = None
        try:
            self._bring(job, on_block)
        except Exception as failure:  # whoever waits for the load is told, also of a fault of on_block's
            error = failure
        finally:
            with self._lock:
                self._settle(job)
                self._loads.discard(job.load)
            job.load.end(error)

    def _settle(self, job: _Job) -> None:
        """Give back what did not land, and host copies that were only for the way."""
        for tier, key in job.held:
            self._tiers[tier].release(key)
        for tier, key in job.taken:
            residency = self._tiers[tier]
            if key in residency.offsets and key not in residency.complete:
                residency.drop(key)

    def _bring(self, job: _Job, on_block: OnBlock | None) -> None:
        """Block after block, the next one being read while the last is checked."""
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
            move.chunks = self.reader.each_chunk(size, self._copier(key, size))
            return move
        through_host = key in self._tiers["host"].offsets
        target = self._tiers["host" if through_host else "gpu"]
        # Whole pages are read: the extent is as long as that.
        memory = target.arena.view(target.offsets[key], -(-size // ALIGNMENT) * ALIGNMENT).numpy().data
        after = self._copier(key, size) if through_host and job.to == "gpu" else _nothing
        try:
            descriptor = move.files.enter_context(self.reader.open(path))
        except (OSError, UserError) as error:
            # Told when it is this block's turn, after those before it have landed.
            move.failure = f"cannot be opened: {getattr(error, 'strerror', None) or error}"
            return move
        parts = Parts(job.model.part_bytes, described.parts) if self.config.verify else None
        move.chunks = self.reader.read(descriptor, described.data_offset, memory, size, after, parts)
        return move

    def _copier(self, key: _Key, size: int) -> Callable[[int, int], None]:
        """Copies a range of a block from host to device memory, on a GPU without waiting for it."""
        host, device = self._tiers["host"], self._tiers["gpu"]
        source, target = host.arena.view(host.offsets[key], size), device.arena.view(device.offsets[key], size)

        def copy(begin: int, end: int) -> None:
            with torch.cuda.stream(self._stream):
                target[begin:end].copy_(source[begin:end], non_blocking=True)

        return copy

    def _finish(self, job: _Job, move: _Move) -> None:
        """Wait for a block's chunks, and make it resident."""
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
        if self._stream is not None:
            self._stream.synchronize()
        with self._lock:
            for tier in _ON_THE_WAY[job.to]:
                residency = self._tiers[tier]
                if (tier, key) in job.taken and (tier == job.to or job.keep_host):
                    residency.complete.add(key)
                elif (tier, key) in job.taken:
                    residency.drop(key)
        job.load.landed.append(move.block)


# The tiers a block passes on its way up from the disk.
_ON_THE_WAY: dict[StoreTier, tuple[StoreTier, ...]] = {"host": ("host",), "gpu": ("host", "gpu")}


def _nothing(begin: int, end: int) -> None:
    """A chunk that stays where it was read to."""
