"""Measure the rdma transport against perftest's ib_write_bw, and a multicast against point to point; print JSON.

In the Soft-RoCE machine:   scripts/softroce -- python tests/rdma/bandwidth.py
With hardware:              python tests/rdma/bandwidth.py --device mlx5_0 --gid-index 3 --mib 4096

Both ends run on this machine: they share its cores, and emulated devices their emulation. The load of the machine changes from
second to second, so short measurements alternate, and each of ours is compared with the two of perftest around it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from statistics import median, quantiles
from typing import Any

from lambdascale.multicast import BinomialPipeline, completion_rounds
from lambdascale.testing.carriers import Carriers
from lambdascale.transport import Endpoint, Handlers, TokenBucket
from lambdascale.transport.rdma import RdmaOptions, load

MIB = 1 << 20
BLOCKS = 16
_TRIES = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="rxe0")
    parser.add_argument("--gid-index", type=int, default=1)
    parser.add_argument("--mib", type=int, default=16, help="bytes written in a measurement (default: %(default)s MiB)")
    parser.add_argument("--repeat", type=int, default=9, help="measurements of the transport (default: %(default)s)")
    parser.add_argument("--multicasts", type=int, default=3, help="and of the multicast (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=4, help="of the multicast (default: %(default)s)")
    parser.add_argument("--paced", type=float, default=4e6, help="bytes/s of a paced link, slow enough for the machine")
    given = parser.parse_args()
    options = RdmaOptions(devices=(given.device,), gid_index=given.gid_index, windows=False)
    with pair(options, given.mib * MIB) as write:
        reference = partial(perftest, given.device, given.gid_index, given.mib)
        theirs, ours = alternate("ib_write_bw, transport", reference, write, given.repeat)
        spread = partial(multicast, options, given.nodes, given.mib)
        around, each = alternate("transport, multicast per node", write, spread, given.multicasts)
    report = {
        "ib_write_bw_bytes_per_s": median(theirs),
        "transport_bytes_per_s": median(ours),
        **ratios("transport_of_ib_write_bw", theirs, ours),
        "multicast_nodes": given.nodes,
        "multicast_per_node_bytes_per_s": median(each),
        **ratios("multicast_per_node_of_point_to_point", around, each),
        **paced_multicast(options, given.nodes, given.paced),
    }
    print(json.dumps(report))


def alternate(names: str, outer: Any, inner: Any, repeat: int) -> tuple[list[float], list[float]]:
    """Measure ``outer`` and ``inner`` in turn, with one more ``outer``, so that each ``inner`` lies between two of them."""
    rates, others = [outer()], []
    for _ in range(repeat):
        others.append(inner())
        rates.append(outer())
        print(f"{names}: {rates[-2] / 1e6:.1f}, {others[-1] / 1e6:.1f} MB/s", file=sys.stderr, flush=True)
    return rates, others


def ratios(name: str, outer: Sequence[float], inner: Sequence[float]) -> dict[str, Any]:
    """Ratios of each inner rate to the mean of its neighbours: median, quartiles, and all of them."""
    found = [2 * rate / (before + after) for rate, before, after in zip(inner, outer, outer[1:], strict=False)]
    first, _, third = quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return {name: median(found), f"{name}_quartiles": (first, third), f"{name}_each": [round(ratio, 3) for ratio in found]}


def perftest(device: str, gid_index: int, mib: int) -> float:
    """Rate of ib_write_bw with messages of 1 MiB over one queue pair, in bytes/s."""
    command = ["ib_write_bw", "-d", device, "-x", str(gid_index), "-s", str(MIB), "-n", str(max(5, mib)), "-F"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(_TRIES):  # until the server listens
                time.sleep(1)
                done = subprocess.run([*command, "127.0.0.1"], capture_output=True, text=True, timeout=120)
                if done.returncode == 0:
                    break
        finally:
            server.kill()
    rows = re.findall(rf"^ *{MIB} +\d+ +[\d.]+ +([\d.]+)", done.stdout, re.MULTILINE)
    if not rows:
        raise RuntimeError(f"ib_write_bw says: {done.stdout}{done.stderr}")
    return float(rows[0]) * MIB


@contextmanager
def pair(options: RdmaOptions, size: int) -> Iterator[Any]:
    """Yield a function that writes between two processes, in chunks of 1 MiB: bytes/s until the receiver is notified."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    receiver = context.Process(target=_receive, args=(options, size, theirs), daemon=True)
    receiver.start()
    endpoint = load()(1, _handlers(), b"k" * 32, options=options)
    source = endpoint.allocate(size)
    endpoint.register(source)
    endpoint.connect(0, ours.recv())

    def write() -> float:
        began = time.monotonic()
        endpoint.write(0, source, 0, 0)
        ours.recv()
        return size / (time.monotonic() - began)

    write()  # warm-up
    yield write
    ours.send("end")
    endpoint.close()
    receiver.join()


def _handlers(written: threading.Semaphore | None = None) -> Handlers:
    return Handlers(
        on_write=lambda *_: written.release() if written else None, on_message=lambda *_: None, on_lost=lambda *_: None
    )


def _receive(options: RdmaOptions, size: int, pipe: Connection) -> None:
    written = threading.Semaphore(0)
    endpoint = load()(0, _handlers(written), b"k" * 32, options=options)
    endpoint.register(endpoint.allocate(size))
    pipe.send(endpoint.address)
    while not pipe.poll():
        if written.acquire(timeout=0.05):
            pipe.send("written")
    endpoint.close()


def _make(options: RdmaOptions, link: float | None, node: int, handlers: Handlers) -> Endpoint:
    return load()(node, handlers, b"k" * 32, options=options, link=TokenBucket(link) if link else None)


def multicast(options: RdmaOptions, nodes: int, mib: int) -> float:
    """Rate in bytes/s at which each of ``nodes`` - 1 receivers gets a multicast."""
    size = mib * MIB // BLOCKS
    return BLOCKS * size / _carry(partial(_make, options, None), nodes, size)


def paced_multicast(options: RdmaOptions, nodes: int, link: float) -> dict[str, float]:
    """Multicast over links slow enough for this machine: rate per node against the link's rate, and against the plan's rounds."""
    size = 1 << 18
    plan = BinomialPipeline().plan(sources=1, destinations=nodes - 1, blocks=BLOCKS)
    took_s = _carry(partial(_make, options, link), nodes, size)
    rounds = max(completion_rounds(plan).values())
    return {
        "paced_link_bytes_per_s": link,
        "paced_per_node_of_link": BLOCKS * size / took_s / link,
        "paced_time_of_ideal": took_s / (rounds * size / link),
    }


def _carry(make: partial[Endpoint], nodes: int, size: int) -> float:
    with Carriers(make, nodes=nodes, sources=1, blocks=BLOCKS, block_bytes=size) as carriers:
        return carriers.carry(BinomialPipeline().plan(sources=1, destinations=nodes - 1, blocks=BLOCKS))


if __name__ == "__main__":
    main()
