"""Time iterations of a source of a multicast on a GPU: beside copies that read or write its memory, and beside a broadcast.

python scripts/gpu_interference.py [--layers 32] [--out results/tables/gpu_interference.csv]

An iteration is the matrix products of a Llama-2-7B (random weights, 16 bits), recorded as a CUDA graph: a decode step of a batch,
bound by memory, or a prefill, bound by arithmetic. Copies between GPU and pinned host memory stand for one-sided writes: the
GPU's copy engines read and write its memory over PCIe as a NIC does, at about the rate of a 400 Gb/s port. Broadcasts are NCCL's
between two GPUs, if the machine has two: over NVLink, and with that closed through host memory, nearer to a port's rate.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist

from lambdascale.calibration.cards import card
from lambdascale.cli.guard import run_guarded
from lambdascale.cli.parser import Parser

_HIDDEN, _FFN = 4096, 11008
_SIZES = {"decode of 1": 1, "decode of 8": 8, "decode of 32": 32, "prefill of 512": 512, "prefill of 2048": 2048}
_CHUNK = 256 << 20
_LASTS_S = 1.0
_ROUNDS = 40
_CLOSED = {"broadcast, NVLink": {}, "broadcast, host memory": {"NCCL_P2P_DISABLE": "1"}}
Traffic = Callable[[int], None]


Weights = list[list[torch.Tensor]]


def random_weights(layers: int) -> Weights:
    """Return the matrices of ``layers`` layers."""
    shapes = [(3 * _HIDDEN, _HIDDEN), (_HIDDEN, _HIDDEN), (2 * _FFN, _HIDDEN), (_HIDDEN, _FFN)]
    return [[torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02 for shape in shapes] for _ in range(layers)]


def iteration(weights: Weights, entered: torch.Tensor) -> torch.cuda.CUDAGraph:
    """Record the matrix products of all layers for the tokens ``entered``."""

    def run() -> None:
        hidden = entered
        for qkv, out, up, down in weights:
            attended = torch.nn.functional.linear(hidden, qkv)[:, :_HIDDEN]
            hidden = torch.nn.functional.linear(attended, out)
            hidden = torch.nn.functional.linear(torch.nn.functional.linear(hidden, up)[:, :_FFN], down)

    for _ in range(3):  # libraries choose their kernels before the recording
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def timed(graph: torch.cuda.CUDAGraph, rounds: int) -> float:
    """Return the median seconds of a replay, of ``rounds``."""
    stream = torch.cuda.current_stream()
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        graph.replay()
        stream.synchronize()
        found.append(time.perf_counter() - begin)
    return median(found)


def beside(graph: torch.cuda.CUDAGraph, traffic: Traffic, rate: float) -> tuple[float, float]:
    """Return the median seconds of a replay while ``traffic`` is under way, and the traffic's bytes/s meanwhile.

    ``rate``: about that of the traffic alone; as many chunks are queued as take ``_LASTS_S``.
    """
    side = torch.cuda.Stream()
    chunks = max(8, int(rate * _LASTS_S / _CHUNK))
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(side):
        begin.record()
        traffic(chunks)
        end.record()
    time.sleep(0.02)
    found = []
    stream = torch.cuda.current_stream()
    while not end.query():
        at = time.perf_counter()
        graph.replay()
        stream.synchronize()
        found.append(time.perf_counter() - at)
    torch.cuda.synchronize()
    return median(found[:-1] or [float("nan")]), chunks * _CHUNK / (begin.elapsed_time(end) / 1000)


def copies() -> Iterator[tuple[str, Traffic, float]]:
    """Yield the copies: what they stand for, a function that queues so many chunks, and their rate alone."""
    host = [torch.empty(_CHUNK, dtype=torch.uint8).pin_memory() for _ in range(2)]
    device = [torch.empty(_CHUNK, dtype=torch.uint8, device="cuda") for _ in range(2)]
    back = torch.cuda.Stream()

    def send(chunks: int) -> None:
        for _ in range(chunks):
            host[0].copy_(device[0], non_blocking=True)

    def receive(chunks: int) -> None:
        for _ in range(chunks):
            device[1].copy_(host[1], non_blocking=True)

    def both(chunks: int) -> None:
        with torch.cuda.stream(back):
            receive(chunks)
        send(chunks)

    for name, traffic in (("sends", send), ("receives", receive), ("sends and receives", both)):
        yield name, traffic, alone(traffic)


def alone(traffic: Traffic) -> float:
    """Return the rate of ``traffic`` without iterations beside it, in bytes/s."""
    for chunks in (2, 16):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        traffic(chunks)
        torch.cuda.synchronize()
    return 16 * _CHUNK / (time.perf_counter() - begin)


def rows_of(layers: int, traffics: Iterator[tuple[str, Traffic, float]], sizes: list[str]) -> list[dict[str, Any]]:
    """Time every size of iteration alone and beside each kind of traffic."""
    kinds, rows = list(traffics), []
    weights = random_weights(layers)
    for size in sizes:
        entered = torch.randn(_SIZES[size], _HIDDEN, device="cuda", dtype=torch.bfloat16)
        graph = iteration(weights, entered)
        timed(graph, _ROUNDS)
        for name, traffic, rate in kinds:
            alone_s = timed(graph, _ROUNDS)
            beside_s, moved = beside(graph, traffic, rate)
            rows.append(
                {
                    "traffic": name,
                    "iteration": size,
                    "alone_ms": 1000 * alone_s,
                    "beside_ms": 1000 * beside_s,
                    "slowdown": beside_s / alone_s,
                    "gb_per_s": moved / 1e9,
                    "gb_per_s_alone": rate / 1e9,
                }
            )
        del graph, entered
    return rows


def broadcasts(layers: int, name: str) -> list[dict[str, Any]]:
    """Time iterations on the source of a broadcast to a second process, which this one starts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    child = subprocess.Popen([sys.executable, __file__, "--receive", str(port), "--layers", str(layers)])
    try:
        torch.cuda.set_device(0)
        dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=2)
        buffer = torch.ones(_CHUNK, dtype=torch.uint8, device="cuda")
        count = torch.zeros(1, dtype=torch.int64, device="cuda")

        def send(chunks: int) -> None:
            # The receiver learns first how many chunks come.
            count.fill_(chunks)
            dist.broadcast(count, 0)
            for _ in range(chunks):
                dist.broadcast(buffer, 0)

        found = rows_of(layers, iter([(name, send, alone(send))]), list(_SIZES))
        send(0)
        torch.cuda.synchronize()
        dist.destroy_process_group()
        return found
    finally:
        child.wait(30)


def receive(port: int) -> None:
    """Receive chunks until none are announced."""
    torch.cuda.set_device(1)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=1, world_size=2)
    buffer = torch.empty(_CHUNK, dtype=torch.uint8, device="cuda")
    count = torch.zeros(1, dtype=torch.int64, device="cuda")
    while True:
        dist.broadcast(count, 0)
        if not (chunks := int(count.item())):
            break
        for _ in range(chunks):
            dist.broadcast(buffer, 0)
    torch.cuda.synchronize()
    dist.destroy_process_group()


def main() -> None:
    """Measure, write and print."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32, help="layers of the model, of 32 (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("results/tables/gpu_interference.csv"), help="table to write (default: %(default)s)"
    )
    parser.add_argument("--receive", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--broadcast", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.receive is not None:
        receive(arguments.receive)
        return
    if arguments.broadcast is not None:
        pd.DataFrame(broadcasts(arguments.layers, arguments.broadcast)).to_json(arguments.out, orient="records")
        return
    on = card()
    rows = rows_of(arguments.layers, copies(), list(_SIZES))
    parts = [pd.DataFrame(rows)]
    if torch.cuda.device_count() > 1:
        for name, environment in _CLOSED.items():
            part = arguments.out.with_suffix(".part.json")
            command = [sys.executable, __file__, "--broadcast", name, "--layers", str(arguments.layers), "--out", str(part)]
            subprocess.run(command, check=True, env=os.environ | environment, timeout=150)
            parts.append(pd.read_json(part))
            part.unlink()
    table = pd.concat(parts).assign(measured_on=f"{on}, torch {torch.__version__}")
    table.to_csv(arguments.out, index=False, float_format="%.4g")
    print(table.drop(columns="measured_on").to_string(index=False, float_format=lambda value: f"{value:.4g}"))


if __name__ == "__main__":
    sys.exit(run_guarded(main))
