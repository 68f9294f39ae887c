"""Simulated instances: the control plane's batch scheduler, with time from the compute model, on the nodes' compute ports.

An instance is a list of stages; a replica has one. It keeps one batch in flight per node (reference, section 2.4), or one per GPU
of its nodes where a model is split over several. An iteration visits its stages in order and waits for each node's port. A decode
batch of a replica that no request joins or leaves, on a node where nothing else computes, advances many iterations in one event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lambdascale.control.batching import BatchedRequest, BatchLimits, BatchScheduler, Iteration
from lambdascale.core import NodeId, Stage
from lambdascale.core.commands import KvPolicy
from lambdascale.core.events import Mode, RequestFinished, RequestPreempted, TokensProduced
from lambdascale.core.timing import ComputeModel
from lambdascale.sim.kernel import Kernel
from lambdascale.sim.port import ComputePort

_NO_ITERATION = Iteration([], 0, 0, 1)
Emit = Callable[[TokensProduced | RequestFinished | RequestPreempted], None]
# Bytes of KV from one node to another, and what to call once they have arrived.
CopyKv = Callable[[NodeId, NodeId, float, Callable[[], None]], None]


@dataclass(slots=True, kw_only=True)
class Surroundings:
    """The cluster as an instance sees it. ``timing``: the compute model of each node for the instance's model.

    ``batches``: batches in flight for each node (see BatchLimits.batches).
    """

    kernel: Kernel
    port: Callable[[NodeId], ComputePort]
    timing: Callable[[NodeId], ComputeModel]
    emit: Emit
    copy_kv: CopyKv
    limits: BatchLimits
    batches: int
    kv_tokens: int
    kv_bytes_per_token: int
    hop_s: float
    block_bytes: tuple[int, ...]


class _Layout:
    """Stages with what an iteration needs at each of them: the node's port and compute model, and the stage's share."""

    __slots__ = ("mode", "nodes", "ports", "shares", "single", "stages", "timings")

    def __init__(self, stages: tuple[Stage, ...], around: Surroundings) -> None:
        total = sum(around.block_bytes)
        self.stages = stages
        self.single = len(stages) == 1
        self.nodes = tuple(dict.fromkeys(stage.node for stage in stages))
        self.ports = [around.port(stage.node) for stage in stages]
        self.timings = [around.timing(stage.node) for stage in stages]
        self.shares = [sum(around.block_bytes[stage.first_block : stage.last_block + 1]) / total for stage in stages]
        self.mode: Mode = "local" if self.single else "pipeline"


class _Batch:
    """A batch in flight, and what occupies a port while one of its iterations is at a stage (see Run).

    ``under_way``: the layout its iteration runs on, None between iterations. ``on``: the one with its KV. ``blocked``: KV is
    moving, from ``sources``. ``iteration`` is at stage ``position``; a decode batch of a replica runs it ``steps`` times.
    ``fixed``: see Run; iterations of a pipeline are.
    """

    __slots__ = (
        "_began_s",
        "_instance",
        "_pace",
        "_timing",
        "blocked",
        "fixed",
        "iteration",
        "on",
        "position",
        "scheduler",
        "sources",
        "steps",
        "under_way",
    )

    def __init__(self, instance: SimInstance, scheduler: BatchScheduler, on: _Layout) -> None:
        self.scheduler = scheduler
        self.on = on
        self.under_way: _Layout | None = None
        self.blocked = False
        self.fixed = False
        self.sources: frozenset[NodeId] = frozenset()
        self.iteration = _NO_ITERATION
        self.position = 0
        self.steps = 1
        self._instance = instance
        self._began_s = 0.0
        self._pace = 1.0
        self._timing = on.timings[0]

    @property
    def is_due(self) -> bool:
        """True if the next iteration could begin."""
        return self.under_way is None and not self.blocked and bool(self.scheduler.waiting or self.scheduler.running)

    def begin(self, pace: float) -> float:
        """See Run."""
        layout, iteration = self.under_way, self.iteration
        assert layout is not None, "an iteration is under way"
        self._began_s = self._instance.kernel.now
        self._pace = pace
        self._timing = timing = layout.timings[self.position]
        if layout.single and not iteration.prefills:
            return pace * timing.decode_run_s(iteration.decodes, iteration.context_tokens, self.steps)
        return pace * timing.iteration_s(iteration, layout.shares[self.position])

    def last_s(self) -> float:
        """See Run."""
        layout, iteration = self.under_way, self.iteration
        assert layout is not None, "an iteration is under way"
        if self.steps == 1:
            return self._pace * self._timing.iteration_s(iteration, layout.shares[self.position])
        context = iteration.context_tokens + iteration.decodes * (self.steps - 1)
        return self._pace * self._timing.decode_run_s(iteration.decodes, context, 1)

    def cut(self) -> float | None:
        """See Run."""
        if self.steps <= 1:
            return None
        steps, run_s = self._steps_by_now()
        if steps >= self.steps:
            return None
        self.steps = steps
        return self._pace * run_s

    def _steps_by_now(self) -> tuple[int, float]:
        """Return the steps up to the end of the one under way, and the seconds that so many take alone."""
        iteration, elapsed_s = self.iteration, (self._instance.kernel.now - self._began_s) / self._pace
        return self._timing.decode_steps_by(iteration.decodes, iteration.context_tokens, elapsed_s)

    def timed(self, steps: int) -> tuple[float, float, float]:
        """Begin and end of the first ``steps`` steps of what ran, and by how much each is longer than the one before; seconds."""
        timing, iteration = self._timing, self.iteration
        growth_s = self._pace * iteration.decodes * timing.kv_token_s
        if steps == self.steps:
            return self._began_s, self._instance.kernel.now, growth_s
        run_s = timing.decode_run_s(iteration.decodes, iteration.context_tokens, steps)
        return self._began_s, self._began_s + self._pace * run_s, growth_s

    def end(self) -> None:
        """See Run."""
        if self.fixed:
            self._instance.hop(self, self._instance.kernel.now)
        else:
            self._instance.complete(self)

    def end_at(self, end_s: float) -> None:
        """See Run."""
        self._instance.hop(self, end_s)

    def lose(self) -> None:
        """Keep the iterations of a drained run that are over; the one under way is lost."""
        assert self.under_way is not None, "an iteration is under way"
        if not self.under_way.single or self.iteration.prefills:
            return
        done = min(self._steps_by_now()[0], self.steps) - 1
        if done:
            self._instance.keep(self, done)


class SimInstance:
    """Serves requests by its stages until it is drained."""

    def __init__(self, instance_id: int, stages: tuple[Stage, ...], around: Surroundings) -> None:
        self.instance_id = instance_id
        self.kernel = around.kernel
        self._around = around
        self._stopped = False
        self._after_last = 0  # index of the batch behind the one that had the last turn
        self._kv: KvPolicy = "copy"
        self._kv_tokens = around.kv_tokens
        self._layout = _Layout(stages, around)
        self._batches = [self._new_batch() for _ in range(self._wanted)]

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """Distinct nodes of the stages, in order of first appearance."""
        return self._layout.nodes

    @property
    def shares(self) -> list[tuple[NodeId, float]]:
        """Node and share of the model of each stage."""
        return [(stage.node, share) for stage, share in zip(self._layout.stages, self._layout.shares, strict=True)]

    @property
    def _wanted(self) -> int:
        """Number of batches to keep in flight."""
        return len(self._layout.nodes) * self._around.batches

    def _new_batch(self) -> _Batch:
        return _Batch(self, BatchScheduler(self._around.limits, self._kv_tokens), self._layout)

    # -- requests ----------------------------------------------------------------------------------------------------

    def take(self, works: Iterable[BatchedRequest]) -> None:
        """Take requests, some of which may have produced tokens elsewhere, each into the batch that has the fewest."""
        batches = self._batches
        for work in works:
            batch = batches[0] if len(batches) == 1 else min(batches, key=lambda batch: len(batch.scheduler))
            batch.scheduler.add(work)
            if batch.steps > 1 and batch.under_way is not None and batch.scheduler.admits:
                batch.under_way.ports[0].cut()
        self._look_for_work()

    def _look_for_work(self) -> bool:
        """Queue for a turn if a batch is due; return True if one is."""
        if self._stopped:
            return False
        for batch in self._batches:
            if batch.under_way is None and batch.is_due:
                self._layout.ports[0].want(self)
                return True
        return False

    def involves(self, node: NodeId) -> bool:
        """True if the node serves it, or an iteration under way or KV on the move still needs the node."""
        if node in self.nodes:
            return True
        return any(
            node in batch.sources or (batch.under_way is not None and node in batch.under_way.nodes) for batch in self._batches
        )

    def drain(self) -> list[BatchedRequest]:
        """Stop for good; return what was running and waiting. Tokens of iterations in flight are redone."""
        self._stopped = True
        layouts = [self._layout, *(batch.under_way for batch in self._batches if batch.under_way is not None)]
        for node in dict.fromkeys(node for layout in layouts for node in layout.nodes):
            self._around.port(node).withdraw(self)
        return [work for batch in self._batches for work in batch.scheduler.drain()]

    # -- iterations --------------------------------------------------------------------------------------------------

    def next_run(self, *, alone: bool) -> _Batch | None:
        """See Owner: the first stage of the next iteration of a batch that is between two iterations.

        Batches take turns in a circle, as on a live node: where fewer keep the busiest node occupied, the rest would starve.
        """
        batches, begin = self._batches, self._after_last
        several = len(batches) > 1
        order: Sequence[int] = (*range(begin, len(batches)), *range(min(begin, len(batches)))) if several else (0,)
        for index in order:
            batch = batches[index]
            if batch.under_way is not None or batch.blocked:
                continue
            iteration = batch.scheduler.schedule()
            if iteration is None:
                continue
            if iteration.preempted:
                self._report_preempted(iteration.preempted)
            self._after_last = index + 1
            batch.under_way = layout = self._layout
            batch.iteration = iteration
            batch.position = 0
            batch.fixed = not layout.single
            waits = several and self._look_for_work()
            batch.steps = iteration.max_steps if alone and layout.single and not waits else 1
            return batch
        return None

    def hop(self, batch: _Batch, end_s: float) -> None:
        """Hand an iteration to its next stage, or its tokens back to the first, the hop's latency after ``end_s``."""
        self.kernel.at(end_s + self._around.hop_s, self._arrive, batch)

    def _arrive(self, batch: _Batch) -> None:
        layout = batch.under_way
        if self._stopped or layout is None:
            return
        batch.position += 1
        if batch.position < len(layout.ports):
            layout.ports[batch.position].add_pass(self, batch)
        else:
            self.complete(batch)

    def complete(self, batch: _Batch) -> None:
        """Take note that a batch's iteration is over, and look for the next one."""
        first, finished = batch.scheduler.complete(batch.iteration, batch.steps)
        if first or finished:
            self._report(batch, first, finished)
        batch.under_way = None
        if batch.on is not self._layout:
            self._move(batch)
        self._layout.ports[0].resume(self)

    def keep(self, batch: _Batch, steps: int) -> None:
        """Take note of the ``steps`` iterations that a lost run has behind it."""
        self._report(batch, *batch.scheduler.complete(batch.iteration, steps))

    def _report(self, batch: _Batch, first: Sequence[BatchedRequest], finished: Sequence[BatchedRequest]) -> None:
        assert batch.under_way is not None, "the iteration was under way"
        now, emit, mode = self.kernel.now, self._around.emit, batch.under_way.mode
        for work in first:
            emit(TokensProduced(now, self.instance_id, work.request_id, 1, mode))
        for work in finished:
            emit(RequestFinished(now, self.instance_id, work.request_id, work.produced))

    def _report_preempted(self, preempted: Sequence[BatchedRequest]) -> None:
        for work in preempted:
            self._around.emit(RequestPreempted(self.kernel.now, self.instance_id, work.request_id))

    # -- moved boundaries --------------------------------------------------------------------------------------------

    def repartition(self, stages: tuple[Stage, ...], kv: KvPolicy, kv_tokens: int) -> None:
        """Serve by ``stages`` from the next iterations on. A batch goes on once the KV of its requests has followed."""
        self._layout.ports[0].cut()
        self._layout, self._kv, self._kv_tokens = _Layout(stages, self._around), kv, kv_tokens
        for batch in self._batches:
            batch.scheduler.kv_tokens = kv_tokens
        while len(self._batches) < self._wanted:
            self._batches.append(self._new_batch())
        for batch in list(self._batches):
            if batch.under_way is None and not batch.blocked:
                self._move(batch)
        self._look_for_work()

    def _move(self, batch: _Batch) -> None:
        """Bring the KV of a batch between two iterations to the nodes of the present stages."""
        before, batch.on = batch.on, self._layout
        sizes = self._around.block_bytes
        kv_bytes = batch.scheduler.kv_in_use * self._around.kv_bytes_per_token
        moved = [
            (src, dst, kv_bytes * sum(sizes[first : last + 1]) / sum(sizes))
            for src, dst, first, last in _moves(before.stages, self._layout.stages)
        ]
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
                self._move(batch) if batch.on is not self._layout else self._settle(batch)
                self._look_for_work()

        for src, dst, size_bytes in moved:
            self._around.copy_kv(src, dst, size_bytes, arrived)

    def _settle(self, batch: _Batch) -> None:
        """Merge a batch that the instance has no GPU for any more into the others."""
        if len(self._batches) > self._wanted:
            self._batches.remove(batch)
            with_kv = set(batch.scheduler.decoding)
            works = batch.scheduler.drain()
            self.take([_again(work, cached=work.cached or work.request_id in with_kv) for work in works])


def _again(work: BatchedRequest, *, cached: bool) -> BatchedRequest:
    return BatchedRequest(work.request_id, work.prompt_tokens, work.output_tokens, work.produced, cached)


def _moves(before: Sequence[Stage], after: Sequence[Stage]) -> list[tuple[NodeId, NodeId, int, int]]:
    """Ranges of blocks that change nodes: (from, to, first block, last block)."""
    found = []
    for old in before:
        for new in after:
            first, last = max(old.first_block, new.first_block), min(old.last_block, new.last_block)
            if first <= last and old.node != new.node:
                found.append((old.node, new.node, first, last))
    return found
