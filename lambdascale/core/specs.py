"""Models and clusters as values. Sizes in bytes, rates in bytes/s, times in seconds; conf/ has the numbers and their sources."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from heapq import heapify, heapreplace
from itertools import pairwise
from typing import Any

from lambdascale.core.checks import check_types, require
from lambdascale.core.errors import CapacityError, UserError
from lambdascale.core.kv_path import KvPath
from lambdascale.core.process_start import ProcessStart
from lambdascale.core.units import parse_rate, parse_size


def _positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{type(config).__name__}.{name} must be positive, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """A block: layers ``first_layer`` to ``last_layer`` (both included) in ``size_bytes`` contiguous bytes."""

    index: int
    first_layer: int
    last_layer: int
    size_bytes: int

    @property
    def layers(self) -> int:
        """Number of layers in the block."""
        return self.last_layer - self.first_layer + 1


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Sizes of a decoder-only transformer.

    ``weight_bytes`` is the size of the whole checkpoint, of which the input embedding and the output head take
    ``embedding_bytes`` each. A replica is split by layers over ``gpus_per_replica`` GPUs of one node.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    vocab: int
    weight_bytes: int | str
    dtype_bytes: int = 2
    gpus_per_replica: int = 1

    def __post_init__(self) -> None:
        """Normalise sizes and validate."""
        check_types(self)
        object.__setattr__(self, "weight_bytes", parse_size(self.weight_bytes))
        _positive(self, "layers", "hidden", "heads", "kv_heads", "vocab", "weight_bytes", "dtype_bytes", "gpus_per_replica")
        require(
            self.hidden % self.heads == 0,
            f"model {self.name}: hidden {self.hidden} is not a multiple of heads {self.heads}",
        )
        require(
            2 * self.embedding_bytes < self.size_bytes,
            f"model {self.name}: weight_bytes {self.weight_bytes} is too small for its embedding and head",
        )

    @property
    def size_bytes(self) -> int:
        """Size of the checkpoint in bytes (``weight_bytes`` after parsing)."""
        return int(self.weight_bytes)

    @property
    def embedding_bytes(self) -> int:
        """Bytes of the input embedding, and of the output head."""
        return self.vocab * self.hidden * self.dtype_bytes

    @property
    def layer_bytes(self) -> int:
        """Bytes of one transformer layer."""
        return (self.size_bytes - 2 * self.embedding_bytes) // self.layers

    @property
    def params(self) -> float:
        """Number of parameters."""
        return self.size_bytes / self.dtype_bytes

    @cached_property
    def kv_bytes_per_token(self) -> int:
        """KV-cache bytes of one token over all layers."""
        return 2 * self.layers * self.kv_heads * (self.hidden // self.heads) * self.dtype_bytes

    @cached_property
    def _partitions(self) -> dict[int, tuple[BlockSpec, ...]]:
        return {}

    def partition(self, blocks: int) -> tuple[BlockSpec, ...]:
        """Divide the model into ``blocks`` contiguous blocks of near-equal bytes (reference, section 2.1).

        The first also carries the embedding, the last the head. A block holds at least one layer; UserError otherwise.
        """
        if not 1 <= blocks <= self.layers:
            raise UserError(f"{self.name} has {self.layers} layers: choose 1 to {self.layers} blocks, not {blocks}")
        if blocks not in self._partitions:
            self._partitions[blocks] = self._cut(blocks)
        return self._partitions[blocks]

    def _cut(self, blocks: int) -> tuple[BlockSpec, ...]:
        """Assign each layer in turn to the smallest block so far, which minimises the size of the largest block."""
        embedding, layer = self.embedding_bytes, self.layer_bytes
        body = self.size_bytes - 2 * embedding
        extra = [embedding * ((index == 0) + (index == blocks - 1)) for index in range(blocks)]
        layers = [1] * blocks
        smallest = [(extra[index] + layer, index) for index in range(blocks)]
        heapify(smallest)
        for _ in range(self.layers - blocks):
            size, index = smallest[0]
            layers[index] += 1
            heapreplace(smallest, (size + layer, index))
        cuts, begin = [], 0
        for index, count in enumerate(layers):
            end = begin + count
            size = body * end // self.layers - body * begin // self.layers + extra[index]
            cuts.append(BlockSpec(index=index, first_layer=begin, last_layer=end - 1, size_bytes=size))
            begin = end
        return tuple(cuts)


# Share of a GPU's memory for weights, KV and what is set aside; the rest is for all else.
MEMORY_UTILISATION = 0.9


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """Data sheet of a GPU: memory (bytes), memory bandwidth (bytes/s), dense 16-bit matrix rate (FLOP/s).

    ``set_aside_bytes``: memory that weights and KV do not get. Live nodes add what others write to beside blocks.
    ``weights_bytes``: memory that weights get, whichever model is served; None: as much as that takes. Live nodes say how much:
    they keep room for further models.
    """

    name: str
    memory_bytes: int | str
    hbm_bytes_per_s: float | str
    peak_flops: float
    set_aside_bytes: int | str = 0
    weights_bytes: int | str | None = None

    def __post_init__(self) -> None:
        """Normalise sizes and validate."""
        check_types(self)
        object.__setattr__(self, "memory_bytes", parse_size(self.memory_bytes))
        object.__setattr__(self, "set_aside_bytes", parse_size(self.set_aside_bytes))
        object.__setattr__(self, "hbm_bytes_per_s", parse_rate(self.hbm_bytes_per_s))
        _positive(self, "memory_bytes", "hbm_bytes_per_s", "peak_flops")
        if self.weights_bytes is not None:
            object.__setattr__(self, "weights_bytes", parse_size(self.weights_bytes))
            _positive(self, "weights_bytes")
        require(int(self.set_aside_bytes) >= 0, f"GpuSpec.set_aside_bytes must not be negative, not {self.set_aside_bytes!r}")


@dataclass(frozen=True, kw_only=True)
class ComputeTable:
    """Iteration times measured for one model on one node: prefill over tokens, decode over batch size (short contexts).

    ``model``: name of the model that was measured. ``prefill_tokens``: tokens of the prefills, rising. ``prefill_s``: their
    seconds. ``decode_batch``: sequences of the decode iterations, rising. ``decode_s``: their seconds. Each token of KV cache
    read adds ``decode_s_per_context_token`` to a decode iteration.
    """

    model: str
    prefill_tokens: tuple[float, ...]
    prefill_s: tuple[float, ...]
    decode_batch: tuple[float, ...]
    decode_s: tuple[float, ...]
    decode_s_per_context_token: float = 0.0

    def __post_init__(self) -> None:
        """Validate: equal lengths, rising points, positive times."""
        check_types(self)
        for xs, ys, what in ((self.prefill_tokens, self.prefill_s, "prefill"), (self.decode_batch, self.decode_s, "decode")):
            require(
                len(xs) == len(ys) > 0, f"measured table of {self.model}: {what} needs at least one point and one time per point"
            )
            rising = all(a < b for a, b in pairwise(xs))
            require(rising and min(ys) > 0, f"measured table of {self.model}: {what} points must rise and times be positive")


@dataclass(frozen=True, kw_only=True)
class ComputeSpec:
    """Speed of an engine on a GPU: efficiencies against the data sheet, or ``measured`` tables for the models that have one.

    ``iteration_overhead_s`` is a fixed cost of every iteration. ``shared_slowdown`` simulates nodes that are processes of one
    machine and share its cores: the factors by which an iteration takes longer while one, two, ... nodes compute (beyond the
    last: in proportion); () for nodes that share nothing. Live nodes ignore it.
    """

    flops_efficiency: float
    bandwidth_efficiency: float
    iteration_overhead_s: float = 0.0
    measured: tuple[ComputeTable, ...] = ()
    shared_slowdown: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self)
        for name in ("flops_efficiency", "bandwidth_efficiency"):
            value = getattr(self, name)
            require(0 < value <= 1, f"ComputeSpec.{name} must be in (0, 1], not {value!r}")
        require(
            self.iteration_overhead_s >= 0,
            f"ComputeSpec.iteration_overhead_s must not be negative: {self.iteration_overhead_s!r}",
        )
        slowdowns = (1.0, *self.shared_slowdown)
        require(
            all(one <= two for one, two in pairwise(slowdowns)),
            f"ComputeSpec.shared_slowdown must start at 1 or more and never fall: {self.shared_slowdown!r}",
        )


@dataclass(frozen=True, kw_only=True)
class NodeSpec:
    """Hardware of one node: ``gpus`` GPUs of one kind and their engine's speed; rates in bytes/s.

    ``nic_bytes_per_s`` is the line rate of all its NICs together, per direction; ``pcie_bytes_per_s`` and ``ssd_bytes_per_s`` are
    the node's too.
    """

    gpus: int
    gpu: GpuSpec
    compute: ComputeSpec
    nic_bytes_per_s: float
    pcie_bytes_per_s: float
    ssd_bytes_per_s: float
    host_memory_bytes: int

    def kv_tokens(self, model: ModelSpec, memory_utilisation: float = MEMORY_UTILISATION) -> int:
        """Tokens of KV cache for each batch of a replica, beside the weights and what is set aside; 0 or less: they do not fit.

        The GPUs of a replica work on as many batches at once, and share the memory that the weights leave among them.
        """
        gpus = model.gpus_per_replica
        if gpus > self.gpus:
            return 0
        weights = model.size_bytes if self.gpu.weights_bytes is None else gpus * int(self.gpu.weights_bytes)
        memory = int(self.gpu.memory_bytes) * gpus * memory_utilisation - gpus * int(self.gpu.set_aside_bytes)
        return int((memory - weights) // (gpus * model.kv_bytes_per_token))


@dataclass(frozen=True, kw_only=True)
class NodeOverride:
    """Differences of the nodes with the ids ``nodes`` from the cluster's others; None keeps the cluster's value.

    ``gpus``: GPUs of each of these nodes. ``gpu``: their data sheet, a GpuSpec. ``compute``: their speed, a ComputeSpec.
    ``nics_per_node``: their NICs. ``nic_bytes_per_s``: line rate of each NIC, per direction. ``pcie_bytes_per_s``: rate from host
    memory to the GPUs. ``ssd_bytes_per_s``: rate of their SSD. ``host_memory_bytes``: memory of the host.
    """

    nodes: tuple[int, ...]
    gpus: int | None = None
    gpu: GpuSpec | None = None
    compute: ComputeSpec | None = None
    nics_per_node: int | None = None
    nic_bytes_per_s: float | str | None = None
    pcie_bytes_per_s: float | str | None = None
    ssd_bytes_per_s: float | str | None = None
    host_memory_bytes: int | str | None = None

    def __post_init__(self) -> None:
        """Normalise rates and validate."""
        check_types(self)
        for name in ("nic_bytes_per_s", "pcie_bytes_per_s", "ssd_bytes_per_s"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, parse_rate(getattr(self, name)))
                _positive(self, name)
        if self.nics_per_node is not None:
            _positive(self, "nics_per_node")
        if self.host_memory_bytes is not None:
            object.__setattr__(self, "host_memory_bytes", parse_size(self.host_memory_bytes))

    def apply(self, common: NodeSpec, nics: int, nic_bytes_per_s: float) -> NodeSpec:
        """Return ``common`` with the differences; ``nics`` and the rate of each are the cluster's."""
        apart = ("nodes", "nics_per_node", "nic_bytes_per_s")
        named = ((field.name, getattr(self, field.name)) for field in fields(self) if field.name not in apart)
        rate = (self.nics_per_node or nics) * (nic_bytes_per_s if self.nic_bytes_per_s is None else float(self.nic_bytes_per_s))
        changes: dict[str, Any] = {name: value for name, value in named if value is not None}
        return replace(common, nic_bytes_per_s=rate, **changes)


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """A cluster of nodes that are equal except for ``overrides``.

    A node has ``nics_per_node`` NICs of ``nic_bytes_per_s`` line rate per direction each; a send uses them all.
    ``rdma_efficiency`` and ``collective_efficiency`` are the shares of the line rate that one-sided writes and a collective's
    ring achieve. ``link_latency_s`` is the start-up time of one send, ``hop_latency_s`` the time for activations to reach the
    next stage; between GPUs of a node they take none. ``pcie_bytes_per_s`` (host to GPU) and ``ssd_bytes_per_s`` are per node;
    ``remote_bytes_per_s`` is the remote store's rate to one node, 0 without a store. ``usd_per_host_gb_hour``: price of host
    memory that copies of models take, per 10^9 bytes. ``start``: the start of a process on a node, where that is simulated.
    ``kv_path``: the way of a request's KV to another node, which a live cluster says itself: see KvPath; with "places",
    ``kv_places`` of ``kv_place_bytes`` on each node, 0: as many as it needs.
    ``provenance`` names the origin of the numbers.
    """

    name: str
    nodes: int
    gpus_per_node: int
    gpu: GpuSpec
    compute: ComputeSpec
    nic_bytes_per_s: float | str
    rdma_efficiency: float
    collective_efficiency: float
    link_latency_s: float
    hop_latency_s: float
    pcie_bytes_per_s: float | str
    ssd_bytes_per_s: float | str
    host_memory_bytes: int | str
    usd_per_gpu_hour: float
    remote_bytes_per_s: float | str = 0.0
    usd_per_host_gb_hour: float = 0.0
    nics_per_node: int = 1
    overrides: tuple[NodeOverride, ...] = ()
    start: ProcessStart | None = None
    kv_path: KvPath = "network"
    kv_places: int = 0
    kv_place_bytes: int | str = 0
    provenance: str = "configured: conf/cluster and overrides"

    def __post_init__(self) -> None:
        """Normalise rates and validate."""
        check_types(self)
        for name in ("nic_bytes_per_s", "pcie_bytes_per_s", "ssd_bytes_per_s", "remote_bytes_per_s"):
            object.__setattr__(self, name, parse_rate(getattr(self, name)))
        for name in ("host_memory_bytes", "kv_place_bytes"):
            object.__setattr__(self, name, parse_size(getattr(self, name)))
        _positive(self, "nodes", "gpus_per_node", "nics_per_node", "nic_bytes_per_s", "pcie_bytes_per_s", "ssd_bytes_per_s")
        for name in ("rdma_efficiency", "collective_efficiency"):
            value = getattr(self, name)
            require(0 < value <= 1, f"ClusterSpec.{name} must be in (0, 1], not {value!r}")
        prices = ("usd_per_gpu_hour", "usd_per_host_gb_hour")
        for name in ("link_latency_s", "hop_latency_s", "remote_bytes_per_s", "host_memory_bytes", *prices):
            value = getattr(self, name)
            require(value >= 0, f"ClusterSpec.{name} must not be negative, not {value!r}")
        places = self.kv_places, int(self.kv_place_bytes)
        require(
            places == (0, 0) or (min(places) > 0 and self.kv_path == "places"),
            f"cluster.kv_places and cluster.kv_place_bytes must be positive, with kv_path=places, or both be 0, not {places}",
        )

        known = [node for override in self.overrides for node in override.nodes]
        for node in known:
            require(0 <= node < self.nodes, f"cluster.overrides names node {node}, but nodes are 0 to {self.nodes - 1}")
        require(len(set(known)) == len(known), f"cluster.overrides names a node twice: {sorted(known)}")

    def node(self, node: int) -> NodeSpec:
        """Return the hardware of node ``node``."""
        return self._specs.get(node, self._common)

    @cached_property
    def _common(self) -> NodeSpec:
        return NodeSpec(
            gpus=self.gpus_per_node,
            gpu=self.gpu,
            compute=self.compute,
            nic_bytes_per_s=self.nics_per_node * float(self.nic_bytes_per_s),
            pcie_bytes_per_s=float(self.pcie_bytes_per_s),
            ssd_bytes_per_s=float(self.ssd_bytes_per_s),
            host_memory_bytes=int(self.host_memory_bytes),
        )

    @cached_property
    def _specs(self) -> dict[int, NodeSpec]:
        nics, rate = self.nics_per_node, float(self.nic_bytes_per_s)
        return {node: each.apply(self._common, nics, rate) for each in self.overrides for node in each.nodes}

    @cached_property
    def kinds(self) -> tuple[NodeSpec, ...]:
        """Distinct kinds of hardware among the nodes."""
        alike = (self._common,) if len(self._specs) < self.nodes else ()
        return tuple(dict.fromkeys((*alike, *self._specs.values())))

    def kv_tokens(self, model: ModelSpec) -> int:
        """Tokens of KV cache that fit beside the weights on every node that can hold ``model``; CapacityError if no node can."""
        fitting = [tokens for kind in self.kinds if (tokens := kind.kv_tokens(model)) > 0]
        if not fitting:
            raise CapacityError(
                f"{model.name} ({model.size_bytes / 1e9:.2f} GB on {model.gpus_per_replica} GPUs) does not fit a node of "
                f"{self.name}: {self.gpus_per_node} x {int(self.gpu.memory_bytes) / 1e9:.1f} GB, 90% usable"
                + (f", {int(self.gpu.set_aside_bytes) / 1e9:.2f} GB set aside" if self.gpu.set_aside_bytes else "")
                + (f", {int(self.gpu.weights_bytes) / 1e9:.2f} GB for weights of all models" if self.gpu.weights_bytes else "")
            )
        return min(fitting)
