"""One stream between two processes: a block written into the peer's memory, against a plain copy of as many bytes."""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from lambdascale.testing.transports import Heard
from lambdascale.transport import ShmEndpoint, TcpEndpoint

SIZE = 256 << 20
PEER = """
import sys, time
from lambdascale.testing.transports import Heard
from lambdascale.transport import ShmEndpoint, TcpEndpoint
endpoint = {kind}(0, Heard().handlers(), b"k" * 32)
endpoint.register(endpoint.allocate({size}))
print(endpoint.address, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", [TcpEndpoint, ShmEndpoint])
def test_write(benchmark: BenchmarkFixture, kind: type[TcpEndpoint]) -> None:
    source, target = np.ones(SIZE, dtype=np.uint8), np.zeros(SIZE, dtype=np.uint8)
    code = PEER.format(kind=kind.__name__, size=SIZE)
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdout is not None
        endpoint = kind(1, Heard().handlers(), b"k" * 32)
        endpoint.connect(0, peer.stdout.readline().strip())

        def write() -> None:
            endpoint.write(0, source.data, 0, 1).result(60)

        def copied() -> float:
            begin = time.perf_counter()
            np.copyto(target, source)
            return time.perf_counter() - begin

        benchmark.pedantic(write, rounds=7, warmup_rounds=1)
        floor = median(copied() for _ in range(7))
        rate = SIZE / benchmark.stats.stats.median
        benchmark.extra_info["percent_of_a_copy"] = round(100 * rate * floor / SIZE)
        print(f"\n{kind.__name__}: {rate / 1e9:.2f} GB/s, a copy {SIZE / floor / 1e9:.2f}")
        endpoint.close()
        peer.kill()
