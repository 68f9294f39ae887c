"""Limits of a multicast: its plan at a rate, and the rate of the link beneath it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from lambdascale.calibration import probes
from lambdascale.core import MulticastPlan, NodeId


def planned_s(plan: MulticastPlan, block_bytes: Sequence[int], bytes_per_s: float) -> float:
    """Return the seconds that a plan takes over links of this rate in each direction, and nothing else.

    A block is sent as soon as its sender has it and neither its sender nor its receiver is busy with a block before it: rounds
    have no barrier between them. A streaming plan forwards small pieces: it takes as long as the model.
    """
    if plan.streaming:
        return sum(block_bytes) / bytes_per_s
    sent: dict[NodeId, float] = {}  # seconds until the node's last send, so far, is through
    received: dict[NodeId, float] = {}
    held: dict[tuple[NodeId, int], float] = {}  # until a node has a block
    for send in (send for sends in plan.rounds for send in sends):
        begin = max(sent.get(send.src, 0.0), received.get(send.dst, 0.0), held.get((send.src, send.block), 0.0))
        end = begin + block_bytes[send.block] / bytes_per_s
        sent[send.src] = received[send.dst] = held[send.dst, send.block] = end
    return max(received.values(), default=0.0)


def link_rate(transport: str, size_bytes: int = 1 << 30) -> float | None:
    """Measure the rate in bytes/s of the link under a transport, now; None if one host cannot measure it.

    cuda_ipc: a copy from GPU 0 to GPU 1, or within GPU 0 if it is the only one. shm: a copy in host memory. tcp: a stream over
    the loopback interface.
    """
    if transport == "cuda_ipc":
        return _peer_copy_rate(size_bytes)
    if transport == "shm":
        return probes.copy_rate(size_bytes // 4)
    return probes.loopback(size_bytes // 4)[0] if transport == "tcp" else None


def _peer_copy_rate(size_bytes: int) -> float:
    here, there = torch.device("cuda:0"), torch.device("cuda", min(1, torch.cuda.device_count() - 1))
    source = torch.ones(size_bytes, dtype=torch.uint8, device=here)
    target = torch.empty(size_bytes, dtype=torch.uint8, device=there)
    times = []
    for _ in range(6):
        for device in (here, there):
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        target.copy_(source)
        for device in (here, there):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return size_bytes / sorted(times[1:])[2]
