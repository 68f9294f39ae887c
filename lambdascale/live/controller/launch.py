"""Launchers start node processes. ``local`` forks them on this host."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Protocol

from lambdascale.core import NodeId
from lambdascale.live.node.agent import run
from lambdascale.live.node_config import NodeConfig

_JOIN_S = 10.0
_REAP_S = 1.0  # a killed process has long ended when its successor is started
_TUNABLES = "GLIBC_TUNABLES"
# glibc writes past the caches only what is nearly as large as the last of them. A processor with a large shared one then reads
# all that it overwrites: copies take twice as long (7 instead of 13 GB/s a core on a Sapphire Rapids with 480 MiB). Read at exec.
_COPY_PAST_CACHES = "glibc.cpu.x86_non_temporal_threshold=0x100000"


class Launcher(Protocol):
    """Starts agents and notices when they die."""

    host: str  # the address the controller listens on, and whose interface agents on this host use

    def start(self, configs: Sequence[NodeConfig]) -> None:
        """Start an agent for each configuration. An earlier one of the same node has died or has been killed."""
        ...

    def sentinels(self) -> dict[int, NodeId]:
        """Return file descriptors that become readable when an agent dies, as far as the launcher has them."""
        ...

    def dead(self) -> list[NodeId]:
        """Return the nodes whose agents are known to have died."""
        ...

    def kill(self, node: NodeId) -> None:
        """End an agent at once, without its help."""
        ...

    def close(self) -> None:
        """Wait for agents that were told to leave; end those that stay."""
        ...


class LocalLauncher:
    """Processes on this host, forked from a server that has loaded torch once. They die with the controller."""

    host = "127.0.0.1"

    def __init__(self) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["lambdascale.live.node.agent", "lambdascale.live.node.preload"])
        with _tuned():
            forkserver.ensure_running()
        self._processes: dict[NodeId, BaseProcess] = {}

    def start(self, configs: Sequence[NodeConfig]) -> None:
        """See Launcher."""
        for config in configs:
            before = self._processes.get(config.node)
            if before is not None:
                before.join(_REAP_S)
            process = self._context.Process(target=run, args=(config,), name=f"node-{config.node}", daemon=True)
            process.start()
            self._processes[config.node] = process

    def sentinels(self) -> dict[int, NodeId]:
        """See Launcher."""
        return {process.sentinel: node for node, process in self._processes.items() if process.is_alive()}

    def dead(self) -> list[NodeId]:
        """See Launcher."""
        return [node for node, process in self._processes.items() if not process.is_alive()]

    def pid(self, node: NodeId) -> int:
        """Return the id of a node's process."""
        pid = self._processes[node].pid
        assert pid is not None, "it was started"
        return pid

    def kill(self, node: NodeId) -> None:
        """See Launcher."""
        self._processes[node].kill()

    def close(self) -> None:
        """See Launcher."""
        for process in self._processes.values():
            process.join(_JOIN_S)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes.clear()


@contextmanager
def _tuned() -> Iterator[None]:
    """Have programs that are executed meanwhile copy large pieces past the caches, unless the user has tuned that."""
    before = os.environ.get(_TUNABLES)
    if before is None or "non_temporal_threshold" not in before:
        os.environ[_TUNABLES] = ":".join(filter(None, (before, _COPY_PAST_CACHES)))
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TUNABLES]
        else:
            os.environ[_TUNABLES] = before
