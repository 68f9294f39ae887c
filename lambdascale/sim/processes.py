"""Processes of simulated nodes: a pool keeps them warm, or every allocation starts one and its transfers wait for that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, Protocol, runtime_checkable

from lambdascale.core import ClusterSpec, ModelSpec, NodeId, ProcessStart
from lambdascale.core.checks import check_types, require
from lambdascale.core.commands import LoadBlocks, StartMulticast
from lambdascale.sim.links import FlowGroup
from lambdascale.sim.loads import Load
from lambdascale.sim.transfers import TransferEngine

# In front of a member's receives: no send is in its round, so that none begins.
_CLOSED = (-1, None)


@runtime_checkable
class Pool(Protocol):
    """Decides which allocations find a process that runs."""

    def build(self, cluster: ClusterSpec, models: Sequence[ModelSpec]) -> Processes | None:
        """Return the processes of a run, None if all of them run from its beginning."""
        ...


@dataclass(frozen=True, kw_only=True)
class WarmPool:
    """Every node has a process for every model, with context, kernels and registered memory, as the paper assumes."""

    def build(self, cluster: ClusterSpec, models: Sequence[ModelSpec]) -> Processes | None:
        """See Pool."""
        return None


@dataclass(frozen=True, kw_only=True)
class NewProcesses:
    """An allocation starts a process for its model, which ends ``keep_alive_s`` seconds after the release; null: never.

    What a run begins with runs already. Needs the constants ``cluster.start``.
    """

    keep_alive_s: float | None = 0.0

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self)
        kept = self.keep_alive_s
        require(kept is None or kept >= 0, f"backend.pool.keep_alive_s must not be negative, not {kept!r}")

    def build(self, cluster: ClusterSpec, models: Sequence[ModelSpec]) -> Processes | None:
        """See Pool; UserError for a cluster without the constants."""
        start = cluster.start
        require(start is not None, f"cluster {cluster.name} has no constants of process starts (cluster.start)")
        assert start is not None, "required above"
        kept_s = inf if self.keep_alive_s is None else self.keep_alive_s
        return Processes(start, {model.name: model.size_bytes for model in models}, kept_s)


class Processes:
    """Processes that nodes have, by model. Times in seconds of the run; ``sizes``: bytes of the models' weights."""

    def __init__(self, start: ProcessStart, sizes: Mapping[str, int], keep_alive_s: float) -> None:
        self.first_iteration_s = start.first_iteration_s
        self._ready_in_s = {model: start.ready_s(size) for model, size in sizes.items()}
        self._keep_alive_s = keep_alive_s
        self._ready: dict[tuple[NodeId, str], float] = {}  # of allocated ones: when blocks can come
        self._kept: dict[tuple[NodeId, str], float] = {}  # of released ones: when they end
        self._unused: set[tuple[NodeId, str]] = set()  # those without an iteration so far

    def allocate(self, at_s: float, node: NodeId, model: str, *, running: bool) -> None:
        """Start a process for an allocation, unless it is ``running`` or one was kept."""
        key = node, model
        if running or at_s < self._kept.pop(key, -inf):
            self._ready[key] = at_s
            return
        self._ready[key] = at_s + self._ready_in_s[model]
        self._unused.add(key)

    def release(self, at_s: float, node: NodeId, model: str) -> None:
        """Keep the process of a released node for a while. One that has not come up yet ends at once."""
        key = node, model
        if self._ready.pop(key, inf) <= at_s:
            self._kept[key] = at_s + self._keep_alive_s
        else:
            self._unused.discard(key)

    def lost(self, node: NodeId) -> None:
        """Let all processes of a node end."""
        for held in (self._ready, self._kept):
            for key in [key for key in held if key[0] == node]:
                del held[key]
        self._unused = {key for key in self._unused if key[0] != node}

    def ready_s(self, model: str, nodes: Iterable[NodeId]) -> float:
        """Return the time from which blocks of a model can come to all of ``nodes``."""
        return max(self._ready.get((node, model), -inf) for node in nodes)

    def first_use(self, node: NodeId, model: str) -> bool:
        """Return True if the process has never had an iteration; it has one now."""
        if (node, model) not in self._unused:
            return False
        self._unused.discard((node, model))
        return True


class PatientTransfers(TransferEngine):
    """A data plane whose destinations receive once their ``processes`` run.

    Under a barrier, and in a collective, all wait for the last of them; then the communicator is built.
    """

    def __init__(self, processes: Processes, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._processes = processes

    def load(self, command: LoadBlocks) -> None:
        """See TransferEngine."""
        if self._processes.ready_s(command.model, (command.node,)) <= self._kernel.now:
            super().load(command)
            return
        load = self._transfers[command.transfer_id] = Load(command, self._fabric, self._arrived, self._ended)
        self._await(load, command, (command.node,), load.start)

    def _launch(self, transfer: Any) -> None:
        command, nodes = transfer.command, transfer.command.plan.destinations
        starting = [node for node in nodes if self._processes.ready_s(command.model, (node,)) > self._kernel.now]
        collective = command.multicast == "collective"
        if not starting:
            super()._launch(transfer)
        elif collective or command.plan.streaming or self._barrier_s(command) is not None:
            # A collective has its communicator to build yet.
            self._await(transfer, command, nodes, partial(super()._launch, transfer), () if collective else nodes)
        else:
            for node in starting:
                member = transfer.members[node]
                member.receives.appendleft(_CLOSED)
                self._await(transfer, command, (node,), partial(self._open, transfer, member))
            super()._launch(transfer)

    def _open(self, transfer: Any, member: Any) -> None:
        """Let a destination of one-sided writes receive the blocks of its first round."""
        member.receives.popleft()
        due = member.receives[0][0]
        for source in [source for number, source in member.receives if number == due]:
            self._send_next(transfer, source)

    def _await(
        self,
        transfer: FlowGroup,
        command: StartMulticast | LoadBlocks,
        nodes: Sequence[NodeId],
        launch: Callable[[], None],
        told: Sequence[NodeId] | None = None,
    ) -> None:
        """Go on when the processes of ``nodes`` run, none of which was lost; the set-up of ``told`` (None: all) is over then."""

        def ready(_: None) -> None:
            if transfer.cancelled or not self._fabric.alive(nodes):
                return
            for node in nodes if told is None else told:
                self._set_up(command.transfer_id, node)
            launch()

        self._kernel.at(self._processes.ready_s(command.model, nodes), ready)
