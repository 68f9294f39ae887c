"""Launchers start node processes. ``local`` forks them on this host."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Protocol

from lambdascale.core import NodeId
from lambdascale.live.forkserver import prepare
from lambdascale.live.node.agent import run, wait_and_run
from lambdascale.live.node.line import LEFT
from lambdascale.live.node_config import NodeConfig

_JOIN_S = 10.0
_REAP_S = 1.0  # a killed process has long ended when its successor is started


@dataclass(frozen=True)
class End:
    """End of an agent's process: the reason, with the process as «it»; ``ours``: a fault in this package may have caused it."""

    reason: str
    ours: bool

    @classmethod
    def of(cls, status: int | None) -> End:
        """Tell the end from the process's exit status; negative: the signal that ended it, None: not known."""
        if status == LEFT:
            return cls("it has not heard from the controller for too long, and left", ours=False)
        if status is None:
            return cls("its process has ended", ours=False)
        if status >= 0:
            return cls(f"its process has ended with status {status}", ours=True)
        name = next((known.name for known in signal.Signals if known == -status), f"signal {-status}")
        killed = status in (-signal.SIGKILL, -signal.SIGTERM)
        return cls(f"it was killed ({name})" if killed else f"it was ended by a fault ({name})", ours=not killed)


class Launcher(Protocol):
    """Starts agents and notices when they die."""

    host: str  # the address the controller listens on, and whose interface agents on this host use

    def start(self, configs: Sequence[NodeConfig]) -> None:
        """Start an agent for each configuration. An earlier one of the same node has died or has been killed."""
        ...

    def sentinels(self) -> dict[int, NodeId]:
        """Return file descriptors that become readable when an agent dies, as far as the launcher has them."""
        ...

    def dead(self) -> dict[NodeId, End]:
        """Return the nodes whose agents are known to have died."""
        ...

    def kill(self, node: NodeId) -> None:
        """End an agent at once, without its help, if it has been started."""
        ...

    def close(self) -> None:
        """Wait for agents that were told to leave; end those that stay."""
        ...


@dataclass(frozen=True, eq=False)
class _Spare:
    """A process that waits at the other end of ``connection`` for the configuration of a node with this GPU."""

    gpu: int | None
    process: BaseProcess
    connection: Connection


class LocalLauncher:
    """Processes on this host, forked from a server that has loaded torch once. They die with the controller.

    ``spares``: processes kept ready for each GPU (with ``gpus`` 0: for all nodes), with its context and the kernels of ``models``
    (names and directories) in it; a node that is started takes one, and another is started. ``main`` and ``spare_main`` run in
    the processes.
    """

    host = "127.0.0.1"

    def __init__(
        self,
        *,
        spares: int = 0,
        gpus: int = 0,
        models: Sequence[tuple[str, str]] = (),
        main: Callable[[NodeConfig, float], None] = run,
        spare_main: Callable[[int | None, Sequence[tuple[str, str]], Connection], None] = wait_and_run,
    ) -> None:
        self._context = prepare()
        self._main, self._spare_main, self._models = main, spare_main, models
        self._processes: dict[NodeId, BaseProcess] = {}
        self._wanted = {gpu: spares for gpu in (range(gpus) if gpus else (None,)) if spares}
        self._spares: list[_Spare] = []

    def start(self, configs: Sequence[NodeConfig]) -> None:
        """See Launcher."""
        for config in configs:
            before = self._processes.get(config.node)
            if before is not None:
                before.join(_REAP_S)
            self._processes[config.node] = self._take_spare(config) or self._new(config)
        self.refill()

    def _new(self, config: NodeConfig) -> BaseProcess:
        process = self._context.Process(
            target=self._main, args=(config, time.monotonic()), name=f"node-{config.node}", daemon=True
        )
        process.start()
        return process

    def _take_spare(self, config: NodeConfig) -> BaseProcess | None:
        """Turn a spare process with the node's GPU into the node, if one is left."""
        gpus = len(self._wanted)
        gpu = config.node % gpus if gpus and None not in self._wanted else None
        for spare in [spare for spare in self._spares if spare.gpu == gpu]:
            self._spares.remove(spare)
            try:
                with spare.connection:
                    spare.connection.send((config, time.monotonic()))
            except OSError:  # it has died
                continue
            return spare.process
        return None

    def refill(self) -> None:
        """Start spare processes in place of those taken."""
        self._spares = [spare for spare in self._spares if spare.process.is_alive()]
        for gpu, wanted in self._wanted.items():
            for _ in range(wanted - sum(spare.gpu == gpu for spare in self._spares)):
                theirs, ours = self._context.Pipe(duplex=False)
                process = self._context.Process(
                    target=self._spare_main, args=(gpu, self._models, theirs), name="spare", daemon=True
                )
                process.start()
                theirs.close()
                self._spares.append(_Spare(gpu, process, ours))

    def sentinels(self) -> dict[int, NodeId]:
        """See Launcher."""
        return {process.sentinel: node for node, process in self._processes.items() if process.is_alive()}

    def dead(self) -> dict[NodeId, End]:
        """See Launcher."""
        return {node: End.of(process.exitcode) for node, process in self._processes.items() if not process.is_alive()}

    def pid(self, node: NodeId) -> int:
        """Return the id of a node's process."""
        pid = self._processes[node].pid
        assert pid is not None, "it was started"
        return pid

    def kill(self, node: NodeId) -> None:
        """See Launcher."""
        if node in self._processes:
            self._processes[node].kill()

    def close(self) -> None:
        """See Launcher."""
        for spare in self._spares:
            spare.connection.close()  # it ends by itself
        spares = [spare.process for spare in self._spares]
        for process in (*self._processes.values(), *spares):
            process.join(_JOIN_S)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes.clear()
        self._spares.clear()
