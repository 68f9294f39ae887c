"""The live cluster's configuration, and its assembly."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from lambdascale.checkpoints import PackedModel
from lambdascale.checkpoints.builtin import NAMES, builtin_model
from lambdascale.control import SystemConfig
from lambdascale.core import CapacityError, ClusterSpec, ModelSpec, TracedRequest, UserError
from lambdascale.core.checks import check_types, require
from lambdascale.inference.batch import Ticket
from lambdascale.inference.verification import Verify
from lambdascale.live.communicator_choice import Kind, choose
from lambdascale.live.controller.backend import LiveBackend
from lambdascale.live.controller.hub import Hub
from lambdascale.live.controller.launch import Launcher, LocalLauncher
from lambdascale.live.controller.pulse import PATIENCE_S
from lambdascale.live.node_config import NodeConfig
from lambdascale.live.node_memory import NodeMemory
from lambdascale.transport.cuda import count_gpus
from lambdascale.transport.rdma import RdmaOptions

# Prompts of traces are random tokens: the low ids of a tokenizer are its control tokens.
_FIRST_TOKEN, _TRACE_STREAM = 64, 7
_SERVER_RESTARTS = 5


@dataclass(frozen=True, kw_only=True)
class LiveConfig:
    """Real node processes. ``checkpoint``: a packed model, or a built-in one's name (smollm2, small, tiny).

    ``executor`` "timed" only takes the time that the cluster's compute model says; "paced" computes and takes at least that time.
    ``paced``: links, disks and PCIe (loads to the device, and what is sent from host copies) are as slow as the cluster's
    configuration says, otherwise they are as fast as this machine is.
    A sequence has at most ``slot_tokens`` tokens. ``threads`` per node, None: the machine's divided among the nodes.
    ``rdma`` is for the transport of that name. ``collective``: what the NCCL baseline broadcasts by; "auto" is NCCL where every
    node has a GPU of its own, else gloo.
    ``verify``: the blocks whose checksums nodes compare, when they load them and when they receive them: all ("full"), none
    ("off"), or the first, the last and every eighth ("sampled").
    ``silence_s``: a node not heard of for so long is given up (a local one that dies is noticed at once). Nodes wait as long for
    a controller that replays a trace, or while they start, and 1.5 s for a server's.
    ``restarts``: how often the process of a lost node is started again within ten minutes, at most. None: 5 times for a server,
    never while a trace is replayed, whose failures are part of what is measured.
    ``spares``: processes kept ready for each GPU (without GPUs: for all nodes) with its context and kernels, which restarted
    nodes take.
    ``kernels``: nodes with GPUs join when their kernels are compiled ("first", as measurements want it), or at once, and compile
    them behind the first tokens or while they have nothing to do ("behind").
    ``timeline``: folder where every node writes what its compute thread does when, None: nowhere.
    """

    checkpoint: str = "smollm2"
    dtype: str = "bf16"
    launcher: Literal["local", "ray"] = "local"
    transport: Literal["shm", "tcp", "rdma", "cuda_ipc"] = "shm"
    executor: Literal["torch", "paced", "timed"] = "torch"
    device: Literal["cpu", "cuda"] = "cpu"
    collective: Literal["auto", "nccl", "gloo"] = "auto"
    paced: bool = True
    slot_tokens: int = 512
    threads: int | None = None
    verify: Verify = "full"
    silence_s: float = 10.0
    restarts: int | None = None
    spares: int = 0
    kernels: Literal["first", "behind"] = "behind"
    timeline: str | None = None
    rdma: RdmaOptions = field(default_factory=RdmaOptions)

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self)
        require(self.slot_tokens >= 2, f"backend.slot_tokens must be at least 2, not {self.slot_tokens}")
        require(self.threads is None or self.threads >= 1, f"backend.threads must be at least 1, not {self.threads}")
        require(
            self.transport != "cuda_ipc" or self.device == "cuda",
            f"the cuda_ipc transport moves blocks between GPUs: it needs device cuda, not {self.device}",
        )
        require(
            self.rdma.gpudirect == "off" or (self.transport == "rdma" and self.device == "cuda"),
            f"backend.rdma.gpudirect={self.rdma.gpudirect} needs transport rdma and device cuda, "
            f"not {self.transport} and {self.device}",
        )
        require(
            self.collective != "nccl" or self.device == "cuda",
            f"backend.collective=nccl moves the memory of GPUs: it needs device cuda, not {self.device}",
        )
        require(self.restarts is None or self.restarts >= 0, f"backend.restarts must not be negative, not {self.restarts}")
        require(self.spares >= 0, f"backend.spares must not be negative, not {self.spares}")
        require(self.spares == 0 or self.launcher == "local", "backend.spares needs launcher local")
        require(
            self.timeline is None or self.executor == "torch",
            f"backend.timeline records what the engine does: it needs executor torch, not {self.executor}",
        )
        require(self.silence_s >= 1, f"backend.silence_s must be at least 1, not {self.silence_s}")

    @property
    def label(self) -> str:
        """Name of the backend in rows and summaries; it distinguishes timed and paced compute from this machine's own."""
        return "live" if self.executor == "torch" else f"live-{self.executor}"

    def restart_limit(self, *, open_ended: bool) -> int:
        """Return how often a node may be restarted by a server (``open_ended``) or by the run of a trace."""
        if self.restarts is not None:
            return self.restarts
        return _SERVER_RESTARTS if open_ended else 0

    def communicator(self, system: SystemConfig, nodes: int) -> tuple[Kind | None, str]:
        """Return the communicator of the system's broadcasts, None without any; and the reason for not using NCCL.

        UserError if NCCL is asked for and not possible.
        """
        if system.start.multicast != "collective":
            return None, ""
        from lambdascale.live.node.communicators import has_nccl  # torch takes seconds to import; only this needs it

        # Ray gives every node a GPU.
        gpus = nodes if self.launcher == "ray" else count_gpus() if self.device == "cuda" else 0
        return choose(self.collective, device=self.device, nodes=nodes, gpus=gpus, nccl=has_nccl())

    def packed(self, blocks: int) -> PackedModel:
        """Return the checkpoint, cut into ``blocks``; UserError if it is cut otherwise."""
        if self.checkpoint in NAMES:
            return builtin_model(self.checkpoint, blocks, self.dtype)
        model = PackedModel.open(Path(self.checkpoint))
        if len(model.blocks) != blocks:
            raise UserError(
                f"{self.checkpoint} is packed as {len(model.blocks)} blocks, the system moves {blocks}: "
                f"system.blocks={len(model.blocks)}, or pack it again"
            )
        return model

    def specs(self, models: Sequence[ModelSpec], blocks: int) -> tuple[ModelSpec, ...]:
        """The models as they are on disk: the sizes are the checkpoint's, the names the configuration's.

        UserError for a model whose replica takes several GPUs: a live node is one GPU.
        """
        for model in models:
            require(
                model.gpus_per_replica == 1,
                f"a replica of {model.name} takes {model.gpus_per_replica} GPUs, and a live node is one GPU: "
                "choose another model, model.gpus_per_replica=1, or backend=sim",
            )
        spec = self.packed(blocks).spec
        return tuple(replace(spec, name=model.name) for model in models)

    def seen(self, cluster: ClusterSpec, models: Sequence[tuple[str, PackedModel]], system: SystemConfig) -> ClusterSpec:
        """Return the cluster as the control plane has to see it. See NodeMemory."""
        return self.memory(models, system, cluster.nodes).seen(cluster)

    def memory(self, models: Sequence[tuple[str, PackedModel]], system: SystemConfig, nodes: int) -> NodeMemory:
        """Return the division of the nodes' memory. Nodes of this machine take turns at its GPUs; Ray gives each its own."""
        gpus = count_gpus() if self.device == "cuda" and self.launcher == "local" else 0
        return NodeMemory(
            models=models,
            system=system,
            nodes=nodes,
            transport=self.transport,
            device=self.device,
            slot_tokens=self.slot_tokens,
            sharing=-(-nodes // gpus) if gpus else 1,
        )

    def check_slots(self, cluster: ClusterSpec, models: Sequence[tuple[str, PackedModel]], system: SystemConfig) -> None:
        """Raise CapacityError if a GPU that is to serve a model lacks room for a replica's KV, which is reserved as a whole."""
        if self.device == "cpu" or self.executor == "timed":
            return
        slots = system.batching.max_batch
        for kind in self.seen(cluster, models, system).kinds:
            for name, model in models:
                if 0 < (room := kind.kv_tokens(model.spec)) < slots * self.slot_tokens:
                    raise CapacityError(
                        f"a replica's {slots} slots of {self.slot_tokens} tokens are more KV than a GPU of {cluster.name} has "
                        f"room for, {room} tokens of {name}: lower system.batching.max_batch or backend.slot_tokens (serve: "
                        "--slot-tokens)"
                    )

    def build(
        self,
        *,
        cluster: ClusterSpec,
        models: Sequence[ModelSpec],
        requests: Sequence[TracedRequest],
        system: SystemConfig,
        seed: int,
        token_times: bool = False,
    ) -> LiveBackend:
        """Return a started cluster that replays ``requests``, and keeps ``token_times`` if asked to; the caller closes it."""
        packed = self.packed(system.blocks)
        longest = max((each.prompt_tokens + each.answer_tokens for each in requests), default=0)
        if longest > self.slot_tokens:
            raise UserError(
                f"a request has {longest} tokens, a sequence may have {self.slot_tokens}: "
                "cut them with workload.max_context_tokens, or raise backend.slot_tokens"
            )
        return self.start(
            cluster=cluster,
            models=[(model.name, packed) for model in models],
            system=system,
            trace=requests,
            ticket_of=trace_tickets(packed, seed),
            token_times=token_times,
        )

    def start(
        self,
        *,
        cluster: ClusterSpec,
        models: Sequence[tuple[str, PackedModel]],
        system: SystemConfig,
        trace: Sequence[TracedRequest] = (),
        ticket_of: Callable[[TracedRequest], Ticket] | None = None,
        open_ended: bool = False,
        token_times: bool = False,
    ) -> LiveBackend:
        """Launch the nodes and wait for them. UserError for settings that contradict the packed models, or exceed the GPUs."""
        for name, model in models:
            require(
                len(model.blocks) == system.blocks, f"{name} has {len(model.blocks)} blocks, the system moves {system.blocks}"
            )
            limit = model.architecture.max_position
            require(self.slot_tokens <= limit, f"backend.slot_tokens {self.slot_tokens} exceeds the {limit} positions of {name}")
        self.check_slots(cluster, models, system)
        collective, why = self.communicator(system, cluster.nodes)
        if why:
            print(f"broadcasts go by gloo, through host memory, and not by NCCL: {why}", file=sys.stderr)
        launcher = self._launcher(models)
        # Nodes that replay a trace, or start with a cluster, are not replaced, and their machine may be overloaded: they are as
        # patient as the controller.
        patience_s = max(PATIENCE_S, self.silence_s)
        hub = Hub(launcher.host, PATIENCE_S if open_ended else patience_s, start_patience_s=patience_s)
        backend = LiveBackend(
            launcher=launcher,
            hub=hub,
            trace=trace,
            ticket_of=ticket_of or _no_tickets,
            silence_s=self.silence_s,
            restarts=self.restart_limit(open_ended=open_ended),
            open_ended=open_ended,
            token_times=token_times,
        )
        configs = [self._node(node, hub, cluster, models, system, collective or "gloo") for node in range(cluster.nodes)]
        try:
            backend.start(configs)
        except BaseException:
            backend.close()
            raise
        return backend

    def _launcher(self, models: Sequence[tuple[str, PackedModel]]) -> Launcher:
        if self.launcher == "ray":
            from lambdascale.live.controller.ray_launcher import RayLauncher

            return RayLauncher(gpus_per_node=1 if self.device == "cuda" else 0)
        kernels = models if self.executor != "timed" else ()
        return LocalLauncher(spares=self.spares, gpus=count_gpus() if self.device == "cuda" else 0, models=_places(kernels))

    def _node(
        self,
        node: int,
        hub: Hub,
        cluster: ClusterSpec,
        models: Sequence[tuple[str, PackedModel]],
        system: SystemConfig,
        collective: Kind,
    ) -> NodeConfig:
        """Return the configuration of one node."""
        hardware, memory = cluster.node(node), self.memory(models, system, cluster.nodes)
        lands_on_host = self.device != "cpu" and self.transport != "cuda_ipc" and collective != "nccl"
        network = hardware.nic_bytes_per_s * cluster.rdma_efficiency
        return NodeConfig(
            node=node,
            access=hub.access,
            models=_places(models),
            cluster=cluster,
            limits=system.batching,
            transport=self.transport,
            executor=self.executor,
            device=self.device,
            slot_tokens=self.slot_tokens,
            host_bytes=memory.host_bytes(hardware, lands_on_host=lands_on_host),
            device_bytes=memory.weights_bytes(hardware.gpus),
            threads=self.threads or max(1, (os.cpu_count() or 1) // cluster.nodes),
            link=network if self.paced else None,
            ssd=hardware.ssd_bytes_per_s if self.paced else None,
            pcie=hardware.pcie_bytes_per_s if self.paced else None,
            # Always paced: the store is this machine's checkpoint folder, as far away as the cluster says.
            remote=float(cluster.remote_bytes_per_s) or None,
            preloaded=system.start.instant,
            rdma=self.rdma,
            collective=collective,
            verify=self.verify,
            areas=memory.areas(hardware.gpu),
            kernels=self.kernels,
            timeline=self.timeline,
        )


def _places(models: Sequence[tuple[str, PackedModel]]) -> tuple[tuple[str, str], ...]:
    """Names and directories of models."""
    return tuple((name, str(model.directory.resolve())) for name, model in models)


def _no_tickets(traced: TracedRequest) -> Ticket:
    raise AssertionError("requests of a front end bring their tickets")


def trace_tickets(model: PackedModel, seed: int) -> Callable[[TracedRequest], Ticket]:
    """Prompts for a trace's requests: random tokens, the same for the same seed. Answers end where the trace's do."""
    vocab = model.architecture.vocab

    def ticket(traced: TracedRequest) -> Ticket:
        request = traced.request
        rng = np.random.default_rng((seed, _TRACE_STREAM, request.request_id))
        tokens = rng.integers(min(_FIRST_TOKEN, vocab - 1), vocab, size=request.prompt_tokens).tolist()
        return Ticket(request.request_id, tokens, request.prompt_tokens, traced.answer_tokens)

    return ticket
