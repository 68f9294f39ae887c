"""The one thread of an endpoint that waits: for completions, and for sockets that end. It sleeps unless there is something."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable

_TICK_S = 1.0


class Watch:
    """Calls back when a descriptor is readable, and runs what other threads give it. ``tick``: called every second or so."""

    def __init__(self, name: str, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._poll = select.poll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._jobs: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll.register(self._wake, select.POLLIN)
        self._ended = False
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def add(self, fd: int, callback: Callable[[], None]) -> None:
        """Watch a descriptor. Only from this thread."""
        self._callbacks[fd] = callback
        self._poll.register(fd, select.POLLIN)

    def remove(self, fd: int) -> None:
        """Watch it no longer. Only from this thread."""
        if self._callbacks.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def call(self, job: Callable[[], None]) -> None:
        """Run something in this thread, soon."""
        self._jobs.append(job)
        os.eventfd_write(self._wake, 1)

    def call_and_wait(self, job: Callable[[], None], timeout_s: float) -> None:
        """Run something in this thread and wait for it; from this thread itself, at once."""
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
            # Callbacks of a connection remove others: look each up when its turn comes.
            for fd, _ in self._poll.poll(_TICK_S * 1000 if len(self._callbacks) else None):
                if fd == self._wake:
                    os.eventfd_read(self._wake)
                elif fd in self._callbacks:
                    self._callbacks[fd]()
            while self._jobs:
                self._jobs.popleft()()
            self._tick()
