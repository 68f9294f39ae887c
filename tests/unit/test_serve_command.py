"""``lambdascale serve`` without a cluster: the choice of a system, and when a service is alive and ready."""

from __future__ import annotations

import argparse
import asyncio
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lambdascale.cli.serve import _cluster, _system
from lambdascale.control import SystemConfig
from lambdascale.core import UserError
from lambdascale.core.commands import Serve, StopInstance
from lambdascale.core.events import NodeGivenUp, NodeJoined, NodeLost
from lambdascale.core.plan import Stage
from lambdascale.live.config import LiveConfig
from lambdascale.live.serving.options import HttpOptions
from lambdascale.live.serving.server import Service, _Server, window_of
from lambdascale.live.serving.state import ClusterState
from lambdascale.transport import cuda


def system(choice: str | Path, *overrides: str) -> SystemConfig:
    return _system(argparse.Namespace(system=str(choice), min_nodes=1, keep_alive=7.0, overrides=list(overrides)), 8)


@pytest.mark.parametrize(
    ("device", "launcher", "sizes", "memory"),
    [
        ("cuda", "local", [80 << 30, 24 << 30], 24 << 30),
        ("cuda", "local", [], 1 << 40),
        ("cuda", "ray", [24 << 30], 1 << 40),
        ("cpu", "local", [24 << 30], 1 << 40),
    ],
    ids=["the smallest GPU's", "no GPU: its nodes will say so", "GPUs of other machines", "none is used"],
)
def test_memory_that_decisions_count_on(
    device: str, launcher: str, sizes: list[int], memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "gpu_sizes", lambda: sizes)
    arguments = argparse.Namespace(device=device, launcher=launcher, nodes=2, link=None, disk=None)
    assert _cluster(arguments).gpu.memory_bytes == memory


class TestSystem:
    @pytest.mark.parametrize("name", ["lambdascale", "serverlessllm_prototype"])
    def test_a_name(self, name: str) -> None:
        """Any of conf/system."""
        assert system(name).name == name

    def test_a_file_is_composed_like_those_of_conf(self, tmp_path: Path) -> None:
        """The file has its defaults, the command's values and overrides."""
        path = tmp_path / "my system.yaml"
        path.write_text("defaults:\n  - lambdascale\n  - _self_\nname: mine\nkv: copy\n")
        built = system(path, "system.blocks=4")
        assert (built.name, built.kv, built.blocks) == ("mine", "copy", 8)
        assert built.autoscaler.keep_alive_s == 7.0

    def test_a_file_of_the_same_name(self, tmp_path: Path) -> None:
        path = tmp_path / "lambdascale.yaml"
        path.write_text("defaults:\n  - lambdascale\n  - _self_\nname: other\n")
        assert system(path).name == "other"

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (None, "must be one of"),
            ("a: [", "not YAML"),
            ("name: x\n", "is not a system: it has no _target_"),
            ("defaults:\n  - nothing\n", "nothing"),
        ],
    )
    def test_anything_else(self, tmp_path: Path, content: str | None, says: str) -> None:
        path = tmp_path / "system.yaml"
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=says):
            system(path)


class TestConditions:
    """Alive: the control thread runs and a node is alive. Ready: the clock runs and the model is served."""

    @pytest.fixture
    def service(self) -> Any:
        made = Service.__new__(Service)
        self.now_s, self.runs = 0.0, True
        state = ClusterState(2)
        thread = SimpleNamespace(is_alive=lambda: self.runs)
        backend = SimpleNamespace(now=lambda: self.now_s, end=lambda reason: None)
        made.__dict__.update(
            state=state, fault=None, _stopping=False, _thread=thread, backend=backend, _model="m", _to_zero=False
        )
        return made

    def test_alive(self, service: Any) -> None:
        assert service.ill() == "no node is alive"
        service.state.on_event(NodeJoined(0.0, 0))
        assert service.ill() == ""
        service.state.on_event(NodeLost(1.0, 0, returns=True))
        assert service.ill() == "no node is alive"
        assert service.closed() == "", "requests wait for it"
        service.state.on_event(NodeGivenUp(1.0, 0))
        assert service.closed() == "no node is alive"
        service.state.on_event(NodeJoined(2.0, 0))
        assert service.closed() == ""
        self.runs = False
        assert service.ill()
        service.fault = RuntimeError()
        assert service.ill() == service.closed() == "the server has failed"

    def test_stopping(self, service: Any) -> None:
        service.state.on_event(NodeJoined(0.0, 0))
        service.stop_answering()
        assert service.ill() == service.closed() == "the server is stopping"

    def test_ready(self, service: Any) -> None:
        assert service.unready() == "m is being loaded"
        service.state.on_command(0.0, Serve(1, "m", (Stage(0, 0, 1),), (1, 1), 100))
        assert service.unready() == "m is being loaded"
        self.now_s = 1.0
        assert service.unready() == ""
        service.state.on_command(0.0, StopInstance(1))
        assert service.unready() == "no instance serves m"

    def test_a_cluster_that_may_shrink_to_nothing(self, service: Any) -> None:
        service._to_zero = True
        assert service.unready()
        self.now_s = 1.0
        assert service.unready() == ""


def test_restarts_of_servers_and_of_traces() -> None:
    """A trace's failures are part of what is measured, unless the user says otherwise."""
    assert LiveConfig().restart_limit(open_ended=True) == 5
    assert LiveConfig().restart_limit(open_ended=False) == 0
    assert {LiveConfig(restarts=2).restart_limit(open_ended=ended) for ended in (True, False)} == {2}
    with pytest.raises(UserError, match="restarts"):
        LiveConfig(restarts=-1)


@pytest.mark.parametrize(
    ("nodes", "overrides", "window"),
    [
        (4, (), 40),
        (1, (), 16),
        (4, ("system.batching.max_batch=2",), 13),
        (4, ("system.autoscaler.target_per_replica=50",), 151),
        (4, ("system.autoscaler.target_per_replica=50", "system.autoscaler.max_replicas=2"), 51),
    ],
)
def test_the_window(nodes: int, overrides: tuple[str, ...], window: int) -> None:
    """All nodes at work and a batch more, and never fewer than the autoscaler has to see to want all that it may."""
    assert window_of(system("lambdascale", *overrides), nodes) == window


def test_ready_is_told_once() -> None:
    """The line comes no earlier: the server's tick looks again and again."""
    problems = ["being loaded", "being loaded", "", "", "lost"]
    told: list[int] = []
    service: Any = SimpleNamespace(ill=lambda: "", unready=lambda: problems[0])
    service.front_end = SimpleNamespace(app=lambda: None)
    with socket.socket() as bound:
        server = _Server(service, HttpOptions(), bound, lambda: told.append(len(problems)))

    async def ticks() -> None:
        while problems:
            await server.on_tick(1)
            problems.pop(0)

    asyncio.run(ticks())
    assert told == [3]
