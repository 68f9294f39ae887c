"""Two nodes that hand KV over: real caches, runners and endpoints, and the compute threads' work done step by step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from lambdascale.core.plan import Stage
from lambdascale.inference.kv_cache import KvCache
from lambdascale.live import wire
from lambdascale.live.node.instance import Instance, Partition
from lambdascale.live.node.kv_places import KvTraffic
from lambdascale.live.node.mode_switch import KvData
from lambdascale.live.node.places import Area
from lambdascale.live.node.runners import TorchRunner
from lambdascale.transport import Endpoint, Handlers

LAYERS, HEADS, SIZE, SLOTS, TOKENS = 6, 2, 8, 4, 50
ARENA = 8192  # bytes in front of the places: the arena of blocks
LAYER_BYTES = 2 * HEADS * SIZE * 2  # of a token's KV, in bf16
PATIENCE_S = 60.0


class CacheRunner(TorchRunner):
    """A TorchRunner with KV memory and no weights."""

    def __init__(self, layers: range, device: torch.device) -> None:
        self._architecture: Any = SimpleNamespace(kv_heads=HEADS, head_dim=SIZE)
        self._dtype = torch.bfloat16
        self._stage: Any = SimpleNamespace(
            kv=KvCache(self._architecture, len(layers), SLOTS, TOKENS, torch.bfloat16, device), device=device
        )
        self.layers, self.slots, self.kv_bytes = layers, SLOTS, LAYER_BYTES
        self.closed = False

    @property
    def both(self) -> torch.Tensor:
        kv: torch.Tensor = self._stage.kv.both
        return kv

    def close(self) -> None:
        assert not self.closed, "a runner is closed twice"
        self.closed = True


class Peer:
    """A node: its endpoint, and what has come to its compute thread."""

    def __init__(self, node: int, make: Callable[[int, Handlers], Endpoint], place_bytes: int, places: int) -> None:
        self.came: deque[wire.Peer | int] = deque()  # messages, and nodes that were lost
        self.seen: list[wire.Peer] = []
        self.brought: list[KvData] = []
        handlers = Handlers(
            on_write=lambda *_: None,
            on_message=lambda peer, data: self.came.append(wire.to_peer(data)),
            on_lost=lambda peer, reason: self.came.append(peer),
        )
        self.endpoint = make(node, handlers)
        memory = self.endpoint.allocate(ARENA + place_bytes * places)
        self.endpoint.register(memory)
        area = Area(self.endpoint, memory, 0).part(ARENA, place_bytes * places)
        self.given_up: list[int] = []  # pipelines
        self.traffic = KvTraffic(node, area, place_bytes, self._tell, self.brought.append, self.given_up.append)

    def _tell(self, node: int, message: wire.Peer) -> bool:
        self.endpoint.send(node, wire.encode(message))
        return True

    def step(self) -> bool:
        """Take the next message, or loss."""
        if not self.came:
            return False
        message = self.came.popleft()
        if isinstance(message, int):
            self.traffic.lost(message)
        else:
            assert isinstance(message, wire.OfKv)
            self.seen.append(message)
            self.traffic.take(message)
        return True


def pipeline_of(runner: CacheRunner) -> Instance:
    """Instance 1, with a runner of layers behind those of another node."""
    instance = Instance(1, "m", 0, SLOTS, SLOTS * TOKENS)
    instance.add(0, Partition((Stage(0, 0, 0), Stage(1, 1, 1)), {1: runner}))
    return instance


def moves(tokens: Sequence[int], node: int) -> list[wire.KvMove]:
    """The KV of so many tokens in slots 0, 1, ... goes to a node."""
    return [wire.KvMove(100 + slot, 0, 0, slot, count, 2, node) for slot, count in enumerate(tokens)]


def hand_over(
    make: Callable[[int, Handlers], Endpoint], devices: Sequence[torch.device], tokens: Sequence[int], places: int
) -> None:
    """Node 1 hands KV over to node 0 and, the last of it, to itself; check that all of it comes and nothing is left."""
    place_bytes = 2 * TOKENS * LAYER_BYTES
    receiver, sender = (Peer(node, make, place_bytes, places) for node in (0, 1))
    try:
        sender.endpoint.connect(0, receiver.endpoint.address)
        source, target = CacheRunner(range(2, 2 + LAYERS), devices[1]), CacheRunner(range(2 + LAYERS), devices[0])
        source.both.copy_(torch.randn(source.both.shape).bfloat16())
        expected = source.both.cpu().clone()
        *away, last = moves(tokens, 0)
        here = wire.KvMove(*(getattr(last, name) for name in last.__struct_fields__[:-1]), 1)
        sender.traffic.sender.leave(pipeline_of(source), [*away, here])
        deadline = time.monotonic() + PATIENCE_S
        while len(sender.traffic.sender) or sum(len(kv.layers) for kv in receiver.brought) < LAYERS * len(away):
            assert time.monotonic() < deadline, "it does not come"
            if not any([receiver.step(), sender.step()]):
                time.sleep(0.001)
        parts = [message for message in receiver.seen if isinstance(message, wire.KvPart)]
        assert all(isinstance(part.data, wire.Landed) for part in parts)
        assert len(parts) > len(away), "KV larger than a place comes in parts"
        assert receiver.traffic.landing.free == sender.traffic.landing.free == places
        assert source.closed
        for kv in receiver.brought:
            target.write_kv(kv.request_id - 100, kv.layers, kv.data)
        local = CacheRunner(range(2, 2 + LAYERS), devices[1])
        for kv in sender.brought:
            local.write_kv(kv.request_id - 100, kv.layers, kv.data)
        for slot, count in enumerate(tokens):
            found = local.both[:, slot] if slot == len(away) else target.both[2:, slot]
            assert torch.equal(found[:, :, :count].cpu(), expected[:, slot, :, :count])
    finally:
        sender.endpoint.close()
        receiver.endpoint.close()
