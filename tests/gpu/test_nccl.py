"""Broadcasts by NCCL, between GPUs of this machine; and by gloo where nodes share them."""

from __future__ import annotations

import multiprocessing
import os
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from lambdascale.checkpoints import PackedModel
from lambdascale.core.events import BlockArrived, NodeLost
from lambdascale.live.config import LiveConfig
from lambdascale.live.node.communicators import Nccl, has_nccl
from tests.live.harness import Outcome, Watcher, burst, expected, pack_tiny, run, system_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")]
nccl = pytest.mark.skipif(not has_nccl() or torch.cuda.device_count() < 2, reason="needs NCCL and two GPUs")
SIZE = (64 << 20) + 12345
PATIENCE_S = 120.0


def be_a_member(rank: int, size: int, pipe: Connection) -> None:
    """Rank 0 says where they meet; everybody broadcasts what rank 1 has, then tells; the last one dies when it is told to."""
    timeout = timedelta(seconds=30)
    device = torch.device(f"cuda:{rank}")
    tcp_store: Any = distributed.TCPStore
    port = pipe.recv()
    store = tcp_store("127.0.0.1", port, size, rank == 0, timeout, wait_for_workers=False)
    if rank == 0:
        pipe.send(store.port)
    began = time.monotonic()
    lost: list[str] = []
    try:
        with Nccl(store, rank, size, device, lambda: "".join(lost)) as group:
            setup_s = time.monotonic() - began
            # The root's in host memory, as a warm source has it.
            data = torch.arange(SIZE, dtype=torch.int64).remainder(251).to(torch.uint8)
            target = data if rank == 1 else torch.zeros(SIZE, dtype=torch.uint8, device=device)
            torch.cuda.synchronize(device)
            group.broadcast(target, 1)
            pipe.send((bool(torch.equal(target.cpu(), data)), setup_s))
            if pipe.recv() == "die":
                os._exit(1)
            lost += [pipe.recv()] if pipe.poll(PATIENCE_S) else []
            if lost[0]:
                group.broadcast(target, 1)
        pipe.send("")
    except RuntimeError as error:
        # What the GPU can do afterwards.
        pipe.send(str(error) if int(torch.ones(3, device=device).sum()) == 3 else "the GPU does not answer")


class Members:
    """Two processes with a GPU each."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        self.processes = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            self.processes.append(context.Process(target=be_a_member, args=(rank, 2, theirs), daemon=True))
            self.processes[-1].start()
            theirs.close()
        self.pipes[0].send(0)
        self.pipes[1].send(self.hear(0))

    def hear(self, rank: int) -> Any:
        assert self.pipes[rank].poll(PATIENCE_S), f"rank {rank} says nothing"
        return self.pipes[rank].recv()

    def close(self) -> None:
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()


@pytest.fixture
def members() -> Any:
    made = Members()
    yield made
    made.close()


@nccl
def test_a_broadcast_from_host_memory(members: Members) -> None:
    for rank in range(2):
        arrived, setup_s = members.hear(rank)
        assert arrived
        assert setup_s > 0.01, "the communicator is set up before anything is broadcast"
    for rank in range(2):
        members.pipes[rank].send("live")
        members.pipes[rank].send("")
    assert [members.hear(rank) for rank in range(2)] == ["", ""]


@nccl
def test_a_member_that_dies(members: Members) -> None:
    """The survivor is told of it, gives the broadcast up at once, and its GPU goes on."""
    for rank in range(2):
        assert members.hear(rank)[0]
    members.pipes[1].send("die")
    members.processes[1].join(PATIENCE_S)
    members.pipes[0].send("live")
    members.pipes[0].send("node 1 is lost")
    assert "node 1 is lost" in members.hear(0)


REQUESTS = burst(32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_tiny(tmp_path_factory.mktemp("nccl"))


def check(outcome: Outcome, tiny: Path) -> None:
    assert outcome.answers == expected(PackedModel.open(tiny, "tiny"), REQUESTS)
    assert (outcome.rows.status == "ok").all()


@pytest.mark.live
@nccl
@pytest.mark.parametrize("copies", [0, 1])
@pytest.mark.parametrize("transport", ["shm", "cuda_ipc"])
def test_live_by_nccl(tiny: Path, transport: str, copies: int) -> None:
    """The second node gets every block from the first one's GPU, or from its host memory."""
    system = system_of("nccl_broadcast", f"system.memory.initial_copies={copies}")
    assert LiveConfig(device="cuda").communicator(system, 2) == ("nccl", "")
    outcome = run(tiny, REQUESTS, system=system, nodes=2, transport=transport, device="cuda", collective="nccl")
    check(outcome, tiny)
    arrived = {entry.block for _, entry in outcome.recorder.entries if isinstance(entry, BlockArrived) and entry.node == 1}
    assert arrived == set(range(8))


@pytest.mark.live
@nccl
def test_the_source_of_a_live_broadcast_dies(tiny: Path) -> None:
    watcher = Watcher(
        lambda entry: isinstance(entry, BlockArrived) and (entry.node, entry.block) == (1, 3),
        lambda backend: backend.launcher.kill(0),
    )
    outcome = run(
        tiny, REQUESTS, system=system_of("nccl_broadcast"), nodes=2, device="cuda", collective="nccl", watchers=[watcher]
    )
    assert watcher.acted
    assert any(isinstance(entry, NodeLost) for _, entry in outcome.recorder.entries)
    check(outcome, tiny)


@pytest.mark.live
@pytest.mark.parametrize("transport", ["shm", "cuda_ipc"])
def test_live_by_gloo_on_shared_gpus(tiny: Path, transport: str, capfd: pytest.CaptureFixture[str]) -> None:
    """NCCL would refuse: it is said, and gloo brings blocks to host memory, or to the device through it."""
    nodes = torch.cuda.device_count() + 1
    outcome = run(tiny, REQUESTS, system=system_of("nccl_broadcast"), nodes=nodes, transport=transport, device="cuda")
    check(outcome, tiny)
    assert f"{nodes} nodes have {nodes - 1}" in capfd.readouterr().err
