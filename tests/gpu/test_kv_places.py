"""KV from GPU to GPU over cuda_ipc: it is complete before it is announced, and read before its place is used again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lambdascale.transport import CudaIpcEndpoint, Endpoint, Handlers, gpu_of
from tests.node import kv_rig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(autouse=True)
def first_gpu() -> Iterator[None]:
    yield
    torch.cuda.set_device(0)


@pytest.mark.parametrize("gpus", [(0, 0), pytest.param((0, 1), marks=two_gpus), pytest.param((1, 0), marks=two_gpus)])
@pytest.mark.parametrize("places", [1, 3])
def test_over_cuda_ipc(gpus: tuple[int, int], places: int) -> None:
    """One place is written again as soon as it is free, while the GPUs are busy with something else."""
    busy = [torch.randn(2048, 2048, device=f"cuda:{gpu}") for gpu in gpus]

    def make(node: int, handlers: Handlers) -> Endpoint:
        return CudaIpcEndpoint(node, handlers, b"k" * 32, gpu=gpu_of(gpus[node]))

    for _ in range(20):
        for data in busy:
            torch.mm(data, data)
        kv_rig.hand_over(make, [torch.device("cuda", gpu) for gpu in gpus], (50, 7, 33, 20), places)
