"""Routing of requests to instances: one queue per model, first come first served, to the least loaded instance."""

from __future__ import annotations

from lambdascale.control.state import Fleet, Instance, ModelState
from lambdascale.core import Failure, Request
from lambdascale.core.commands import Dispatch, FailRequest

_NO_NODE = Failure("no_node", "no node is left to serve it")
# A request that was on so many failed instances is given up: it may be what makes them fail.
_TRIES = 3


class Router:
    """Holds requests back until an instance has a free slot, so that new capacity takes over the queue at once."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def arrive(self, request: Request) -> None:
        """Dispatch a new request, queue it, or refuse it: its KV cache, up to its limit, fits no node, or no node will serve."""
        state = self._fleet.models[request.model]
        if not self._fleet.can_serve(state):
            self._fleet.out.append(FailRequest(request.request_id, self._why(state)))
            return
        needed = request.kv_tokens
        if needed > state.least_kv_tokens and needed > self._fleet.most_kv_tokens(state):
            self._fleet.out.append(FailRequest(request.request_id, self._too_large(state, request)))
            return
        instance = None if state.queue else self._pick(state, needed)
        if instance is None:
            state.queue.append(request)
            return
        self._take(state, instance, request)
        self._fleet.out.append(Dispatch(instance.instance_id, (request,)))

    def give_up(self, state: ModelState) -> None:
        """Fail what is queued and fits no node, neither a living one nor one that will be started again; go on with the rest."""
        fleet = self._fleet
        if not state.queue:
            return
        serves, room = fleet.can_serve(state), fleet.most_kv_tokens(state)
        failed = [request for request in state.queue if not serves or request.kv_tokens > room]
        for request in failed:
            failure = self._too_large(state, request) if serves else self._why(state)
            fleet.out.append(FailRequest(request.request_id, failure))
            fleet.failures.pop(request.request_id, None)
            fleet.produced.pop(request.request_id, None)
            state.queue.remove(request)
        if failed:
            self.fill(state)

    @staticmethod
    def _why(state: ModelState) -> Failure:
        return Failure("unfit_nodes", f"{state.spec.name} fails on every node: {state.reason}") if state.unfit else _NO_NODE

    def _too_large(self, state: ModelState, request: Request) -> Failure:
        room = self._fleet.most_kv_tokens(state)
        return Failure(
            "too_large",
            f"needs up to {request.kv_tokens} tokens of KV cache ({request.prompt_tokens} for its prompt, {request.max_tokens} "
            f"for its answer), a replica of {request.model} has {room}",
        )

    def finish(self, instance: Instance, request_id: int) -> None:
        """Give the slot of a finished request to the head of the queue."""
        state = self._fleet.models[instance.model]
        del instance.outstanding[request_id]
        self._fleet.failures.pop(request_id, None)
        if state.reason:
            for node in instance.nodes:
                state.allocations[node].failures = 0
        state.running -= 1
        if state.queue:
            self.fill(state)
        if not instance.outstanding:
            instance.idle_since = self._fleet.at

    def answered(self, request_id: int) -> None:
        """Drop a request from the queue: an instance that serves no more has answered it. Nothing happens if it does not wait."""
        for state in self._fleet.models.values():
            request = next((request for request in state.queue if request.request_id == request_id), None)
            if request is not None:
                state.queue.remove(request)
                self._fleet.failures.pop(request_id, None)
                self.fill(state)

    def fill(self, state: ModelState) -> None:
        """Give queued requests to free slots, one Dispatch per instance."""
        chosen: dict[int, list[Request]] = {}
        while state.queue and (instance := self._pick(state, state.queue[0].kv_tokens)) is not None:
            request = state.queue.popleft()
            self._take(state, instance, request)
            chosen.setdefault(instance.instance_id, []).append(request)
        self._fleet.out += [Dispatch(instance_id, tuple(requests)) for instance_id, requests in chosen.items()]

    def requeue(self, state: ModelState, instance: Instance, *, failed: bool = False) -> None:
        """Put the requests of a lost instance back at the head of the queue, oldest first.

        ``failed``: the instance failed on nodes that live; a request that this happened to three times is failed.
        """
        lost = sorted(instance.outstanding.values(), key=lambda request: request.request_id, reverse=True)
        state.running -= len(lost)
        instance.outstanding.clear()
        for request in lost:
            self._fleet.moved.pop(request.request_id, None)
            if failed and self._failed_too_often(request.request_id):
                failure = Failure("instance_failed", f"its instance failed {_TRIES} times: {state.reason}")
                self._fleet.out.append(FailRequest(request.request_id, failure))
            else:
                state.queue.appendleft(request)

    def _failed_too_often(self, request_id: int) -> bool:
        failures = self._fleet.failures
        failures[request_id] = failures.get(request_id, 0) + 1
        if failures[request_id] < _TRIES:
            return False
        del failures[request_id]
        self._fleet.produced.pop(request_id, None)
        return True

    @staticmethod
    def _pick(state: ModelState, kv_tokens: int) -> Instance | None:
        """Return the least loaded instance with a free slot and so much KV memory.

        A drained one is returned only if no other has both; it then serves again.
        """
        best, least, drained = None, 1.0, None
        for instance in state.instances.values():
            load = len(instance.outstanding) / instance.capacity
            if load < least and instance.open and instance.kv_tokens >= kv_tokens:
                if instance.draining:
                    drained = instance
                else:
                    best, least = instance, load
        if best is None and drained is not None:
            drained.draining = False
            return drained
        return best

    @staticmethod
    def _take(state: ModelState, instance: Instance, request: Request) -> None:
        instance.outstanding[request.request_id] = request
        state.running += 1
