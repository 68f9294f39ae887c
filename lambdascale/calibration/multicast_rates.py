"""Limits of a multicast: its plan at a rate, and the rate of the link beneath it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from lambdascale.calibration import probes
from lambdascale.core import MulticastPlan


def planned_s(plan: MulticastPlan, block_bytes: Sequence[int], bytes_per_s: float) -> float:
    """Return the seconds of a plan's rounds over links of this rate, each as long as its largest block takes.

    A streaming plan forwards small pieces: it takes as long as the model.
    """
    if plan.streaming:
        return sum(block_bytes) / bytes_per_s
    return sum(max(block_bytes[send.block] for send in sends) for sends in plan.rounds) / bytes_per_s


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
