"""Memory of live nodes: what weights, KV and others' writes get of a GPU and its host, for nodes and for the control plane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lambdascale.checkpoints import PackedModel
from lambdascale.checkpoints.safetensors_file import ALIGNMENT
from lambdascale.control import SystemConfig
from lambdascale.core import ClusterSpec, NodeSpec
from lambdascale.core.kv_path import KvPath
from lambdascale.core.specs import GpuSpec
from lambdascale.live.node_config import Areas

# Nodes of a pipeline, and so its batches in flight, that memory is set aside for; and the most of it in bytes.
_PIPELINE, _MOST_PLACES = 4, {"cpu": 256 << 20, "cuda": 1 << 30}
# Places for KV on a node, in host memory and on a GPU: their number, the size that parts of it are cut to, and the most bytes.
# A part takes milliseconds from grant to grant, most of it the wait for a turn, and a GPU copies 300 GB/s.
_KV_PLACES, _KV_PART, _MOST_KV = 16, {False: 8 << 20, True: 64 << 20}, {False: 128 << 20, True: 1 << 30}


def batch_slots(most: int, kv_tokens: int, slot_tokens: int, layers: Sequence[int]) -> int:
    """Return the KV slots of each batch of an instance: ``most``, or as many as have room on each of its nodes; at least one.

    ``layers``: number of the model's layers on each node, for one batch in flight per node. ``kv_tokens``: KV memory of the node
    that has least, in tokens of all layers, as the control plane promises it: a node with more than its part of the layers
    keeps more than its part of the KV. A slot has ``slot_tokens`` tokens, so that every request fits one: with fewer slots,
    requests wait for each other, and none is lost. One slot may be too many for a pipeline of more nodes than ``most``, with
    nearly all layers on one: its start fails, and its requests go elsewhere, three times at most.
    """
    return max(1, min(most, kv_tokens * sum(layers) // (len(layers) * max(layers) * slot_tokens)))


@dataclass(frozen=True, kw_only=True)
class NodeMemory:
    """Sizes for a cluster of ``nodes`` nodes that serves ``models``; ``sharing`` of them have a GPU together.

    A node has one GPU (on ``device`` "cpu" none), whatever the number of ``gpus`` that the control plane counts on it: so many
    models are served there at once. ``transport``, ``slot_tokens``: see LiveConfig.
    """

    models: Sequence[tuple[str, PackedModel]]
    system: SystemConfig
    nodes: int
    transport: str
    device: Literal["cpu", "cuda"]
    slot_tokens: int
    sharing: int = 1

    @property
    def _sizes(self) -> list[int]:
        """Bytes of arena that each model takes, largest first: blocks begin on pages."""
        rooms = (sum(-(-size // ALIGNMENT) * ALIGNMENT for size in model.block_bytes) for _, model in self.models)
        return sorted(rooms, reverse=True)

    def weights_bytes(self, gpus: int) -> int:
        """Return the memory for weights on the device.

        With several models it has room for one more than are served at once: memory comes back in pieces. Models that a node
        holds from the start ("instant" loads) all stay.
        """
        return sum(self._sizes if self.system.start.instant else self._sizes[: gpus + 1])

    def host_bytes(self, hardware: NodeSpec, *, lands_on_host: bool) -> int:
        """Return the memory for weights in host memory: for copies, and for what is loaded or sent through it.

        ``lands_on_host``: others write blocks there that go on to the device. They stay until their model is released, as long as
        the next one needs room beside it. Loads of a GPU's node need none.
        """
        sizes = self._sizes
        room = self.system.memory.room_bytes(hardware.host_memory_bytes)
        wanted = (sum(sizes) if room else 0) + (sizes[0] if self.system.start.loader == "sequential" else 0)
        copies = min(wanted, room + sizes[0])
        if not lands_on_host or self.nodes == 1 or self.system.start.multicast is None:
            return copies
        # A block has one place, as a copy or on its way.
        return max(copies, min(sum(sizes), copies + sum(sizes[: hardware.gpus + 1])))

    def areas(self, gpu: GpuSpec) -> Areas:
        """Return a node's memory for what others write there beside blocks."""
        return Areas(self._hidden_bytes(), *self.kv_places(int(gpu.memory_bytes) // self.sharing))

    def _hidden_bytes(self) -> int:
        """Return the memory of a node for the hidden states that others send it: for two pipelines, up to a bound."""
        if self.nodes == 1 or self.transport == "rdma":
            return 0
        one = self.system.batching.max_tokens * max((model.row_bytes for _, model in self.models), default=0)
        return min(2 * min(self.nodes, _PIPELINE) * (one + ALIGNMENT), _MOST_PLACES[self.device])

    def kv_places(self, gpu_bytes: int) -> tuple[int, int]:
        """Return the number and size of a node's places for KV; (0, 0) where it travels in messages, or none moves.

        A place holds at least a layer of the longest sequence. If that exceeds the bound, KV travels in messages. On a GPU
        places take at most a fortieth of its ``gpu_bytes``.
        """
        if self.nodes == 1 or self.transport == "rdma" or self.system.kv == "recompute":
            return 0, 0
        on_gpu = self.transport == "cuda_ipc"
        longest = [(model.spec.kv_bytes_per_token * self.slot_tokens, model.architecture.layers) for _, model in self.models]
        layer = max(whole // layers for whole, layers in longest)
        size = max(layer, min(_KV_PART[on_gpu], max(whole for whole, _ in longest)))
        size = -(-size // ALIGNMENT) * ALIGNMENT
        most = min(_MOST_KV[on_gpu], gpu_bytes // 40) if on_gpu else _MOST_KV[on_gpu]
        number = min(_KV_PLACES, most // size)
        return (number, size) if number else (0, 0)

    # -- for the control plane ---------------------------------------------------------------------------------------

    def seen(self, cluster: ClusterSpec) -> ClusterSpec:
        """Return the cluster as the control plane has to see it: with these nodes' way of KV, and what it gets of their GPUs."""
        areas = [self.areas(kind.gpu) for kind in cluster.kinds]
        least = min(areas, key=lambda each: each.kv_places)  # their size is the same everywhere
        path: KvPath = "places" if least.kv_places else "messages"
        cluster = replace(cluster, kv_path=path, kv_places=least.kv_places, kv_place_bytes=least.kv_place_bytes)
        if self.device == "cpu":
            return cluster
        gpu, gpus = cluster.gpu, cluster.gpus_per_node
        overrides = tuple(replace(each, gpu=self._part(each.gpu or gpu, each.gpus or gpus)) for each in cluster.overrides)
        return replace(cluster, gpu=self._part(gpu, gpus), overrides=overrides)

    def _part(self, gpu: GpuSpec, gpus: int) -> GpuSpec:
        """Return each of the ``gpus`` that a node's share of a GPU counts for: equal parts of it."""
        aside = int(gpu.set_aside_bytes) + (self.areas(gpu).nbytes if self.transport == "cuda_ipc" else 0)
        return replace(
            gpu,
            memory_bytes=int(gpu.memory_bytes) // (self.sharing * gpus),
            set_aside_bytes=-(-aside // gpus),
            weights_bytes=-(-self.weights_bytes(gpus) // gpus),
        )
