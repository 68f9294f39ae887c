"""One node's memory on its own: the control plane's cache policy decides what stays, the block store carries it out.

In a cluster the control plane takes these decisions and sends them as commands; a single node, a tool or a test uses this.
"""

from __future__ import annotations

from lambdascale.checkpoints.safetensors_file import ALIGNMENT
from lambdascale.core import CapacityError
from lambdascale.inference.loading import Load, OnBlock
from lambdascale.inference.residency import StoreTier
from lambdascale.inference.store import BlockStore
from lambdascale.memory import HostCacheConfig, HostCaches

_NODE = 0


class NodeMemory:
    """Models in two tiers, each an LRU with keep-alive over the arena's bytes. Times ``now`` in seconds, never decreasing."""

    def __init__(
        self, store: BlockStore, *, host_keep_alive_s: float | None = None, gpu_keep_alive_s: float | None = None
    ) -> None:
        self.store = store
        host, gpu = int(store.config.host_bytes), int(store.config.device_bytes)
        self._caches: dict[StoreTier, HostCaches] = {
            "host": HostCaches(HostCacheConfig(keep_alive_s=host_keep_alive_s), {_NODE: host}),
            "gpu": HostCaches(HostCacheConfig(keep_alive_s=gpu_keep_alive_s), {_NODE: gpu}),
        }
        self._users: dict[str, list[tuple[StoreTier, ...]]] = {}

    def acquire(self, name: str, now: float, on_block: OnBlock | None = None) -> Load:
        """Have a model on the device, evicting what was used longest ago; it stays until ``release``.

        The host keeps a copy if it has room for one. CapacityError if the device has not, with everything in use.
        """
        model = self.store.model(name)
        size = sum(-(-block // ALIGNMENT) * ALIGNMENT for block in model.block_bytes)
        if not self._admit("gpu", name, size, now):
            raise CapacityError(f"no room for {name} ({size} bytes) on the device beside what is in use")
        tiers: tuple[StoreTier, ...] = ("gpu", "host") if self._admit("host", name, size, now) else ("gpu",)
        for tier in tiers:
            self._caches[tier].pin(_NODE, name)
        self._users.setdefault(name, []).append(tiers)
        while True:
            try:
                return self.store.load(name, range(len(model.blocks)), keep_host="host" in tiers, on_block=on_block)
            except ValueError as error:
                # Enough bytes, but in pieces: one more model has to go.
                if not isinstance(error, CapacityError) or not self._evict_one(name):
                    self.release(name, now)
                    raise

    def release(self, name: str, now: float) -> None:
        """Undo one ``acquire``: with the last, the model may be evicted and its keep-alive starts."""
        for tier in self._users[name].pop():
            self._caches[tier].unpin(_NODE, name, now)

    def expire(self, now: float) -> None:
        """Evict what nobody used for longer than its keep-alive."""
        for tier, cache in self._caches.items():
            for name in cache.expire(_NODE, now):
                self.store.evict(name, tier)

    def _admit(self, tier: StoreTier, name: str, size: int, now: float) -> bool:
        """Whether the tier has room for the model, after evicting what may go."""
        cache = self._caches[tier]
        if cache.has(_NODE, name, now):
            cache.touch(_NODE, name, now)
            return True
        for victim in cache.put(_NODE, name, size, now):
            self.store.evict(victim, tier)
        return cache.has(_NODE, name, now)

    def _evict_one(self, keep: str) -> bool:
        for tier, cache in self._caches.items():
            victim = cache.oldest(_NODE, keep)
            if victim is not None:
                cache.remove(_NODE, victim)
                self.store.evict(victim, tier)
                return True
        return False
