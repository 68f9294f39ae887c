"""The cuda_ipc transport on GPUs: in one process, and between processes that open each other's memory."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lambdascale.core import NodeId
from lambdascale.multicast import BinomialPipeline, plan_from_holdings
from lambdascale.testing.carriers import Carriers
from lambdascale.testing.transports import TransportConformance
from lambdascale.transport import CudaIpcEndpoint, DeviceMemory, Endpoint, Handlers, TokenBucket, gpu_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
KEY = b"k" * 32
BLOCKS = 6


class TestFromTheHost(TransportConformance):
    def gpu(self, node: int) -> int:
        return 0

    def make_endpoint(self, node: int, handlers: Handlers) -> Endpoint:
        return CudaIpcEndpoint(node, handlers, KEY, gpu=gpu_of(self.gpu(node)))

    def break_off(self, endpoint: Endpoint) -> None:
        assert isinstance(endpoint, CudaIpcEndpoint)
        for connection in list(endpoint._connections.values()):
            connection.sock.shutdown(socket.SHUT_RDWR)


class TestFromTheDevice(TestFromTheHost):
    """Sources as the block store has them: pieces of torch's memory."""

    @pytest.fixture(autouse=True)
    def sources(self) -> None:
        self.kept: list[torch.Tensor] = []

    def source(self, data: bytes) -> DeviceMemory:
        tensor = torch.from_numpy(np.frombuffer(b"before" + data, dtype=np.uint8).copy()).cuda()
        torch.cuda.synchronize()
        self.kept.append(tensor)
        return DeviceMemory(gpu_of(tensor.device.index), tensor.data_ptr() + 6, len(data))


class TestPaced(TestFromTheDevice):
    def make_endpoint(self, node: int, handlers: Handlers) -> Endpoint:
        return CudaIpcEndpoint(node, handlers, KEY, gpu=gpu_of(self.gpu(node)), link=TokenBucket(200e6))


@two_gpus
class TestTwoGpus(TestFromTheDevice):
    def gpu(self, node: int) -> int:
        return node % 2


def on_one_gpu(node: NodeId, handlers: Handlers) -> Endpoint:
    return CudaIpcEndpoint(node, handlers, KEY, gpu=gpu_of(0))


def on_gpus_in_turn(node: NodeId, handlers: Handlers) -> Endpoint:
    return CudaIpcEndpoint(node, handlers, KEY, gpu=gpu_of(node % 2))


@pytest.mark.parametrize("make", [on_one_gpu, pytest.param(on_gpus_in_turn, marks=two_gpus)])
def test_everybody_gets_everything(make: Callable[[NodeId, Handlers], Endpoint]) -> None:
    """Blocks of a size that a page of a GPU's memory (2 MiB) does not divide."""
    with Carriers(make, nodes=4, sources=1, blocks=BLOCKS, block_bytes=(3 << 20) + 5, start_method="spawn") as carriers:
        carriers.carry(BinomialPipeline().plan(sources=1, destinations=3, blocks=BLOCKS))
        assert all(held == set(range(BLOCKS)) for held in carriers.held.values())


@pytest.mark.parametrize("make", [on_one_gpu, pytest.param(on_gpus_in_turn, marks=two_gpus)])
def test_the_survivors_of_a_killed_receiver(make: Callable[[NodeId, Handlers], Endpoint]) -> None:
    """A process dies with its memory open elsewhere, and with others' memory open: theirs stays what it was."""
    with Carriers(make, nodes=4, sources=1, blocks=BLOCKS, block_bytes=64 << 20, start_method="spawn") as carriers:
        carriers.carry_and_kill(BinomialPipeline().plan(sources=1, destinations=3, blocks=BLOCKS), victim=2, after=2, at=2)
        assert set(carriers.held) == {0, 1, 3}
        carriers.carry(plan_from_holdings(carriers.held, [1, 3], BLOCKS))
        assert all(held == set(range(BLOCKS)) for held in carriers.held.values())


@pytest.mark.parametrize("ordinal", [0, pytest.param(1, marks=two_gpus)])
def test_torch_sees_the_same_memory(ordinal: int) -> None:
    """The tensor is no copy and on no other device; the thread's device is torch's as before."""
    before = torch.cuda.current_device()
    memory = gpu_of(ordinal).allocate(5_000_001)
    tensor = torch.as_tensor(memory, device=f"cuda:{ordinal}")
    assert (tensor.data_ptr(), tensor.numel(), tensor.dtype) == (memory.address, 5_000_001, torch.uint8)
    assert int(tensor.count_nonzero()) == 0
    data = random.Random(5).randbytes(1000)
    memory[77:1077].fill(data)
    assert tensor[77:1077].cpu().numpy().tobytes() == data
    tensor[-1] = 9
    torch.cuda.synchronize(ordinal)
    assert bytes(memory[-2:]) == b"\0\x09"
    assert torch.cuda.current_device() == before
    del tensor
    gpu_of(ordinal).free(memory)
