"""Simulated replicas and pipelines: the control plane's batch scheduler, with time from the compute model.

A replica advances a decode batch that nobody joins or leaves in one event. A pipeline keeps one batch in flight per stage
(reference, section 2.4); its stages take batches in the order these were started, so a batch's finish is known at its start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from lambdascale.control.batching import BatchedRequest, BatchLimits, BatchScheduler, Iteration
from lambdascale.core import NodeId, Request
from lambdascale.core.events import Mode, RequestFinished, TokensProduced
from lambdascale.core.timing import ComputeModel
from lambdascale.sim.kernel import Kernel
from lambdascale.sim.sharing import SharedCores

Emit = Callable[[TokensProduced | RequestFinished], None]

# Instances look for work after everything else that happens at the same time, so that simultaneous requests share a batch.
_LAST = 1


class SimInstance:
    """What replicas and pipelines have in common: they report tokens, and may be stopped for good."""

    mode: Mode
    stages: tuple[tuple[NodeId, float], ...] = ()  # of a pipeline: node and its share of the model

    def __init__(self, instance_id: int, kernel: Kernel, cores: SharedCores, compute: ComputeModel, emit: Emit) -> None:
        self.instance_id = instance_id
        self._kernel = kernel
        self._cores = cores
        self.compute = compute
        self._emit = emit
        self._stopped = False
        self._occupied = 0

    def dispatch(self, requests: Iterable[Request]) -> None:
        """Take requests from the router."""
        self.resume([BatchedRequest(r.request_id, r.prompt_tokens, r.output_tokens) for r in requests])

    def resume(self, works: Iterable[BatchedRequest]) -> None:
        """Take requests that may have produced tokens elsewhere."""
        raise NotImplementedError

    def drain(self) -> list[BatchedRequest]:
        """Stop for good; what was running and waiting. Iterations in flight are lost: their tokens are redone."""
        raise NotImplementedError

    def occupy(self, busy: bool) -> None:
        """Something else takes a GPU (a collective's kernels): no new iteration starts until all are given back."""
        self._occupied += 1 if busy else -1
        assert self._occupied >= 0, f"instance {self.instance_id} is given back what it was not deprived of"
        if self._occupied == 0:
            self._wake()

    def _wake(self) -> None:
        """Look for work after everything else that happens now."""
        raise NotImplementedError

    def _complete(self, scheduler: BatchScheduler, iteration: Iteration, steps: int) -> None:
        first, finished = scheduler.complete(iteration, steps)
        now = self._kernel.now
        for work in first:
            self._emit(TokensProduced(now, self.instance_id, work.request_id, 1, self.mode))
        for work in finished:
            self._emit(RequestFinished(now, self.instance_id, work.request_id, work.produced))


class SimReplica(SimInstance):
    """A node that holds the whole model."""

    mode: Mode = "local"

    def __init__(
        self,
        instance_id: int,
        kernel: Kernel,
        cores: SharedCores,
        compute: ComputeModel,
        emit: Emit,
        limits: BatchLimits,
        kv_tokens: int,
    ) -> None:
        super().__init__(instance_id, kernel, cores, compute, emit)
        self._scheduler = BatchScheduler(limits, kv_tokens)
        self._iteration: Iteration | None = None
        self._began_s = 0.0
        self._ticket, self._pace = -1, 1.0
        self._steps = 0
        self._version = 0
        self._woken = False

    def resume(self, works: Iterable[BatchedRequest]) -> None:
        """Queue the work; a long decode run is cut at the end of the iteration under way."""
        for work in works:
            self._scheduler.add(work)
        if self._iteration is None:
            self._wake()
        elif self._scheduler.admits:
            self._cut()

    def occupy(self, busy: bool) -> None:
        """The iteration under way ends first."""
        super().occupy(busy)
        if busy:
            self._cut()

    def drain(self) -> list[BatchedRequest]:
        """Stop; completed steps of the run under way count, the step in flight does not."""
        self._stopped = True
        self._version += 1
        iteration, self._iteration = self._iteration, None
        if iteration is not None and not iteration.prefills:
            done = self._steps_by_now(iteration) - 1
            if done:
                self._complete(self._scheduler, iteration, done)
        self._cores.leave(self._ticket)
        return self._scheduler.drain()

    def _wake(self) -> None:
        if not self._woken and self._iteration is None and not self._stopped:
            self._woken = True
            self._kernel.at(self._kernel.now, self._begin, priority=_LAST)

    def _begin(self, _: object) -> None:
        self._woken = False
        if self._iteration is not None or self._occupied or self._stopped:
            return
        iteration = self._iteration = self._scheduler.schedule()
        if iteration is None:
            return
        now = self._began_s = self._kernel.now
        self._steps = iteration.max_steps
        self._version += 1
        if iteration.prefills:
            took = self.compute.iteration_s(iteration)
        else:
            took = self.compute.decode_run_s(iteration.decodes, iteration.context_tokens, iteration.max_steps)
        self._ticket, self._pace = self._cores.enter(self._cut)
        self._kernel.at(now + took * self._pace, self._end, self._version)

    def _cut(self) -> None:
        """End a long decode run with the iteration under way."""
        iteration = self._iteration
        if iteration is None or self._steps <= 1:
            return
        steps = self._steps_by_now(iteration)
        if steps < self._steps:
            self._steps = steps
            self._version += 1
            took = self._pace * self.compute.decode_run_s(iteration.decodes, iteration.context_tokens, steps)
            self._kernel.at(max(self._began_s + took, self._kernel.now), self._end, self._version)

    def _steps_by_now(self, iteration: Iteration) -> int:
        elapsed = (self._kernel.now - self._began_s) / self._pace
        return min(self.compute.decode_steps_by(iteration.decodes, iteration.context_tokens, elapsed), self._steps)

    def _end(self, version: int) -> None:
        if version != self._version:
            return
        iteration = self._iteration
        assert iteration is not None, "an iteration ends that never began"
        self._iteration = None
        self._cores.leave(self._ticket)
        self._complete(self._scheduler, iteration, self._steps)
        self._begin(None)


class SimPipeline(SimInstance):
    """Nodes that hold the model together: a batch in flight per stage, activations handed from node to node."""

    mode: Mode = "pipeline"

    def __init__(
        self,
        instance_id: int,
        kernel: Kernel,
        cores: SharedCores,
        compute: ComputeModel,
        emit: Emit,
        limits: BatchLimits,
        kv_tokens: int,
        stages: Sequence[tuple[NodeId, float]],
        hop_s: float,
    ) -> None:
        super().__init__(instance_id, kernel, cores, compute, emit)
        self.stages = tuple(stages)
        self._hop_s = hop_s
        # Each node keeps the KV of its own stage only, for every batch in flight: a stage's share for each of as many
        # batches is what one node keeps for one batch alone.
        self._node_free_s = dict.fromkeys((node for node, _ in stages), 0.0)
        self._batches = [BatchScheduler(limits, kv_tokens) for _ in self._node_free_s]
        self._running: dict[int, tuple[Iteration, int]] = {}
        self._woken = False

    def resume(self, works: Iterable[BatchedRequest]) -> None:
        """Give each request to the batch that has the fewest."""
        for work in works:
            min(self._batches, key=len).add(work)
        self._wake()

    def _wake(self) -> None:
        if not self._woken and not self._stopped:
            self._woken = True
            self._kernel.at(self._kernel.now, self._begin_all, priority=_LAST)

    def drain(self) -> list[BatchedRequest]:
        """Stop; every iteration in flight is lost and its token redone."""
        self._stopped = True
        for _, ticket in self._running.values():
            self._cores.leave(ticket)
        return [work for batch in self._batches for work in batch.drain()]

    def _begin_all(self, _: object) -> None:
        self._woken = False
        for index in range(len(self._batches)):
            if index not in self._running:
                self._begin(index)

    def _begin(self, index: int) -> None:
        iteration = None if self._stopped or self._occupied else self._batches[index].schedule()
        if iteration is None:
            return
        # A batch is at one stage at a time.
        ticket, pace = self._cores.enter(_nothing)
        self._running[index] = (iteration, ticket)
        self._kernel.at(self._through_stages(iteration, pace), self._end, index)

    def _through_stages(self, iteration: Iteration, pace: float) -> float:
        """When the iteration leaves the last stage and its tokens are back at the first, if it enters now."""
        at = self._kernel.now
        for node, share in self.stages:
            at = max(at, self._node_free_s[node]) + pace * self.compute.iteration_s(iteration, share)
            self._node_free_s[node] = at
            at += self._hop_s
        return at

    def _end(self, index: int) -> None:
        if self._stopped:
            return
        iteration, ticket = self._running.pop(index)
        self._cores.leave(ticket)
        self._complete(self._batches[index], iteration, 1)
        self._begin(index)


def _nothing() -> None:
    """An iteration of a pipeline keeps the pace it began with."""
