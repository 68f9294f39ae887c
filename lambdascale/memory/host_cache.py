"""Host-memory copies of models: an LRU cache per node with a byte budget and a keep-alive time (paper, section 5).

The SSD of every node holds every model (the paper's and ServerlessLLM's setting); GPU residency is the control plane's
record of allocations. A host copy is written while a model is resident on the node's GPU: blocks are copied GPU to host over
the PCIe direction that loading leaves idle, so the copy is complete by the time the GPU is released and does not slow the load.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lambdascale.core import NodeId, UserError, parse_size
from lambdascale.core.checks import check_types, require


@dataclass(frozen=True, kw_only=True)
class HostCacheConfig:
    """``budget`` of host memory per node for copies (None: all of it); copies unused for ``keep_alive_s`` expire (None: never).

    ``initial_copies`` nodes hold each model from the start (the warm part of the cluster), node 0 first. On the first
    ``lasting_nodes`` nodes copies never expire. Without ``enabled`` no copy is kept.
    """

    budget: int | str | None = None
    keep_alive_s: float | None = None
    initial_copies: int = 1
    lasting_nodes: int = 0
    enabled: bool = True

    def __post_init__(self) -> None:
        """Normalise the budget and validate."""
        check_types(self)
        if self.budget is not None:
            object.__setattr__(self, "budget", parse_size(self.budget))
            require(int(self.budget) >= 0, f"memory.budget must not be negative, not {self.budget}")
        require(
            self.keep_alive_s is None or self.keep_alive_s >= 0, f"memory.keep_alive_s must not be negative: {self.keep_alive_s}"
        )
        require(self.initial_copies >= 0, f"memory.initial_copies must not be negative, not {self.initial_copies}")
        require(self.lasting_nodes >= 0, f"memory.lasting_nodes must not be negative, not {self.lasting_nodes}")

    def room_bytes(self, host_memory_bytes: int) -> int:
        """See HostMemoryConfig."""
        if not self.enabled:
            return 0
        return host_memory_bytes if self.budget is None else int(self.budget)

    def build(self, host_memory_bytes: Mapping[NodeId, int]) -> HostCaches:
        """Return empty caches for nodes with ``host_memory_bytes`` each; UserError if the budget exceeds a node's."""
        return HostCaches(self, host_memory_bytes)


class HostCaches:
    """The host copies of all nodes. Every method takes the time ``now`` in seconds; expired copies count as absent."""

    def __init__(self, config: HostCacheConfig, host_memory_bytes: Mapping[NodeId, int]) -> None:
        least = min(host_memory_bytes.values())
        if config.budget is not None and int(config.budget) > least:
            raise UserError(f"memory.budget {config.budget} exceeds a node's host memory of {least} bytes")
        self._keep_alive_s, self._lasting_nodes = config.keep_alive_s, config.lasting_nodes
        self._budgets = {node: config.room_bytes(size) for node, size in host_memory_bytes.items()}
        self._nodes: dict[NodeId, OrderedDict[str, tuple[int, float]]] = {}
        self._used: dict[NodeId, int] = {}
        self._pins: dict[tuple[NodeId, str], int] = {}

    def used_bytes(self, node: NodeId) -> int:
        """Bytes of copies on ``node``, expired ones included until they are evicted."""
        return self._used.get(node, 0)

    def has(self, node: NodeId, model: str, now: float) -> bool:
        """True if ``node`` holds a usable host copy of ``model``."""
        cache = self._nodes.get(node)
        entry = cache.get(model) if cache else None
        if entry is None:
            return False
        return not self._expired(node, entry[1], now) or (node, model) in self._pins

    def holders(self, nodes: Iterable[NodeId], model: str, now: float) -> list[NodeId]:
        """Nodes among ``nodes`` that hold a usable copy of ``model``."""
        return [node for node in nodes if self.has(node, model, now)]

    def put(self, node: NodeId, model: str, size_bytes: int, now: float) -> list[str]:
        """Keep or renew a copy of ``size_bytes``; return the models evicted for it. A copy that does not fit is not kept."""
        cache = self._nodes.setdefault(node, OrderedDict())
        evicted = self.expire(node, now)
        if model in cache:
            self._drop(node, model)
        while cache and self._used.get(node, 0) + size_bytes > self._budgets[node]:
            victim = next((name for name in cache if not self._pinned(node, name)), None)
            if victim is None:
                break
            self._drop(node, victim)
            evicted.append(victim)
        if self._used.get(node, 0) + size_bytes <= self._budgets[node]:
            cache[model] = (size_bytes, now)
            self._used[node] = self._used.get(node, 0) + size_bytes
        return evicted

    def touch(self, node: NodeId, model: str, now: float) -> None:
        """Record a use: the copy becomes the most recently used and its keep-alive starts again. KeyError without a copy."""
        cache = self._nodes[node]
        cache[model] = (cache[model][0], now)
        cache.move_to_end(model)

    def pin(self, node: NodeId, model: str) -> None:
        """Pin a copy that a load or a multicast reads: while pinned it is neither evicted nor expires."""
        self._pins[node, model] = self._pins.get((node, model), 0) + 1

    def pins(self, node: NodeId, model: str) -> int:
        """Number of transfers that read this copy now."""
        return self._pins.get((node, model), 0)

    def unpin(self, node: NodeId, model: str, now: float) -> None:
        """Undo one pin; a use ends here, so the keep-alive starts again."""
        count = self._pins.get((node, model), 0)
        if count <= 1:
            self._pins.pop((node, model), None)
        else:
            self._pins[node, model] = count - 1
        if model in self._nodes.get(node, {}):
            self.touch(node, model, now)

    def expire(self, node: NodeId, now: float) -> list[str]:
        """Evict copies whose keep-alive has passed; return their models."""
        cache = self._nodes.get(node, OrderedDict())
        expired = [name for name, (_, used) in cache.items() if self._expired(node, used, now) and not self._pinned(node, name)]
        for name in expired:
            self._drop(node, name)
        return expired

    def forget(self, node: NodeId) -> None:
        """Drop all copies and pins of a lost node."""
        self._nodes.pop(node, None)
        self._used.pop(node, None)
        self._pins = {key: count for key, count in self._pins.items() if key[0] != node}

    def _expired(self, node: NodeId, used: float, now: float) -> bool:
        return self._keep_alive_s is not None and now - used > self._keep_alive_s and node >= self._lasting_nodes

    def _pinned(self, node: NodeId, model: str) -> bool:
        return (node, model) in self._pins

    def _drop(self, node: NodeId, model: str) -> None:
        size, _ = self._nodes[node].pop(model)
        self._used[node] -= size
