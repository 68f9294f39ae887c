"""Multicasts in virtual time: real movers and stores over links that are shared evenly, with the delays of threads and messages.

Links carry a block in ``T_MS``, the time of 0.84 GB (7B in 16 blocks) over the NVLink of an H200. Every job of a thread and
every message takes ``DELAY_MS``, the verification of a block ``VERIFY_MS``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from lambdascale.checkpoints import PackedModel, pack
from lambdascale.cli.multicast import Setting
from lambdascale.core.commands import StartMulticast
from lambdascale.core.events import BlockArrived
from lambdascale.inference import BlockStore, StoreConfig
from lambdascale.live import wire
from lambdascale.live.node.loads import Links
from lambdascale.live.node.mover import Mover
from lambdascale.live.node.window import PACED, UNPACED, Window
from lambdascale.sim.kernel import Kernel
from lambdascale.sim.links import LinkNetwork, Port
from lambdascale.transport import TokenBucket
from tests.unit.node_doubles import FakeBroadcasts

BLOCKS = 16
T_MS, DELAY_MS, VERIFY_MS = 2.2, 0.1, 0.4
#: The rule until 2026-11-28: two blocks at once for all peers together, in the plan's order.
TOGETHER = Window(peer=2, node=2)


class Later(Executor):
    """Does one job after the other, each in so many milliseconds of virtual time."""

    def __init__(self, kernel: Kernel, job_ms: float) -> None:
        self._kernel, self._job_ms, self._free = kernel, job_ms, 0.0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = Future[Any]()
        self._free = max(self._free, self._kernel.now) + self._job_ms

        def job(_: None) -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)

        self._kernel.at(self._free, job)
        return future


class Host:
    """Nodes on one switch. ``delay_ms``: of a job and of a message."""

    def __init__(self, model: PackedModel, nodes: int, sources: int, window: Window, delay_ms: float, verify_ms: float) -> None:
        self.kernel, self.model, self.delay_ms = Kernel(), model, delay_ms
        self.links = LinkNetwork(self.kernel)
        self.ports = [(Port(f"out {node}", 1 / T_MS), Port(f"in {node}", 1 / T_MS)) for node in range(nodes)]
        self.stores, self.movers, self.last_ms = [], [], 0.0
        for node in range(nodes):
            size = sum(-(-size // 4096) * 4096 for size in model.block_bytes)
            store = BlockStore(StoreConfig(host_bytes=size, device_bytes=size, land_on_device=True, readers=1))
            store.add(model)
            if node < sources:
                store.load(model.name, range(BLOCKS), to="gpu", keep_host=False).wait(30)
            self.stores.append(store)
            self.movers.append(
                Mover(
                    node,
                    store,
                    Endpoint(self, node),
                    self._report,
                    pytest.fail,
                    window=window,
                    links=Links(),
                    collective=FakeBroadcasts(),
                    thread=Later(self.kernel, delay_ms),
                    worker=Later(self.kernel, verify_ms),
                    timer=lambda delay_s, job: None,
                )
            )

    def _report(self, event: object) -> None:
        assert isinstance(event, BlockArrived), event
        self.last_ms = self.kernel.now

    def after(self, do: Callable[[], object]) -> None:
        """Do it one delay from now."""
        self.kernel.at(self.kernel.now + self.delay_ms, lambda _: do())

    def multicast(self, command: StartMulticast) -> float:
        """Carry a multicast out; return the milliseconds until the last block."""
        for mover in self.movers:
            mover.multicast(command)
        while self.kernel.step():
            pass
        for store in self.stores:
            assert store.resident("tiny", "gpu") == set(range(BLOCKS))
        return self.last_ms

    def close(self) -> None:
        for mover, store in zip(self.movers, self.stores, strict=True):
            mover.close()
            store.close()


class Endpoint:
    """A connection carries one write after the other; those of several connections share the node's link."""

    def __init__(self, host: Host, node: int) -> None:
        self._host, self._node = host, node
        self._waiting: dict[int, deque[Callable[[], None]]] = {}

    def send(self, peer: int, data: bytes) -> None:
        message = wire.to_peer(data)
        self._host.after(lambda: self._host.movers[peer].ready(self._node, message))

    def write(self, peer: int, data: memoryview, offset: int, immediate: int, over: TokenBucket | None = None) -> Future[None]:
        host, future, content = self._host, Future[None](), bytearray(data)
        waiting = self._waiting.setdefault(peer, deque())

        def written() -> None:
            store = host.stores[peer]
            store._tiers["gpu"].arena.view(offset, len(content)).copy_(torch.frombuffer(content, dtype=torch.uint8))
            host.after(lambda: host.movers[peer].written(self._node, immediate))
            host.after(done)

        def done() -> None:
            waiting.popleft()
            if waiting:
                waiting[0]()
            future.set_result(None)

        waiting.append(lambda: host.links.start((host.ports[self._node][0], host.ports[peer][1]), 1.0, written))
        if len(waiting) == 1:
            waiting[0]()
        return future

    def admit(self, peer: int) -> None:
        pass

    def dismiss(self, peer: int) -> None:
        pass


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """A packed model of sixteen layers, a block each."""
    from lambdascale.checkpoints.synthetic import PRESETS, write_random

    root = tmp_path_factory.mktemp("sixteen")
    (root / "source").mkdir()
    write_random(PRESETS["tiny"] | {"num_hidden_layers": BLOCKS}, root / "source", 1)
    pack(root / "source", root / "tiny", BLOCKS)
    return PackedModel.open(root / "tiny", "tiny")


@pytest.fixture
def of_plan(sixteen: PackedModel) -> Iterator[Callable[..., float]]:
    """Function that carries out a multicast and returns its time over its plan's: rounds of a block."""
    with ExitStack() as stack:

        def run(system: str, nodes: int, sources: int, window: Window, *, slow: float = 1.0) -> float:
            host = Host(sixteen, nodes, sources, window, slow * DELAY_MS, slow * VERIFY_MS)
            stack.callback(host.close)
            setting = Setting(system, nodes, "shm", "cpu")
            plan = setting.plan(sources=sources, destinations=nodes - sources, blocks=BLOCKS)
            command = StartMulticast(1, "tiny", plan, (1,) * BLOCKS, ("gpu",) * sources, "one_sided")
            return host.multicast(command) / (len(plan.rounds) * T_MS)

        yield run


SETTINGS = [("lambdascale", n, 1) for n in range(3, 9)] + [("lambdascale", 4, 2), ("lambdascale", 8, 2), ("lambdascale", 8, 3)]
SETTINGS += [("faasnet", 4, 1), ("faasnet", 8, 1), ("faasnet", 4, 2)]


@pytest.mark.parametrize(("system", "nodes", "sources"), SETTINGS)
@pytest.mark.parametrize("slow", [0.001, 1.0, 3.0])
def test_a_window_for_each_peer_takes_no_longer_than_one_for_all(
    of_plan: Callable[..., float], system: str, nodes: int, sources: int, slow: float
) -> None:
    """The time of any plan is at most 3 % longer: a block that cannot go yet keeps no other peer waiting."""
    given = system, nodes, sources
    assert of_plan(*given, UNPACED, slow=slow) <= 1.03 * of_plan(*given, TOGETHER, slow=slow)


@pytest.mark.parametrize(
    ("system", "nodes", "sources", "most"),
    [
        ("lambdascale", 4, 1, 1.20),
        ("lambdascale", 4, 2, 1.08),
        ("lambdascale", 8, 1, 1.42),
        ("lambdascale", 8, 2, 1.20),
        ("faasnet", 4, 1, 1.06),
        ("faasnet", 8, 1, 1.09),
    ],
)
def test_unpaced_multicasts_stay_near_their_plan(
    of_plan: Callable[..., float], system: str, nodes: int, sources: int, most: float
) -> None:
    """Two blocks at once for all peers together took 1.39 times the plan from one source to three nodes, 1.56 to seven."""
    assert of_plan(system, nodes, sources, UNPACED) <= most


@pytest.mark.parametrize("nodes", [3, 4, 7, 8])
def test_in_the_plans_order_rounds_take_what_the_plan_says(of_plan: Callable[..., float], nodes: int) -> None:
    """No link waits for another without delays, as on paced links, whose lateness is made up."""
    assert of_plan("lambdascale", nodes, 1, PACED, slow=0.001) == pytest.approx(1.0, abs=0.01)
