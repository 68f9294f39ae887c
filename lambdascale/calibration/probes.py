"""Rates of a machine's parts, medians of repeats: memory, copies to the device, arithmetic, a loopback connection."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from statistics import median

import torch

from lambdascale.inference.arena import Arena, touched_memory

_ROUNDS = 5
_TCP_CHUNK = 1 << 20


def seconds(work: Callable[[], object], device: torch.device, rounds: int = _ROUNDS) -> float:
    """Return the median time of ``work`` in seconds, after one run that does not count."""
    once(work, device)
    return median(once(work, device) for _ in range(rounds))


def once(work: Callable[[], object], device: torch.device) -> float:
    """Return the time of ``work`` in seconds, with the device's queue empty before and after."""
    _synchronize(device)
    begin = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_rate(size_bytes: int) -> float:
    """Measure one thread's copies between mapped pages of host memory, in bytes/s."""
    source, target = (torch.frombuffer(touched_memory(size_bytes), dtype=torch.uint8) for _ in range(2))
    return size_bytes / seconds(lambda: target.copy_(source), torch.device("cpu"))


def host_to_device_rate(size_bytes: int, device: torch.device) -> float:
    """Measure copies from a (pinned) host arena to a device arena, in bytes/s."""
    host, target = (Arena(size_bytes, where, "a measurement's buffer") for where in (torch.device("cpu"), device))
    try:
        return size_bytes / seconds(lambda: target.bytes.copy_(host.bytes, non_blocking=True), device)
    finally:
        host.close()


def memory_rate(size_bytes: int, device: torch.device) -> float:
    """Measure in bytes/s how fast the device reads its own memory: a sum over ``size_bytes``, as decode steps read weights."""
    values = torch.ones(size_bytes // 4, dtype=torch.float32, device=device)
    return size_bytes / seconds(lambda: values.sum(), device)


def matrix_rate(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """Measure a square matrix product, in FLOP/s."""
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / seconds(lambda: left @ right, device)


def loopback(size_bytes: int) -> tuple[float, float]:
    """Measure a TCP stream over the loopback interface: (bytes/s, seconds for 8 bytes one way)."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        peer, _ = server.accept()
        with peer:
            for end in (client, peer):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            rate = median(_stream(client, peer, size_bytes) for _ in range(_ROUNDS))
            return rate, _ping(client, peer) / 2


def _stream(client: socket.socket, peer: socket.socket, size_bytes: int) -> float:
    data, buffer = bytes(_TCP_CHUNK), bytearray(_TCP_CHUNK)
    chunks = -(-size_bytes // _TCP_CHUNK)

    def send() -> None:
        for _ in range(chunks):
            client.sendall(data)

    begin = time.perf_counter()
    sender = threading.Thread(target=send)
    sender.start()
    left = chunks * _TCP_CHUNK
    while left:
        left -= peer.recv_into(buffer, min(left, _TCP_CHUNK))
    sender.join()
    return chunks * _TCP_CHUNK / (time.perf_counter() - begin)


def _ping(client: socket.socket, peer: socket.socket, rounds: int = 1000) -> float:
    """Return the median round-trip time of 8 bytes in seconds."""

    def echo() -> None:
        for _ in range(rounds):
            peer.sendall(peer.recv(8, socket.MSG_WAITALL))

    answering = threading.Thread(target=echo)
    answering.start()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        client.sendall(b"8 bytes!")
        client.recv(8, socket.MSG_WAITALL)
        times.append(time.perf_counter() - begin)
    answering.join()
    return median(times)
