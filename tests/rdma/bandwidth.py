"""Measures the rdma transport against perftest's ib_write_bw, and a multicast against point to point. Prints JSON.

In the Soft-RoCE machine:   scripts/softroce -- python tests/rdma/bandwidth.py
With hardware:              python tests/rdma/bandwidth.py --device mlx5_0 --gid-index 3 --mib 4096

Both ends run on this machine: they share its cores, and emulated devices their emulation. Runs alternate, medians are compared.
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
from functools import partial
from multiprocessing.connection import Connection
from statistics import median

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
    parser.add_argument("--mib", type=int, default=32, help="bytes written in a measurement (default: %(default)s MiB)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=4, help="of the multicast (default: %(default)s)")
    parser.add_argument("--paced", type=float, default=4e6, help="bytes/s of a paced link, slow enough for the machine")
    given = parser.parse_args()
    options = RdmaOptions(devices=(given.device,), gid_index=given.gid_index, windows=False)
    pairs = []
    for _ in range(given.repeat):
        pairs.append((perftest(given.device, given.gid_index, given.mib), transport(options, given.mib)))
        print(f"ib_write_bw, transport: {pairs[-1]}", file=sys.stderr, flush=True)
    reference, ours = (median(column) for column in zip(*pairs, strict=True))
    report = {
        "ib_write_bw_bytes_per_s": reference,
        "transport_bytes_per_s": ours,
        "ratio": ours / reference,
        "each": pairs,
        **multicast(options, given.nodes, given.mib, ours),
        **paced_multicast(options, given.nodes, given.paced),
    }
    print(json.dumps(report))


def perftest(device: str, gid_index: int, mib: int) -> float:
    """ib_write_bw with messages of 1 MiB over one queue pair; bytes/s."""
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


def transport(options: RdmaOptions, mib: int) -> float:
    """One write of as many bytes, in chunks of 1 MiB, between two processes; bytes/s until the receiver has been told."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    receiver = context.Process(target=_receive, args=(options, mib * MIB, theirs), daemon=True)
    receiver.start()
    endpoint = load()(0, _handlers(), b"k" * 32, options=options)
    source = endpoint.allocate(mib * MIB)
    endpoint.register(source)
    endpoint.connect(1, ours.recv())
    endpoint.write(1, source[:MIB], 0, 0).result(60)
    ours.recv()
    began = time.monotonic()
    endpoint.write(1, source, 0, 1)
    ours.recv()
    took_s = time.monotonic() - began
    endpoint.close()
    receiver.join()
    return mib * MIB / took_s


def _handlers(written: threading.Semaphore | None = None) -> Handlers:
    return Handlers(
        on_write=lambda *_: written.release() if written else None, on_message=lambda *_: None, on_lost=lambda *_: None
    )


def _receive(options: RdmaOptions, size: int, pipe: Connection) -> None:
    written = threading.Semaphore(0)
    endpoint = load()(1, _handlers(written), b"k" * 32, options=options)
    endpoint.register(endpoint.allocate(size))
    pipe.send(endpoint.address)
    for _ in range(2):
        written.acquire()
        pipe.send("written")
    endpoint.close()


def _make(options: RdmaOptions, link: float | None, node: int, handlers: Handlers) -> Endpoint:
    return load()(node, handlers, b"k" * 32, options=options, link=TokenBucket(link) if link else None)


def multicast(options: RdmaOptions, nodes: int, mib: int, point_to_point: float) -> dict[str, float]:
    """All nodes share this machine's cores: what all receive together is compared with one connection's rate."""
    size = mib * MIB // BLOCKS
    took_s = _carry(partial(_make, options, None), nodes, size)
    together = (nodes - 1) * BLOCKS * size / took_s
    return {
        "multicast_nodes": nodes,
        "multicast_per_node_bytes_per_s": together / (nodes - 1),
        "multicast_together_of_point_to_point": together / point_to_point,
    }


def paced_multicast(options: RdmaOptions, nodes: int, link: float) -> dict[str, float]:
    """Links so slow that the machine keeps up: the rate per node against the link's, and against the plan's rounds."""
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
