"""Instances that log the times of tokens: those of a run with token_times. Others have no part in it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from lambdascale.control.batching import BatchedRequest, BatchLimits, BatchScheduler, Iteration
from lambdascale.core import Stage
from lambdascale.sim.instances import SimInstance, Surroundings
from lambdascale.sim.token_log import BatchLog, Stay, TokenLog

if TYPE_CHECKING:
    from lambdascale.sim.instances import _Batch


class TimedInstance(SimInstance):
    """Serves as any instance does, and enters the times of its iterations and the stays of its requests in ``tokens``."""

    def __init__(self, instance_id: int, stages: tuple[Stage, ...], around: Surroundings, tokens: TokenLog) -> None:
        self._tokens = tokens  # first: the base class makes batches
        super().__init__(instance_id, stages, around)

    def _new_batch(self) -> _Batch:
        batch = super()._new_batch()
        batch.scheduler = _TimedScheduler(self._around.limits, self._kv_tokens, self._tokens, batch.timed)
        return batch


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
