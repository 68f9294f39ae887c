"""ControlPlane: joins router, scaler, recovery and autoscaler into a ServingSystem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import floor, inf
from typing import Any

from lambdascale.control.allocations import Allocations
from lambdascale.control.recovery import Recovery
from lambdascale.control.router import Router
from lambdascale.control.scale_in import ScaleIn
from lambdascale.control.scaling import Scaler
from lambdascale.control.serving import Serving
from lambdascale.control.state import Fleet, ModelState
from lambdascale.control.system import SystemConfig
from lambdascale.control.transfers import Transfers
from lambdascale.core import ClusterSpec, ModelSpec, NodeId
from lambdascale.core.commands import Command, PlaceCopy, SetTimer
from lambdascale.core.events import (
    BlockArrived,
    CommandFailed,
    ConnectionLost,
    Event,
    NodeGivenUp,
    NodeJoined,
    NodeLost,
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    SetUpDone,
    TimerFired,
    TokensProduced,
)

# Times within a billionth of an interval of a tick count as on it (sums of floats).
_TICK_TOLERANCE = 1e-9


class ControlPlane:
    """λScale's cluster manager, or a baseline's: the parts in ``config`` make the difference."""

    def __init__(self, *, config: SystemConfig, cluster: ClusterSpec, models: Sequence[ModelSpec]) -> None:
        self.config = config
        self.fleet = Fleet(
            cluster, models, config.blocks, config.memory, config.start.storage, max_batch=config.batching.max_batch
        )
        fleet, start = self.fleet, config.start
        self._router = Router(fleet)
        transfers = Transfers(fleet, loader=start.loader, multicast=start.multicast or "one_sided")
        allocations = Allocations(fleet)
        self._serving = Serving(fleet, self._router, transfers, allocations, start=start, batching=config.batching, kv=config.kv)
        self._scaler = Scaler(fleet, transfers, allocations, self._serving, start)
        self._scale_in = ScaleIn(fleet, allocations, self._serving, config.autoscaler)
        self._recovery = Recovery(fleet, self._router, transfers, allocations, self._serving)
        self._tick = 0
        self._armed_s, self._armed_index = -inf, 0  # time of the last timer, and its place on the grid
        self._provisioned = False
        # Read once: every tick needs them.
        autoscaler, self._states = config.autoscaler, tuple(fleet.models.values())
        self._desired, self._fixed, self._in_turn = autoscaler.desired, autoscaler.fixed, autoscaler.in_turn
        self._interval_s, self._min_replicas = autoscaler.interval_s, autoscaler.min_replicas
        self._handlers: dict[type[Event], Callable[[Any], None]] = {
            NodeJoined: self._node_joined,
            RequestArrived: self._request_arrived,
            BlockArrived: self._serving.block_arrived,
            SetUpDone: self._ignore,
            TokensProduced: self._tokens_produced,
            RequestFinished: self._request_finished,
            RequestPreempted: self._ignore,
            TimerFired: self._timer_fired,
            NodeLost: self._node_lost,
            NodeGivenUp: self._node_given_up,
            ConnectionLost: self._connection_lost,
            CommandFailed: self._command_failed,
        }

    def on_event(self, event: Event) -> Sequence[Command]:
        """Return the commands to carry out now, in order."""
        fleet = self.fleet
        fleet.at = event.at
        self._handlers[type(event)](event)
        if not fleet.out:
            return ()
        commands, fleet.out = fleet.out, []
        if fleet.costs and (len(commands) > 1 or type(commands[0]) is not SetTimer):
            fleet.costs.clear()  # a timer alone changes nothing that waits or runs
        return commands

    def _ignore(self, event: Event) -> None:
        """Progress of a request or a transfer that the control plane has no decision about."""

    def _node_joined(self, event: NodeJoined) -> None:
        """Take a node in. One that comes back is empty; what it held before is lost, whether or not its loss was noticed."""
        fleet, node = self.fleet, event.node
        if node in fleet.gpus_free:
            self._recovery.node_lost(node, returns=True)
        fleet.returning.discard(node)
        fleet.gpus_free[node] = fleet.cluster.node(node).gpus
        if self._provisioned:
            for state in fleet.models.values():
                state.unfit.discard(node)
            self._arm_once()
            return
        if len(fleet.gpus_free) < fleet.cluster.nodes:
            return
        self._provisioned = True
        self._place_host_copies()
        for state in fleet.models.values():
            self._scaler.provision(state, self.config.autoscaler.min_replicas)

    def _place_host_copies(self) -> None:
        """Place the copies that a run starts with; where a node has no room for all of its, the last ones."""
        fleet, copies = self.fleet, self.config.memory.initial_copies
        nodes = sorted(fleet.gpus_free)
        placed: dict[tuple[NodeId, str], None] = {}
        for index, state in enumerate(fleet.models.values()):
            name = state.spec.name
            for copy in range(min(copies, len(nodes))):
                node = nodes[(index * copies + copy) % len(nodes)]
                for evicted in fleet.host.put(node, name, state.spec.size_bytes, fleet.at):
                    del placed[node, evicted]
                if fleet.host.has(node, name, fleet.at):
                    placed[node, name] = None
        fleet.out += [PlaceCopy(node, name) for node, name in placed]

    def _request_arrived(self, event: RequestArrived) -> None:
        self.fleet.costs.clear()
        self._router.arrive(event.request)
        self._arm_once()

    def _tokens_produced(self, event: TokensProduced) -> None:
        fleet = self.fleet
        instance = fleet.instances.get(fleet.moved.get(event.request_id, event.instance))
        if instance is not None and event.request_id in instance.outstanding:
            fleet.produced[event.request_id] = event.tokens

    def _request_finished(self, event: RequestFinished) -> None:
        fleet = self.fleet
        fleet.produced.pop(event.request_id, None)
        moved_to = fleet.moved.pop(event.request_id, event.instance) if fleet.moved else event.instance
        instance = fleet.instances.get(moved_to)
        # An answer may still come in from an instance that was given up; its request has been restarted, or waits, by then.
        if instance is not None and event.request_id in instance.outstanding:
            fleet.costs.clear()
            self._router.finish(instance, event.request_id)
        elif instance is None:
            fleet.costs.clear()
            self._router.answered(event.request_id)

    def _node_lost(self, event: NodeLost) -> None:
        self._recovery.node_lost(event.node, returns=event.returns)
        self._arm_once()

    def _node_given_up(self, event: NodeGivenUp) -> None:
        self._recovery.node_given_up(event.node)

    def _connection_lost(self, event: ConnectionLost) -> None:
        self._recovery.connection_lost(event.node, event.peer)
        self._arm_once()

    def _command_failed(self, event: CommandFailed) -> None:
        if event.transfer_id < 0 and event.instance < 0:
            raise RuntimeError(
                f"{event.command} failed, and the failure names neither a transfer nor an instance: {event.reason}"
            )
        self._recovery.transfer_failed(event.transfer_id)
        self._recovery.instance_failed(event.instance, event.reason)
        self._arm_once()

    # -- autoscaling -------------------------------------------------------------------------------------------------

    def _arm_once(self) -> None:
        if not self._tick:
            self._arm()

    def _arm(self, after: bool = False) -> None:
        """Set the timer for the next evaluation, on the grid of the interval; ``after``: strictly later than now."""
        fleet, interval = self.fleet, self._interval_s
        now = fleet.at
        if after and now == self._armed_s:  # the common case: it fires on time
            index = self._armed_index + 1
        else:
            position = now / interval
            index = floor(position + _TICK_TOLERANCE)
            if after or position - index > _TICK_TOLERANCE:
                index += 1
        at = index * interval
        if at < now:
            at = now
        self._armed_s, self._armed_index = at, index
        self._tick = tick = fleet.new_id()
        fleet.out.append(SetTimer(tick, at))

    def _timer_fired(self, event: TimerFired) -> None:
        if event.timer_id != self._tick:
            return
        self._tick = 0
        is_calm = self._scale_in.is_calm
        for state in self._states:
            if not is_calm(state):
                self._evaluate(state)
        for state in self._states:
            if (state.running and not self._fixed) or self._unsettled(state):
                self._arm(after=True)
                return

    def _evaluate(self, state: ModelState) -> None:
        """Let the model have as many replicas as its load wants now, or wait its turn."""
        if self._in_turn and any(transfer.model == state.spec.name for transfer in self.fleet.transfers.values()):
            return
        desired = self._desired(len(state.queue), state.running)
        more = desired - state.replicas
        if more <= 0 and state.queue and self.fleet.lacking(state):
            # On a node with the KV memory that the head of the queue may need, once another is idle and so to spare.
            more = int(self._scale_in.has_idle(state))
        if more > 0 and len(self.fleet.models) > 1:
            self._make_room(state, more)
        self._scale_in.look(state, desired)
        if more > 0:
            self._scaler.scale_out(state, more)

    def _make_room(self, state: ModelState, replicas: int) -> None:
        """Take surplus replicas from other models when too few nodes are free, and idle ones where requests wait for no other.

        They do for a model's first replica, and for a node with the KV memory that the head of the queue may need.
        """
        lacking = replicas - len(self.fleet.free_nodes(state))
        for other in self.fleet.models.values():
            if lacking <= 0:
                break
            if other is not state:
                lacking -= self._scale_in.make_room(other, lacking)
        helpless = not state.allocations or self.fleet.lacking(state) > 0
        if state.queue and helpless and not self.fleet.free_nodes(state):
            self._scale_in.claim(state)

    def _unsettled(self, state: ModelState) -> bool:
        """True if a later evaluation could change something for this model without a further event that sets the timer."""
        least = self._min_replicas
        if state.queue or state.running:
            # A fixed number is another one for a while where requests need nodes with more KV memory.
            return not self._fixed or state.replicas != least or self.fleet.lacks_room(state)
        if state.replicas < least:
            return bool(self.fleet.free_nodes(state))
        return state.replicas > least
