"""The two threads of a node's block movement: one for decisions, which never blocks, and one for slow work on the store."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from threading import Timer

from lambdascale.core import NodeId
from lambdascale.core.events import BlockArrived, CommandFailed

Job = Callable[[], object]


def start_timer(delay_s: float, job: Job) -> None:
    """Call ``job`` after a while, from a thread of its own."""
    timer = Timer(delay_s, job)
    timer.daemon = True
    timer.start()


@dataclass(frozen=True)
class About:
    """The command that a job belongs to, and the transfer or the model that its failure concerns (-1 and "": none)."""

    command: str
    transfer_id: int = -1
    model: str = ""


class Failures:
    """Reports failures to the controller: as CommandFailed of a transfer or a model, else by ``fault(reason)``.

    A fault says that the node as a whole cannot be relied on any more: the controller counts the node as lost. The controller
    acts on a transfer's failure whatever it is, on a model's only if it is foreseen (no room, say).
    """

    def __init__(self, node: NodeId, send: Callable[[BlockArrived | CommandFailed], None], fault: Callable[[str], None]) -> None:
        self._node, self._send, self._fault = node, send, fault

    def failed(self, about: About, error: Exception | str) -> None:
        """Report that a command could not be carried out. Errors that are not the user's are printed with their traceback."""
        reason = str(error)
        unforeseen = isinstance(error, Exception) and not isinstance(error, ValueError)
        if isinstance(error, Exception) and unforeseen:
            traceback.print_exception(error)
            reason = f"node {self._node}: {type(error).__name__}: {error}"
        if about.transfer_id < 0 and (unforeseen or not about.model):
            self._fault(f"{about.command}: {reason}")
        else:
            self._send(CommandFailed(0.0, about.command, reason, transfer_id=about.transfer_id, model=about.model))


class Jobs:
    """Runs jobs in order, on ``thread`` (state and decisions) or on ``worker`` (hashing, copies between memories).

    Both are executors with one thread, or a test's that it steps itself, as is ``timer``. Nothing on ``thread`` may wait: turns,
    sends and fences of all transfers go through it.
    """

    def __init__(
        self,
        thread: Executor,
        worker: Executor,
        failures: Failures,
        timer: Callable[[float, Job], None] = start_timer,
    ) -> None:
        self._thread, self._worker, self._failures, self._timer = thread, worker, failures, timer

    def do(self, about: About, job: Job) -> None:
        """Run a job on the thread. Its exception is reported as a failure of what it is about."""
        self._submit(self._thread, lambda: self._guarded(about, job))

    def work(self, about: About, job: Job, then: Callable[[Exception | None], None]) -> None:
        """Run a slow job on the worker, after all that were given before, then ``then(its exception)`` on the thread."""

        def run() -> None:
            error: Exception | None = None
            try:
                job()
            except Exception as failure:
                error = failure
            self.do(about, lambda: then(error))

        self._submit(self._worker, run)

    def later(self, delay_s: float, about: About, job: Job) -> None:
        """Run a job on the thread after a while."""
        self._timer(delay_s, lambda: self.do(about, job))

    def close(self) -> None:
        """Drop jobs that have not begun and wait for those that have; jobs given from now on are dropped."""
        for executor in (self._thread, self._worker):
            executor.shutdown(wait=True, cancel_futures=True)

    @staticmethod
    def _submit(executor: Executor, job: Job) -> None:
        try:
            executor.submit(job)
        except RuntimeError:
            return  # the executor is shut down: nobody waits for this any more

    def _guarded(self, about: About, job: Job) -> None:
        try:
            job()
        except Exception as error:
            self._failures.failed(about, error)
