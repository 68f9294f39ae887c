"""The block store of a node: what lies in its host and device arenas, comes from disk or other nodes, is used and evicted.

It carries out; what to keep is decided elsewhere.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import xxhash

from lambdascale.checkpoints import PackedModel
from lambdascale.core import parse_size
from lambdascale.core.checks import check_types, require
from lambdascale.inference.arena import Arena
from lambdascale.inference.loading import BlockError, Load, Loader, OnBlock
from lambdascale.inference.read_back import ReadBack
from lambdascale.inference.reader import ChunkReader, Direct
from lambdascale.inference.residency import Key, Residency, StoreTier
from lambdascale.inference.weights import BlockWeights

Tensor = torch.Tensor


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
        self._awaited: set[Key] = set()
        self.landing_tier: StoreTier = "gpu" if self.device.type == "cpu" or config.land_on_device else "host"
        self._read_back = ReadBack(self.device) if self.device.type != "cpu" and config.land_on_device else None
        given = {self.landing_tier: landing}
        host = Arena(int(config.host_bytes), torch.device("cpu"), "a host arena", given.get("host"))
        device = Arena(int(config.device_bytes), self.device, "a device arena", given.get("gpu"))
        self._tiers: dict[StoreTier, Residency] = {"host": Residency("host", host), "gpu": Residency("gpu", device)}
        self.reader = ChunkReader(config.readers, int(config.chunk_bytes), config.direct)
        self._loader = Loader(self._tiers, self._lock, self.device, self.reader, verify=config.verify)

    def close(self) -> None:
        """Cancel loads, wait for them, free the memory."""
        self._loader.close()
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
                residency.use(key)
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

    def _take_all(self, model: PackedModel, keys: Sequence[Key], tier: StoreTier) -> None:
        """Memory for all of them or none."""
        taken: list[Key] = []
        try:
            for key in keys:
                self._tiers[tier].take(model, key)
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
        self._loader.begin(model, load, to, keep_host=keep_host, on_block=on_block)
        return load
