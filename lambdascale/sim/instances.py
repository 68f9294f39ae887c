"""Simulated instances: the control plane's batch scheduler, with time from the compute model, on the nodes' compute ports.

An instance is a list of stages; a replica has one. It keeps one batch in flight per node (reference, section 2.4), or one per GPU
of its nodes where a model is split over several. An iteration visits its stages in order and waits for each node's port. A decode
batch of a replica that no request joins or leaves, on a node where nothing else computes, advances many iterations in one event.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lambdascale.control.batching import BatchedRequest, BatchScheduler
from lambdascale.core import NodeId, Stage
from lambdascale.core.commands import KvPolicy
from lambdascale.core.events import RequestFinished, RequestPreempted, TokensProduced
from lambdascale.sim.batches import NOWHERE, Batch, Layout, Stages, Surroundings


class SimInstance:
    """Serves requests by its stages until it is drained."""

    def __init__(self, instance_id: int, stages: tuple[Stage, ...], kv_tokens: int, around: Surroundings) -> None:
        self.instance_id = instance_id
        self.kernel = around.kernel
        self.hop_s = around.hop_s
        self._around = around
        self.stopped = False
        self._after_last = 0  # index of the batch behind the one that had the last turn
        self._kv: KvPolicy = "copy"
        self._kv_tokens = kv_tokens
        self.layout = around.layout(stages)
        self._batches = [self._new_batch() for _ in range(self._wanted)]

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """Distinct nodes of the stages, in order of first appearance."""
        return self.layout.nodes

    @property
    def shares(self) -> list[tuple[NodeId, float]]:
        """Node and share of the model of each stage."""
        return [(stage.node, share) for stage, share in zip(self.layout.stages, self.layout.shares, strict=True)]

    @property
    def _wanted(self) -> int:
        """Number of batches to keep in flight."""
        return len(self.layout.nodes) * self._around.batches

    def _new_batch(self) -> Batch:
        return Batch(self, BatchScheduler(self._around.limits, self._kv_tokens), self.layout)

    # -- requests ----------------------------------------------------------------------------------------------------

    def take(self, works: Iterable[BatchedRequest]) -> None:
        """Take requests, some of which may have produced tokens elsewhere, each into the batch that has the fewest."""
        batches = self._batches
        for work in works:
            batch = batches[0] if len(batches) == 1 else min(batches, key=lambda batch: len(batch.scheduler))
            batch.scheduler.add(work)
            if batch.steps > 1 and batch.under_way is not None and batch.scheduler.admits:
                batch.under_way.port.cut()
        self._look_for_work()

    def _look_for_work(self) -> bool:
        """Queue for a turn if a batch is due; return True if one is."""
        if self.stopped:
            return False
        for batch in self._batches:
            if batch.under_way is None and batch.is_due:
                self.layout.port.want(self)
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
        self.stopped = True
        layouts = [self.layout, *(batch.under_way for batch in self._batches if batch.under_way is not None)]
        for port in dict.fromkeys([port for layout in layouts for port in layout.ports]):
            port.withdraw(self)
        works = [work for batch in self._batches for work in batch.scheduler.drain()]
        # Batches and instance refer to each other: apart, they are freed at once, and not by the garbage collector.
        for batch in self._batches:
            batch.stages = None
        self._batches = []
        return works

    # -- iterations --------------------------------------------------------------------------------------------------

    def next_run(self, alone: bool) -> Batch | Stages | None:
        """See Owner: the first stage of the next iteration of a batch that is between two iterations."""
        batches = self._batches
        several = len(batches) != 1
        batch = self._next_in_turn() if several else batches[0]
        if batch is None or batch.under_way is not None or batch.blocked:
            return None
        iteration = batch.scheduler.schedule()
        if iteration is None:
            return None
        if iteration.preempted:
            self._report_preempted(iteration.preempted)
        batch.iteration = iteration
        batch.under_way = layout = self.layout
        waits = several and self._look_for_work()
        if layout.single:
            batch.timing = layout.timing
            batch.steps = iteration.max_steps if alone and not waits else 1
            return batch
        batch.steps, run = 1, batch.stages
        if run is None:
            run = batch.stages = Stages(self, batch)
        run.position = 0
        return run

    def _next_in_turn(self) -> Batch | None:
        """Return the batch that has the next turn; None if none is due.

        Batches take turns in a circle, as on a live node: where fewer keep the busiest node occupied, the rest would starve.
        """
        batches, count = self._batches, len(self._batches)
        begin = self._after_last if self._after_last < count else 0
        for index in range(begin - count, begin):  # below 0: counted from the last
            batch = batches[index]
            if batch.is_due:
                self._after_last = index % count + 1
                return batch
        return None

    def report(self, batch: Batch, first: Sequence[BatchedRequest], finished: Sequence[BatchedRequest]) -> None:
        """Report first tokens and ended requests of the iteration under way."""
        assert batch.under_way is not None, "the iteration was under way"
        now, emit, mode, number = self.kernel.now, self._around.emit, batch.under_way.mode, self.instance_id
        for work in first:
            emit(TokensProduced(now, number, work.request_id, 1, mode))
        for work in finished:
            emit(RequestFinished(now, number, work.request_id, work.produced))

    def _report_preempted(self, preempted: Sequence[BatchedRequest]) -> None:
        for work in preempted:
            self._around.emit(RequestPreempted(self.kernel.now, self.instance_id, work.request_id))

    # -- moved boundaries --------------------------------------------------------------------------------------------

    def repartition(self, stages: tuple[Stage, ...], kv: KvPolicy, kv_tokens: int) -> None:
        """Serve by ``stages`` from the next iterations on. A batch goes on once the KV of its requests has followed."""
        self.layout.port.cut()
        self.layout, self._kv, self._kv_tokens = Layout(stages, self._around), kv, kv_tokens
        for batch in self._batches:
            batch.scheduler.kv_tokens = kv_tokens
        if len(self._batches) == 1:
            self._after_last = 1
        while len(self._batches) < self._wanted:
            self._batches.append(self._new_batch())
        for batch in list(self._batches):
            if batch.under_way is None and not batch.blocked:
                self.move(batch)
        self._look_for_work()

    def move(self, batch: Batch) -> None:
        """Bring the KV of a batch between two iterations to the nodes of the present stages."""
        before, batch.on = batch.on, self.layout
        sizes = self._around.block_bytes
        kv_bytes = batch.scheduler.kv_in_use * self._around.kv_bytes_per_token
        moved = [
            (src, dst, kv_bytes * sum(sizes[first : last + 1]) / sum(sizes))
            for src, dst, first, last in _moves(before.stages, self.layout.stages)
        ]
        if not kv_bytes or not moved:
            self._settle(batch)
        elif self._kv == "recompute":
            for work in batch.scheduler.drain():
                batch.scheduler.add(_again(work, cached=False))
            self._settle(batch)
        else:
            self._copy(batch, moved)

    def _copy(self, batch: Batch, moved: Sequence[tuple[NodeId, NodeId, float]]) -> None:
        batch.blocked, batch.sources = True, frozenset(src for src, _, _ in moved)
        left = len(moved)

        def arrived() -> None:
            nonlocal left
            left -= 1
            if left == 0 and not self.stopped:
                batch.blocked, batch.sources = False, NOWHERE
                self.move(batch) if batch.on is not self.layout else self._settle(batch)
                self._look_for_work()

        for src, dst, size_bytes in moved:
            self._around.copy_kv(src, dst, size_bytes, arrived)

    def _settle(self, batch: Batch) -> None:
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
