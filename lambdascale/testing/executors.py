"""An executor whose jobs run when a test says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Steps(Executor):
    """Keeps jobs in order until ``step`` or ``run`` carries them out, in the calling thread."""

    def __init__(self) -> None:
        self._jobs: deque[Callable[[], None]] = deque()
        self._closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a job. RuntimeError after ``shutdown``, as of the executors of the standard library."""
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future = Future[T]()

        def job() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)

        self._jobs.append(job)
        return future

    def __len__(self) -> int:
        return len(self._jobs)

    def step(self) -> bool:
        """Carry out the oldest job; False if none waits."""
        if not self._jobs:
            return False
        self._jobs.popleft()()
        return True

    def run(self) -> None:
        """Carry out jobs until none waits."""
        while self.step():
            pass

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Refuse jobs from now on."""
        self._closed = True
        if cancel_futures:
            self._jobs.clear()
