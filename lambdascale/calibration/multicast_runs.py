"""Multicasts timed one after the other on a live cluster that serves no requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from lambdascale.checkpoints import PackedModel
from lambdascale.core import MulticastPlan, NodeId
from lambdascale.core.commands import Command, LoadBlocks, MulticastKind, ReleaseNode, SetTimer, StartMulticast, Tier
from lambdascale.core.events import BlockArrived, CommandFailed, Event, NodeJoined, NodeLost, SetUpDone, TimerFired

#: In tables, the system of nodes that load their own host copies.
OWN_COPIES = "own copies"
#: In tables, part of ``measured_on`` where NCCL makes its connections with a communicator, not with the first broadcast.
CONNECTED = "NCCL_RUNTIME_CONNECT=0"
_TIMER = 1
# Pause in which blocks of the last multicast are released, so that the nodes are idle when the next begins.
_PAUSE_S = 0.5


@dataclass(frozen=True)
class Trial:
    """A multicast of each plan's model, all begun at once, ``repeat`` times; plans by name of the model.

    ``own_copies``: the destinations load their own host copies instead, all at once.
    """

    plans: tuple[tuple[str, MulticastPlan], ...]
    own_copies: bool = False
    repeat: int = 5

    @property
    def destinations(self) -> list[tuple[NodeId, str]]:
        """Nodes that receive, with the model."""
        return [(node, name) for name, plan in self.plans for node in plan.destinations]

    @property
    def sources(self) -> list[tuple[NodeId, str]]:
        """Nodes that hold a model before."""
        return [(node, name) for name, plan in self.plans for node in plan.sources]


@dataclass
class Timed:
    """Times of a trial: from each command until the last destination has reported its last block, verified.

    ``set_up_s``: the part until the last node's communicator is built, for broadcasts.
    """

    seconds: list[float] = field(default_factory=list)
    set_up_s: list[float] = field(default_factory=list)


class Repeated:
    """A system that carries out trials, each ``repeat`` times, timed by the clock of the cluster of ``nodes`` that drives it.

    Sources load a model first and keep it; destinations drop it after each multicast. ``timed``: the times of each trial.
    RuntimeError if a command fails or a node is lost.
    """

    def __init__(self, models: Mapping[str, PackedModel], trials: Sequence[Trial], nodes: int, kind: MulticastKind) -> None:
        self._kind = kind
        self._sizes = {name: model.block_bytes for name, model in models.items()}
        self._trials = list(trials)
        self._missing = nodes
        self._numbers = count(1)
        self._holders: set[tuple[NodeId, str]] = set()
        self._copies: set[tuple[NodeId, str]] = set()
        self._left: set[tuple[NodeId, str, int]] = set()
        self._began: float | None = None
        self._set_up_at: float | None = None
        self.timed = [Timed() for _ in self._trials]

    def _now(self) -> tuple[Trial, Timed] | None:
        """Return the trial under way and its times; None once all are done."""
        return next((each for each in zip(self._trials, self.timed, strict=True) if len(each[1].seconds) < each[0].repeat), None)

    def on_event(self, event: Event) -> Sequence[Command]:
        """See ServingSystem."""
        if isinstance(event, CommandFailed | NodeLost):
            raise RuntimeError(f"the multicast failed: {event}")
        if isinstance(event, NodeJoined):
            self._missing -= 1
            return self._prepare(event.at) if not self._missing else []
        if isinstance(event, TimerFired):
            return self._begin(event.at)
        if isinstance(event, SetUpDone):
            self._set_up_at = event.at
        if isinstance(event, BlockArrived):
            return self._arrived(event)
        return []

    def _prepare(self, at: float) -> list[Command]:
        """Have sources load what they lack and destinations drop what they have; then pause, and begin."""
        now = self._now()
        if now is None:
            return []
        trial, _ = now
        lacking = [each for each in trial.sources if each not in self._holders]
        if trial.own_copies:
            lacking = [each for each in trial.destinations if each not in self._holders | self._copies]
        if lacking:
            self._holders |= set(lacking)
            return self._load(lacking, "ssd")
        return [*self._release(trial), SetTimer(_TIMER, at + _PAUSE_S)]

    def _release(self, trial: Trial) -> list[Command]:
        dropped = sorted(self._holders & set(trial.destinations))
        self._holders -= set(dropped)
        self._copies |= set(dropped) if trial.own_copies else set()
        return [ReleaseNode(node, name, 1, trial.own_copies) for node, name in dropped]

    def _load(self, holders: Sequence[tuple[NodeId, str]], tier: Tier) -> list[Command]:
        self._left = {(node, name, block) for node, name in holders for block in range(len(self._sizes[name]))}
        commands: list[Command] = []
        for node, name in holders:
            sizes = self._sizes[name]
            commands.append(LoadBlocks(next(self._numbers), name, node, tuple(range(len(sizes))), sizes, tier, "pipelined"))
        return commands

    def _begin(self, at: float) -> list[Command]:
        now = self._now()
        assert now is not None, "the timer is set for a trial"
        trial, _ = now
        self._began, self._set_up_at = at, None
        self._holders |= set(trial.destinations)
        if trial.own_copies:
            return self._load(trial.destinations, "host")
        self._left = {(node, name, block) for node, name in trial.destinations for block in range(len(self._sizes[name]))}
        commands: list[Command] = []
        for name, plan in trial.plans:
            tiers: list[Tier] = ["gpu"] * len(plan.sources)
            commands.append(StartMulticast(next(self._numbers), name, plan, self._sizes[name], tuple(tiers), self._kind))
        return commands

    def _arrived(self, event: BlockArrived) -> list[Command]:
        place = event.node, event.model, event.block
        if place not in self._left:
            return []
        self._left.discard(place)
        if self._left:
            return []
        now = self._now()
        if self._began is not None and now is not None:
            _, timed = now
            timed.seconds.append(event.at - self._began)
            if self._set_up_at is not None:
                timed.set_up_s.append(self._set_up_at - self._began)
            self._began = None
        return self._prepare(event.at)
