"""The one thread of an endpoint that waits: for completions, and for sockets that end. All connections depend on it.

So nothing that it calls can end it: an exception is printed and reported to the owner of the call, and the thread goes on.
"""

from __future__ import annotations

import os
import select
import threading
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial

_TICK_S = 1.0
Failed = Callable[[Exception], None]


def guarded(act: Callable[[], None], failed: Failed | None = None) -> bool:
    """Call ``act``. An exception is printed and given to ``failed``, if given; False then."""
    try:
        act()
    except Exception as error:
        traceback.print_exc()
        if failed is not None:
            guarded(partial(failed, error))
        return False
    return True


class Watch:
    """Calls back when a descriptor is readable, and runs jobs of other threads. ``tick``: called every second or so."""

    def __init__(self, name: str, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._poll = select.poll()
        self._callbacks: dict[int, tuple[Callable[[], None], Failed]] = {}
        self._jobs: deque[tuple[Callable[[], None], Failed | None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll.register(self._wake, select.POLLIN)
        self._ended = False
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def add(self, fd: int, callback: Callable[[], None], failed: Failed) -> None:
        """Watch a descriptor. One whose callback fails is watched no longer, and ``failed`` is told. Only from this thread."""
        self._callbacks[fd] = callback, failed
        self._poll.register(fd, select.POLLIN)

    def remove(self, fd: int) -> None:
        """Watch a descriptor no longer. Only from this thread."""
        if self._callbacks.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def call(self, job: Callable[[], None], failed: Failed | None = None) -> None:
        """Run a job in this thread, soon. ``failed`` is told if it raises."""
        self._jobs.append((job, failed))
        os.eventfd_write(self._wake, 1)

    def call_and_wait(self, job: Callable[[], None], timeout_s: float) -> None:
        """Run a job in this thread and wait for it, at most ``timeout_s``; from this thread itself, at once."""
        if threading.current_thread() is self.thread:
            job()
            return
        done = threading.Event()

        def run() -> None:
            try:
                job()
            finally:
                done.set()

        self.call(run)
        done.wait(timeout_s)

    def close(self) -> None:
        """Let the thread end."""

        def end() -> None:
            self._ended = True

        self.call(end)
        self.thread.join()
        os.close(self._wake)

    def _run(self) -> None:
        while not self._ended:
            for fd, _ in self._poll.poll(_TICK_S * 1000 if len(self._callbacks) else None):
                if fd == self._wake:
                    os.eventfd_read(self._wake)
                else:
                    self._call_back(fd)
            while self._jobs:
                guarded(*self._jobs.popleft())
            guarded(self._tick)

    def _call_back(self, fd: int) -> None:
        # Callbacks of a connection remove others: each is looked up when its turn comes.
        if fd in self._callbacks and not guarded(*self._callbacks[fd]):
            self.remove(fd)
