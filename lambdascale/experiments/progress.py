"""Progress of a run, in requests answered, on terminals only; and of many runs or seeds, with the time that remains."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from multiprocessing import parent_process
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from lambdascale.core.commands import Command, FailRequest
from lambdascale.core.events import Event, RequestFinished

_EVERY_S = 0.1
_LINE_EVERY_S = 30.0


class Progress:
    """Observer that counts answered and refused requests and redraws the bar at most ten times a second."""

    def __init__(self, total: int, title: str) -> None:
        console = Console(stderr=True)
        # A sweep's processes share its terminal, where it shows its own progress.
        self.visible = console.is_terminal and parent_process() is None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = RichProgress(*columns, console=console, auto_refresh=False, transient=True)
        self._task = self._bar.add_task(title or "run", total=total)
        self._done = 0
        self._due = 0.0

    def __enter__(self) -> Progress:
        if self.visible:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.visible:
            self._bar.stop()

    def on_event(self, event: Event) -> None:
        """Count an answered request."""
        if type(event) is RequestFinished:
            self._count()

    def on_command(self, at: float, command: Command) -> None:
        """Count a refused request."""
        if type(command) is FailRequest:
            self._count()

    def _count(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now >= self._due:
            self._due = now + _EVERY_S
            self._bar.update(self._task, completed=self._done, refresh=True)


class JobProgress:
    """Count of what is done, and the time that the rest will take at that rate: a bar on a terminal, else lines.

    ``unit``: what is counted, in the plural.
    """

    def __init__(self, total: int, unit: str) -> None:
        console = Console(stderr=True)
        self._terminal = console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[times]}"))
        self._bar = RichProgress(*columns, console=console, auto_refresh=False, transient=True)
        self._task = self._bar.add_task(unit, total=total, times="")
        self._unit, self._total, self._done = unit, total, 0
        self._begin = time.monotonic()
        self._due = self._begin + (0.0 if self._terminal else _LINE_EVERY_S)

    def __enter__(self) -> JobProgress:
        if self._terminal:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._terminal:
            self._bar.stop()

    def advance(self, count: int = 1) -> None:
        """Count more as done; show it if the last time is long enough ago."""
        self._done += count
        now = time.monotonic()
        if now < self._due:
            return
        shown = times(now - self._begin, self._done, self._total)
        if self._terminal:
            self._due = now + _EVERY_S
            self._bar.update(self._task, completed=self._done, times=shown, refresh=True)
        else:
            self._due = now + _LINE_EVERY_S
            print(f"{self._done} of {self._total} {self._unit}, {shown}", file=sys.stderr, flush=True)


def times(elapsed_s: float, done: int, total: int) -> str:
    """Return the time taken for ``done`` of ``total``, and an estimate for the rest."""
    taken, left = (timedelta(seconds=round(seconds)) for seconds in (elapsed_s, elapsed_s / done * (total - done)))
    return f"{taken} so far, about {left} left"
