"""Simulated instances: the control plane's batch scheduler, with time from the compute model, on the nodes' compute ports.

An instance is a list of stages; a replica has one. It keeps one batch in flight per node (reference, section 2.4). An iteration
visits its stages in order and waits for each node's port. A decode batch of a replica that no request joins or leaves, on a node
where nothing else computes, advances many iterations in one event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lambdascale.control.batching import BatchedRequest, BatchLimits, BatchScheduler, Iteration
from lambdascale.core import NodeId, Stage
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
    """The cluster as an instance sees it. ``timing``: the compute model of each node for the instance's model."""

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


class _Layout:
    """Stages with what an iteration needs at each of them: the node's port and compute model, and the stage's share."""

    __slots__ = ("mode", "nodes", "ports", "shares", "stages", "timings")

    def __init__(self, stages: tuple[Stage, ...], around: Surroundings) -> None:
        total = sum(around.block_bytes)
        self.stages = stages
        self.nodes = tuple(dict.fromkeys(stage.node for stage in stages))
        self.ports = [around.port(stage.node) for stage in stages]
        self.timings = [around.timing(stage.node) for stage in stages]
        self.shares = [sum(around.block_bytes[stage.first_block : stage.last_block + 1]) / total for stage in stages]
        self.mode: Mode = "pipeline" if len(stages) > 1 else "local"

    def iteration_s(self, iteration: Iteration, position: int) -> float:
        """Return the time of one iteration at a stage."""
        return self.timings[position].iteration_s(iteration, self.shares[position])


class _Batch:
    """A batch in flight. ``under_way``: the layout its iteration runs on, None between iterations. ``on``: the one with its KV.

    ``blocked``: KV is moving, from ``sources``.
    """

    __slots__ = ("blocked", "on", "scheduler", "sources", "under_way")

    def __init__(self, scheduler: BatchScheduler, on: _Layout) -> None:
        self.scheduler = scheduler
        self.on = on
        self.under_way: _Layout | None = None
        self.blocked = False
        self.sources: frozenset[NodeId] = frozenset()

    @property
    def is_due(self) -> bool:
        """True if the next iteration could begin."""
        return self.under_way is None and not self.blocked and bool(self.scheduler.waiting or self.scheduler.running)


class SimInstance:
    """Serves requests by its stages until it is drained."""

    def __init__(self, instance_id: int, stages: tuple[Stage, ...], around: Surroundings) -> None:
        self.instance_id = instance_id
        self._around = around
        self._kernel = around.kernel
        self._stopped = False
        self._kv: KvPolicy = "copy"
        self._kv_tokens = around.kv_tokens
        self._layout = _Layout(stages, around)
        self._batches = [self._new_batch() for _ in self.nodes]

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """Distinct nodes of the stages, in order of first appearance."""
        return self._layout.nodes

    @property
    def shares(self) -> list[tuple[NodeId, float]]:
        """Node and share of the model of each stage."""
        return [(stage.node, share) for stage, share in zip(self._layout.stages, self._layout.shares, strict=True)]

    def _new_batch(self) -> _Batch:
        return _Batch(BatchScheduler(self._around.limits, self._kv_tokens), self._layout)

    # -- requests ----------------------------------------------------------------------------------------------------

    def take(self, works: Iterable[BatchedRequest]) -> None:
        """Take requests, some of which may have produced tokens elsewhere, each into the batch that has the fewest."""
        batches = self._batches
        for work in works:
            batch = batches[0] if len(batches) == 1 else min(batches, key=lambda batch: len(batch.scheduler))
            batch.scheduler.add(work)
            if batch.under_way is not None and batch.scheduler.admits:
                batch.under_way.ports[0].cut()
        self._look_for_work()

    def _look_for_work(self) -> None:
        if self._stopped:
            return
        for batch in self._batches:
            if batch.is_due:
                self._layout.ports[0].want(self)
                return

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

    def next_run(self, *, alone: bool) -> _HeadRun | None:
        """See Owner: the first stage of the next iteration of a batch that is between two iterations."""
        layout, batches = self._layout, self._batches
        for batch in batches:
            if batch.under_way is not None or batch.blocked:
                continue
            iteration = batch.scheduler.schedule()
            if iteration is None:
                continue
            batch.under_way = layout
            if len(batches) > 1:
                self._look_for_work()
            steps = iteration.max_steps if alone and len(layout.stages) == 1 and len(batches) == 1 else 1
            return _HeadRun(self, batch, layout, iteration, steps)
        return None

    def hop(self, batch: _Batch, iteration: Iteration, position: int) -> None:
        """Hand an iteration to its next stage, or its tokens back to the first, after the hop's latency."""
        self._kernel.at(self._kernel.now + self._around.hop_s, self._arrive, (batch, iteration, position))

    def _arrive(self, entry: tuple[_Batch, Iteration, int]) -> None:
        batch, iteration, position = entry
        layout = batch.under_way
        if self._stopped or layout is None:
            return
        if position < len(layout.stages):
            layout.ports[position].add_pass(self, _PassRun(self, batch, layout, iteration, position))
        else:
            self.complete(batch, iteration, 1)

    def complete(self, batch: _Batch, iteration: Iteration, steps: int) -> None:
        """Take note that an iteration ran ``steps`` times, and look for the next one."""
        self.note(batch, iteration, steps)
        batch.under_way = None
        if batch.on is not self._layout:
            self._move(batch)
        self._layout.ports[0].resume(self)

    def note(self, batch: _Batch, iteration: Iteration, steps: int) -> None:
        """Report first tokens and finished requests of an iteration that ran ``steps`` times."""
        first, finished = batch.scheduler.complete(iteration, steps)
        if not first and not finished:
            return
        assert batch.under_way is not None, "the iteration was under way"
        now, emit, mode = self._kernel.now, self._around.emit, batch.under_way.mode
        for work in first:
            emit(TokensProduced(now, self.instance_id, work.request_id, 1, mode))
        for work in finished:
            emit(RequestFinished(now, self.instance_id, work.request_id, work.produced))

    @property
    def now(self) -> float:
        """Seconds of the run."""
        return self._kernel.now

    # -- moved boundaries --------------------------------------------------------------------------------------------

    def repartition(self, stages: tuple[Stage, ...], kv: KvPolicy, kv_tokens: int) -> None:
        """Serve by ``stages`` from the next iterations on. A batch goes on once the KV of its requests has followed."""
        self._layout.ports[0].cut()
        self._layout, self._kv, self._kv_tokens = _Layout(stages, self._around), kv, kv_tokens
        for batch in self._batches:
            batch.scheduler.kv_tokens = kv_tokens
        while len(self._batches) < len(self.nodes):
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
        """Merge a batch that the instance has no node for any more into the others."""
        if len(self._batches) > len(self.nodes):
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


class _HeadRun:
    """The first stage of an iteration; of a replica, as many iterations of an unchanged decode batch as nothing cuts short."""

    __slots__ = ("_batch", "_began_s", "_instance", "_iteration", "_layout", "_pace", "_steps")

    def __init__(self, instance: SimInstance, batch: _Batch, layout: _Layout, iteration: Iteration, steps: int) -> None:
        self._instance = instance
        self._batch = batch
        self._layout = layout
        self._iteration = iteration
        self._steps = steps
        self._began_s = instance.now
        self._pace = 1.0

    @property
    def _is_decode_run(self) -> bool:
        return not self._iteration.prefills and len(self._layout.stages) == 1

    def begin(self, pace: float) -> float:
        """See Run."""
        self._pace = pace
        iteration, layout = self._iteration, self._layout
        if iteration.prefills or len(layout.stages) > 1:
            return pace * layout.timings[0].iteration_s(iteration, layout.shares[0])
        return pace * layout.timings[0].decode_run_s(iteration.decodes, iteration.context_tokens, self._steps)

    def _decode_s(self, steps: int) -> float:
        return self._layout.timings[0].decode_run_s(self._iteration.decodes, self._iteration.context_tokens, steps)

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
        elapsed, iteration = (self._instance.now - self._began_s) / self._pace, self._iteration
        return min(self._layout.timings[0].decode_steps_by(iteration.decodes, iteration.context_tokens, elapsed), self._steps)

    def end(self) -> None:
        """See Run."""
        if len(self._layout.stages) == 1:
            self._instance.complete(self._batch, self._iteration, self._steps)
        else:
            self._instance.hop(self._batch, self._iteration, 1)

    def lose(self) -> None:
        """Keep the iterations of a drained run that are over; the one under way is lost."""
        done = self._steps_by_now() - 1 if self._is_decode_run else 0
        if done:
            self._instance.note(self._batch, self._iteration, done)


class _PassRun:
    """A later stage of an iteration under way."""

    __slots__ = ("_batch", "_instance", "_iteration", "_layout", "_position")

    def __init__(self, instance: SimInstance, batch: _Batch, layout: _Layout, iteration: Iteration, position: int) -> None:
        self._instance = instance
        self._batch = batch
        self._layout = layout
        self._iteration = iteration
        self._position = position

    def begin(self, pace: float) -> float:
        """See Run."""
        return pace * self._layout.iteration_s(self._iteration, self._position)

    def cut(self) -> None:
        """See Run: one iteration cannot be cut."""

    def end(self) -> None:
        """See Run."""
        self._instance.hop(self._batch, self._iteration, self._position + 1)

    def lose(self) -> None:
        """See Run: its token is redone."""
