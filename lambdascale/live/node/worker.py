"""A thread that alternates between jobs, which others post, and turns of its own work; in spare time it prepares."""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

NO_INSTANCE = -1
# Between two pieces of work for spare time other threads have the interpreter.
_PAUSE_S = 0.01


class Worker:
    """``may_run`` tells if a turn can be taken, ``run_turn`` takes one; ``failed`` hears of what jobs and turns raise.

    ``spare(urgent)`` does a piece of work that can wait, while nothing else is to do, and gives up once ``urgent()``; it returns
    False if none is left until something has happened. ``start()`` runs the thread. Without it, ``step()`` does the thread's work
    piece by piece, for tests.
    """

    def __init__(
        self,
        name: str,
        may_run: Callable[[], bool],
        run_turn: Callable[[], None],
        failed: Callable[[Exception, int], None],
        spare: Callable[[Callable[[], bool]], bool] = lambda urgent: False,
    ) -> None:
        self._may_run = may_run
        self._run_turn = run_turn
        self._failed = failed
        self._spare = spare
        self._more_to_spare = True  # the thread's own
        # _posted and _stopping are only touched with _wake's lock held; its condition is that either has changed.
        self._posted: deque[tuple[Callable[[], None], int, Future[None]]] = deque()
        self._stopping = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Run the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after the turn that runs now and the jobs posted so far."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def post(self, job: Callable[[], None], instance: int = NO_INSTANCE) -> Future[None]:
        """Run a job between two turns. If it raises, ``failed`` hears of it with ``instance``, and the future raises the same."""
        done = Future[None]()
        with self._wake:
            self._posted.append((job, instance, done))
            self._wake.notify()
        return done

    def step(self) -> bool:
        """Run the jobs posted so far, then one turn; False if nothing was to do."""
        with self._wake:
            posted, self._posted = self._posted, deque()
        for job, instance, done in posted:
            error = self.guarded(job, instance)
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)
        ready = self._may_run()
        if ready:
            self._run_turn()
        return ready or bool(posted)

    def guarded(self, job: Callable[[], None], instance: int) -> Exception | None:
        """Run a job now; return what it raises, after ``failed`` has heard of it."""
        try:
            job()
        except Exception as error:
            traceback.print_exc()
            self._failed(error, instance)
            return error
        return None

    def _run(self) -> None:
        while self._await():
            if self._due():
                self.step()
                self._more_to_spare = True
            else:
                self._more_to_spare = self._prepare()

    def _await(self) -> bool:
        """Wait until something is due, or for a pause if work for spare time may be left. Return False at the end."""
        with self._wake:
            if not self._due():
                self._wake.wait(_PAUSE_S if self._more_to_spare else None)
            return not self._stopping or bool(self._posted)  # a caller may wait for what was posted

    def _due(self) -> bool:
        return bool(self._posted) or self._stopping or self._may_run()

    def _prepare(self) -> bool:
        try:
            return self._spare(self._due)
        except Exception as error:
            traceback.print_exc()
            self._failed(error, NO_INSTANCE)
            return False
