"""Faults for running processes, and what processes hold: for runs that put a live cluster under stress. Linux only."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lambdascale.core import NodeId

# Kinds of faults and how often each comes; "controller": this process itself is stopped.
WEIGHTS = {"kill": 40, "cut": 35, "short stop": 14, "long stop": 8, "controller": 3}
_PIDFD_GETFD = 438  # asm-generic/unistd.h; Python has no name for it


class Faults:
    """Seeded faults for the processes of ``nodes`` nodes, which ``pid(node)`` returns; each silent for ``silence_s`` is given up.

    ``done``: faults by kind; ``missed``: those without a node to strike.
    """

    def __init__(self, pid: Callable[[NodeId], int], nodes: int, silence_s: float, seed: int) -> None:
        self._pid, self._nodes, self._silence_s = pid, nodes, silence_s
        self._random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.missed = 0

    def strike(self, members: Collection[NodeId]) -> frozenset[NodeId]:
        """Put in the next fault; return the two nodes whose connection it has cut, if it is a cut."""
        kind = self._random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        first, second = self._random.sample(range(self._nodes), 2)
        length_s = self._random.uniform(0.1, 1.0)
        needed = {"controller": set[NodeId](), "cut": {first, second}}.get(kind, {first})
        if not needed <= set(members) or not self._put(kind, first, second, length_s):
            self.missed += 1
            return frozenset()
        self.done[kind] += 1
        return frozenset((first, second)) if kind == "cut" else frozenset()

    def _put(self, kind: str, first: NodeId, second: NodeId, length_s: float) -> bool:
        if kind == "controller":
            stop_myself(3.0)
        elif kind == "cut":
            return cut(self._pid(first), self._pid(second))
        elif kind == "kill":
            _signal(self._pid(first), signal.SIGKILL)
        else:
            _stop(self._pid(first), length_s if kind == "short stop" else self._silence_s + 2)
        return True


def _stop(pid: int, seconds: float) -> None:
    _signal(pid, signal.SIGSTOP)
    timer = threading.Timer(seconds, _signal, (pid, signal.SIGCONT))
    timer.daemon = True
    timer.start()


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def stop_myself(seconds: float) -> None:
    """Stop this process for a while."""
    me = os.getpid()
    with subprocess.Popen(["/bin/sh", "-c", f"kill -STOP {me}; sleep {seconds}; kill -CONT {me}"]):
        pass


def _sockets(pid: int) -> dict[str, int]:
    """A process's sockets: descriptor by inode."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            target = os.readlink(entry)
            if target.startswith("socket:["):
                found[target[8:-1]] = int(entry.name)
    return found


def cut(one: int, two: int) -> bool:
    """Shut down the TCP connections between two processes; False if none exists."""
    try:
        ours, theirs = _sockets(one), _sockets(two)
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        ends = {(row[1], row[2]) for row in rows if row[9] in theirs and row[3] == "01"}
        mine = [ours[row[9]] for row in rows if row[9] in ours and (row[2], row[1]) in ends]
        pidfd = os.pidfd_open(one)
    except OSError:  # it has just died
        return False
    try:
        for descriptor in mine:
            copy = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, descriptor, 0)
            if copy < 0:
                raise OSError(ctypes.get_errno(), "pidfd_getfd")
            with socket.socket(fileno=copy) as end, suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
    finally:
        os.close(pidfd)
    return bool(mine)


# -- what processes hold -------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """Memory, descriptors, threads and sockets of a process at a moment."""

    at: float
    rss_mib: float
    descriptors: int
    threads: int
    sockets: int


def sample(pid: int) -> Sample | None:
    """Return what a process holds, None if it has ended."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        rss = int(status["VmRSS"].split()[0]) / 1024
        return Sample(time.monotonic(), rss, descriptors, int(status["Threads"]), len(_sockets(pid)))
    except (OSError, KeyError):
        return None


def slopes(samples: list[Sample]) -> dict[str, float]:
    """Growth a minute, by a straight line through the samples of a process after its first quarter."""
    kept = samples[len(samples) // 4 :]
    if len(kept) < 5:
        return {}
    minutes = [each.at / 60 for each in kept]
    names = ("rss_mib", "descriptors", "threads", "sockets")
    return {name: float(np.polyfit(minutes, [getattr(each, name) for each in kept], 1)[0]) for name in names}
