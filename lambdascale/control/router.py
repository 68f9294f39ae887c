"""Which request goes to which instance: one queue per model, first come first served, to the least loaded instance."""

from __future__ import annotations

from collections.abc import Sequence

from lambdascale.control.state import Fleet, Instance, ModelState
from lambdascale.core import Request
from lambdascale.core.commands import Dispatch, FailRequest

_NO_NODE = "no node is left to serve it"


class Router:
    """Holds requests back until an instance has a free slot, so that new capacity takes over the queue at once."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def arrive(self, request: Request) -> None:
        """A new request: dispatch it, queue it, or refuse it when its KV cache could never fit a replica, or no node is left."""
        state = self._fleet.models[request.model]
        if not self._fleet.gpus_free:
            self._fleet.out.append(FailRequest(request.request_id, _NO_NODE))
            return
        needed = request.prompt_tokens + request.output_tokens
        if needed > state.kv_tokens:
            reason = f"needs {needed} tokens of KV cache, a replica of {request.model} has {state.kv_tokens}"
            self._fleet.out.append(FailRequest(request.request_id, reason))
            return
        instance = None if state.queue else self._pick(state)
        if instance is None:
            state.queue.append(request)
            return
        self._take(state, instance, request)
        self._fleet.out.append(Dispatch(instance.instance_id, (request,)))

    def give_up(self, state: ModelState) -> None:
        """No node is left: nobody will answer what is queued."""
        self._fleet.out += [FailRequest(request.request_id, _NO_NODE) for request in state.queue]
        state.queue.clear()

    def finish(self, instance: Instance, request_id: int) -> None:
        """A request is done: its slot goes to the head of the queue."""
        state = self._fleet.models[instance.model]
        del instance.outstanding[request_id]
        state.running -= 1
        if state.queue:
            self.fill(state)
        if not instance.outstanding:
            instance.idle_since = self._fleet.at

    def fill(self, state: ModelState) -> None:
        """Give queued requests to free slots, one Dispatch per instance."""
        chosen: dict[int, list[Request]] = {}
        while state.queue and (instance := self._pick(state)) is not None:
            request = state.queue.popleft()
            self._take(state, instance, request)
            chosen.setdefault(instance.instance_id, []).append(request)
        self._fleet.out += [Dispatch(instance_id, tuple(requests)) for instance_id, requests in chosen.items()]

    def requeue(self, state: ModelState, instances: Sequence[Instance]) -> None:
        """Put the requests of lost instances back at the head of the queue, oldest first."""
        lost = [request for instance in instances for request in instance.outstanding.values()]
        for request in lost:
            self._fleet.moved.pop(request.request_id, None)
        for instance in instances:
            state.running -= len(instance.outstanding)
            instance.outstanding.clear()
        state.queue.extendleft(sorted(lost, key=lambda request: request.request_id, reverse=True))

    @staticmethod
    def _pick(state: ModelState) -> Instance | None:
        best, least = None, 1.0
        for instance in state.instances.values():
            load = len(instance.outstanding) / instance.capacity
            if load < least:
                best, least = instance, load
        return best

    @staticmethod
    def _take(state: ModelState, instance: Instance, request: Request) -> None:
        instance.outstanding[request.request_id] = request
        state.running += 1
