"""Simulated instances: the control plane's batch scheduler, with time from the compute model, on the nodes' compute ports.

An instance is a list of stages; a replica has one. It keeps one batch in flight per node (reference, section 2.4). An iteration
visits its stages in order and waits for each node's port. A decode batch of a replica that no request joins or leaves, on a node
where nothing else computes, advances many iterations in one event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lambdascale.control.batching import BatchedRequest, BatchLimits, BatchScheduler, Iteration
from lambdascale.core import NodeId, Request, Stage
from lambdascale.core.commands import KvPolicy
from lambdascale.core.events import Mode, RequestFinished, TokensProduced
from lambdascale.core.timing import ComputeModel
from lambdascale.sim.kernel import Kernel
from lambdascale.sim.port import ComputePort

Emit = Callable[[TokensProduced | RequestFinished], None]
# Bytes of KV from one node to another, and what to call once they have arrived.
CopyKv = Callable[[NodeId, NodeId, float, Callable[[], None]], None]


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What an instance needs of its cluster. ``timing``: the compute model of each node for the instance's model."""

    kernel: Kernel
    port: Callable[[NodeId], ComputePort]
    timing: Callable[[NodeId], ComputeModel]
    emit: Emit
    copy_kv: CopyKv
    limits: BatchLimits
    kv_tokens: int
    kv_bytes_per_token: int
    hop_s: float
    block_bytes: tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Batch:
    """A batch in flight. ``stages``: those its iteration under way runs on, None between iterations. ``on``: those with its KV.

    ``blocked``: KV is moving, from ``sources``.
    """

    scheduler: BatchScheduler
    stages: tuple[Stage, ...] | None = None
    on: tuple[Stage, ...] = ()
    blocked: bool = False
    sources: frozenset[NodeId] = frozenset()


class SimInstance:
    """Serves requests by its ``stages`` until it is drained."""

    def __init__(self, instance_id: int, stages: tuple[Stage, ...], around: Surroundings) -> None:
        self.instance_id = instance_id
        self._around = around
        self._total = sum(around.block_bytes)
        self._stopped = False
        self._kv: KvPolicy = "copy"
        self.stages = stages
        self._batches = [self._new_batch() for _ in self.nodes]

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """Distinct nodes of the stages, in order of first appearance."""
        return tuple(dict.fromkeys(stage.node for stage in self.stages))

    @property
    def mode(self) -> Mode:
        """Mode its tokens are produced in."""
        return "pipeline" if len(self.stages) > 1 else "local"

    def share(self, first_block: int, last_block: int) -> float:
        """Return the share of the model's bytes in a range of blocks."""
        return sum(self._around.block_bytes[first_block : last_block + 1]) / self._total

    def _new_batch(self) -> _Batch:
        return _Batch(BatchScheduler(self._around.limits, self._around.kv_tokens), on=self.stages)

    @property
    def _head(self) -> ComputePort:
        return self._around.port(self.stages[0].node)

    # -- requests ----------------------------------------------------------------------------------------------------

    def dispatch(self, requests: Iterable[Request]) -> None:
        """Take requests from the router."""
        self.resume([BatchedRequest(r.request_id, r.prompt_tokens, r.output_tokens) for r in requests])

    def resume(self, works: Iterable[BatchedRequest]) -> None:
        """Take requests that may have produced tokens elsewhere, each into the batch that has the fewest."""
        for work in works:
            batch = min(self._batches, key=lambda batch: len(batch.scheduler))
            batch.scheduler.add(work)
            if batch.stages is not None and batch.scheduler.admits:
                self._around.port(batch.stages[0].node).cut()
        self._look_for_work()

    def _look_for_work(self, *, at_once: bool = False) -> None:
        if not self._stopped and any(_is_due(batch) for batch in self._batches):
            self._head.want(self, at_once=at_once)

    def involves(self, node: NodeId) -> bool:
        """True if the node serves it, or an iteration under way or KV on the move still needs the node."""
        if node in self.nodes:
            return True
        return any(node in batch.sources or any(s.node == node for s in batch.stages or ()) for batch in self._batches)

    def drain(self) -> list[BatchedRequest]:
        """Stop for good; return what was running and waiting. Tokens of iterations in flight are redone."""
        self._stopped = True
        used = [stage.node for batch in self._batches for stage in batch.stages or ()]
        for node in dict.fromkeys([*used, *self.nodes]):
            self._around.port(node).withdraw(self)
        return [work for batch in self._batches for work in batch.scheduler.drain()]

    # -- iterations --------------------------------------------------------------------------------------------------

    def next_run(self, *, alone: bool) -> _HeadRun | None:
        """See Owner: the first stage of the next iteration of a batch that is between two iterations."""
        for batch in self._batches:
            if not _is_due(batch):
                continue
            iteration = batch.scheduler.schedule()
            if iteration is None:
                continue
            batch.stages = self.stages
            if any(_is_due(other) for other in self._batches):
                self._head.want(self)
            steps = iteration.max_steps if alone and len(self.stages) == 1 and len(self._batches) == 1 else 1
            return _HeadRun(self, batch, iteration, steps)
        return None

    def hop(self, batch: _Batch, iteration: Iteration, position: int) -> None:
        """Hand an iteration to its next stage, or its tokens back to the first, after the hop's latency."""
        kernel = self._around.kernel
        kernel.at(kernel.now + self._around.hop_s, self._arrive, (batch, iteration, position))

    def _arrive(self, entry: tuple[_Batch, Iteration, int]) -> None:
        batch, iteration, position = entry
        if self._stopped or batch.stages is None:
            return
        if position < len(batch.stages):
            self._around.port(batch.stages[position].node).add_pass(self, _PassRun(self, batch, iteration, position))
        else:
            self.complete(batch, iteration, 1)

    def complete(self, batch: _Batch, iteration: Iteration, steps: int) -> None:
        """Take note that an iteration ran ``steps`` times, and look for the next one."""
        mode: Mode = "pipeline" if len(batch.stages or ()) > 1 else "local"
        batch.stages = None
        self._report(batch.scheduler, iteration, steps, mode)
        if batch.on is not self.stages:
            self._move(batch)
        self._look_for_work(at_once=True)

    def note(self, batch: _Batch, iteration: Iteration, steps: int) -> None:
        """Take note of completed iterations of a run that is being drained."""
        self._report(batch.scheduler, iteration, steps, self.mode)

    def _report(self, scheduler: BatchScheduler, iteration: Iteration, steps: int, mode: Mode) -> None:
        first, finished = scheduler.complete(iteration, steps)
        now, emit = self._around.kernel.now, self._around.emit
        for work in first:
            emit(TokensProduced(now, self.instance_id, work.request_id, 1, mode))
        for work in finished:
            emit(RequestFinished(now, self.instance_id, work.request_id, work.produced))

    def iteration_s(self, iteration: Iteration, stage: Stage) -> float:
        """Return the time of one iteration on a stage."""
        return self._around.timing(stage.node).iteration_s(iteration, self.share(stage.first_block, stage.last_block))

    def timing_of(self, batch: _Batch) -> ComputeModel:
        """Return the compute model of the first stage's node."""
        assert batch.stages is not None, "an iteration is under way"
        return self._around.timing(batch.stages[0].node)

    @property
    def now(self) -> float:
        """Seconds of the run."""
        return self._around.kernel.now

    # -- moved boundaries --------------------------------------------------------------------------------------------

    def repartition(self, stages: tuple[Stage, ...], kv: KvPolicy) -> None:
        """Serve by ``stages`` from the next iterations on. A batch goes on once the KV of its requests has followed."""
        self._around.port(self.stages[0].node).cut()
        self.stages, self._kv = stages, kv
        while len(self._batches) < len(self.nodes):
            self._batches.append(self._new_batch())
        for batch in list(self._batches):
            if batch.stages is None and not batch.blocked:
                self._move(batch)
        self._look_for_work()

    def _move(self, batch: _Batch) -> None:
        """Bring the KV of a batch between two iterations to the nodes of the present stages."""
        before, batch.on = batch.on, self.stages
        kv_bytes = batch.scheduler.kv_in_use * self._around.kv_bytes_per_token
        moved = [(src, dst, self.share(*blocks) * kv_bytes) for src, dst, blocks in _moves(before, self.stages)]
        if not kv_bytes or not moved:
            self._settle(batch)
        elif self._kv == "recompute":
            for work in batch.scheduler.drain():
                batch.scheduler.add(_again(work, cached=False))
            self._settle(batch)
        else:
            self._copy(batch, moved)

    def _copy(self, batch: _Batch, moved: Sequence[tuple[NodeId, NodeId, float]]) -> None:
        batch.blocked, batch.sources = True, frozenset(src for src, _, _ in moved)
        left = len(moved)

        def arrived() -> None:
            nonlocal left
            left -= 1
            if left == 0 and not self._stopped:
                batch.blocked, batch.sources = False, frozenset()
                self._move(batch) if batch.on is not self.stages else self._settle(batch)
                self._look_for_work()

        for src, dst, size_bytes in moved:
            self._around.copy_kv(src, dst, size_bytes, arrived)

    def _settle(self, batch: _Batch) -> None:
        """Merge a batch that the instance has no node for any more into the others."""
        if len(self._batches) > len(self.nodes):
            self._batches.remove(batch)
            with_kv = set(batch.scheduler.decoding)
            works = batch.scheduler.drain()
            self.resume([_again(work, cached=work.cached or work.request_id in with_kv) for work in works])


def _is_due(batch: _Batch) -> bool:
    return batch.stages is None and not batch.blocked and len(batch.scheduler) > 0


def _again(work: BatchedRequest, *, cached: bool) -> BatchedRequest:
    return BatchedRequest(work.request_id, work.prompt_tokens, work.output_tokens, work.produced, cached)


def _moves(before: Sequence[Stage], after: Sequence[Stage]) -> list[tuple[NodeId, NodeId, tuple[int, int]]]:
    """Ranges of blocks that change nodes: (from, to, (first block, last block))."""
    found = []
    for old in before:
        for new in after:
            first, last = max(old.first_block, new.first_block), min(old.last_block, new.last_block)
            if first <= last and old.node != new.node:
                found.append((old.node, new.node, (first, last)))
    return found


class _HeadRun:
    """The first stage of an iteration; of a replica, as many iterations of an unchanged decode batch as nothing cuts short."""

    def __init__(self, instance: SimInstance, batch: _Batch, iteration: Iteration, steps: int) -> None:
        self._instance = instance
        self._batch = batch
        self._iteration = iteration
        self._steps = steps
        self._began_s = 0.0
        self._pace = 1.0

    @property
    def _whole(self) -> bool:
        return len(self._batch.stages or ()) == 1

    def begin(self, pace: float) -> float:
        """See Run."""
        self._began_s, self._pace = self._instance.now, pace
        iteration = self._iteration
        if iteration.prefills or not self._whole:
            assert self._batch.stages is not None, "an iteration is under way"
            return pace * self._instance.iteration_s(iteration, self._batch.stages[0])
        return pace * self._decode_s(self._steps)

    def _decode_s(self, steps: int) -> float:
        timing = self._instance.timing_of(self._batch)
        return timing.decode_run_s(self._iteration.decodes, self._iteration.context_tokens, steps)

    def cut(self) -> float | None:
        """See Run."""
        if self._steps <= 1:
            return None
        steps = self._steps_by_now()
        if steps >= self._steps:
            return None
        self._steps = steps
        return self._pace * self._decode_s(steps)

    def _steps_by_now(self) -> int:
        elapsed = (self._instance.now - self._began_s) / self._pace
        timing, iteration = self._instance.timing_of(self._batch), self._iteration
        return min(timing.decode_steps_by(iteration.decodes, iteration.context_tokens, elapsed), self._steps)

    def end(self) -> None:
        """See Run."""
        if self._whole:
            self._instance.complete(self._batch, self._iteration, self._steps)
        else:
            self._instance.hop(self._batch, self._iteration, 1)

    def lose(self) -> None:
        """Keep the iterations of a drained run that are over; the one under way is lost."""
        if self._whole and not self._iteration.prefills:
            done = self._steps_by_now() - 1
            if done:
                self._instance.note(self._batch, self._iteration, done)


class _PassRun:
    """A later stage of an iteration under way."""

    def __init__(self, instance: SimInstance, batch: _Batch, iteration: Iteration, position: int) -> None:
        self._instance = instance
        self._batch = batch
        self._iteration = iteration
        self._position = position

    def begin(self, pace: float) -> float:
        """See Run."""
        assert self._batch.stages is not None, "an iteration is under way"
        return pace * self._instance.iteration_s(self._iteration, self._batch.stages[self._position])

    def cut(self) -> None:
        """See Run: one iteration cannot be cut."""

    def end(self) -> None:
        """See Run."""
        self._instance.hop(self._batch, self._iteration, self._position + 1)

    def lose(self) -> None:
        """See Run: its token is redone."""
