"""An agent's decisions, its main loop and its ends. No processes."""

from __future__ import annotations

import mmap
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hydra.utils import instantiate

from lambdascale import inference
from lambdascale.core import UserError
from lambdascale.core.commands import StopInstance
from lambdascale.experiments.compose import compose
from lambdascale.live import wire
from lambdascale.live.config import LiveConfig
from lambdascale.live.node import agent as module
from lambdascale.live.node import start
from lambdascale.live.node.agent import Agent, make_endpoint, make_store, pick_gpu
from lambdascale.live.node.start import StartParts
from lambdascale.live.node_config import Areas
from lambdascale.transport import Handlers, TransportError

NOBODY = Handlers(on_write=lambda *_: None, on_message=lambda *_: None, on_lost=lambda *_: None)


def config(**fields: Any) -> Any:
    access = SimpleNamespace(nodes_key=b"k")
    known = {"node": 0, "device": "cuda", "transport": "shm", "access": access, "host": "127.0.0.1", "generation": 0}
    return SimpleNamespace(**(known | fields))


def test_nodes_take_turns_at_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [pick_gpu(config(node=node)) for node in range(4)] == [0, 1, 0, 1]
    assert pick_gpu(config(node=3, device="cpu")) is None


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="finds no GPU"):
        pick_gpu(config())


def test_cuda_ipc_on_a_cpu() -> None:
    with pytest.raises(UserError, match="needs device cuda"):
        LiveConfig(transport="cuda_ipc")
    with pytest.raises(UserError, match="needs device cuda"):
        make_endpoint(config(transport="cuda_ipc", device="cpu"), NOBODY, None, None)
    assert LiveConfig(transport="cuda_ipc", device="cuda").transport == "cuda_ipc"


@pytest.mark.parametrize("data", [b"", b"\xc1", wire.encode(wire.Beat())])
def test_a_peers_message_that_makes_no_sense_costs_the_connection(data: bytes) -> None:
    """The message ends the connection: a transport takes other exceptions for faults of this node, and prints a traceback."""
    with pytest.raises(EOFError, match=r"node 3 sends [0-9]+ bytes that are no message"):
        Agent._on_message(cast(Agent, None), 3, data)


class Deaf:
    """An endpoint that reaches nobody but node 0."""

    def __init__(self, node: int) -> None:
        self._node = node

    def expect(self, generations: dict[int, int]) -> list[int]:
        return [node for node in generations if node < self._node]

    def connect(self, node: int, address: str) -> None:
        if node:
            raise TransportError(f"nodes 2 and {node} are on different hosts")


@pytest.mark.parametrize(("node", "reached"), [(1, True), (2, False)])
def test_a_peer_that_cannot_be_reached(node: int, reached: bool) -> None:
    """The controller hears why, in one message."""
    said: list[Any] = []
    agent = Agent.__new__(Agent)
    line = SimpleNamespace(say=said.append)
    known = {"_connecting": threading.Lock(), "_newest": 7, "_leaving": threading.Event()}
    agent.__dict__.update(_config=config(node=node), endpoint=Deaf(node), _line=line, **known)
    agent._connect(wire.Directory(7, {0: "a", 1: "b", 2: "c"}, {0: 0, 1: 0, 2: 0}))
    assert said == [wire.Connected(1, 7) if reached else wire.Unreached(1, "nodes 2 and 1 are on different hosts")]


class Line:
    """A socket to a controller that says what it is given, and nothing more."""

    lost = ""

    def __init__(self, *messages: Any) -> None:
        self._messages = list(messages)
        self.said: list[Any] = []
        self.closed = False
        self.on_said = lambda message: None

    def say(self, message: Any) -> None:
        assert not self.closed
        self.said.append(message)
        self.on_said(message)

    def poll(self, timeout_s: float) -> list[Any]:
        return [self._messages.pop(0)] if self._messages else []

    def close(self) -> None:
        self.closed = True


def bare_agent(line: Line, **parts: Any) -> Agent:
    """An agent that has a main loop and no parts."""
    agent = Agent.__new__(Agent)
    known = {"_connecting": threading.Lock(), "_newest": 0, "_leaving": threading.Event(), "_parts": StartParts(None)}
    agent.__dict__.update(_config=config(node=1), _line=line, **known, **parts)
    agent._messages = {wire.Directory: agent._start_connecting}
    return agent


def test_an_agent_that_connects_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that does not answer for a while stops no heartbeat."""
    monkeypatch.setattr(module, "_BEAT_S", 0.0)
    go, line = threading.Event(), Line(wire.Directory(1, {0: "a", 1: "b"}, {0: 0, 1: 0}))

    def connect(node: int, address: str) -> None:
        if not go.wait(10):
            raise TransportError("no heartbeat meanwhile")

    agent = bare_agent(line, endpoint=SimpleNamespace(connect=connect, expect=lambda generations: [0], address="x"))
    answers = {wire.Beat: go.set, wire.Connected: agent._leaving.set, wire.Unreached: agent._leaving.set}
    line.on_said = lambda message: answers.get(type(message), lambda: None)()
    agent.serve()
    assert wire.Connected(1, 1) in line.said


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Statuses with which the process would have ended."""
    found: list[int] = []
    monkeypatch.setattr(module.os, "_exit", found.append)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back afterwards
    return found


def test_a_main_loop_that_fails(monkeypatch: pytest.MonkeyPatch, exits: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """Loudly: on stderr, to the controller, and with a status that is not 0."""
    line = Line(wire.Do(StopInstance(3)))
    agent = bare_agent(line, endpoint=SimpleNamespace(address="x"), close=lambda: None)
    monkeypatch.setattr(module, "Line", lambda config: line)
    monkeypatch.setattr(module, "Agent", lambda config, line, parts: agent)
    module.run(config(node=1), local=False)
    assert exits == [1]
    assert "Traceback" in capsys.readouterr().err
    (fault,) = [message for message in line.said if isinstance(message, wire.Fault)]
    assert (fault.node, fault.users) == (1, False)
    assert "KeyError" in fault.reason
    assert line.closed


def test_a_thread_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """The controller hears of it, whichever thread it is."""
    line, error = Line(), ZeroDivisionError("mine")
    failure = threading.ExceptHookArgs((type(error), error, None, threading.Thread(name="some")))
    module._report_thread(1, line, failure)
    assert line.said == [wire.Fault(1, "thread some failed: ZeroDivisionError: mine", False)]
    assert "mine" in capsys.readouterr().err


@pytest.mark.parametrize("verify", ["off", "sampled", "full"])
def test_what_is_verified(verify: Any) -> None:
    """The setting reaches the store of every node."""
    assert LiveConfig(verify=verify).verify == verify
    endpoint = SimpleNamespace(
        on_device=False,
        allocate=lambda size: memoryview(bytearray(size)),
        register=lambda memory: None,
        register_source=lambda memory: None,
    )
    sizes = {"host_bytes": 0, "device_bytes": 0, "areas": Areas()}
    told = config(device="cpu", verify=verify, collective="gloo", **sizes)
    store, _, _ = make_store(told, endpoint, "cpu")
    assert store.config.verify == verify
    store.close()


def test_hidden_states_land_behind_the_arena() -> None:
    """Peers write blocks and hidden states to one registered memory; the store's arena has none of the latter's."""
    registered = []
    endpoint = SimpleNamespace(
        on_device=False,
        allocate=lambda size: memoryview(mmap.mmap(-1, size)),
        register=registered.append,
        register_source=lambda memory: None,
    )
    sizes = {"host_bytes": 0, "device_bytes": 8192 + 5, "areas": Areas(60, 2, 20)}
    store, area, first = make_store(config(device="cpu", verify="off", collective="gloo", **sizes), endpoint, "cpu")
    assert (first, area.nbytes, registered[0].nbytes) == (12288, 4096 + 40, 12288 + 4096 + 40)
    area[:] = bytes([255]) * area.nbytes
    assert bytes(registered[0][first:]) == bytes(area)
    assert not store._tiers["gpu"].arena.bytes.any()
    store.close()


def test_a_setting_of_verify_that_does_not_exist() -> None:
    with pytest.raises(UserError, match="verify"):
        LiveConfig(verify="some")


@pytest.mark.parametrize(
    ("changes", "kv_bytes_per_token", "expected"),
    [
        ({}, 40, (16, 40 * 1024)),  # a whole sequence
        ({}, 400 << 10, (10, 25 << 19)),  # a layer of it, beyond 8 MiB
        ({"transport": "cuda_ipc", "device": "cuda"}, 400 << 10, (16, 64 << 20)),
        # A quarter of a tenth of 24 and of 2 GB: the rest is for weights and KV, and for all else.
        ({"transport": "cuda_ipc", "device": "cuda", "gpu": 24 * 10**9}, 400 << 10, (8, 64 << 20)),
        ({"transport": "cuda_ipc", "device": "cuda", "gpu": 2 * 10**9}, 400 << 10, (0, 0)),
        ({"gpu": 2 * 10**9}, 40, (16, 40 * 1024)),  # in host memory
        ({}, 16 << 20, (0, 0)),  # a layer of 512 MiB
        ({"transport": "rdma"}, 40, (0, 0)),
        ({"kv": "recompute"}, 40, (0, 0)),
        ({"kv": "cheapest"}, 40, (16, 40 * 1024)),
        ({"nodes": 1}, 40, (0, 0)),
    ],
)
def test_places_for_kv(changes: dict[str, Any], kv_bytes_per_token: int, expected: tuple[int, int]) -> None:
    """One layer of the longest sequence fits into each. Without them, KV travels in messages."""
    changes = dict(changes)
    nodes, system = changes.pop("nodes", 2), SimpleNamespace(kv=changes.pop("kv", "copy"))
    gpu_bytes = changes.pop("gpu", 80 * 10**9)
    spec, architecture = SimpleNamespace(kv_bytes_per_token=kv_bytes_per_token), SimpleNamespace(layers=32)
    model: Any = SimpleNamespace(spec=spec, architecture=architecture)
    memory = LiveConfig(slot_tokens=1024, **changes).memory([("m", model)], cast(Any, system), nodes)
    assert memory.kv_places(gpu_bytes) == expected


@pytest.mark.parametrize(("rate", "remote"), [("0", None), ("2MB/s", 2e6)])
def test_what_a_node_is_told(rate: str, remote: float | None) -> None:
    """The remote store's rate, also where nothing else is paced, and what to verify."""
    composed = compose(["cluster=desk", f"cluster.remote_bytes_per_s={rate}"])
    cluster, system = instantiate(composed.cluster, _convert_="all"), instantiate(composed.system, _convert_="all")
    live, model = LiveConfig(verify="sampled", paced=False), SimpleNamespace(block_bytes=(4096,), directory=Path("."))
    model.row_bytes = 128
    hub = SimpleNamespace(access=None)
    told = live._node(0, hub, cluster, [("m", model)], system, "gloo")
    assert (told.remote, told.verify, told.ssd) == (remote, "sampled", None)
    assert told.areas.hidden_bytes == 2 * cluster.nodes * (system.batching.max_tokens * 64 * 2 + 4096), "two pipelines' batches"
    over_rdma = replace(live, transport="rdma")._node(0, hub, cluster, [("m", model)], system, "gloo")
    alone = live._node(0, hub, replace(cluster, nodes=1), [("m", model)], system, "gloo")
    assert (over_rdma.areas.hidden_bytes, alone.areas.hidden_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("transport", "name", "nodes", "collective", "landing"),
    [
        ("shm", "lambdascale", 2, "gloo", True),
        ("cuda_ipc", "lambdascale", 2, "gloo", False),
        ("shm", "lambdascale", 1, "gloo", False),
        ("shm", "serverlessllm", 2, "gloo", False),
        ("shm", "nccl_broadcast", 2, "nccl", False),
        ("shm", "nccl_broadcast", 2, "gloo", True),
    ],
)
def test_host_memory_of_a_gpu_node_is_for_what_others_write_there(
    transport: Any, name: str, nodes: int, collective: Any, landing: bool
) -> None:
    """Loads need none of it: they go through a small ring."""
    composed = compose(["cluster=desk", f"system={name}", "system.memory.enabled=false"])
    cluster, system = instantiate(composed.cluster, _convert_="all"), instantiate(composed.system, _convert_="all")
    live, model = LiveConfig(device="cuda", transport=transport), SimpleNamespace(block_bytes=(4096,), directory=Path("."))
    model.row_bytes = 128
    told = live._node(0, SimpleNamespace(access=None), replace(cluster, nodes=nodes), [("m", model)], system, collective)
    assert told.host_bytes == (4096 if landing else 0)


def test_kernels_wait_for_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile them once nothing is being loaded, and not at all in a node that leaves before."""
    loading, compiled, reserved = [True, True, False], [], []
    monkeypatch.setattr(start, "_QUIET_S", 0.001)
    monkeypatch.setattr(inference, "compile_kernels", lambda model, device: compiled.append((model, str(device))))
    monkeypatch.setattr(inference, "reserve_kv", lambda *arguments: reserved.append(arguments[2:]))

    class Store:
        models = ("m",)

        @property
        def loading(self) -> bool:
            return loading.pop(0)

    leaving: Any = threading.Event()
    start.compile_when_quiet(Store(), 1, leaving, 8, 100)  # type: ignore[arg-type]  # a stand-in
    assert (compiled, loading, reserved) == ([("m", "cuda:1")], [], [(8, 100)])
    leaving.set()
    start.compile_when_quiet(Store(), 1, leaving, 8, 100)  # type: ignore[arg-type]  # a stand-in
    assert len(compiled) == 1
