"""Blocks from GPU to GPU: what cuda_ipc writes, and what reading a landed block back to verify it costs.

pytest tests/benchmarks/test_bench_gpu.py --benchmark-only -s
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from lambdascale.inference.read_back import ReadBack
from lambdascale.testing.transports import Heard
from lambdascale.transport import CudaIpcEndpoint, gpu_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")]
SIZE = 1 << 30
PEER = """
import sys
from lambdascale.testing.transports import Heard
from lambdascale.transport import CudaIpcEndpoint, gpu_of
endpoint = CudaIpcEndpoint(0, Heard().handlers(), b"k" * 32, gpu=gpu_of({gpu}))
endpoint.register(endpoint.allocate({size}))
print(endpoint.address, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    "gpu",
    [0, pytest.param(1, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))],
    ids=["same_gpu", "other_gpu"],
)
@pytest.mark.parametrize("source", ["gpu", "host"])
def test_write(benchmark: BenchmarkFixture, gpu: int, source: str) -> None:
    """1 GiB in one write, by the writer's clock; from a GPU's memory, and from pinned host memory as a warm start does."""
    code = PEER.format(gpu=gpu, size=SIZE)
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdout is not None
        endpoint = CudaIpcEndpoint(1, Heard().handlers(), b"k" * 32, gpu=gpu_of(0))
        arena = endpoint.allocate(SIZE)
        endpoint.register(arena)
        endpoint.connect(0, peer.stdout.readline().strip())
        pinned = torch.ones(SIZE, dtype=torch.uint8).pin_memory()
        data = arena if source == "gpu" else pinned.numpy().data
        benchmark.pedantic(lambda: endpoint.write(0, data, 0, 1).result(60), rounds=7, warmup_rounds=1)
        print(f"\n{benchmark.name}: {SIZE / benchmark.stats.stats.median / 1e9:.1f} GB/s")
        endpoint.close()
        peer.kill()


def test_read_back(benchmark: BenchmarkFixture) -> None:
    """The checksum of 1 GiB on a GPU."""
    data = torch.randint(0, 256, (SIZE,), dtype=torch.uint8, device="cuda:0")
    reader = ReadBack(torch.device("cuda:0"))
    benchmark.pedantic(lambda: reader.xxh3_64(data), rounds=5, warmup_rounds=1)
    print(f"\n{benchmark.name}: {SIZE / benchmark.stats.stats.median / 1e9:.1f} GB/s")
