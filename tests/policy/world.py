"""A control plane without a cluster: tests play events into it and read its commands.

Everything a test touches is public behaviour: a system from conf/, events in, commands out. Commands are shown as short strings,
with transfers (t1, t2, ...) and instances (i1, i2, ...) numbered in the order in which they are first named:

    allocate 2 · release 2 (a copy stays: release 2 keep) · place 1 · evict 2 · timer 0.1 · fail 7
    multicast t1 0:gpu>1,2 · load t2 1 ssd 0123 · cancel t1
    serve i1 0 · serve i2 1:0-1,2:2-3 · dispatch i1 0,1,2 · switch i2 0>i3,1>i4 recompute · stop i1
    reshape i1 1:0-0,0:1-3 copy

With several models, the name of one that is not "a" stands behind the node or request: allocate 2b. Every event and command
is also shown to the invariant checker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from lambdascale.control import SystemConfig, build_system
from lambdascale.control.start import StartPolicy
from lambdascale.core import Request, Stage
from lambdascale.core.commands import (
    AllocateNode,
    CancelTransfer,
    Command,
    Dispatch,
    EvictBlocks,
    FailRequest,
    LoadBlocks,
    PlaceCopy,
    ReleaseNode,
    Repartition,
    Serve,
    SetTimer,
    StartMulticast,
    StopInstance,
    SwitchMode,
)
from lambdascale.core.events import (
    BlockArrived,
    CommandFailed,
    Event,
    NodeJoined,
    NodeLost,
    RequestArrived,
    RequestFinished,
    TimerFired,
    TokensProduced,
)
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.testing.invariants import InvariantChecker
from lambdascale.testing.systems import small_cluster, small_model

# The settings tests change, by their keys in conf/.
_KEYS = {
    "sources": "system.start.sources",
    "source_rule": "system.start.source_rule._target_",
    "warm": "system.start.warm._target_",
    "placement": "system.start.placement._target_",
    "loader": "system.start.loader",
    "kv": "system.kv",
    "order": "system.start.planner.order",
    "form": "+system.start.pipelines.form",
    "switch": "++system.start.pipelines.switch",
    "blocks": "system.blocks",
    "max_batch": "system.batching.max_batch",
    "mode": "system.batching.mode",
    "copies": "system.memory.initial_copies",
    "host_keep_alive_s": "system.memory.keep_alive_s",
    "host_budget": "system.memory.budget",
    "host_copies": "system.memory.enabled",
    "autoscaler": "autoscaler@system.autoscaler",
    "target": "system.autoscaler.target_per_replica",
    "keep_alive_s": "system.autoscaler.keep_alive_s",
    "min_replicas": "system.autoscaler.min_replicas",
    "max_replicas": "system.autoscaler.max_replicas",
}


# Settings that name a part of lambdascale.control.start.
_PARTS = ("source_rule", "warm", "placement")


@lru_cache(maxsize=256)
def _configured(system: str, *overrides: str) -> SystemConfig:
    return build(compose([f"system={system}", *overrides])).system


def configured(system: str, **settings: object) -> SystemConfig:
    """A system of conf/system with ``settings``, named as in this module."""
    return _configured(system, *(f"{_KEYS[name]}={_yaml(name, value)}" for name, value in settings.items()))


def _yaml(name: str, value: object) -> str:
    if name in _PARTS:
        return f"lambdascale.control.start.{value}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# The id of a transfer that is younger than every allocation.
_NEWEST = 1 << 30


class World:
    """A fleet of ``nodes`` nodes of ``gpus`` GPUs, joined at time 0, with the replicas a run starts with in place.

    Models ("a", "b", ...) have 1 GB in 4 blocks; a GPU holds one, or ``gpus_per_replica`` GPUs of a node do. One request a batch
    slot, ``max_batch`` 2; a replica wanted for every ``target`` 2 requests; no host copies; pipelines form always, since time
    stands still; unless settings say otherwise.
    ``cluster``: fields of ClusterSpec to replace; ``start``: another start policy than the system's.
    ``joined``: as many nodes have joined when the test begins (default: all). ``at_instance``: the id of the instance that each
    request was sent to last. ``requests``: number of requests so far.
    """

    def __init__(
        self,
        system: str = "lambdascale_tuned",
        *,
        nodes: int = 4,
        joined: int | None = None,
        gpus: int = 1,
        gpus_per_replica: int | dict[str, int] = 1,
        models: str = "a",
        cluster: dict[str, Any] | None = None,
        start: StartPolicy | None = None,
        **settings: object,
    ) -> None:
        defaults: dict[str, object] = {"blocks": 4, "max_batch": 2, "target": 2, "copies": 0}
        if system in ("lambdascale", "lambdascale_tuned"):
            defaults["form"] = "always"
        self.config = configured(system, **(defaults | settings))
        if start is not None:
            self.config = replace(self.config, start=start)
        hardware = replace(small_cluster(nodes, gpus), **(cluster or {}))
        each = gpus_per_replica if isinstance(gpus_per_replica, dict) else dict.fromkeys(models, gpus_per_replica)
        specs = [replace(small_model(name), gpus_per_replica=each[name]) for name in models]
        self.plane = build_system(self.config, cluster=hardware, models=specs)
        desired, max_batch = self.config.autoscaler.desired, self.config.batching.max_batch
        self.checker = InvariantChecker(hardware, self.config.blocks, desired=desired, max_batch=max_batch)
        self.at = 0.0
        self.commands: list[Command] = []
        self._transfers: dict[int, str] = {}
        self._instances: dict[int, str] = {}
        self._open: dict[str, StartMulticast | LoadBlocks] = {}
        self._cancelled: set[str] = set()
        self._timer: SetTimer | None = None
        self.requests = 0
        self.at_instance: dict[int, int] = {}
        self.start = [line for node in range(nodes if joined is None else joined) for line in self.play(NodeJoined(0.0, node))]

    # -- events ------------------------------------------------------------------------------------------------------

    def stale(self, instance: int, request: int) -> list[str]:
        """An answer comes from an instance (its id) that has the request no more, or never had it; the checker is not told."""
        return [self._show(command) for command in self.plane.on_event(RequestFinished(self.at, instance, request, 10))]

    def play(self, event: Event) -> list[str]:
        """Give the plane an event; its commands, shown. Instant loads are acknowledged at once."""
        self.at = event.at
        self.checker.on_event(event)
        given = list(self.plane.on_event(event))
        lines = []
        for command in given:
            self.checker.on_command(event.at, command)
            self._note(command)
            lines.append(self._show(command))
        self.commands += given
        for command in given:
            if isinstance(command, LoadBlocks) and command.tier == "instant":
                lines += self.deliver(self._transfers[command.transfer_id])
        return lines

    def arrive(self, count: int = 1, model: str = "a", *, prompt: int = 10, output: int = 10) -> list[str]:
        """``count`` requests arrive now, ids counted on from the last one's."""
        lines = []
        for _ in range(count):
            request = Request(self.requests, self.at, model, prompt, output)
            self.requests += 1
            lines += self.play(RequestArrived(self.at, request))
        return lines

    def finish(self, *requests: int) -> list[str]:
        """Requests end where they are."""
        return [line for r in requests for line in self.finish_at(self.at_instance[r], r)]

    def finish_at(self, instance: int, request: int) -> list[str]:
        """A request ends, reported by an instance (its id): where it is, or the pipeline it was moved from."""
        return self.play(RequestFinished(self.at, instance, request, 10))

    def first_token(self, *requests: int) -> list[str]:
        """Requests get their first tokens where they are."""
        return [line for r in requests for line in self.play(TokensProduced(self.at, self.at_instance[r], r, 1, "local"))]

    @property
    def ticking(self) -> bool:
        """True if a timer is set."""
        return self._timer is not None

    def tick(self, at: float | None = None) -> list[str]:
        """The timer set last fires, at its time or at ``at``."""
        timer = self._timer
        assert timer is not None, "no timer is set"
        self._timer = None
        return self.play(TimerFired(max(self.at, timer.at) if at is None else at, timer.timer_id))

    def block(self, node: int, *blocks: int, model: str = "a") -> list[str]:
        """Blocks arrive at a node, whichever transfer brings them."""
        return [line for block in blocks for line in self.play(BlockArrived(self.at, _NEWEST, node, model, block))]

    def untold_block(self, node: int, block: int) -> list[str]:
        """A block arrives that the node has already, or on a node that nobody knows; the checker is not told."""
        return [self._show(command) for command in self.plane.on_event(BlockArrived(self.at, _NEWEST, node, "a", block))]

    def deliver(self, transfer: str, sends: int | None = None) -> list[str]:
        """A transfer brings its blocks in order, all or the first ``sends``; what a node holds already is left out."""
        command = self._open[transfer]
        moves = self._moves(command)[:sends]
        return [line for node, block in moves for line in self.block(node, block, model=command.model)]

    def _moves(self, command: StartMulticast | LoadBlocks) -> list[tuple[int, int]]:
        if isinstance(command, LoadBlocks):
            moves = [(command.node, block) for block in command.blocks]
        else:
            moves = [(send.dst, send.block) for sends in command.plan.rounds for send in sends]
        return [(node, block) for node, block in moves if block not in self.held(node, command.model)]

    def lose(self, node: int, *, returns: bool = False) -> list[str]:
        """A node is lost; ``returns``: it will be started again."""
        return self.play(NodeLost(self.at, node, returns))

    def fail(self, *, transfer: str | None = None, instance: str | None = None) -> list[str]:
        """A transfer or an instance fails; with neither, a command nobody knows."""
        transfers, instances = ({shown: n for n, shown in table.items()} for table in (self._transfers, self._instances))
        return self.play(
            CommandFailed(self.at, "Serve", "broken", transfers.get(transfer or "", -1), instances.get(instance or "", -1))
        )

    def held(self, node: int, model: str = "a") -> set[int]:
        """The blocks a node holds in GPU memory."""
        return self.checker.held(node, model)

    def open_transfers(self) -> list[str]:
        """Names of the transfers with blocks still to bring, without those that were cancelled."""
        return [name for name, command in self._open.items() if name not in self._cancelled and self._moves(command)]

    def command(self, transfer: str) -> StartMulticast | LoadBlocks:
        """The command behind a transfer's name."""
        return self._open[transfer]

    # -- names -------------------------------------------------------------------------------------------------------

    def _note(self, command: Command) -> None:
        if isinstance(command, StartMulticast | LoadBlocks):
            self._open[self._transfer(command.transfer_id)] = command
        elif isinstance(command, CancelTransfer):
            self._cancelled.add(self._transfer(command.transfer_id))
        elif isinstance(command, SetTimer):
            self._timer = command
        elif isinstance(command, Dispatch):
            self.at_instance |= dict.fromkeys((request.request_id for request in command.requests), command.instance)
        elif isinstance(command, SwitchMode):
            self.at_instance |= dict(command.moves)

    def _transfer(self, number: int) -> str:
        return self._transfers.setdefault(number, f"t{len(self._transfers) + 1}")

    def _instance(self, number: int) -> str:
        return self._instances.setdefault(number, f"i{len(self._instances) + 1}")

    def _show(self, command: Command) -> str:
        match command:
            case AllocateNode():
                return f"allocate {command.node}{_other(command.model)}"
            case ReleaseNode():
                return f"release {command.node}{_other(command.model)}{' keep' if command.keep_host else ''}"
            case PlaceCopy():
                return f"place {command.node}{_other(command.model)}"
            case EvictBlocks():
                return f"evict {command.node}{_other(command.model)}"
            case SetTimer():
                return f"timer {command.at:g}"
            case FailRequest():
                return f"fail {command.request_id}"
            case StartMulticast() | LoadBlocks():
                return self._show_transfer(command)
            case CancelTransfer():
                return f"cancel {self._transfer(command.transfer_id)}"
        return self._show_serving(command)

    def _show_transfer(self, command: StartMulticast | LoadBlocks) -> str:
        name, other = self._transfer(command.transfer_id), _other(command.model)
        if isinstance(command, LoadBlocks):
            return f"load {name} {command.node}{other} {command.tier} {''.join(map(str, command.blocks))}"
        sources = ",".join(f"{node}:{tier}" for node, tier in zip(command.plan.sources, command.source_tiers, strict=True))
        return f"multicast {name} {sources}>{','.join(map(str, command.plan.destinations))}{other}"

    def _show_serving(self, command: Command) -> str:
        match command:
            case Serve():
                name, other = self._instance(command.instance), _other(command.model)
                return f"serve {name} {_stages(command.stages) if command.is_pipeline else command.stages[0].node}{other}"
            case Dispatch():
                return f"dispatch {self._instance(command.instance)} {','.join(str(r.request_id) for r in command.requests)}"
            case Repartition():
                return f"reshape {self._instance(command.instance)} {_stages(command.stages)} {command.kv}"
            case SwitchMode():
                moves = ",".join(f"{request}>{self._instance(instance)}" for request, instance in command.moves)
                return f"switch {self._instance(command.pipeline)} {moves} {command.kv}"
            case StopInstance():
                return f"stop {self._instance(command.instance)}"
        raise AssertionError(f"no way to show {command}")


def _other(model: str) -> str:
    return "" if model == "a" else model


def _stages(stages: Sequence[Stage]) -> str:
    return ",".join(f"{s.node}:{s.first_block}-{s.last_block}" for s in stages)


def without(lines: Sequence[str], *kinds: str) -> list[str]:
    """The commands that are of none of these kinds."""
    return [line for line in lines if line.split()[0] not in kinds]


def pipelined(*, prompt: int = 10, **settings: Any) -> World:
    """Two replicas (i1 on node 0, i2 on 1) with two requests each; the multicast t3 to nodes 2 and 3 has brought half of each.

    Blocks 0 and 1 are on node 2, blocks 2 and 3 on node 3: pipeline i3 serves there and has requests 4 to 7; 8 waits.
    """
    world = World(nodes=4, min_replicas=2, **settings)
    world.arrive(9, prompt=prompt)
    assert world.tick() == ["allocate 2", "allocate 3", "multicast t3 0:gpu,1:gpu>2,3", "timer 0.1"]
    assert world.deliver("t3", 3) == []
    assert world.deliver("t3", 1) == ["serve i3 2:0-1,3:2-3", "dispatch i3 4,5,6,7"]
    return world
