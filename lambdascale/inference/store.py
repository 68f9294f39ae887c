"""The block store of a node: it loads, receives, lends and evicts the blocks in its host and device arenas.

The control plane decides what to keep; the store carries that out.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import xxhash

from lambdascale.checkpoints import PackedModel
from lambdascale.core import parse_size
from lambdascale.core.checks import check_types, require
from lambdascale.inference import devices
from lambdascale.inference.arena import Arena
from lambdascale.inference.copies import BoundedCopies
from lambdascale.inference.digest import block_digest
from lambdascale.inference.loading import BlockError, Load, Loader, OnBlock
from lambdascale.inference.reader import ChunkReader, Direct
from lambdascale.inference.reception import Reception, Receptions
from lambdascale.inference.residency import Residency, StoreTier
from lambdascale.inference.verification import Verify, is_verified
from lambdascale.inference.weights import BlockWeights

Tensor = torch.Tensor


class BlockInUseError(RuntimeError):
    """Refusal to evict a block that is in use or being loaded. Nothing was evicted."""


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Sizes and rules of a block store.

    ``host_bytes`` and ``device_bytes`` are the sizes of the arenas. With ``device`` "cpu" the device arena is a stand-in in host
    memory. ``readers`` threads (None: 4, and up to 12 for a GPU) read ``chunk_bytes`` at a time; ``direct``: see
    ChunkReader, ``staged``: see Loader. ``verify``: the blocks whose
    checksums are compared, when they are loaded and when they arrive (see ``is_verified``). ``land_on_device``: other nodes
    write blocks straight into the device arena; otherwise they write them into the host arena, from where the store copies
    them to the device.
    """

    host_bytes: int | str
    device_bytes: int | str
    device: str = "cpu"
    readers: int | None = None
    chunk_bytes: int | str = "16MiB"
    direct: Direct = "auto"
    verify: Verify = "full"
    land_on_device: bool = False
    staged: bool | None = None

    def __post_init__(self) -> None:
        """Normalise sizes and validate. UserError for a value out of range."""
        check_types(self)
        for name in ("host_bytes", "device_bytes", "chunk_bytes"):
            object.__setattr__(self, name, parse_size(getattr(self, name)))
        require(self.readers is None or self.readers >= 1, f"readers must be at least 1, not {self.readers}")
        require(int(self.chunk_bytes) >= 4096, f"chunk_bytes must be at least 4096, not {self.chunk_bytes}")

    @property
    def reader_threads(self) -> int:
        """Number of threads that read."""
        return self.readers or (4 if self.device == "cpu" else min(12, max(4, (os.cpu_count() or 4) - 4)))


class BlockStore:
    """Blocks of packed models in two tiers. Thread-safe. CapacityError at start if an arena does not fit the machine.

    ``landing``: memory that other nodes may write blocks to, used as the arena of ``landing_tier`` (a tensor if that is a GPU's).
    """

    def __init__(self, config: StoreConfig, landing: memoryview | Tensor | None = None) -> None:
        self.config = config
        self.device = torch.device(config.device)
        require(self.device.type in ("cpu", "cuda"), f"device must be cpu or cuda, not {config.device}")
        require(self.device.type == "cpu" or torch.cuda.is_available(), "device is cuda, but PyTorch finds no GPU")
        # Guards the models and all tiers: memory is taken, given back and evicted, and blocks become complete, in a hold only.
        self._lock = threading.RLock()
        self._models: dict[str, PackedModel] = {}
        self.landing_tier: StoreTier = "gpu" if config.land_on_device else "host"
        self._lands_on_gpu = self.device.type != "cpu" and config.land_on_device
        # A stream of their own, so that digests do not wait for what the default stream computes.
        self._digests = torch.cuda.Stream(self.device) if self.device.type != "cpu" else None
        # Copies to host memory, likewise, in pieces.
        self._down = BoundedCopies(self.device, torch.cuda.Stream(self.device) if self.device.type != "cpu" else None)
        given = {self.landing_tier: landing}
        host = Arena(int(config.host_bytes), torch.device("cpu"), "a host arena", given.get("host"))
        device = Arena(int(config.device_bytes), self.device, "a device arena", given.get("gpu"))
        self._tiers: dict[StoreTier, Residency] = {"host": Residency("host", host), "gpu": Residency("gpu", device)}
        self.reader = ChunkReader(config.reader_threads, int(config.chunk_bytes), config.direct)
        self._loader = Loader(
            self._tiers,
            self._lock,
            self.device,
            self.reader,
            verify=config.verify,
            digest=self._digest,
            staged=config.staged,
        )
        self._receptions = Receptions(self._lock, self._tiers[self.landing_tier], self._tiers["gpu"], self._check, self._lift)

    def close(self) -> None:
        """Cancel loads, wait for their ends and free the memory."""
        self._loader.close()
        self.reader.close()
        for tier in self._tiers.values():
            tier.arena.close()

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def host_memory(self) -> memoryview:
        """Return the host tier's arena, for transports that register the memory they send from."""
        return self._tiers["host"].arena.bytes.numpy().data

    def use_device(self) -> None:
        """Make the store's GPU the current one of the calling thread; each thread that copies to or from it must call this."""
        devices.use(self.device)

    def rehearse(self) -> None:
        """Compile the kernel that verifies blocks in a GPU's memory, before the first block arrives. Do nothing elsewhere."""
        if self.device.type != "cpu" and self.config.verify != "off":
            self._digest(torch.zeros(1 << 20, dtype=torch.uint8, device=self.device), 1 << 20)

    # -- what is where -----------------------------------------------------------------------------------------------

    def add(self, model: PackedModel) -> None:
        """Register a model. UserError if another one has its name, or if its blocks cannot be verified where they land."""
        require(
            not self._lands_on_gpu or self.config.verify == "off" or all(block.digests for block in model.blocks),
            f"{model.name} was packed without digests for GPUs: pack it again, or set backend.verify=off",
        )
        with self._lock:
            known = self._models.setdefault(model.name, model)
            require(
                known.directory.resolve() == model.directory.resolve(),
                f"two models are called {model.name}: {known.directory} and {model.directory}",
            )

    @property
    def models(self) -> tuple[PackedModel, ...]:
        """The registered models."""
        return tuple(self._models.values())

    @property
    def loading(self) -> bool:
        """True while loads are under way."""
        return self._loader.busy

    def model(self, name: str) -> PackedModel:
        """Return a registered model. UserError for any other name."""
        require(name in self._models, f"the store does not know the model {name}")
        return self._models[name]

    def resident(self, name: str, tier: StoreTier) -> frozenset[int]:
        """Return the blocks of the model that are complete in a tier."""
        with self._lock:
            return frozenset(block for model, block in self._tiers[tier].complete if model == name)

    def holds(self, name: str, block: int, tier: StoreTier) -> bool:
        """Return True if a block is complete in a tier."""
        return (name, block) in self._tiers[tier].complete

    def awaited(self, name: str, block: int) -> bool:
        """Return True if memory is reserved for a block that others may write and that has not arrived."""
        key = (name, block)
        return self._receptions.expects(key) and key not in self._tiers[self.landing_tier].complete

    def free_bytes(self, tier: StoreTier) -> int:
        """Return the bytes of a tier's arena that are neither occupied by blocks nor reserved for them."""
        return self._tiers[tier].arena.extents.free_bytes

    # -- use ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def using(self, name: str, blocks: Iterable[int], tier: StoreTier = "gpu") -> Iterator[list[Tensor]]:
        """Yield the bytes of complete blocks; none is evicted inside the context. UserError if one is not resident."""
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
        """Yield the weights of blocks on the device, as views of the arena, which are valid inside the context."""
        layouts = self.model(name).layouts
        with self.using(name, blocks) as buffers:
            yield [BlockWeights(layouts[block], buffer) for block, buffer in zip(blocks, buffers, strict=True)]

    # -- eviction ----------------------------------------------------------------------------------------------------

    def evict(self, name: str, tier: StoreTier) -> int:
        """Drop the model's blocks from a tier; return the bytes freed.

        BlockInUseError, and nothing dropped, if one of them is in use or being loaded. Memory reserved for blocks that others may
        write is left alone: their reception frees it.
        """
        with self._lock:
            residency = self._tiers[tier]
            keys = [key for key in sorted(residency.offsets) if key[0] == name]
            keys = [key for key in keys if key in residency.complete or not self._is_expected(key, tier)]
            for key in keys:
                if residency.uses.get(key) or key not in residency.complete or self._is_expected(key, tier):
                    raise BlockInUseError(f"block {key[1]} of {name} is in use in {tier} memory")
            before = residency.arena.extents.free_bytes
            for key in keys:
                residency.drop(key)
            return residency.arena.extents.free_bytes - before

    def _is_expected(self, key: tuple[str, int], tier: StoreTier) -> bool:
        return tier == self.landing_tier and self._receptions.expects(key)

    def mirror(self, name: str) -> int:
        """Copy the model's blocks that host memory lacks from the device to it; return the bytes copied.

        CapacityError, and nothing done, if host memory has no room. Blocks the caller until the copies are complete.
        """
        model, host = self.model(name), self._tiers["host"]
        with ExitStack() as stack:
            with self._lock:
                missing = [(name, block) for block in sorted(self.resident(name, "gpu") - self.resident(name, "host"))]
                host.take_all(model, missing)
                sources = stack.enter_context(self.using(name, [block for _, block in missing]))
            step = int(self.config.chunk_bytes)
            for key, source in zip(missing, sources, strict=True):
                target = host.arena.view(host.offsets[key], source.numel())
                for piece, begin in zip(source.split(step), range(0, source.numel(), step), strict=True):
                    self._down.start(target[begin : begin + step], piece)
            self._down.wait()
            with self._lock:
                host.complete.update(missing)
        return sum(model.block_bytes[block] for _, block in missing)

    # -- blocks that other nodes bring -------------------------------------------------------------------------------

    def expect(self, name: str, blocks: Iterable[int]) -> Reception:
        """Reserve memory for blocks that others will write, where they are not resident. See Reception.

        A block that several receptions expect has one place. CapacityError, and nothing reserved, without room for all;
        UserError for blocks that are being loaded.
        """
        return self._receptions.expect(self.model(name), blocks)

    def landing(self, name: str, block: int) -> Tensor:
        """Return the memory reserved for a block, as a flat uint8 tensor. UserError if the block is not expected."""
        return self._receptions.memory(self.model(name), block)

    def _check(self, model: PackedModel, block: int, data: Tensor, xxh3_64: int | None) -> None:
        """Raise BlockError if the block is one to verify and its hash is not the packed model's."""
        if not is_verified(self.config.verify, block, len(model.blocks)):
            return
        if self._lands_on_gpu:
            wanted, found = model.blocks[block].digest, self._digest(data, model.part_bytes)
        else:
            wanted = int(model.blocks[block].xxh3_64, 16)
            found = self.block_hash(data) if xxh3_64 is None else xxh3_64
        if found != wanted:
            raise BlockError(model.name, block, model.path(block), f"arrived with checksum {found:016x} instead of {wanted:016x}")

    @staticmethod
    def block_hash(data: Tensor) -> int:
        """Return the xxh3-64 hash of a block in host memory, a flat uint8 tensor."""
        return xxhash.xxh3_64_intdigest(data.numpy().data)

    def _digest(self, data: Tensor, part_bytes: int) -> int:
        """Return the digest of a block in the device arena, computed beside what the GPU runs."""
        self.use_device()
        with torch.cuda.stream(self._digests):
            return block_digest(data, part_bytes)

    def _lift(self, name: str, block: int) -> None:
        """Copy a landed block to the device and wait, unless it is resident there. CapacityError if the device has no room."""
        if not self.holds(name, block, "gpu"):
            self.load(name, [block], to="gpu").wait()

    # -- loading -----------------------------------------------------------------------------------------------------

    def load(
        self, name: str, blocks: Iterable[int], *, to: StoreTier = "gpu", keep_host: bool = True, on_block: OnBlock | None = None
    ) -> Load:
        """Bring blocks into a tier, in this order, from host memory where they are resident there and from disk otherwise.

        ``keep_host``: blocks read from disk stay in host memory too. Blocks that are resident in the tier land at once.
        ``on_block(model, block)`` is called from the loading thread for each that lands. CapacityError, and nothing begun, if
        the tier has no room for all; UserError for unknown blocks, and for blocks another load is bringing.
        """
        model, order = self.model(name), list(dict.fromkeys(blocks))
        unknown = [block for block in order if not 0 <= block < len(model.blocks)]
        require(not unknown, f"{name} has blocks 0 to {len(model.blocks) - 1}, not {unknown}")
        load = Load(name, order)
        self._loader.begin(model, load, to, keep_host=keep_host, on_block=on_block)
        return load
