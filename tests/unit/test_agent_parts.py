"""What an agent decides before it serves: its GPU, and what it says of a peer it cannot reach. No processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lambdascale.core import UserError
from lambdascale.live import wire
from lambdascale.live.config import LiveConfig
from lambdascale.live.node.agent import Agent, make_endpoint, pick_gpu
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
    agent.__dict__.update(_config=config(node=node), endpoint=Deaf(node), _line=SimpleNamespace(say=said.append))
    agent._connect(wire.Directory(7, {0: "a", 1: "b", 2: "c"}, {0: 0, 1: 0, 2: 0}))
    assert said == [wire.Connected(1, 7) if reached else wire.Unreached(1, "nodes 2 and 1 are on different hosts")]
