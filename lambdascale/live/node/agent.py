"""A node's process: it joins the cluster, holds weights, moves blocks and computes until told to leave.

Three parts with threads of their own do the work: the mover, computing, and the transport. The main thread talks with the
controller over one socket, so that messages keep their order. A failure that no part can name the concern of ends the node: the
controller hears of it as a Fault and counts the node as lost.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lambdascale.checkpoints import PackedModel
from lambdascale.checkpoints.safetensors_file import ALIGNMENT
from lambdascale.core import NodeId
from lambdascale.core.checks import require
from lambdascale.core.commands import (
    CancelTransfer,
    EvictBlocks,
    LoadBlocks,
    PlaceCopy,
    ReleaseNode,
    Serve,
    StartMulticast,
    StopInstance,
)
from lambdascale.core.events import NodeEvent
from lambdascale.live import wire
from lambdascale.live.node.line import LEFT, Line
from lambdascale.live.node.start import StartParts, bind, compile_when_quiet, make_context, pick_gpu, warm
from lambdascale.live.node_config import NodeConfig
from lambdascale.transport import (
    CudaIpcEndpoint,
    DeviceMemory,
    Endpoint,
    Handlers,
    Memory,
    ShmEndpoint,
    TcpEndpoint,
    TokenBucket,
    TransportError,
    gpu_of,
    rdma,
)

if TYPE_CHECKING:
    from lambdascale.inference import BlockStore

_BEAT_S = 0.25
# A thread lets others have the interpreter's lock: Python's 5 ms are a tenth of a block's send, which takes several turns.
_SWITCH_S = 0.0005
_SOCKETS: dict[str, type[TcpEndpoint]] = {"shm": ShmEndpoint, "tcp": TcpEndpoint}


def make_endpoint(config: NodeConfig, handlers: Handlers, link: TokenBucket | None, gpu: int | None) -> Endpoint:
    """Return the configured transport's endpoint, for a node with this GPU. UserError if the node lacks the hardware for it."""
    key = config.access.nodes_key
    options: dict[str, Any] = {"host": config.host, "link": link, "generation": config.generation}
    if config.transport == "cuda_ipc":
        require(gpu is not None, "the cuda_ipc transport moves blocks between GPUs: it needs device cuda")
        return CudaIpcEndpoint(config.node, handlers, key, gpu=gpu_of(gpu), **options)
    if config.transport == "rdma":
        owner = None if gpu is None or config.rdma.gpudirect == "off" else gpu_of(gpu)
        return rdma.load()(config.node, handlers, key, options=config.rdma, gpu=owner, **options)
    return _SOCKETS[config.transport](config.node, handlers, key, **options)


def make_store(config: NodeConfig, endpoint: Endpoint, device: str) -> tuple[BlockStore, Memory, int]:
    """Return a node's store of blocks, and the memory for hidden states, then KV, with its offset in what is registered.

    The arena that peers write to comes first in that memory.
    """
    import torch

    from lambdascale.inference import BlockStore, StoreConfig

    on_device = endpoint.on_device or config.device == "cpu"
    store_config = StoreConfig(
        host_bytes=config.host_bytes,
        device_bytes=config.device_bytes,
        device=device,
        land_on_device=on_device or config.collective == "nccl",
        verify=config.verify,
    )
    by_nccl = store_config.land_on_device and not on_device  # blocks do not come over the endpoint
    arena_bytes = 0 if by_nccl else config.device_bytes if on_device else config.host_bytes
    first = -(-arena_bytes // ALIGNMENT) * ALIGNMENT
    landing = endpoint.allocate(first + config.areas.nbytes)
    endpoint.register(landing)
    if by_nccl:
        return BlockStore(store_config), landing, first
    store = BlockStore(store_config, torch.as_tensor(landing, device=device) if isinstance(landing, DeviceMemory) else landing)
    if on_device:
        endpoint.register_source(store.host_memory())
    return store, landing[first:], first


def wait_and_run(gpu: int | None, models: Sequence[tuple[str, str]], connection: Connection) -> None:
    """Be a spare process: make the context of a GPU, with the kernels of ``models`` (names and directories) in it.

    Then wait for a node's configuration, and run the node; or end when the other end of ``connection`` is closed instead.
    """
    bind()
    make_context(gpu)
    if gpu is not None:
        warm([PackedModel.open(Path(directory), name) for name, directory in models], gpu, kernels=True)
    try:
        with connection:
            config, launched = connection.recv()
    except EOFError:
        return
    run(config, launched)


def run(config: NodeConfig, launched: float | None = None, *, local: bool = True) -> None:
    """Run a node until the controller ends it. ``local``: a child of the controller's process, which it does not outlive.

    ``launched``: when the launcher was asked for it, by this host's monotonic clock. Exits with status 2 after a user's mistake
    and 1 after a failure; the controller hears the reason first.
    """
    parts = StartParts(launched)
    if local:
        bind()
    sys.setswitchinterval(_SWITCH_S)
    line = Line(config)
    threading.excepthook = partial(_report_thread, config.node, line)
    try:
        agent = Agent(config, line, parts)
    except Exception as error:
        users = isinstance(error, ValueError)
        if not users:
            traceback.print_exc()
        line.say(wire.Fault(config.node, f"{error}" if users else f"{type(error).__name__}: {error}", users))
        line.close()
        sys.exit(2 if users else 1)
    try:
        agent.serve()
    except Exception as error:
        traceback.print_exc()
        line.say(wire.Fault(config.node, f"the agent failed: {type(error).__name__}: {error}", users=False))
        line.close()
        sys.stderr.flush()
        os._exit(1)  # without an orderly close: a thread to wait for may be part of the failure
    if line.lost:
        print(f"node {config.node}: {line.lost}, leaving", file=sys.stderr, flush=True)
        os._exit(LEFT)  # at once, without an orderly close: the system frees all memory
    agent.close()
    line.close()


def _report_thread(node: NodeId, line: Line, failure: threading.ExceptHookArgs) -> None:
    """Report the exception that has ended one of the node's threads: its work would remain undone without notice."""
    threading.__excepthook__(failure)
    name = "" if failure.thread is None else failure.thread.name
    line.say(wire.Fault(node, f"thread {name} failed: {failure.exc_type.__name__}: {failure.exc_value}", users=False))


class Agent:
    """A node's parts, joined. UserError if its configuration does not fit its hardware."""

    def __init__(self, config: NodeConfig, line: Line, parts: StartParts) -> None:
        # torch takes seconds to load; the process that agents are forked from has it already.
        with parts.part("imports"):
            import torch

            import lambdascale.live.node.preload  # noqa: F401  imported for its effect

        from lambdascale.live.node.collective import Collective, Outlet, paced_pieces
        from lambdascale.live.node.compute import Compute
        from lambdascale.live.node.kv_places import KvTraffic
        from lambdascale.live.node.loads import Links
        from lambdascale.live.node.mover import Mover
        from lambdascale.live.node.multicasts import BLOCK_BITS
        from lambdascale.live.node.parcels import Parcels
        from lambdascale.live.node.places import Area
        from lambdascale.live.node.runners import Executor, PacedExecutor, TimedExecutor, TorchExecutor
        from lambdascale.live.node.window import PACED, UNPACED

        torch.set_num_threads(config.threads)
        self._config = config
        self._line = line
        self._parts = parts
        self._leaving = threading.Event()
        self._connecting = threading.Lock()  # held by `connect` threads alone: no two of them connect to the same node
        self._newest = 0  # number of the last directory; the main thread writes it
        link = None if config.link is None else TokenBucket(config.link)
        handlers = Handlers(
            on_write=lambda peer, immediate, offset, size: self.mover.written(peer, immediate),
            on_checked=None
            if config.verify == "off"
            else lambda peer, immediate, offset, size, found: self.mover.written(peer, immediate, found),
            on_message=self._on_message,
            on_lost=self._on_lost,
        )
        gpu = pick_gpu(config)
        device = "cpu" if gpu is None else f"cuda:{gpu}"
        with parts.part("context"):
            make_context(gpu)
            self.endpoint = make_endpoint(config, handlers, link, gpu)
        models = [PackedModel.open(Path(directory), name) for name, directory in config.models]

        def warm_up(gpu: int) -> None:
            with parts.part("warm-up"):
                warm(models, gpu, kernels=config.kernels == "first")

        # Memory is populated, which takes seconds for a large arena, while the engine's first kernels are loaded.
        with ThreadPoolExecutor(1, "warm-up") as beside:
            warmed = beside.submit(warm_up, gpu) if gpu is not None and config.executor != "timed" else None
            with parts.part("memory"):
                self.store, area, first = make_store(config, self.endpoint, device)
                self.store.rehearse()
            if warmed is not None:
                warmed.result()
        if config.transport == "rdma" and self.endpoint.on_device:
            print(f"node {config.node}: NICs write to the memory of GPU {gpu}, by {config.rdma.gpudirect}", file=sys.stderr)
        for model in models:
            self.store.add(model)
        if gpu is not None and warmed is not None:
            given = self.store, gpu, self._leaving, config.limits.max_batch, config.slot_tokens
            threading.Thread(target=compile_when_quiet, args=given, name="kernels", daemon=True).start()
        if config.preloaded:
            with parts.part("preload"):
                for model in models:
                    self.store.load(model.name, range(len(model.blocks)), keep_host=False).wait()
        buckets = Links(
            ssd=None if config.ssd is None else TokenBucket(config.ssd),
            pcie=None if config.pcie is None else TokenBucket(config.pcie),
            remote=None if config.remote is None else TokenBucket(config.remote),
        )
        outlet = Outlet(
            written=lambda number, block: self.mover.written(config.node, number << BLOCK_BITS | block),
            ended=lambda number, error: self.mover.broadcast_ended(number, error),
            occupy=lambda busy: self.compute.occupy(busy).result(),
            send=self._send,
            report=self._report,
        )
        pieces = None if link is None else paced_pieces(config.cluster)
        self.collective = Collective(config.node, config.host, self.store, link, outlet, config.collective, pieces)
        self.mover = Mover(
            config.node,
            self.store,
            self.endpoint,
            self._report,
            self._fault,
            window=UNPACED if link is None else PACED,
            links=buckets,
            collective=self.collective,
            preloaded=config.preloaded,
        )
        places = Area(self.endpoint, area, first)
        hidden, kv = places.part(0, config.areas.hidden_bytes), places.part(config.areas.kv_begin, config.areas.kv_bytes)
        compute: Callable[..., Compute] = Compute
        executor: Executor
        if config.timeline is not None:
            from lambdascale.live.node.timeline import recorded

            compute, executor = recorded(config.timeline, config.node, config.slot_tokens, self.store)
        elif config.executor == "timed":
            executor = TimedExecutor(self.store, config.cluster.node(config.node))
        elif config.executor == "paced":
            executor = PacedExecutor(self.store, config.cluster.node(config.node), config.slot_tokens)
        else:
            executor = TorchExecutor(self.store, config.slot_tokens)
        self.compute = compute(
            config.node,
            executor,
            config.limits,
            config.slot_tokens,
            lambda model: self.store.model(model).architecture.vocab,
            line.say,
            self._send,
            # A place holds the hidden states of the largest iteration.
            lambda tell: Parcels(
                config.node, hidden, lambda model: config.limits.max_tokens * self.store.model(model).row_bytes, tell
            ),
            lambda tell, *heard: KvTraffic(config.node, kv, config.areas.kv_place_bytes, tell, *heard),
        )
        self.compute.start()
        self._commands: dict[type, Callable[[Any], object]] = {
            StartMulticast: self.mover.multicast,
            LoadBlocks: self.mover.load,
            CancelTransfer: lambda c: self.mover.cancel(c.transfer_id),
            EvictBlocks: self.mover.evict,
            PlaceCopy: self._place_copy,
            ReleaseNode: self._release,
            Serve: self.compute.serve,
            StopInstance: lambda c: self.compute.stop(c.instance),
        }
        self._messages: dict[type, Callable[[Any], object]] = {
            wire.Do: lambda m: self._commands[type(m.command)](m.command),
            wire.Assign: self.compute.take,
            wire.Switch: self.compute.switch,
            wire.NewStages: self.compute.repartition,
            wire.Abort: lambda m: self.compute.abort(m.request_id),
            wire.Directory: self._start_connecting,
            wire.Sever: self._start_severing,
            wire.Shutdown: lambda m: self._leaving.set(),
        }

    def serve(self) -> None:
        """Join, then carry out the controller's messages until it ends the node, or is lost itself (see Line).

        What runs in this loop must not wait for anything: while it does, no heartbeat is sent. Handlers queue work for the
        mover's and the compute thread, or start a thread of their own; they may fail, which ends the node.
        """
        self._line.say(wire.Hello(self._config.node, self.endpoint.address, os.getpid(), self._parts.seconds))
        beat = time.monotonic()
        while not self._leaving.is_set() and not self._line.lost:
            for message in self._line.poll(_BEAT_S):
                self._messages[type(message)](message)
            now = time.monotonic()
            if now - beat >= _BEAT_S:
                beat = now
                self._line.say(wire.Beat())

    def close(self) -> None:
        """End all threads and free everything."""
        self.compute.close()
        self.mover.close()
        self.endpoint.close()
        self.store.close()

    # -- what the parts tell each other ------------------------------------------------------------------------------

    def _report(self, event: NodeEvent) -> None:
        self._line.say(wire.Happened(event))

    def _fault(self, reason: str) -> None:
        self._line.say(wire.Fault(self._config.node, reason, users=False))

    def _send(self, node: NodeId, message: wire.Peer) -> bool:
        """Send a message; False if the peer is lost: the controller will say what becomes of the requests."""
        try:
            self.endpoint.send(node, wire.encode(message))
        except TransportError:
            return False
        return True

    def _on_message(self, peer: NodeId, data: bytes) -> None:
        try:
            message = wire.to_peer(data)
        except wire.Garbled as error:  # it costs the connection
            raise EOFError(f"node {peer} sends {error}") from error
        if isinstance(message, wire.Ready):
            self.mover.ready(peer, message)
        elif isinstance(message, wire.Rendezvous):
            self.collective.rendezvous(message)
        else:
            self.compute.take(message)

    def _on_lost(self, peer: NodeId, reason: str) -> None:
        self.mover.lost(peer)
        self.collective.lost(peer)
        self.compute.lost(peer)
        self._line.say(wire.Severed(peer, reason))

    # -- commands that concern more than one part --------------------------------------------------------------------

    def _start_connecting(self, directory: wire.Directory) -> None:
        """Connect beside the main loop: each peer may take up to the transport's timeout."""
        self._newest = directory.number
        threading.Thread(target=self._connect, args=(directory,), name="connect", daemon=True).start()

    def _start_severing(self, message: wire.Sever) -> None:
        """End a connection beside the main loop; its loss is reported as any other."""
        threading.Thread(target=self._sever, args=(message.peer,), name="connect", daemon=True).start()

    def _sever(self, peer: NodeId) -> None:
        with self._connecting:
            self.endpoint.sever(peer)

    def _connect(self, directory: wire.Directory) -> None:
        """Connect to the nodes with a lower id that are new, so that every pair has one connection."""
        with self._connecting:
            if directory.number < self._newest:
                return  # the later one names all nodes that this one does, or better
            for node in self.endpoint.expect(directory.generations):
                try:
                    self.endpoint.connect(node, directory.addresses[node])
                except TransportError as error:
                    if not self._leaving.is_set() and directory.number == self._newest:
                        self._line.say(wire.Unreached(node, str(error)))
                    return
            self._line.say(wire.Connected(self._config.node, directory.number))

    def _place_copy(self, command: PlaceCopy) -> None:
        self.mover.place_copy(command.model, lambda: self._line.say(wire.Placed(command.node, command.model)))

    def _release(self, command: ReleaseNode) -> None:
        """Free the memory once the instances that used it have stopped: the compute thread was told so before."""
        self.mover.release(command, self.compute.post(lambda: None))
