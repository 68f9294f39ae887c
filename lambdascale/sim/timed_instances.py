"""Instances that log the times of tokens: those of a run with token_times. Other runs do not use this module."""

from __future__ import annotations

from collections.abc import Callable, Collection

from lambdascale.control.batching import BatchedRequest, BatchLimits, BatchScheduler, Iteration
from lambdascale.core import Stage
from lambdascale.sim.batches import Batch, Layout, Surroundings
from lambdascale.sim.instances import SimInstance
from lambdascale.sim.token_log import BatchLog, Stay, TokenLog


class TimedInstance(SimInstance):
    """Serves as any instance does, and enters the times of its iterations and the stays of its requests in ``tokens``."""

    def __init__(
        self, instance_id: int, stages: tuple[Stage, ...], kv_tokens: int, around: Surroundings, tokens: TokenLog
    ) -> None:
        self._tokens = tokens  # first: the base class makes batches
        super().__init__(instance_id, stages, kv_tokens, around)

    def _new_batch(self) -> Batch:
        batch = _TimedBatch(self, BatchScheduler(self._around.limits, self._kv_tokens), self.layout)
        batch.scheduler = _TimedScheduler(self._around.limits, self._kv_tokens, self._tokens, batch.timed)
        return batch


class _TimedBatch(Batch):
    """Batch that knows when what runs began."""

    __slots__ = ("_began_s",)

    def __init__(self, instance: SimInstance, scheduler: BatchScheduler, on: Layout) -> None:
        super().__init__(instance, scheduler, on)
        self._began_s = 0.0

    def begin(self, pace: float) -> float:
        """See Run."""
        self._began_s = self._instance.kernel.now
        return super().begin(pace)

    def timed(self, steps: int) -> tuple[float, float, float]:
        """Begin and end of the first ``steps`` steps of what ran, and by how much each is longer than the one before; seconds."""
        timing, iteration = self.timing, self.iteration
        growth_s = self._pace * iteration.decodes * timing.kv_token_s
        if steps == self.steps:
            return self._began_s, self._instance.kernel.now, growth_s
        run_s = timing.decode_run_s(iteration.decodes, iteration.context_tokens, steps)
        return self._began_s, self._began_s + self._pace * run_s, growth_s


class _TimedScheduler(BatchScheduler):
    """Scheduler of a batch whose iterations are logged. ``timed``: begin, end and growth of those just run (see BatchLog)."""

    __slots__ = ("_log", "_timed", "_tokens")

    def __init__(
        self, limits: BatchLimits, kv_tokens: int, tokens: TokenLog, timed: Callable[[int], tuple[float, float, float]]
    ) -> None:
        super().__init__(limits, kv_tokens)
        self._tokens = tokens
        self._timed = timed
        self._log: BatchLog = []

    def complete(
        self, iteration: Iteration, steps: int = 1, stopped: Collection[int] = ()
    ) -> tuple[list[BatchedRequest], list[BatchedRequest]]:
        """See BatchScheduler."""
        first, finished = super().complete(iteration, steps, stopped)
        begin_s, end_s, growth_s = self._timed(steps)
        self._log.extend((self._step, end_s, steps, begin_s, growth_s))
        if finished:
            prefilled = {work.request_id for work, _ in iteration.prefills}
            for work in finished:
                alone_s = end_s if work.request_id in prefilled else None
                self._tokens.finish(work.request_id, Stay(self._log, work.joined, self._step, work.produced, alone_s))
        return first, finished

    def _make_room(self) -> list[BatchedRequest]:
        preempted = super()._make_room()
        for work in preempted:  # also those being prefilled: a stay without new tokens adds none
            self._tokens.stay(work.request_id, Stay(self._log, work.joined, self._step, work.produced))
        return preempted

    def drain(self) -> list[BatchedRequest]:
        """See BatchScheduler; the stays of requests that decode end here."""
        for work in self.decoding.values():
            produced = work.produced + self._step - work.joined
            self._tokens.stay(work.request_id, Stay(self._log, work.joined, self._step, produced))
        return super().drain()
