"""Instances that log the times of tokens: those of a run with token_times. Other runs do not use this module."""

from __future__ import annotations

from collections.abc import Collection

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
        batch.scheduler = _TimedScheduler(self._around.limits, self._kv_tokens, self._tokens, batch)
        return batch


class _TimedBatch(Batch):
    """Batch that knows when what runs began."""

    __slots__ = ("began_s", "kernel")

    def __init__(self, instance: SimInstance, scheduler: BatchScheduler, on: Layout) -> None:
        super().__init__(instance, scheduler, on)
        self.kernel = instance.kernel
        self.began_s = 0.0

    def begin(self, pace: float) -> float:
        """See Run."""
        self.began_s = self.kernel.now
        return Batch.begin(self, pace)

    def ended_s(self, steps: int) -> float:
        """Return the time at which the first ``steps`` steps of what runs are over."""
        iteration = self.iteration
        return self.began_s + self._pace * self.timing.decode_run_s(iteration.decodes, iteration.context_tokens, steps)


class _TimedScheduler(BatchScheduler):
    """Scheduler of ``batch``, whose iterations are logged."""

    __slots__ = ("_batch", "_kernel", "_log", "_number", "_tokens")

    def __init__(self, limits: BatchLimits, kv_tokens: int, tokens: TokenLog, batch: _TimedBatch) -> None:
        super().__init__(limits, kv_tokens)
        self._tokens = tokens
        self._batch = batch
        self._kernel = batch.kernel
        self._log: BatchLog = []
        self._number = tokens.open(self._log)

    def complete(
        self, iteration: Iteration, steps: int = 1, stopped: Collection[int] = ()
    ) -> tuple[list[BatchedRequest], list[BatchedRequest]]:
        """See BatchScheduler."""
        ended = _, finished = BatchScheduler.complete(self, iteration, steps, stopped)
        batch, step = self._batch, self._step
        end_s = self._kernel.now if steps == batch.steps else batch.ended_s(steps)
        growth_s = batch._pace * iteration.decodes * batch.timing.kv_token_s if steps > 1 else 0.0
        self._log.extend((step, end_s, batch.began_s, growth_s))
        if finished:
            tokens, number = self._tokens, self._number
            for work in finished:
                tokens.ended += (work.request_id, number, work.joined, step, work.produced)
            if iteration.prefills:
                prefilled = {work.request_id for work, _ in iteration.prefills}
                tokens.alone_s.update({work.request_id: end_s for work in finished if work.request_id in prefilled})
        return ended

    def _make_room(self) -> list[BatchedRequest]:
        preempted = super()._make_room()
        for work in preempted:  # also those being prefilled: a stay without new tokens adds none
            self._tokens.stay(work.request_id, Stay(self._number, work.joined, self._step, work.produced))
        return preempted

    def drain(self) -> list[BatchedRequest]:
        """See BatchScheduler; the stays of requests that decode end here."""
        for work in self.decoding.values():
            produced = work.produced + self._step - work.joined
            self._tokens.stay(work.request_id, Stay(self._number, work.joined, self._step, produced))
        return super().drain()
