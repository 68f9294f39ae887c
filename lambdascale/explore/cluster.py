"""The simulated cluster with faults: nodes that die, return and are slow, a controller that stops, failures of all kinds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from lambdascale.core import ModelSpec, NodeId
from lambdascale.core.commands import (
    AllocateNode,
    Command,
    Dispatch,
    LoadBlocks,
    PlaceCopy,
    ReleaseNode,
    Repartition,
    Serve,
    StartMulticast,
    StopInstance,
    SwitchMode,
)
from lambdascale.core.events import (
    BlockArrived,
    CommandFailed,
    ConnectionLost,
    Event,
    NodeGivenUp,
    NodeJoined,
    NodeLost,
    RequestFinished,
    TokensProduced,
)
from lambdascale.core.timing import ComputeModel, IterationSize
from lambdascale.explore.faults import (
    BadNode,
    Broken,
    ClockStep,
    Cut,
    Fault,
    Late,
    Loss,
    Pause,
    Poison,
    Repeat,
    Slow,
    pair,
    victim,
)
from lambdascale.explore.instances import Instances
from lambdascale.explore.messages import Message
from lambdascale.explore.scenario import Scenario


class _Paced(ComputeModel):
    """A node's compute model that a fault may slow down."""

    def __init__(self, node: Any, model: ModelSpec, pace: Callable[[], float]) -> None:
        super().__init__(node, model)
        self._pace = pace

    def iteration_s(self, iteration: IterationSize, share: float = 1.0) -> float:
        """See ComputeModel."""
        return self._pace() * super().iteration_s(iteration, share)

    def decode_run_s(self, batch: int, context_tokens: int, steps: int) -> float:
        """See ComputeModel."""
        return self._pace() * super().decode_run_s(batch, context_tokens, steps)

    def decode_steps_by(self, batch: int, context_tokens: int, elapsed_s: float) -> tuple[int, float]:
        """See ComputeModel."""
        pace = self._pace()
        if pace == 1.0:
            return super().decode_steps_by(batch, context_tokens, elapsed_s)
        steps = 1
        while (run_s := self.decode_run_s(batch, context_tokens, steps)) < elapsed_s:
            steps += 1
        return steps, run_s


class FaultyCluster(Instances):
    """Carries out a scenario. ``struck``: called with the time and a fault's description when one happens."""

    def __init__(self, scenario: Scenario, struck: Callable[[float, str], None] = lambda at, what: None) -> None:
        super().__init__(scenario)
        self._struck = struck
        self._faults: dict[tuple[str, int], list[Fault]] = {}
        for fault in scenario.faults:
            if fault.when.what:
                self._faults.setdefault((fault.when.what, fault.when.nth), []).append(fault)
        self._seen = Counter[str]()
        self._pace = dict.fromkeys(range(self._nodes), 1.0)
        self._damages: Counter[str] = Counter()  # transfers of a model that are to be damaged

    def _note(self, entry: Event | Command) -> None:
        """Count an event or a command; let the faults happen that are tied to it."""
        if isinstance(entry, StartMulticast | LoadBlocks) and self._damages[entry.model]:
            self._damages[entry.model] -= 1
            self._damage(entry)
        kinds = [type(entry).__name__, "Event"] if isinstance(entry, Event) else [type(entry).__name__]
        for kind in kinds:
            self._seen[kind] += 1
            for fault in self._faults.get((kind, self._seen[kind]), ()):
                self.kernel.at(self.kernel.now + fault.when.after_s, self._strike, (fault, _nodes_of(entry, self._ever), entry))

    def _strike(self, entry: tuple[Fault, tuple[NodeId, ...], Event | Command]) -> None:
        fault, near, cause = entry
        node = victim(fault, near, self._nodes)
        if isinstance(fault, Loss):
            self._lose(node, fault)
        elif isinstance(fault, Cut):
            self._cut_between(pair(fault, near, self._nodes), fault.mended_s)
        elif isinstance(fault, Slow):
            self._slow((node, fault, fault.flaps))
        elif isinstance(fault, Late):
            self._say(f"messages of node {node} take {fault.delay_s:g} s for {fault.lasts_s:g} s")
            self._delay_s[node] = fault.delay_s
            self.kernel.at(self.kernel.now + fault.lasts_s, lambda _: self._delay_s.update({node: 0.0}))
        elif isinstance(fault, Pause):
            self._pause(fault)
        elif isinstance(fault, Repeat):
            self._say(f"the next {fault.count} messages come twice, {fault.after_s:g} s apart")
            self._repeats.extend([fault.after_s] * fault.count)
        elif isinstance(fault, ClockStep):
            self._say(f"the clock steps by {fault.step_s:g} s")
            self._offset_s += fault.step_s
            for timer in list(self._timers):
                self.kernel.at(self.kernel.now, self._timer_due, timer)
        elif isinstance(fault, Poison):
            self._poison(fault)
        elif isinstance(fault, BadNode):
            self._say(f"every instance fails on node {node} from now on")
            self._bad.add(node)
        elif isinstance(fault, Broken):
            self._break(fault, cause)

    def _say(self, what: str) -> None:
        self._struck(max(self._at, self.kernel.now + self._offset_s), what)

    def _pause(self, fault: Pause) -> None:
        self._say(f"the controller stops for {fault.lasts_s:g} s")
        self._paused_until = max(self._paused_until, self.kernel.now + fault.lasts_s)
        self.kernel.at(self._paused_until, self._go_on)

    def _slow(self, entry: tuple[NodeId, Slow, int]) -> None:
        node, fault, left = entry
        self._say(f"node {node} is slow for {fault.lasts_s:g} s: compute {fault.compute:g} times, link at {fault.nic:g}")
        self._pace[node] = fault.compute
        self._transfers.set_nic_share(node, fault.nic)
        now = self.kernel.now
        self.kernel.at(now + fault.lasts_s, self._recover, node)
        if left > 1:
            self.kernel.at(now + 2 * fault.lasts_s, self._slow, (node, fault, left - 1))

    def _recover(self, node: NodeId) -> None:
        self._pace[node] = 1.0
        self._transfers.set_nic_share(node, 1.0)

    def _break(self, fault: Broken, cause: Event | Command) -> None:
        """Let the transfer or the instance of a command fail."""
        if isinstance(cause, StartMulticast | LoadBlocks):
            number = cause.transfer_id
            if fault.damage:
                self._damage(cause)
                self._damages[cause.model] += fault.times - 1
            else:
                self._say(f"transfer {number} fails")
                self._hear(Message(0.0, CommandFailed(0.0, type(cause).__name__, "broken", transfer_id=number), -1, 0))
        elif isinstance(cause, Serve | Dispatch | SwitchMode):
            self._fail_instance(
                cause.moves[0][1] if isinstance(cause, SwitchMode) and cause.moves else getattr(cause, "instance", -1)
            )
        self._wake()

    def _damage(self, command: StartMulticast | LoadBlocks) -> None:
        self._say(f"the next block of transfer {command.transfer_id} is damaged")
        self._damaged.add(command.transfer_id)

    def _poison(self, fault: Poison) -> None:
        arrived = [number for number in self._prompt_tokens if number in self._ledger]
        if arrived:
            request = arrived[fault.pick % len(arrived)]
            self._say(f"instances that request {request} is sent to fail from now on")
            self._poisoned.add(request)

    # -- nodes -------------------------------------------------------------------------------------------------------

    def _lose(self, node: NodeId, fault: Loss) -> None:
        if node in self._lost or node not in self._members:
            return
        self._say(f"node {node} dies; noticed {_after(fault.noticed_s)}, then: {fault.then}, {fault.back_s:g} s later")
        self._lost.add(node)
        for cut in [cut for cut in self._cut if node in cut]:
            self._connect(cut)  # its next process makes connections of its own
        self._transfers.lost(node)
        self._holds = {key: blocks for key, blocks in self._holds.items() if key[0] != node}
        self._break_instances(node)
        if fault.noticed_s is None:
            self.kernel.at(self.kernel.now + fault.back_s, self._return, node)
        else:
            self.kernel.at(self.kernel.now + fault.noticed_s, self._notice, (node, fault))

    def _cut_between(self, cut: frozenset[NodeId], mended_s: float) -> None:
        if len(cut) < 2 or cut in self._cut or not cut <= self._members or not cut.isdisjoint(self._lost):
            return
        node, peer = sorted(cut)
        self._say(f"nodes {node} and {peer} lose their connection; it is made again {mended_s:g} s later")
        self._cut.add(cut)
        self._transfers.lost(*cut)
        self._break_between(cut)
        self.kernel.at(self.kernel.now + mended_s, self._mend, ConnectionLost(0.0, node, peer))

    def _mend(self, event: ConnectionLost) -> None:
        self._hear(Message(0.0, event, -1, 0))
        self._wake()

    def _notice(self, entry: tuple[NodeId, Loss]) -> None:
        node, fault = entry
        self._hear(Message(0.0, NodeLost(self.kernel.now, node, fault.then != "never"), -1, 0))
        self._wake()
        if fault.then == "back":
            self.kernel.at(max(self.kernel.now + fault.back_s, self._paused_until), self._return, node)
        elif fault.then == "given up":
            self.kernel.at(self.kernel.now + fault.back_s, self._give_up, node)

    def _give_up(self, node: NodeId) -> None:
        self._say(f"node {node} is given up")
        self._hear(Message(0.0, NodeGivenUp(0.0, node), -1, 0))
        self._wake()

    def _return(self, node: NodeId) -> None:
        """Let a node join anew, empty; it is a new generation, which no older command or message concerns."""
        if self.kernel.now < self._paused_until:  # nodes join with the controller's help
            self.kernel.at(self._paused_until, self._return, node)
            return
        self._say(f"node {node} is back")
        self._generation[node] += 1
        self._lost.discard(node)
        self._bad.discard(node)
        self._transfers.restored(node)
        self._delay_s[node] = 0.0
        self._hear(Message(0.0, NodeJoined(self.kernel.now, node), -1, 0))
        self._wake()

    def _timing(self, model: ModelSpec, node: NodeId) -> ComputeModel:
        return _Paced(self._cluster.node(node), model, lambda: self._pace[node])


def _after(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:g} s later"


def _nodes_of(entry: Event | Command, ever: dict[int, tuple[NodeId, ...]]) -> tuple[NodeId, ...]:
    """Nodes that an event or command concerns."""
    if isinstance(entry, StartMulticast):
        return entry.plan.members
    if isinstance(entry, BlockArrived | NodeLost | NodeJoined | AllocateNode | ReleaseNode | LoadBlocks | PlaceCopy):
        return (entry.node,)
    if isinstance(entry, Serve | Dispatch | StopInstance | Repartition | TokensProduced | RequestFinished):
        return ever.get(entry.instance, ())
    if isinstance(entry, SwitchMode):
        return ever.get(entry.pipeline, ())
    return ()
