"""Scale-in: which replicas take no new requests, and when they are released. One rule for every system."""

from __future__ import annotations

from math import ceil, inf

from lambdascale.control.allocations import Allocations
from lambdascale.control.autoscaler import AutoscalingPolicy
from lambdascale.control.serving import Serving
from lambdascale.control.state import Fleet, Instance, ModelState
from lambdascale.core import NodeId
from lambdascale.core.commands import StopInstance

# Times within a billionth of an interval count as equal (sums of floats).
_TOLERANCE = 1e-9


class ScaleIn:
    """Drains surplus instances, and releases them once they are empty.

    Only what serves counts: an instance is drained if those that go on serving hold as many copies as were desired at any look
    in the last ``keep_alive_s`` seconds. One that was in use in that time is drained only if the others will not need it back:
    with N - 1 of N replicas, the load of each grows to N / (N - 1), and answers may take as much longer; a model's last one
    stays. A drained instance serves again as soon as it is needed.

    A model whose requests wait while it has no replica comes before idle replicas of others, whether these are kept as a minimum
    or in reserve for a load: the node is freed on which they have been idle longest (see ``claim``).
    """

    def __init__(self, fleet: Fleet, allocations: Allocations, serving: Serving, autoscaler: AutoscalingPolicy) -> None:
        self._fleet = fleet
        self._allocations = allocations
        self._serving = serving
        self._keep_alive_s, self._desired = autoscaler.keep_alive_s, autoscaler.desired

    def is_calm(self, state: ModelState) -> bool:
        """Record the load; return True if a look is known to decide nothing (see Calm)."""
        calm, looks, at = state.calm, state.looks, self._fleet.at
        queued, running = len(state.queue), state.running
        _, last_queued, last_running = looks[-1]
        if running != last_running or queued != last_queued:
            self._record(state, queued, running)
        state.looked_s = at
        while len(looks) > 1 and looks[1][0] < at - self._keep_alive_s - _TOLERANCE:
            looks.popleft()
        if len(state.allocations) != calm.allocations or state.spared != calm.spared or state.draining != calm.draining:
            return False
        if queued and state.queue[0].kv_tokens > state.least_kv_tokens:
            return False
        if running > calm.running or queued > calm.queued:
            if self._desired(queued, running) > calm.enough:
                return False
            calm.running, calm.queued = running, queued
        _, peak_queued, peak_running = looks[0]
        if at > calm.until or peak_running < calm.peak_running or peak_queued < calm.peak_queued:
            if self._desired(peak_queued, peak_running) < calm.serving:
                return False
            calm.until, calm.peak_queued, calm.peak_running = inf, peak_queued, peak_running
        return not calm.draining or self._is_draining(state)

    @staticmethod
    def _record(state: ModelState, queued: int, running: int) -> None:
        """Record another load than at the last look. Descending: a look that a later one exceeds is never the highest again."""
        looks, load, before_s = state.looks, queued + running, state.looked_s
        while looks and looks[-1][1] + looks[-1][2] <= load:
            before_s, _, _ = looks.pop()
        looks.append((before_s, queued, running))

    @staticmethod
    def _is_draining(state: ModelState) -> bool:
        """True if as many instances as at the last look are drained, of as many, and all of them have requests."""
        drained = 0
        for instance in state.instances.values():
            if instance.draining:
                if not instance.outstanding:
                    return False
                drained += 1
        return drained == state.draining == state.calm.draining and len(state.instances) == state.calm.instances

    def look(self, state: ModelState, desired: int) -> None:
        """Take instances back into service, drain others and release those that are empty; ``desired`` replicas now.

        After ``is_calm``: the peak is the look that saw most queued and running requests in the last ``keep_alive_s``.
        """
        _, queued, running = state.looks[0]
        if state.draining:
            self._resume(state, desired)
        copies = state.replicas
        if copies > desired:
            due = self._fleet.at - self._keep_alive_s + _TOLERANCE
            while self._drain(state, queued, running, due, copies - state.draining):
                pass
        if state.draining:
            self._release_empty(state)
        self._calm_down(state, desired, queued, running)

    def _calm_down(self, state: ModelState, desired: int, queued: int, running: int) -> None:
        """Note when further looks decide nothing; ``queued`` and ``running`` at the peak."""
        calm, until, wanted = state.calm, inf, self._desired(queued, running)
        serving = state.replicas - state.draining
        # With fewer, drained instances may be due to serve again.
        enough = min(serving, len(state.instances) - state.draining) if state.draining else serving
        if enough < desired:
            return
        if wanted < serving:
            if not self._keep_alive_s or self._spares(queued, running, serving, serving - 1, serving - 1):
                return
            idle = [instance.idle_since for instance in state.instances.values() if not instance.outstanding]
            until = min([self._fleet.at, *idle]) + self._keep_alive_s - 2 * _TOLERANCE
        calm.until, calm.peak_queued, calm.peak_running = until, queued, running
        calm.allocations, calm.spared = len(state.allocations), state.spared
        calm.draining, calm.instances = state.draining, len(state.instances)
        calm.serving, calm.enough = serving, enough
        if wanted > enough:
            queued, running = len(state.queue), state.running
        calm.queued, calm.running = queued, running

    def make_room(self, state: ModelState, replicas: int) -> int:
        """Drain up to ``replicas`` instances that the load of the moment can spare, idle ones first, and release empty ones.

        Returns the number of drained ones, those that were so before included.
        """
        queued, running = len(state.queue), state.running
        if state.draining:
            self._resume(state, self._desired(queued, running))
        found = sum(instance.draining for instance in state.instances.values())
        copies, due = state.replicas, self._fleet.at
        while found < replicas and self._drain(state, queued, running, due, copies - state.draining):
            found += 1
        if state.draining:
            self._release_empty(state)
        return found

    def claim(self, state: ModelState) -> None:
        """Free a node for a model by releasing idle instances of others, those idle longest; nothing happens without enough.

        A model's first replica comes before replicas that others may want soon; a further one only before those of idle models.
        """
        fleet, needed, room = self._fleet, state.spec.gpus_per_replica, self._fleet.lacking(state)
        ways = []
        for node in (node for node in fleet.candidates(state) if node not in state.allocations):
            gpus, way = fleet.gpus_free[node], []
            for instance in self._idle_on(node):
                other = fleet.models[instance.model]
                if gpus < needed and not (state.allocations and (other.running or other.queue)):
                    gpus += other.spec.gpus_per_replica
                    way.append(instance)
            if gpus >= needed and state.kv_tokens[node] >= room:
                ways.append((max(instance.idle_since for instance in way), node, way))
        for instance in min(ways)[2] if ways else ():
            other = fleet.models[instance.model]
            other.draining -= instance.draining
            self._release(other, instance)

    def _idle_on(self, node: NodeId) -> list[Instance]:
        """Return the instances without requests that alone occupy GPUs of a node, longest idle first."""
        found = []
        for state in self._fleet.models.values():
            allocation = state.allocations.get(node)
            if allocation is not None and len(allocation.instances) == 1:
                found += [i for i in allocation.instances.values() if not i.outstanding and not _in_transfer(state, i)]
        return sorted(found, key=lambda instance: (instance.idle_since, instance.instance_id))

    @staticmethod
    def has_idle(state: ModelState) -> bool:
        """True if an instance has no requests and none of its nodes is in a transfer."""
        return any(not instance.outstanding and not _in_transfer(state, instance) for instance in state.instances.values())

    # -- draining ------------------------------------------------------------------------------------------------------

    @staticmethod
    def _serving_blocks(state: ModelState) -> int:
        """Number of blocks on nodes that serve in an instance which takes requests."""
        blocks = 0
        for allocation in state.allocations.values():
            for instance in allocation.instances.values():
                if not instance.draining:
                    blocks += len(allocation.wanted)
                    break
        return blocks

    def _resume(self, state: ModelState, desired: int) -> None:
        """Take drained instances back, those with most requests first, until as many copies serve as are desired."""
        if len(state.instances) - state.draining >= desired:
            return
        serving = self._serving_blocks(state)
        for instance in sorted(state.instances.values(), key=_by_load, reverse=True):
            if serving >= desired * state.blocks:
                return
            if instance.draining:
                instance.draining = False
                serving += _blocks(state, instance)

    def _drain(self, state: ModelState, queued: int, running: int, due: float, copies: int) -> bool:
        """Drain the least loaded instance if a load of ``queued`` and ``running`` requests allows it; True if it did.

        Instances that were idle since ``due`` are not in use. ``copies``: number of replicas that are not drained.
        """
        desired = self._desired
        if desired(queued, running) >= copies:
            return False
        # The common case, decided without a look at the nodes: all are in use, and none is to spare even if all nodes serve.
        if not self._spares(queued, running, copies, copies - 1, copies - 1) and self._in_use(state, due):
            return False
        able = (i for i in state.instances.values() if not i.draining and not _in_transfer(state, i))
        instance = min(able, key=_by_load, default=None)
        if instance is None:
            return False
        serving = self._serving_blocks(state)
        left = serving - _blocks(state, instance)
        copies = left // state.blocks
        if instance.outstanding or instance.idle_since > due:
            allowed = self._spares(queued, running, serving, left, copies)
        else:
            allowed = desired(queued, running) <= copies
        if allowed:
            instance.draining = True
            state.draining += 1
        return allowed

    @staticmethod
    def _in_use(state: ModelState, due: float) -> bool:
        """True if no instance was idle since ``due``."""
        for instance in state.instances.values():  # noqa: SIM110 - asked at most ticks: a generator takes twice as long
            if not instance.outstanding and instance.idle_since <= due:
                return False
        return True

    def _spares(self, queued: int, running: int, serving: int, left: int, copies: int) -> bool:
        """True if ``copies`` are enough for the load, also when answers take longer as ``left`` do the work of ``serving``."""
        return copies > 0 and self._desired(queued, ceil(running * serving / left)) <= copies

    def _release_empty(self, state: ModelState) -> None:
        drained, empty = 0, []
        for instance in state.instances.values():
            if instance.draining:
                drained += 1
                if not instance.outstanding and not _in_transfer(state, instance):
                    empty.append(instance)
        for instance in sorted(empty, key=_by_load):
            self._release(state, instance)
        state.draining = drained - len(empty)

    def _release(self, state: ModelState, instance: Instance) -> None:
        """Take an empty instance out of service and free those of its nodes that serve in nothing else."""
        self._fleet.out.append(StopInstance(instance.instance_id))
        self._serving.drop(state, instance)
        for node in instance.nodes:
            allocation = state.allocations[node]
            if not allocation.instances:
                self._allocations.release(state, allocation)


def _by_load(instance: Instance) -> tuple[float, float, int]:
    """Order of draining: least loaded first, then longest idle."""
    return len(instance.outstanding) / instance.capacity, instance.idle_since, instance.instance_id


def _in_transfer(state: ModelState, instance: Instance) -> bool:
    """True if a node of the instance takes part in a transfer."""
    for node in instance.nodes:  # noqa: SIM110 - asked at most ticks: a generator takes twice as long
        if state.allocations[node].transfers:
            return True
    return False


def _blocks(state: ModelState, instance: Instance) -> int:
    """Number of blocks on the nodes that serve in no other instance."""
    allocations = (state.allocations[node] for node in instance.nodes)
    return sum(len(allocation.wanted) for allocation in allocations if len(allocation.instances) == 1)
